"""Turn a record of any accepted shape into a pair, or give the reason it cannot be used."""

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
"""Known roles, as in TRL and ShareGPT, and their names in chat templates."""


PROMPT_ALIASES = ("question", "query", "problem", "context", "user", "input", "text")
"""Names of the prompt in other datasets. If a record has one of these and no prompt, the common
start of its responses is not taken as the prompt."""


class Pair(NamedTuple):
    """A pair with checked fields: all are text, or all are messages.

    With more than two responses, `chosen` is the best and `rejected` the worst.
    """

    prompt: Any  # str | list[Message]
    chosen: Any
    rejected: Any
    between: tuple[Any, ...] = ()  # the other responses, best first
    scores: tuple[float, ...] | None = None  # of all responses, best first
    tools: Any = None  # passed to the chat template

    @property
    def responses(self) -> tuple[Any, ...]:
        """All responses, best first."""
        return (self.chosen, *self.between, self.rejected)


class BadRecord(Exception):
    """Reason a record cannot be used. Reasons are counted, so equal reasons have equal texts."""


def checked_pair(row: Any) -> Pair:
    """Return the pair in a record, with the prompt made explicit.

    Raises:
        BadRecord: If the record cannot be used, with the reason.
    """
    if not isinstance(row, dict):
        raise BadRecord("not a record")
    row, ranking = _with_our_fields(row)
    prompt = _checked("prompt", row.get("prompt"))
    responses = {name: _checked(name, row.get(name)) for name in ranking.names}
    for name, response in responses.items():
        _check_response(name, response)
    if len({type(response) for response in responses.values()}) > 1:
        raise BadRecord(f"{' and '.join(ranking.names[:2])} are not both text or both messages")
    ranked: list[Any] = list(responses.values())
    if isinstance(ranked[0], list):
        prompt, *ranked = _conversation(prompt, ranked)
    elif isinstance(prompt, list):
        raise BadRecord("prompt is a list of messages but the responses are text")
    elif prompt is None:
        # a null prompt: other rows of the table have one, so this one must not be guessed
        if "prompt" in row:
            raise BadRecord("prompt is missing")
        if any(isinstance(row.get(name), str) for name in PROMPT_ALIASES):
            raise BadRecord("prompt is missing; another field may contain it (see columns)")
        prompt, *ranked = _split_common_text(ranked)
    if ranked[0] == ranked[-1]:
        raise BadRecord("chosen and rejected are identical")
    tools = _tools(row.get("tools")) if isinstance(prompt, list) else None
    return Pair(prompt, ranked[0], ranked[-1], tuple(ranked[1:-1]), ranking.scores, tools)


def content_id(value: Any) -> str:
    """Return a hash of the content, which does not depend on file, row or process."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def pair_id(pair: Pair) -> str:
    """Return the stable id of a pair: a hash of its prompt, ordered responses and tools."""
    # appended only if present: pairs without tools keep the ids they have in existing stores
    tools = [] if pair.tools is None else [{"tools": pair.tools}]
    return content_id([pair.prompt, pair.chosen, pair.rejected, *pair.between, *tools])


def shared_start(*sequences: Sequence[Any]) -> int:
    """Return the length of the longest common prefix of these sequences."""
    # the prompt is usually a prefix of all, and slices compare much faster than single items
    shortest = min(sequences, key=len)
    if all(sequence[: len(shortest)] == shortest for sequence in sequences):
        return len(shortest)
    for position, items in enumerate(zip(*sequences, strict=False)):
        if any(item != items[0] for item in items):
            return position
    raise AssertionError("unreachable: one sequence differs from the shortest")


# Formats of other libraries, rewritten as prompt, chosen, rejected or as prompt, responses


class _Ranking(NamedTuple):
    """Names of the fields that hold the responses, best first, and their scores."""

    names: Sequence[str] = ("chosen", "rejected")
    scores: tuple[float, ...] | None = None


def _with_our_fields(row: dict[str, Any]) -> tuple[dict[str, Any], _Ranking]:
    """Return the record with the library's field names, and its ranking of responses."""
    for shape in _SHAPES:
        present = all(row.get(name) is not None for name in shape.required)
        if present and row.get(shape.absent) is None:
            row = {**row, **shape.rewrite(row)}
    if row.get("responses") is not None and row.get("chosen") is None:
        return _ranked(row)
    if row.get("chosen") is None and row.get("rejected") is None:
        if "label" in row:
            raise BadRecord("one labelled response, not a pair")
        if row.get("messages") is not None:
            raise BadRecord("one conversation, not a pair")
    return row, _Ranking()


