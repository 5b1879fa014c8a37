"""Turn a record of any accepted shape into a pair, or give the reason it cannot be used."""

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from sage_select.arguments import is_number

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
"""Known roles, as in TRL and ShareGPT, in lower case, and their names in chat templates."""

PROMPT_ALIASES = ("question", "query", "problem", "context", "user", "input", "text")
"""Names of the prompt in other datasets. If a record has one of these and no prompt, the common
start of its responses is not taken as the prompt."""


class Note(NamedTuple):
    """Something about a record that its user should know, although the record can be used.

    Attributes:
        text: What is the case, and what to set; equal for all records with the same problem.
        example: The part of this record that shows it.
    """

    text: str
    example: str = ""


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
    chat_template_kwargs: dict[str, Any] | None = None  # further options of the chat template
    notes: tuple[Note, ...] = ()

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
    _check_media("the field", row)
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
        ranked = [_as_messages(response) for response in ranked]
    elif prompt is None:
        # a null prompt: other rows of the table have one, so this one must not be guessed
        if "prompt" in row:
            raise BadRecord("prompt is missing")
        if any(isinstance(row.get(name), str) for name in PROMPT_ALIASES):
            raise BadRecord("prompt is missing; another field may contain it (see columns)")
        prompt, *ranked = _split_common_text(ranked)
    notes = _unused_fields(row, prompt)
    prompt, ranked, unused = _with_context(row, prompt, ranked)
    ranked, repeated = _without_repetition(prompt, ranked)
    notes += unused + repeated + _placeholders(prompt)
    if ranked[0] == ranked[-1]:
        raise BadRecord("chosen and rejected are identical")
    options: dict[str, Any] = {}
    if isinstance(prompt, list):
        options = {
            "tools": _json("tools", row.get("tools"), list),
            "chat_template_kwargs": _template_options(row.get("chat_template_kwargs")),
        }
    else:
        options = {}
        notes += [
            Note(
                f"the field {name!r} is not used, because prompt and responses are text; give "
                "them as messages"
            )
            for name in ("tools", "chat_template_kwargs")
            if not _is_empty(row.get(name))
        ]
    return Pair(
        prompt,
        ranked[0],
        ranked[-1],
        tuple(ranked[1:-1]),
        ranking.scores,
        **options,
        notes=tuple(notes),
    )


def content_id(value: Any) -> str:
    """Return a hash of the content, which does not depend on file, row or process."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def pair_id(pair: Pair) -> str:
    """Return the stable id of a pair: a hash of its prompt, ordered responses and options."""
    # appended only if present: pairs without options keep the ids they have in existing stores
    options = [
        {name: value}
        for name in ("tools", "chat_template_kwargs")
        if (value := getattr(pair, name)) is not None
    ]
    return content_id([pair.prompt, pair.chosen, pair.rejected, *pair.between, *options])


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
    responses, scores, ranks = (_parsed(row.get(n)) for n in ("responses", "scores", "ranks"))
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
        if not is_number(value) or not abs(value) <= MAX_NUMBER:  # NaN fails, too
            raise BadRecord(f"{name} does not have one number per response")
    return values


MAX_NUMBER = 1e300  # scores and ranks beyond it would overflow


def _sharegpt(row: dict[str, Any]) -> dict[str, Any]:
    """Rewrite a record of LLaMA-Factory or Light-R1: earlier turns, and a message per response."""
    prompt = _messages_of_text(row["conversations"])
    if isinstance(prompt, list) and prompt and _role(prompt[-1]) == "assistant":
        raise BadRecord("conversations ends with an assistant message")
    return {"prompt": prompt} | {
        name: _as_messages(row.get(name)) for name in ("chosen", "rejected")
    }


def _role(message: Any) -> str | None:
    """Return a message's role as chat templates name it, or None if it has no known role."""
    role = message.get("from", message.get("role")) if isinstance(message, dict) else None
    return ROLES.get(role.strip().lower()) if isinstance(role, str) else None


