"""From a record of any accepted shape to a pair, or to the reason why it is none."""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

Message = dict[str, Any]
"""One turn of a conversation: `{"role": ..., "content": ...}`."""

ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
}
"""Known roles, in the words of TRL and of sharegpt, and what chat templates call them."""


PROMPTS_ELSEWHERE = ("question", "query", "problem", "context", "user", "input", "text")
"""What other sets call the prompt. Where a record has one of these and no prompt, what its
responses happen to start with is not taken for it."""


class Pair(NamedTuple):
    """A pair whose fields were checked: all are text, or all are messages.

    Of more than two responses, `chosen` is the best and `rejected` the worst.
    """

    prompt: Any  # str | list[Message]
    chosen: Any
    rejected: Any
    between: tuple[Any, ...] = ()  # the other responses, best first
    scores: tuple[float, ...] | None = None  # of all responses, best first
    tools: Any = None  # what the chat template is told of tools

    @property
    def responses(self) -> tuple[Any, ...]:
        """All responses, best first."""
        return (self.chosen, *self.between, self.rejected)


class BadRecord(Exception):
    """Why a record cannot be used, in the same words for the same reason: they are counted."""


def checked_pair(row: Any) -> Pair:
    """The fields of a record, with the prompt made explicit; raises BadRecord with the reason."""
    if not isinstance(row, dict):
        raise BadRecord("not a record")
    row, ranking = _in_our_words(row)
    prompt = _checked("prompt", row.get("prompt"))
    responses = {name: _checked(name, row.get(name)) for name in ranking.names}
    for name, response in responses.items():
        _check_response(name, response)
    if len({type(response) for response in responses.values()}) > 1:
        raise BadRecord(f"{' and '.join(ranking.names[:2])} are of different kinds")
    ranked: list[Any] = list(responses.values())
    if isinstance(ranked[0], list):
        prompt, *ranked = _conversation(prompt, ranked)
    elif isinstance(prompt, list):
        raise BadRecord("prompt is a list of messages but the responses are text")
    elif prompt is None:
        if "prompt" in row:  # other rows have one: this one's must not be guessed
            raise BadRecord("prompt is missing")
        if any(isinstance(row.get(name), str) for name in PROMPTS_ELSEWHERE):
            raise BadRecord("prompt is missing, a field of another name may hold it (see columns)")
        prompt, *ranked = _split_common_text(ranked)
    if ranked[0] == ranked[-1]:
        raise BadRecord("chosen and rejected are identical")
    tools = _tools(row.get("tools")) if isinstance(prompt, list) else None
    return Pair(prompt, ranked[0], ranked[-1], tuple(ranked[1:-1]), ranking.scores, tools)


def content_id(value: Any) -> str:
    """A hash of the text: the same whatever file, row or process it stands in."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def pair_id(pair: Pair) -> str:
    """The stable name of a pair: a hash of its prompt and of its responses in their order."""
    told = [] if pair.tools is None else [{"tools": pair.tools}]
    return content_id([pair.prompt, pair.chosen, pair.rejected, *pair.between, *told])


def shared_start(*sequences: Sequence[Any]) -> int:
    """How many items these sequences have in common at their start."""
    shortest = min(sequences, key=len)
    if all(sequence[: len(shortest)] == shortest for sequence in sequences):
        return len(shortest)
    for position, items in enumerate(zip(*sequences, strict=False)):
        if any(item != items[0] for item in items):
            return position
    raise AssertionError("one of them differs from the shortest")


# The shapes of other libraries, put into ours: prompt, chosen, rejected; or prompt, responses


class _Ranking(NamedTuple):
    """The fields that hold the responses, best first, and their scores."""

    names: Sequence[str] = ("chosen", "rejected")
    scores: tuple[float, ...] | None = None


def _in_our_words(row: dict[str, Any]) -> tuple[dict[str, Any], _Ranking]:
    """The same record under our field names, and which of its fields are the responses."""
    for shape, unless, rewritten in _SHAPES:
        if all(row.get(name) is not None for name in shape) and row.get(unless) is None:
            row = {**row, **rewritten(row)}
    if row.get("responses") is not None and row.get("chosen") is None:
        return _ranked(row)
    if row.get("chosen") is None and row.get("rejected") is None:
        if "label" in row:
            raise BadRecord("one labelled response, not a pair")
        if row.get("messages") is not None:
            raise BadRecord("one conversation, not a pair")
    return row, _Ranking()


def _ranked(row: dict[str, Any]) -> tuple[dict[str, Any], _Ranking]:
    responses, scores, ranks = row["responses"], row.get("scores"), row.get("ranks")
    if not isinstance(responses, list) or len(responses) < 2:
        raise BadRecord("responses is not a list of two or more")
    if scores is None and ranks is not None:
        scores = [-rank for rank in _numbers("ranks", ranks, len(responses))]
    ordered = None
    if scores is not None:
        numbers = _numbers("scores", scores, len(responses))
        if max(numbers) == min(numbers):
            raise BadRecord("all responses are rated alike")
        order = sorted(range(len(numbers)), key=lambda i: -numbers[i])  # stable: ties as given
        responses = [responses[i] for i in order]
        ordered = tuple(float(numbers[i]) for i in order)
    names = ["chosen", *(f"response {i}" for i in range(2, len(responses))), "rejected"]
    return {**row, **dict(zip(names, responses, strict=True))}, _Ranking(names, ordered)


def _numbers(name: str, values: Any, count: int) -> list[float]:
    if not isinstance(values, list) or len(values) != count:
        raise BadRecord(f"{name} does not have one number per response")
    for value in values:
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not math.isfinite(value)
        ):
            raise BadRecord(f"{name} does not have one number per response")
    return values


def _sharegpt(row: dict[str, Any]) -> dict[str, Any]:
    """LLaMA-Factory's and Light-R1's: the turns so far, and one message for each response."""
    prompt, system = row["conversations"], row.get("system")
    if isinstance(prompt, list) and prompt:
        if _role(prompt[-1]) == "assistant":
            raise BadRecord("conversations ends with an assistant message")
        if isinstance(system, str) and system and _role(prompt[0]) != "system":
            prompt = [{"role": "system", "content": system}, *prompt]
    return {"prompt": prompt} | {
        name: _as_message(row.get(name)) for name in ("chosen", "rejected")
    }


def _role(message: Any) -> str | None:
    """What a message's role is called here, or None if it has none that is known."""
    role = message.get("from", message.get("role")) if isinstance(message, dict) else None
    return ROLES.get(role) if isinstance(role, str) else None