def _ranked(row: dict[str, Any]) -> tuple[dict[str, Any], _Ranking]:
    """Return the record with one field per response, and their order."""
    responses, scores, ranks = row["responses"], row.get("scores"), row.get("ranks")
    if not isinstance(responses, list) or len(responses) < 2:
        raise BadRecord("responses is not a list of two or more")
    if scores is None and ranks is not None:
        scores = [-rank for rank in _numbers("ranks", ranks, len(responses))]
    ordered_scores = None
    if scores is not None:
        numbers = _numbers("scores", scores, len(responses))
        if max(numbers) == min(numbers):
            raise BadRecord("all responses have the same score or rank")
        # a stable sort keeps the order of ties
        order = sorted(range(len(numbers)), key=lambda i: -numbers[i])
        responses = [responses[i] for i in order]
        ordered_scores = tuple(float(numbers[i]) for i in order)
    names = ["chosen", *(f"response {i}" for i in range(2, len(responses))), "rejected"]
    return {**row, **dict(zip(names, responses, strict=True))}, _Ranking(names, ordered_scores)


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
    """Rewrite a record of LLaMA-Factory or Light-R1: earlier turns, and a message per response."""
    prompt, system = row["conversations"], row.get("system")
    if isinstance(prompt, list) and prompt:
        if _role(prompt[-1]) == "assistant":
            raise BadRecord("conversations ends with an assistant message")
        if isinstance(system, str) and system and _role(prompt[0]) != "system":
            prompt = [{"role": "system", "content": system}, *prompt]
    return {"prompt": prompt} | {
        name: _as_messages(row.get(name)) for name in ("chosen", "rejected")
    }


def _role(message: Any) -> str | None:
    """Return a message's role as chat templates name it, or None if it has no known role."""
    role = message.get("from", message.get("role")) if isinstance(message, dict) else None
    return ROLES.get(role) if isinstance(role, str) else None


def _as_messages(response: Any) -> Any:
    """Return a response given as text as a list of one message."""
    is_text = isinstance(response, str)
    return [{"role": "assistant", "content": response}] if is_text else response


def _alpaca(row: dict[str, Any]) -> dict[str, Any]:
    """Rewrite an Alpaca record: an instruction, optionally with input, system and history."""
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
    # a system prompt or earlier turns only exist in a conversation
    turns = [{"role": "system", "content": system}] if system else []
    for exchange in history or []:
        if not isinstance(exchange, list) or len(exchange) != 2:
            raise BadRecord("history is not a list of question-answer pairs")
        turns += [
            {"role": role, "content": text}
            for role, text in zip(("user", "assistant"), exchange, strict=True)
        ]
    turns.append({"role": "user", "content": instruction})
    responses = {name: fields.get(name, row.get(name)) for name in ("chosen", "rejected")}
    return {"prompt": turns} | {name: _as_messages(text) for name, text in responses.items()}


def _completions(row: dict[str, Any]) -> dict[str, Any]:
    """Rewrite an UltraFeedback record: a list of completions with responses and scores."""
    completions = row["completions"]
    if not isinstance(completions, list) or not all(isinstance(c, dict) for c in completions):
        raise BadRecord("completions is not a list of records")
    return {
        "responses": [completion.get("response") for completion in completions],
        "scores": [completion.get("overall_score") for completion in completions],
    }


def _whole_conversations(row: dict[str, Any]) -> dict[str, Any]:
    """Rewrite a record with `chosen_messages` and `rejected_messages`."""
    return {"chosen": row["chosen_messages"], "rejected": row["rejected_messages"]}


class _Shape(NamedTuple):
    """Rule that recognises records of another format and rewrites them to the library's fields."""

    required: tuple[str, ...]
    absent: str
    rewrite: Callable[[dict[str, Any]], dict[str, Any]]


_SHAPES = [
    _Shape(("conversations",), "prompt", _sharegpt),
    _Shape(("chosen_messages", "rejected_messages"), "chosen", _whole_conversations),
    _Shape(("instruction",), "messages", _alpaca),
    _Shape(("completions",), "chosen", _completions),
]

TEXT_FIELDS = frozenset(
    ["prompt", "chosen", "rejected", "responses", *(n for shape in _SHAPES for n in shape.required)]
)
"""Fields whose text becomes tokens; all other fields are annotations."""

TOKEN_FIELDS = ("prompt_ids", "chosen_ids", "rejected_ids")
"""Token fields of records that a trainer has tokenised."""

FIELDS = TEXT_FIELDS | {"input", "output", "system", "history", "tools", "scores", "ranks"}
"""All fields that the library reads."""


# Checks of single fields