def _as_messages(response: Any) -> Any:
    """Return a response given as text as a list of one message."""
    response = _messages_of_text(response)
    is_text = isinstance(response, str)
    return [{"role": "assistant", "content": response}] if is_text else response


def _alpaca(row: dict[str, Any]) -> dict[str, Any]:
    """Rewrite an Alpaca record: an instruction, optionally with input."""
    fields: dict[str, Any] = {}
    match row.get("output"):
        case [chosen, rejected] if row.get("chosen") is None:
            fields = {"chosen": chosen, "rejected": rejected}
    if row.get("prompt") is not None:
        return fields
    instruction = row["instruction"]
    if isinstance(instruction, str) and isinstance(row.get("input"), str) and row["input"]:
        instruction = f"{instruction}\n{row['input']}"
    return fields | {"prompt": instruction, "input": None}  # the input is used


def _completions(row: dict[str, Any]) -> dict[str, Any]:
    """Rewrite an UltraFeedback record: a list of completions with responses and scores."""
    completions = _parsed(row["completions"])
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

CONTEXT_FIELDS = ("system", "history", "initial_reason_steps")
"""Fields that become part of the prompt: a system prompt, earlier exchanges as question-answer
pairs, and the start of a solution that the responses continue (as in Step-DPO)."""

FIELDS = TEXT_FIELDS | {
    "input",
    "output",
    *CONTEXT_FIELDS,
    "tools",
    "chat_template_kwargs",
    "scores",
    "ranks",
}
"""All fields that the library reads."""

_MEDIA = re.compile(
    r"(^|_)(images?|img|imgs|pictures?|photos?|pixel|videos?|audios?|speech)(_|$)", re.IGNORECASE
)
_NO_MEDIA = re.compile(
    r"caption|descri|text|prompt|count|num|size|width|height|_id$", re.IGNORECASE
)


def _check_media(where: str, record: Mapping[Any, Any]) -> None:
    """Refuse a record or a message with an image, a video or sound."""
    for name, value in record.items():
        if (
            _MEDIA.search(str(name))
            and not _NO_MEDIA.search(str(name))
            and isinstance(value, str | bytes | list | dict)
            and not _is_empty(value)
        ):
            raise BadRecord(f"{where} {name} is not empty, but only text can be measured")


def _unused(name: str, fix: str) -> Note:
    return Note(f"the field {name!r} is not used, although it may be part of the prompt; {fix}")


UNUSED_FIELDS = {
    "input": _unused(
        "input",
        "map the other part with columns={'instruction': ...}, and both are joined, or rename it",
    ),
    **{
        name: _unused(name, f"pass columns={{'system': '{name}'}} to use it, or rename it")
        for name in ("system_prompt", "sys_prompt", "system_message", "instructions", "persona")
    },
    **{
        name: _unused(
            name, f"pass columns={{'initial_reason_steps': '{name}'}} to use it, or rename it"
        )
        for name in (
            "prefix",
            "partial_solution",
            "partial_response",
            "solution_prefix",
            "response_prefix",
            "previous_steps",
        )
    },
    **{
        name: _unused(name, "write it into the prompt, or rename it")
        for name in (
            "context",
            "document",
            "documents",
            "passage",
            "passages",
            "background",
            "evidence",
            "knowledge",
            "preamble",
            "instruction",
            "question",
            "query",
            "problem",
            "chat_history",
            "dialogue_history",
            "conversation_history",
        )
    },
    **{
        name: _unused(name, f"pass chat_template_kwargs={{'{name}': ...}} to use it, or rename it")
        for name in ("enable_thinking", "reasoning_effort")
    },
}
"""Fields that often hold a part of the prompt, but have no standard meaning."""


def _unused_fields(row: Mapping[str, Any], prompt: Any) -> list[Note]:
    """Return a note on each field that may be a part of the prompt, but is not used."""
    notes = []
    turns = [prompt] if isinstance(prompt, str) else [m.get("content") or "" for m in prompt]
    asked = ""
    for name, note in UNUSED_FIELDS.items():
        if (value := row.get(name)) is None or _is_empty(value):
            continue
        asked = asked or "".join("".join(turns).split())
        parts = value if isinstance(value, list) else [value]
        # many datasets also have the parts from which they have made their prompt
        if not all("".join(str(part).split()) in asked for part in parts):
            notes.append(note._replace(example=str(value)))
    return notes


