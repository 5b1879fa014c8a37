"""Turn a record of any accepted shape into a pair, or give the reason it cannot be used."""

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from sage_select.arguments import is_number
from sage_select.data.context import (
    CONTEXT_FIELDS,
    other_prompt,
    placeholders,
    unused_fields,
    with_context,
    without_repetition,
)
from sage_select.data.messages import (
    ROLES,
    Message,
    as_messages,
    check_media,
    check_response,
    checked_field,
    is_empty,
    messages_of_text,
    parsed_json,
    parsed_list,
    role_of,
    template_options,
)
from sage_select.data.reasons import BadRecord, Note

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
    chat_template_kwargs: dict[str, Any] | None = None  # further options of the chat template
    notes: tuple[Note, ...] = ()

    @property
    def responses(self) -> tuple[Any, ...]:
        """All responses, best first."""
        return (self.chosen, *self.between, self.rejected)


def checked_pair(row: Any) -> Pair:
    """Return the pair in a record, with the prompt made explicit.

    Raises:
        BadRecord: If the record cannot be used, with the reason.
    """
    if not isinstance(row, dict):
        raise BadRecord("not a record")
    check_media("the field", row)
    row, ranking = _with_our_fields(row)
    prompt = given_prompt = checked_field("prompt", row.get("prompt"))
    responses = {name: checked_field(name, row.get(name)) for name in ranking.names}
    for name, response in responses.items():
        check_response(name, response)
    if len({type(response) for response in responses.values()}) > 1:
        raise BadRecord(f"{' and '.join(ranking.names[:2])} are not both text or both messages")
    ranked: list[Any] = list(responses.values())
    if isinstance(ranked[0], list):
        prompt, *ranked = _conversation(prompt, ranked)
    elif isinstance(prompt, list):
        ranked = [as_messages(response) for response in ranked]
    elif prompt is None:
        # a null prompt: other rows of the table have one, so this one must not be guessed
        if "prompt" in row:
            raise BadRecord("prompt is missing")
        if any(isinstance(row.get(name), str) for name in PROMPT_ALIASES):
            raise BadRecord("prompt is missing; another field may contain it (see columns)")
        prompt, *ranked = _split_common_text(ranked)
    notes = unused_fields(row, prompt)
    if isinstance(prompt, list):
        notes += other_prompt(given_prompt, prompt)
    prompt, ranked, unused = with_context(row, prompt, ranked)
    ranked, repeated = without_repetition(prompt, ranked)
    notes += unused + repeated + placeholders(prompt)
    if ranked[0] == ranked[-1]:
        raise BadRecord("chosen and rejected are identical")
    options: dict[str, Any] = {}
    if isinstance(prompt, list):
        options = {
            "tools": parsed_json("tools", row.get("tools"), list),
            "chat_template_kwargs": template_options(row.get("chat_template_kwargs")),
        }
    else:
        notes += [
            Note(
                f"the field {name!r} is not used, because prompt and responses are text; give "
                "them as messages"
            )
            for name in ("tools", "chat_template_kwargs")
            if not is_empty(row.get(name))
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
    responses, scores, ranks = (parsed_list(row.get(n)) for n in ("responses", "scores", "ranks"))
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
    prompt = messages_of_text(row["conversations"])
    if isinstance(prompt, list) and prompt and role_of(prompt[-1]) == "assistant":
        raise BadRecord("conversations ends with an assistant message")
    return {"prompt": prompt} | {
        name: as_messages(row.get(name)) for name in ("chosen", "rejected")
    }


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
    completions = parsed_list(row["completions"])
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