def _checked(name: str, value: Any) -> Any:
    """Return a field's text, its messages in the form of chat templates, or None."""
    if isinstance(value, dict) and name != "prompt":
        value = [value]  # a response of one message may be given without a list
    if isinstance(value, list):
        if not value:
            raise BadRecord(f"{name} is empty")
        return [_message(name, message) for message in value]
    if value is not None:
        _check_text(name, value, f"{name} is not text")
        # a CSV stores a list of messages as text; as plain text it would be trained on wrongly
        if value.startswith(("[{'", '[{"')) and any(word in value[:12] for word in _MESSAGE_KEYS):
            raise BadRecord(f"{name} is a list of messages saved as text")
    return value


_MESSAGE_KEYS = ("role", "content", "from", "value")


def _message(name: str, message: Any) -> Message:
    """Return a message in the form of chat templates, without null fields."""
    if not isinstance(message, dict):
        raise BadRecord(f"{name} has a message without a role")
    message = _without_nulls(message)
    role = message.pop("from", None) if "role" not in message else message.pop("role")
    if not isinstance(role, str):
        raise BadRecord(f"{name} has a message without a role")
    if role not in ROLES:
        raise BadRecord(f"{name} has a message with an unknown role")
    content = message.pop("value", None) if "content" not in message else message.pop("content")
    if isinstance(content, list):
        content = _joined_parts(name, content)
    if content is None and message.get("tool_calls"):
        return {"role": ROLES[role], **message}
    _check_text(name, content, f"{name} has a message without text")
    return {"role": ROLES[role], "content": content, **message}


def _without_nulls(value: Any) -> Any:
    """Return a value without null fields: a table gives each record the fields of all records."""
    if isinstance(value, dict):
        return {key: _without_nulls(x) for key, x in value.items() if x is not None}
    return [_without_nulls(x) for x in value] if isinstance(value, list) else value


def _tools(tools: Any) -> Any:
    """Return a list of tools, parsed if it is JSON text, or None if there are none."""
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError:
            raise BadRecord("tools is not valid JSON") from None
    return _without_nulls(tools) or None


def _joined_parts(name: str, parts: list[Any]) -> str:
    """Return the text of a message whose content is a list of typed parts."""
    texts = []
    for part in parts:
        text = part.get("text", part.get("value")) if isinstance(part, dict) else None
        if not isinstance(text, str) or part.get("type", "text") != "text":
            raise BadRecord(f"{name} has a message whose content is not text")
        texts.append(text)
    return "".join(texts)


def _check_text(name: str, value: Any, reason: str) -> None:
    if not isinstance(value, str):
        raise BadRecord(reason)
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
            return  # a tool call may have no text
        response = response[-1]["content"]
    if not response.strip():
        raise BadRecord(f"{name} is empty")


# Splitting prompt and responses


def _conversation(prompt: Any, responses: list[list[Message]]) -> list[list[Message]]:
    """Return prompt and responses of a conversation, however the record divides them."""
    if isinstance(prompt, str) and all(r[0]["role"] == "assistant" for r in responses):
        return [[{"role": "user", "content": prompt}], *responses]
    if isinstance(prompt, list):
        # some datasets repeat the prompt's messages in the responses
        size = len(prompt)
        if all(response[:size] == prompt for response in responses):
            responses = [response[size:] for response in responses]
        return [prompt, *map(_starting_with_assistant, responses)]
    # no prompt, or its text beside full conversations: the conversations decide
    shared = _check_split(shared_start(*responses), responses)
    return [
        responses[0][:shared],
        *(_starting_with_assistant(response[shared:]) for response in responses),
    ]


def _starting_with_assistant(response: list[Message]) -> list[Message]:
    """Return a response, or refuse it if its first message would not come from the model."""
    if response[0]["role"] != "assistant":
        raise BadRecord("a response does not start with an assistant message")
    return response


def _split_common_text(responses: list[str]) -> list[str]:
    """Return the common start of responses as the prompt, and the rest of each response."""
    shared = _check_split(shared_start(*responses), responses)
    prompt = responses[0][:shared].removesuffix(" ")  # a word's leading space belongs to the word
    return [prompt, *(response[len(prompt) :] for response in responses)]


def _check_split(shared: int, responses: Sequence[Sequence[Any]]) -> int:
    """Return the length of the common start if it leaves a prompt and responses."""
    if responses[0] == responses[-1]:
        raise BadRecord("chosen and rejected are identical")
    if shared == 0:
        raise BadRecord("chosen and rejected do not start with the same prompt")
    if shared in map(len, responses):
        raise BadRecord("one response is a prefix of another")
    return shared