# Checks of single fields


def _checked(name: str, value: Any) -> Any:
    """Return a field's text, its messages in the form of chat templates, or None."""
    value = _messages_of_text(value)
    if isinstance(value, dict) and name != "prompt":
        value = [value]  # a response of one message may be given without a list
    if isinstance(value, list):
        if not value:
            raise BadRecord(f"{name} is empty")
        return [_message(name, message) for message in value]
    if value is not None:
        _check_text(name, value, f"{name} is not text")
        # a CSV stores a list of messages as text; as plain text it would be trained on wrongly
        if _SAVED_MESSAGES.match(value) and not _is_json(value):
            raise BadRecord(f"{name} is a list of messages saved as text that is not valid JSON")
    return value


_SAVED_MESSAGES = re.compile(
    r"""\s*(array\()?\s*\[?\s*\{(?=.{0,300}['"](role|from)['"]\s*:)(?=.{0,300}['"](content|value)['"]\s*:)""",
    re.DOTALL,
)
"""Messages as Python writes them, or numpy."""


def _messages_of_text(value: Any) -> Any:
    """Return messages that are saved as JSON text as messages, and any other value as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
        return value
    try:
        parsed = json.loads(value)
    except (ValueError, RecursionError):
        return value
    if isinstance(parsed, dict) and _role(parsed) is None:
        return value  # an answer in JSON may have fields of these names
    messages = parsed if isinstance(parsed, list) else [parsed]
    are_messages = messages and all(
        isinstance(m, dict) and ("role" in m or "from" in m) and m.keys() & {"content", "value"}
        for m in messages
    )
    return messages if are_messages else value


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _message(name: str, message: Any) -> Message:
    """Return a message in the form of chat templates, without null fields."""
    if not isinstance(message, dict):
        raise BadRecord(f"{name} has a message without a role")
    message = {key: value for key, value in message.items() if value is not None}
    _check_media(f"{name} has a message whose field", message)
    role = message.pop("from", None) if "role" not in message else message.pop("role")
    if not isinstance(role, str):
        raise BadRecord(f"{name} has a message without a role")
    if role.strip().lower() not in ROLES:
        raise BadRecord(f"{name} has a message with the unknown role {role[:40]!r}")
    content = message.pop("value", None) if "content" not in message else message.pop("content")
    if isinstance(content, list):
        content = _joined_parts(name, content)
    if "tool_calls" in message:
        message["tool_calls"] = _tool_calls(name, message["tool_calls"])
        if not message["tool_calls"]:
            del message["tool_calls"]
    role = ROLES[role.strip().lower()]
    if content is None and message.get("tool_calls"):
        return {"role": role, **message}
    _check_text(name, content, f"{name} has a message without text")
    return {"role": role, "content": content, **message}


def _tool_calls(name: str, calls: Any) -> list[dict[str, Any]]:
    """Return a message's tool calls, without null fields outside their arguments."""
    calls = _json("tool_calls", calls, list) or []
    if not all(isinstance(call, dict) for call in calls):
        raise BadRecord(f"{name} has tool calls that are not a list of records")

    def known_fields(call: dict[str, Any]) -> dict[str, Any]:
        # an argument that is null means something, as opposed to a field that is left out
        return {
            key: known_fields(value) if key == "function" and isinstance(value, dict) else value
            for key, value in call.items()
            if value is not None
        }

    return [known_fields(call) for call in calls]


def _json(name: str, value: Any, kind: type) -> Any:
    """Return a list or mapping, parsed if it is JSON text, or None if it is empty."""
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise BadRecord(f"{name} is not valid JSON") from None
    if value and not isinstance(value, kind):
        raise BadRecord(f"{name} is not a {'list' if kind is list else 'mapping'}")
    return value or None


