"""Context of a prompt: fields that belong to it, fields that may, and what is repeated."""

from collections.abc import Mapping
from typing import Any

from sage_select.data.messages import (
    Message,
    as_messages,
    check_text,
    checked_message,
    is_empty,
    parsed_json,
)
from sage_select.data.reasons import BadRecord, Note

CONTEXT_FIELDS = ("system", "history", "initial_reason_steps")
"""Fields that become part of the prompt: a system prompt, earlier exchanges as question-answer
pairs, and the start of a solution that the responses continue (as in Step-DPO)."""


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
            "conversations",
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


def unused_fields(row: Mapping[str, Any], prompt: Any) -> list[Note]:
    """Return a note on each field that may be a part of the prompt, but is not used."""
    notes = []
    turns = [prompt] if isinstance(prompt, str) else [m.get("content") or "" for m in prompt]
    asked = ""
    for name, note in UNUSED_FIELDS.items():
        if (value := row.get(name)) is None or is_empty(value):
            continue
        asked = asked or "".join("".join(turns).split())
        parts = value if isinstance(value, list) else [value]
        parts = [p.get("value", p.get("content")) if isinstance(p, dict) else p for p in parts]
        # many datasets also have the parts from which they have made their prompt
        if not all("".join(str(part).split()) in asked for part in parts):
            notes.append(note._replace(example=str(value)))
    return notes


def other_prompt(text: Any, prompt: list[Message]) -> list[Note]:
    """Return a note if a prompt given as text is not in the conversations beside it."""
    asked = "".join("".join(str(m.get("content")) for m in prompt).split())
    if isinstance(text, str) and "".join(text.split()) not in asked:
        return [_OTHER_PROMPT._replace(example=text)]
    return []


_OTHER_PROMPT = Note(
    "the field 'prompt' is not used, because the responses are whole conversations, which begin "
    "otherwise; leave it out, or write it into them"
)


def with_context(
    row: Mapping[str, Any], prompt: Any, responses: list[Any]
) -> tuple[Any, list[Any], list[Note]]:
    """Return prompt and responses with the record's context fields, and notes on unused ones."""
    system, history, start = (row.get(name) for name in CONTEXT_FIELDS)
    notes = [
        Note(f"the field {name!r} is not used, because it is not text; make it text")
        for name, value in (("system", system), ("initial_reason_steps", start))
        if not isinstance(value, str) and not is_empty(value)
    ]
    system = system if isinstance(system, str) and not is_empty(system) else None
    start = start if isinstance(start, str) and not is_empty(start) else None
    turns = _exchanges(history)
    if isinstance(prompt, str) and system and prompt.startswith(system.strip()):
        system = None  # the prompt has it already
    if system is None and start is None and not turns:
        return prompt, responses, notes
    if isinstance(prompt, str):
        # a system prompt or earlier turns only exist in a conversation
        prompt = [{"role": "user", "content": prompt}]
        responses = [as_messages(response) for response in responses]
    first = prompt[:1] if prompt[0]["role"] == "system" else []
    rest = prompt[len(first) :]
    if system is not None and not first:
        check_text("system", system, "system is not text")
        first = [{"role": "system", "content": system}]
    elif system is not None and str(first[0].get("content")).strip() != system.strip():
        notes.append(_TWO_SYSTEM_PROMPTS._replace(example=system))
    if start is not None:
        check_text("initial_reason_steps", start, "initial_reason_steps is not text")
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
    exchanges = [] if is_empty(history) else parsed_json("history", history, list) or []
    if all(isinstance(exchange, dict) for exchange in exchanges):
        return [checked_message("history", message) for message in exchanges]
    turns = []
    for exchange in exchanges:
        if not isinstance(exchange, list) or len(exchange) != 2:
            raise BadRecord("history is not a list of question-answer pairs")
        for role, text in zip(("user", "assistant"), exchange, strict=True):
            check_text("history", text, "history is not a list of question-answer pairs")
            turns.append({"role": role, "content": text})
    return turns


def without_repetition(prompt: Any, responses: list[Any]) -> tuple[list[Any], list[Note]]:
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


def placeholders(prompt: Any) -> list[Note]:
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