def _as_message(response: Any) -> Any:
    is_text = isinstance(response, str)
    return [{"role": "assistant", "content": response}] if is_text else response


def _alpaca(row: dict[str, Any]) -> dict[str, Any]:
    """LLaMA-Factory's other format: an instruction, and an input, system and history or not."""
    fields: dict[str, Any] = {}
    match row.get("output"):
        case [chosen, rejected] if row.get("chosen") is None:
            fields = {"chosen": chosen, "rejected": rejected}
    if row.get("prompt") is not None:
        return fields
    instruction, system, history = row["instruction"], row.get("system"), row.get("history")
    if isinstance(instruction, str) and isinstance(row.get("input"), str) and row["input"]:
        instruction = f"{instruction}\n{row['input']}"
    if not system and not history:
        return fields | {"prompt": instruction}
    # what was said before makes it a conversation
    turns = [{"role": "system", "content": system}] if system else []
    for said in history or []:
        if not isinstance(said, list) or len(said) != 2:
            raise BadRecord("history is not a list of questions with their answers")
        turns += [
            {"role": role, "content": text}
            for role, text in zip(("user", "assistant"), said, strict=True)
        ]
    turns.append({"role": "user", "content": instruction})
    both = {name: fields.get(name, row.get(name)) for name in ("chosen", "rejected")}
    return {"prompt": turns} | {name: _as_message(text) for name, text in both.items()}


def _completions(row: dict[str, Any]) -> dict[str, Any]:
    """UltraFeedback's: a list of completions, each with its response and its score."""
    completions = row["completions"]
    if not isinstance(completions, list) or not all(isinstance(c, dict) for c in completions):
        raise BadRecord("completions is not a list of records")
    return {
        "responses": [completion.get("response") for completion in completions],
        "scores": [completion.get("overall_score") for completion in completions],
    }


def _whole_conversations(row: dict[str, Any]) -> dict[str, Any]:
    return {"chosen": row["chosen_messages"], "rejected": row["rejected_messages"]}


_SHAPES: list[tuple[tuple[str, ...], str, Callable[[dict[str, Any]], dict[str, Any]]]] = [
    (("conversations",), "prompt", _sharegpt),
    (("chosen_messages", "rejected_messages"), "chosen", _whole_conversations),
    (("instruction",), "messages", _alpaca),
    (("completions",), "chosen", _completions),
]
"""Fields by which a foreign shape is known, the field without which it is meant, and what it is in
our words."""

TEXT_FIELDS = frozenset(
    ["prompt", "chosen", "rejected", "responses", *(n for shape, *_ in _SHAPES for n in shape)]
)
"""Fields whose text becomes tokens; all others are annotations."""

TOKEN_FIELDS = ("prompt_ids", "chosen_ids", "rejected_ids")
"""Fields of records that a trainer has tokenised."""

FIELDS = TEXT_FIELDS | {"input", "output", "system", "history", "tools", "scores", "ranks"}
"""All fields that have a meaning here."""