def _template_options(options: Any) -> dict[str, Any] | None:
    """Return further options of the chat template, or None if there are none."""
    options = _json("chat_template_kwargs", options, dict)
    for name in RESERVED_OPTIONS & (options or {}).keys():
        raise BadRecord(f"chat_template_kwargs sets {name}, which is set for every record")
    return options  # type: ignore[no-any-return]


RESERVED_OPTIONS = frozenset(
    [
        "conversation",
        "add_generation_prompt",
        "continue_final_message",
        "tokenize",
        "padding",
        "truncation",
        "max_length",
        "return_tensors",
        "return_dict",
        "return_assistant_tokens_mask",
        "tokenizer_kwargs",
    ]
)
"""Options of `apply_chat_template` that the library sets itself."""


def _joined_parts(name: str, parts: list[Any]) -> str:
    """Return the text of a message whose content is a list of typed parts."""
    texts = []
    for part in parts:
        if isinstance(part, str):
            texts.append(part)
            continue
        kind = part.get("type", "text") if isinstance(part, dict) else None
        if isinstance(kind, str) and any(word in kind for word in ("image", "video", "audio")):
            raise BadRecord(f"{name} has a part of type {kind}, but only text can be measured")
        text = part.get("text", part.get("value")) if isinstance(part, dict) else None
        if not isinstance(text, str) or kind != "text":
            raise BadRecord(f"{name} has a message whose content is not text")
        texts.append(text)
    return "".join(texts)


def _is_empty(value: Any) -> bool:
    """Return whether a field is missing or null, or has no content, also in a table or as text."""
    if isinstance(value, dict):
        return all(map(_is_empty, value.values()))
    if isinstance(value, list):
        return all(map(_is_empty, value))
    if isinstance(value, str):
        return value.strip().lower() in ("", "[]", "{}", "null", "none", "nan")
    return value is None or value != value  # NaN, of a CSV


def _parsed(value: Any) -> Any:
    """Return a list that is saved as JSON text as a list, and any other value as it is."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


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


# Splitting prompt and responses, and the context beside them


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


def _with_context(
    row: Mapping[str, Any], prompt: Any, responses: list[Any]
) -> tuple[Any, list[Any], list[Note]]:
    """Return prompt and responses with the record's context fields, and notes on unused ones."""
    system, history, start = (row.get(name) for name in CONTEXT_FIELDS)
    notes = [
        Note(f"the field {name!r} is not used, because it is not text; make it text")
        for name, value in (("system", system), ("initial_reason_steps", start))
        if not isinstance(value, str) and not _is_empty(value)
    ]
    system = system if isinstance(system, str) and not _is_empty(system) else None
    start = start if isinstance(start, str) and not _is_empty(start) else None
    turns = _exchanges(history)
    if isinstance(prompt, str) and system and prompt.startswith(system.strip()):
        system = None  # the prompt has it already
    if system is None and start is None and not turns:
        return prompt, responses, notes
    if isinstance(prompt, str):
        # a system prompt or earlier turns only exist in a conversation
        prompt = [{"role": "user", "content": prompt}]
        responses = [_as_messages(response) for response in responses]
    first = prompt[:1] if prompt[0]["role"] == "system" else []
    rest = prompt[len(first) :]
    if system is not None and not first:
        _check_text("system", system, "system is not text")
        first = [{"role": "system", "content": system}]
    elif system is not None and str(first[0].get("content")).strip() != system.strip():
        notes.append(_TWO_SYSTEM_PROMPTS._replace(example=system))
    if start is not None:
        _check_text("initial_reason_steps", start, "initial_reason_steps is not text")
        if rest and rest[-1]["role"] == "assistant":
            raise BadRecord(
                "initial_reason_steps is set, but the prompt ends with an assistant message already"
            )
        rest = [*rest, {"role": "assistant", "content": start}]
    if rest[: len(turns)] == turns:
        turns = []  # the prompt has them already
    return [*first, *turns, *rest], responses, notes


_TWO_SYSTEM_PROMPTS = Note(
    "the field 'system' is not used, because the conversation has a system message of its own; "
    "leave one of them out"
)


