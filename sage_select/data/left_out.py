"""Notes on the texts that a chat template leaves out of a conversation."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sage_select.data.message_forms import THINK, arguments_of, function_of, texts_of
from sage_select.data.reasons import Note
from sage_select.data.records import Pair

Range = tuple[int, int]
"""Start and end of a part of a text, in characters."""

SETTING = "(tokenizer.chat_template, model.chat_template in a configuration)"


def left_out(
    pair: Pair,
    sequences: Sequence[str],
    turns: Sequence[Sequence[Range]],
    start: int,
    *,
    source: str,
    options: Mapping[str, Any],
) -> list[Note]:
    """Return a note for each kind of text that a template left out, of prompt and responses.

    Args:
        pair: The pair.
        sequences: Prompt and each response, rendered.
        turns: Of each sequence, the ranges that the model wrote.
        start: Length of the prompt in the sequences.
        source: Text of the template.
        options: Options with which it was rendered.
    """
    notes: dict[str, Note] = {}
    for response, text, ranges in zip(pair.responses, sequences, turns, strict=True):
        scored_text = "".join(text[first:last] for first, last in ranges)
        others = [start, *(bound for one in ranges for bound in one)]
        others_text = "".join(text[a:b] for a, b in zip(others[::2], others[1::2], strict=False))
        scored, calls, other = _Search(scored_text), _Search(scored_text), _Search(others_text)
        for message in response:
            own_words = message["role"] == "assistant"
            where = "responses" if own_words else f"{message['role']} messages in responses"
            for kind, part in texts_of(message):
                # a template may write tool calls before the text, or after it
                search = calls if kind == "tool calls" else scored
                if not (search if own_words else other).has(part):
                    _add(notes, Note(_lost(kind, where, source), part))
            if _AS_DATA.search(text) and not _AS_DATA.search(message.get("content") or ""):
                _add(notes, PARTS_AS_DATA)
            for written in _as_python(arguments_of(message)):
                if written in text:
                    _add(notes, _PYTHON_ARGUMENTS._replace(example=written))
        last = THINK.split(response[-1].get("content") or "")[-1].strip()
        if last and text.endswith(last):
            _add(notes, _NO_END._replace(example=text[-20:]))
    context = _Search(sequences[0][: turns[0][0][0]])
    for message in pair.prompt:
        for kind, part in texts_of(message):
            # by design, many templates do not repeat the reasoning of earlier turns
            if kind != "reasoning" and not context.has(part, anywhere=True):
                where = f"{message['role']} messages in prompts"
                _add(notes, Note(_lost(kind, where, source), part))
    for part in _texts_of_tools(options.get("tools") or ()):
        if not context.has(part, anywhere=True):
            _add(notes, _LOST_TOOLS._replace(example=part))
    for name in options:
        if name != "tools" and not re.search(rf"\b{re.escape(name)}\b", source):
            _add(notes, _UNKNOWN_OPTION._replace(example=name))
    return list(notes.values())


def _add(notes: dict[str, Note], note: Note) -> None:
    notes.setdefault(note.text, note)


def _texts_of_tools(tools: Any) -> Iterator[str]:
    """Yield the texts of tools that a template must write."""
    for tool in map(function_of, tools):
        yield str(tool.get("name", ""))
        yield str(tool.get("description") or "")
        parameters = tool.get("parameters")
        properties = parameters.get("properties") if isinstance(parameters, dict) else None
        yield from properties if isinstance(properties, dict) else ()


def _as_python(values: Iterator[Any]) -> Iterator[str]:
    """Yield lists and mappings as Python writes them, if JSON is written differently."""
    for value in values:
        if isinstance(value, dict | list) and value:
            if repr(value) != json.dumps(value, ensure_ascii=False, default=str):
                yield repr(value)
            yield from _as_python(iter(value.values() if isinstance(value, dict) else value))


class _Search:
    """A text in which parts are looked for in their order, whatever white space is in them."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._place = 0
        self._is_compact = False

    def has(self, part: str, *, anywhere: bool = False) -> bool:
        """Return whether a part comes after those found before, or anywhere."""
        if not self._is_compact:
            if self._finds(part.strip(), anywhere):
                return True
            # templates change white space: without it, texts take longer to compare
            self._place = len(_compact(self._text[: self._place]))
            self._text, self._is_compact = _compact(self._text), True
        # as it is, or as templates write it into JSON
        return any(
            self._finds(_compact(form(part)), anywhere) for form in (str, _in_json, _in_ascii_json)
        )

    def _finds(self, part: str, anywhere: bool) -> bool:
        place = self._text.find(part, self._place)
        if place >= 0:
            self._place = place + len(part)
        return place >= 0 or (anywhere and part in self._text)


def _in_json(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _in_ascii_json(text: str) -> str:
    return json.dumps(text)[1:-1]


def _compact(text: str) -> str:
    """Return a text without white space, of which templates change the amount."""
    return "".join(text.split())


def _lost(kind: str, where: str, source: str) -> str:
    """Return the text of the note on texts of one kind that a template leaves out."""
    fix = f"set one that does not {SETTING}"
    options = [name for name in KEEPS_REASONING if re.search(rf"\b{name}\b", source)]
    if kind == "reasoning" and options:
        option = f"{{'{options[0]}': {KEEPS_REASONING[options[0]]}}}"
        fix = f"pass chat_template_kwargs={option}, or {fix}"
    return f"the chat template leaves out {kind} of {where}; {fix}"


KEEPS_REASONING = {
    "preserve_thinking": True,
    "keep_past_thinking": True,
    "clear_thinking": False,
    "truncate_history_thinking": False,
}
"""Options of public chat templates that keep reasoning, with the value that does."""

_AS_DATA = re.compile(r"""\{['"]type['"]: ?['"]text['"]""")

PARTS_AS_DATA = Note(f"the chat template writes content parts as data; set another one {SETTING}")
_NO_END = Note(
    "the chat template writes nothing after a response, so the model does not learn where to end "
    f"it; set one that writes an end token {SETTING}"
)
_LOST_TOOLS = Note(
    f"the chat template leaves out the tools of prompts; set one that does not {SETTING}"
)
_PYTHON_ARGUMENTS = Note(
    "the chat template writes arguments of tool calls as Python's repr, not as JSON; set one that "
    f"writes JSON {SETTING}"
)
_UNKNOWN_OPTION = Note(
    "chat_template_kwargs has an option that the chat template does not read; correct its name, or "
    "leave it out"
)