# The fields, checked


def _checked(name: str, value: Any) -> Any:
    """Text or messages, or None."""
    if isinstance(value, dict) and name != "prompt":
        value = [value]  # a response of one message may stand without a list
    if isinstance(value, list):
        if not value:
            raise BadRecord(f"{name} is empty")
        return [_message(name, message) for message in value]
    if value is not None:
        _check_text(name, value, f"{name} is not text")
        if value.startswith(("[{'", '[{"')) and any(word in value[:12] for word in _MESSAGE_KEYS):
            raise BadRecord(f"{name} is a list of messages that was saved as text")
    return value


_MESSAGE_KEYS = ("role", "content", "from", "value")


def _message(name: str, message: Any) -> Message:
    """A message in the words of chat templates; what is absent is left out of it."""
    if not isinstance(message, dict):
        raise BadRecord(f"{name} has a message without a role")
    message = _without_nulls(message)
    role = message.pop("from", None) if "role" not in message else message.pop("role")
    if not isinstance(role, str):
        raise BadRecord(f"{name} has a message without a role")
    if role not in ROLES:
        raise BadRecord(f"{name} has a message of an unknown role")
    content = message.pop("value", None) if "content" not in message else message.pop("content")
    if isinstance(content, list):
        content = _joined_parts(name, content)
    if content is None and message.get("tool_calls"):
        return {"role": ROLES[role], **message}
    _check_text(name, content, f"{name} has a message without text")
    return {"role": ROLES[role], "content": content, **message}


def _without_nulls(value: Any) -> Any:
    """The same without what is absent: tables give every record the fields of all."""
    if isinstance(value, dict):
        return {key: _without_nulls(x) for key, x in value.items() if x is not None}
    return [_without_nulls(x) for x in value] if isinstance(value, list) else value


def _tools(tools: Any) -> Any:
    """A list of tools, which some sets keep as JSON text; None where there are none."""
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError:
            raise BadRecord("tools is text that is not JSON") from None
    return _without_nulls(tools) or None


def _joined_parts(name: str, parts: list[Any]) -> str:
    """The text of a message whose content is a list of typed parts."""
    texts = []
    for part in parts:
        text = part.get("text", part.get("value")) if isinstance(part, dict) else None
        if not isinstance(text, str) or part.get("type", "text") != "text":
            raise BadRecord(f"{name} has a message with content that is not text")
        texts.append(text)
    return "".join(texts)


def _check_text(name: str, value: Any, otherwise: str) -> None:
    if not isinstance(value, str):
        raise BadRecord(otherwise)
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadRecord(f"{name} is not valid Unicode") from None


def _check_response(name: str, response: Any) -> None:
    if response is None:
        raise BadRecord(f"{name} is missing")
    if isinstance(response, list):
        if response[-1]["role"] != "assistant":
            raise BadRecord(f"{name} does not end with an assistant message")
        if response[-1].get("tool_calls"):
            return
        response = response[-1]["content"]
    if not response.strip():
        raise BadRecord(f"{name} is empty")


# The prompt, made explicit


def _conversation(prompt: Any, responses: list[list[Message]]) -> list[list[Message]]:
    """Prompt and responses of a conversation, however the set divides them."""
    if isinstance(prompt, str) and all(r[0]["role"] == "assistant" for r in responses):
        return [[{"role": "user", "content": prompt}], *responses]
    if isinstance(prompt, list):
        # some sets repeat the prompt's messages in the responses
        size = len(prompt)
        if all(response[:size] == prompt for response in responses):
            responses = [response[size:] for response in responses]
        return [prompt, *map(_begun_by_the_assistant, responses)]
    # without a prompt, or with its text beside full conversations, the conversations rule
    shared = _check_split(shared_start(*responses), responses)
    return [
        responses[0][:shared],
        *(_begun_by_the_assistant(response[shared:]) for response in responses),
    ]


def _begun_by_the_assistant(response: list[Message]) -> list[Message]:
    """What is not said by the model must not be trained on as if it were."""
    if response[0]["role"] != "assistant":
        raise BadRecord("a response starts with a message that is not the assistant's")
    return response


def _split_common_text(responses: list[str]) -> list[str]:
    shared = _check_split(shared_start(*responses), responses)
    prompt = responses[0][:shared].removesuffix(" ")  # a word's leading space belongs to the word
    return [prompt, *(response[len(prompt) :] for response in responses)]


def _check_split(shared: int, responses: Sequence[Sequence[Any]]) -> int:
    if responses[0] == responses[-1]:
        raise BadRecord("chosen and rejected are identical")
    if shared == 0:
        raise BadRecord("chosen and rejected share no prompt")
    if shared in map(len, responses):
        raise BadRecord("one response is the beginning of the other")
    return shared