def _exchanges(history: Any) -> list[Message]:
    """Return earlier turns that are given as a list of question-answer pairs."""
    exchanges = [] if _is_empty(history) else _json("history", history, list) or []
    if all(isinstance(exchange, dict) for exchange in exchanges):
        return [_message("history", message) for message in exchanges]
    turns = []
    for exchange in exchanges:
        if not isinstance(exchange, list) or len(exchange) != 2:
            raise BadRecord("history is not a list of question-answer pairs")
        for role, text in zip(("user", "assistant"), exchange, strict=True):
            _check_text("history", text, "history is not a list of question-answer pairs")
            turns.append({"role": role, "content": text})
    return turns


def _without_repetition(prompt: Any, responses: list[Any]) -> tuple[list[Any], list[Note]]:
    """Return responses without the prompt, or its start of a response, if all repeat it."""
    if isinstance(prompt, str):
        asked, answers = prompt, responses
    else:
        asked = prompt[-1].get("content") or ""
        answers = [response[0].get("content") or "" for response in responses]
    asked = asked.strip()
    repeated = [bool(asked) and answer.lstrip().startswith(asked) for answer in answers]
    is_start = isinstance(prompt, list) and prompt[-1]["role"] == "assistant"
    # an answer may well begin with the one word that was its prompt, but not with a whole question
    is_long = len(asked.split()) >= 3 or "\n" in asked
    if all(repeated) and (is_start or (is_long and isinstance(prompt, str))):
        rest = [answer.lstrip()[len(asked) :] for answer in answers]
        if not all(text.strip() for text in rest):
            raise BadRecord("a response only repeats the prompt")
        last = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        if last[-1:].isspace():
            rest = [text.lstrip() for text in rest]
        if isinstance(prompt, str):
            return rest, []
        return [
            [{**response[0], "content": text}, *response[1:]]
            for response, text in zip(responses, rest, strict=True)
        ], []
    near = [is_long and asked in answer[: len(asked) + 40] for answer in answers]
    if all(repeated) or any(near):
        return responses, [_REPEATED_PROMPT._replace(example=answers[0])]
    return responses, []


_REPEATED_PROMPT = Note(
    "responses begin with their prompt; if it is not meant as a part of the answer, the prompt is "
    "scored as one: take it off the responses"
)


def _placeholders(prompt: Any) -> list[Note]:
    """Return a note if a text has the place of an image, of which the record has none."""
    texts = [prompt] if isinstance(prompt, str) else [m.get("content") or "" for m in prompt]
    for place in ("<image>", "<video>", "<audio>"):
        if any(place in text for text in texts):
            return [_PLACEHOLDER._replace(example=place)]
    return []


_PLACEHOLDER = Note(
    "a prompt has the place of an image, video or sound, but only its text is measured; leave such "
    "rows out, or describe what is there"
)


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


# Advice


def advice(reasons: Sequence[str], fields: str, max_length: int) -> str:
    """Return what to do about records of which none can be used, by their reasons.

    Args:
        reasons: The reasons, the most frequent first.
        fields: The fields of the first record.
        max_length: The maximum number of tokens.
    """
    fixes = []
    for reason in reasons:
        for words, fix in _ADVICE:
            if any(word in reason for word in words):
                fixes.append(fix.format(fields=fields, max_length=max_length))
                break
    return "; ".join(dict.fromkeys(fixes)) or "fix the rows"


_ADVICE: list[tuple[tuple[str, ...], str]] = [
    (
        ("truncation",),
        "raise max_length (data.max_length in a configuration), now {max_length}",
    ),
    (
        ("chat template",),
        "change the messages, or set a chat template that takes them (tokenizer.chat_template, "
        "model.chat_template in a configuration)",
    ),
    (("unknown role",), f"rename the roles; known are {', '.join(ROLES)}"),
    (
        ("only text can be measured",),
        "leave out the rows with images, video or sound, or describe these in the prompt",
    ),
    (
        ("is missing", "not a record", "not a pair", "not start with the same prompt", "a prefix"),
        "the first has the fields {fields}; columns={{'prompt': ...}} (data.columns in a "
        "configuration) maps fields that have other names",
    ),
]
