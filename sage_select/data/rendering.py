"""Conversations as text: rendered by a chat template, and checked for what it does to them.

A template may leave out or rewrite any part of a conversation. So after rendering, every text of a
response must be in what is scored, the prompt must be the start of every sequence, and only the
model's own words may be scored. If the template needs another form of the messages for that, such
as content parts, it gets that form; whatever is still left out becomes a note.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise, product
from typing import Any, NamedTuple

from sage_select.data.records import BadRecord, Message, Note, Pair, shared_start

Range = tuple[int, int]
"""Start and end of a part of a text, in characters."""


class Rendered(NamedTuple):
    """A pair as text.

    Attributes:
        prompt: The text before all responses.
        sequences: The prompt with each response, best first.
        turns: For each sequence the ranges that the model wrote; None if it wrote all that follows
            the prompt.
        notes: What the template left out or rewrote.
    """

    prompt: str
    sequences: list[str]
    turns: list[list[Range] | None]
    notes: tuple[Note, ...] = ()


def rendered_text(pair: Pair) -> Rendered:
    """Return a pair of plain texts, which need no rendering."""
    sequences = [pair.prompt + response for response in pair.responses]
    return Rendered(pair.prompt, sequences, [None] * len(sequences))


def rendered_conversation(
    pair: Pair, tokenizer: Any, options: Mapping[str, Any] | None = None
) -> Rendered:
    """Render a conversation by the tokenizer's chat template.

    Args:
        pair: The pair; its own `chat_template_kwargs` take precedence.
        tokenizer: A tokenizer with a chat template.
        options: Options of the chat template for all pairs.

    Raises:
        BadRecord: If the template cannot render the messages, or the turns of a response cannot be
            found in what it writes.
    """
    if tokenizer.chat_template is None:
        raise ValueError(
            "PreferenceDataset: the pairs are conversations (messages, or text with a system "
            "prompt or a history), but the tokenizer has no chat template; use the "
            "instruction-tuned model's tokenizer, or set tokenizer.chat_template "
            "(model.chat_template in a configuration)"
        )
    options = {
        **(options or {}),
        **({} if pair.tools is None else {"tools": pair.tools}),
        **(pair.chat_template_kwargs or {}),
    }
    template = _Template(tokenizer, options)
    failure: BadRecord | None = None
    incomplete: Rendered | None = None
    for form in _forms(pair):
        responses = [form(response) for response in pair.responses]
        try:
            rendered = _rendered(form(pair.prompt), responses, template)
        except BadRecord as bad:
            failure = failure or bad
            continue
        lost = _lost(pair, options.get("tools"), rendered, tokenizer)
        if not lost:
            return rendered
        incomplete = incomplete or rendered._replace(notes=(*rendered.notes, *lost))
    if incomplete is not None:
        return incomplete
    assert failure is not None
    if any("tool_calls" in message for part in (pair.prompt, *pair.responses) for message in part):
        raise BadRecord(f"{failure} (with the arguments of tool calls as mapping and as text)")
    raise failure


class _Template(NamedTuple):
    """A tokenizer's chat template with its options."""

    tokenizer: Any
    options: Mapping[str, Any]

    def render(self, messages: list[Message], **more: bool) -> str:
        try:
            text: str = self.tokenizer.apply_chat_template(
                messages, tokenize=False, **more, **self.options
            )
            text.encode()  # a lone surrogate raises here, not in the tokenizer
        except Exception as error:  # a template is a program, and may raise any exception
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise BadRecord(f"the chat template cannot render the messages: {reason}") from error
        return text


# Forms of the messages that templates expect


def _forms(pair: Pair) -> Iterator[Callable[[list[Message]], list[Message]]]:
    """Yield functions that change messages to a form that a template may need, the usual first."""
    messages = [m for part in (pair.prompt, *pair.responses) for m in part]
    choices: list[tuple[Callable[[Message], Message], ...]] = [(dict, _with_parts)]
    if any("tool_calls" in m for m in messages):
        choices.append((_with_mapped_arguments, _with_text_arguments))
    if any("content" not in m for m in messages):
        choices.append((dict, _with_null_content, _with_empty_content))
    if any(name in m for m in messages for name in REASONING_FIELDS):
        choices.append((dict, _with_all_reasoning_fields))
    # the fewest changes first
    for changes in sorted(product(*map(enumerate, choices)), key=lambda c: sum(i for i, _ in c)):

        def form(
            messages: list[Message],
            functions: Sequence[Callable[[Message], Message]] = [f for _, f in changes],
        ) -> list[Message]:
            for function in functions:
                messages = [function(message) for message in messages]
            return messages

        yield form


def _with_parts(message: Message) -> Message:
    content = message.get("content")
    if not isinstance(content, str):
        return message
    return {**message, "content": [{"type": "text", "text": content}]}


def _with_null_content(message: Message) -> Message:
    return message if "content" in message else {**message, "content": None}


def _with_empty_content(message: Message) -> Message:
    return message if "content" in message else {**message, "content": ""}


def _with_all_reasoning_fields(message: Message) -> Message:
    """Return a message with its reasoning under every name that templates read."""
    texts = [message[name] for name in REASONING_FIELDS if message.get(name)]
    return {**message, **dict.fromkeys(REASONING_FIELDS, texts[0])} if texts else message


def _with_mapped_arguments(message: Message) -> Message:
    """Return a message whose tool calls have their arguments as a mapping, if they are JSON."""

    def mapping(arguments: Any) -> Any:
        if not isinstance(arguments, str):
            return arguments
        try:
            parsed = json.loads(arguments)
        except (ValueError, RecursionError):
            return arguments
        return parsed if isinstance(parsed, dict) else arguments

    return _with_arguments(message, mapping)


def _with_text_arguments(message: Message) -> Message:
    """Return a message whose tool calls have their arguments as JSON text."""
    return _with_arguments(
        message, lambda x: x if isinstance(x, str) else json.dumps(x, ensure_ascii=False)
    )


def _with_arguments(message: Message, change: Callable[[Any], Any]) -> Message:
    if "tool_calls" not in message:
        return message

    def changed(call: Any) -> Any:
        if isinstance(call.get("function"), dict):
            return {**call, "function": changed(call["function"])}
        return {**call, "arguments": change(call["arguments"])} if "arguments" in call else call

    return {**message, "tool_calls": [changed(call) for call in message["tool_calls"]]}


# Rendering, and the ranges of the model's own words


def _rendered(
    prompt: list[Message], responses: list[list[Message]], template: _Template
) -> Rendered:
    """Render a pair, and find the model's own words."""
    continued = _is_continued(prompt)
    lead = template.render(
        prompt, add_generation_prompt=not continued, continue_final_message=continued
    )
    sequences, turns, notes = [], [], []
    for response in responses:
        text = template.render(_joined(prompt, response))
        sequences.append(text)
        ranges = None
        if len(response) > 1:
            ranges = _turns(prompt, response, text, lead, template)
            if ranges is None:
                raise BadRecord(
                    "the turns of a response cannot be found in what the chat template writes"
                )
        if not text.startswith(lead):
            opening = _opening(prompt, lead, template)
            if text.startswith(lead.removesuffix(opening)):
                # the template begins a response otherwise than with its generation prompt
                missing = lead[shared_start(lead, text) :]
                notes.append(OTHER_OPENING._replace(example=missing))
            else:
                ranges = ranges or _turns(prompt, response, text, lead, template)
                notes.append(REWRITTEN_PROMPT._replace(example=_difference(lead, text)))
        elif ranges is None and prompt[-1]["role"] == "tool":
            ranges = _without_late_opening(prompt, text, lead, template)
        turns.append(ranges)
    return Rendered(lead, sequences, turns, tuple(notes))


def _is_continued(prompt: list[Message]) -> bool:
    """Return whether the prompt ends with the start of a response, which the response continues."""
    last = prompt[-1]
    return last["role"] == "assistant" and "tool_calls" not in last and "content" in last


def _joined(prompt: list[Message], response: list[Message]) -> list[Message]:
    """Return the whole conversation; the start of a response is one message with its rest."""
    if not _is_continued(prompt):
        return prompt + response
    start, rest = prompt[-1]["content"], response[0].get("content")
    if isinstance(rest, list):  # content parts
        content: Any = [{"type": "text", "text": start[0]["text"] + rest[0]["text"]}]
    else:
        content = start + (rest or "")
    return [*prompt[:-1], {**prompt[-1], **response[0], "content": content}, *response[1:]]


def _opening(prompt: list[Message], lead: str, template: _Template) -> str:
    """Return what the template writes before a response, its generation prompt."""
    if _is_continued(prompt):
        return ""
    body = template.render(prompt, add_generation_prompt=False)
    return lead[len(body) :] if lead.startswith(body) else ""


def _without_late_opening(
    prompt: list[Message], text: str, lead: str, template: _Template
) -> list[Range] | None:
    """Return the model's range if the opening of its turn is missing in the generation prompt.

    After a tool result some templates write no generation prompt, although the response gets an
    opening.
    """
    if _opening(prompt, lead, template):
        return None
    asked = [number for number, message in enumerate(prompt) if message["role"] == "user"]
    if not asked:
        return None
    until_user = prompt[: asked[-1] + 1]
    earlier_lead = template.render(until_user, add_generation_prompt=True)
    opening = _opening(until_user, earlier_lead, template)
    if opening and text.startswith(lead + opening):
        return [(len(lead + opening), len(text))]
    return None


def _turns(
    prompt: list[Message], response: list[Message], text: str, lead: str, template: _Template
) -> list[Range] | None:
    """Return the ranges of a rendered conversation that are the model's turns in a response.

    The model's texts are replaced by marks, so that the template shows where it writes each. A turn
    begins after the template's opening of it, and ends with the mark that ends it.

    Returns:
        The ranges, or None if the template writes other text around the marks.
    """
    word = "mark"
    while word in text:
        word += "k"
    marked, texts = _marked(response, word)
    mark = re.compile(rf"{word}(\d+)x")
    places: dict[int, list[Range]] = {}  # of the texts of each message
    written, end = "", 0
    skeleton = template.render(_joined(prompt, marked))
    for match in mark.finditer(skeleton):
        message, own_text = texts[int(match[1])]
        written += skeleton[end : match.start()]
        places.setdefault(message, []).append((len(written), len(written) + len(own_text)))
        written, end = written + own_text, match.end()
    if written + skeleton[end:] != text or not places:
        return None
    opening = _opening(prompt, lead, template)
    turns: list[Range] = []
    for message, ranges in places.items():
        # the conversation up to this turn: text after it may repeat the name of its tool
        cut = template.render(_joined(prompt, marked[: message + 1]))
        marks = [m for m in mark.finditer(cut) if texts[int(m[1])][0] == message]
        if not marks:
            return None
        first, last = ranges[0][0], ranges[len(marks) - 1][1]
        if message == 0 and text.startswith(lead):
            start = len(lead)
        else:
            start = _after_opening(text, turns[-1][1] if turns else 0, first, opening)
        added_tokens = template.tokenizer.get_added_vocab()
        ending = _common_start(text[last:], cut[marks[-1].end() :], added_tokens)
        if len(response) > 1:  # what follows the end of a turn is not the model's
            ending = ending.rstrip() or ending
        turns.append((start, last + len(ending)))
    return turns


def _common_start(text: str, other: str, special_tokens: Iterable[str]) -> str:
    """Return the start of a text that another one shares, without a half of a special token.

    A turn may end with another special token than the last turn, so the first one is always whole.
    """
    end = shared_start(text, other) if text and other else 0
    for token in special_tokens:
        start = text.rfind(token, max(0, end - len(token) + 1), end + len(token) - 1)
        if 0 <= start < end < start + len(token):
            ended = any(earlier in text[:start] for earlier in special_tokens)
            end = start if ended else start + len(token)
    return text[:end]


def _marked(response: list[Message], word: str) -> tuple[list[Message], list[tuple[int, str]]]:
    """Return a response with marks for the model's texts, and by mark its message and text."""
    texts: list[tuple[int, str]] = []

    def mark(message: int, own_text: str) -> str:
        core = own_text.strip()
        if not core:
            return own_text
        texts.append((message, core))
        return own_text.replace(core, f"{word}{len(texts) - 1}x", 1)

    def mark_content(message: int, content: str) -> str:
        parts = _THINK.split(content)
        return "".join(x if _THINK.fullmatch(x) else mark(message, x) for x in parts)

    def mark_call(message: int, call: dict[str, Any]) -> dict[str, Any]:
        if isinstance(call.get("function"), dict):
            return {**call, "function": mark_call(message, call["function"])}
        return {**call, "name": mark(message, str(call.get("name", "")))}

    def marked(number: int, message: Message) -> Message:
        if message["role"] != "assistant":
            return message
        changed = dict(message)
        for name in REASONING_FIELDS:
            if isinstance(message.get(name), str):
                changed[name] = mark(number, message[name])
        content = message.get("content")
        if isinstance(content, list):
            changed["content"] = [
                {"type": "text", "text": mark_content(number, part["text"])} for part in content
            ]
        elif isinstance(content, str):
            changed["content"] = mark_content(number, content)
        if "tool_calls" in message:
            changed["tool_calls"] = [mark_call(number, call) for call in message["tool_calls"]]
        return changed

    return [marked(number, message) for number, message in enumerate(response)], texts


def _after_opening(text: str, before: int, first: int, opening: str) -> int:
    """Return the end of the last opening in a range of the text, or the end of the range."""
    while opening:
        place = text.rfind(opening, before, first)
        if place >= 0:
            return place + len(opening)
        # a template may write only the first part of its generation prompt, without <think>
        marks = [m.end() for m in re.finditer(r"[>\n\]]", opening) if m.end() < len(opening)]
        opening = opening[: marks[-1]] if marks else ""
    return first


def _difference(one: str, other: str) -> str:
    """Return where a text first differs from another."""
    start = shared_start(one, other)
    return one[start : start + 80]


# What a template leaves out

REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
"""Names under which messages have reasoning apart from their content."""

_PARTS_AS_DATA = re.compile(r"""\{['"]type['"]: ?['"]text['"]""")
_THINK = re.compile(r"(</?think(?:ing)?>)")


def _lost(pair: Pair, tools: Any, rendered: Rendered, tokenizer: Any) -> list[Note]:
    """Return a note for each kind of text that a template left out, of prompt and responses."""
    notes: dict[str, Note] = {}
    for response, text, turns in zip(
        pair.responses, rendered.sequences, rendered.turns, strict=True
    ):
        own = turns or [(shared_start(rendered.prompt, text), len(text))]
        own_text = "".join(text[start:end] for start, end in own)
        scored, calls = _Search(own_text), _Search(own_text)
        between = _Search("".join(text[one[1] : other[0]] for one, other in pairwise(own)))
        for message in response:
            own_words = message["role"] == "assistant"
            written = scored if own_words else between
            where = "responses" if own_words else f"{message['role']} messages in responses"
            for kind, part in _texts(message):
                # a template may write tool calls before the text, or after it
                if not (calls if kind == "tool calls" else written).has(part):
                    note = Note(_lost_text(kind, where, tokenizer), part)
                    notes.setdefault(note.text, note)
            if _PARTS_AS_DATA.search(text) and not _PARTS_AS_DATA.search(
                message.get("content") or ""
            ):
                notes["parts"] = Note("the chat template writes content parts as data", text)
            for arguments in _arguments(message):
                if arguments and repr(arguments) in text:
                    notes.setdefault("repr", Note(_PYTHON_ARGUMENTS, repr(arguments)))
        context = text[: own[0][0]]
        last = response[-1].get("content") or ""
        if last.strip() and text.endswith(last.strip()):
            notes["end"] = Note(_NO_END, text[-20:])
    search = _Search(context)
    for message in pair.prompt:
        for kind, part in _texts(message):
            # by design, many templates do not repeat the reasoning of earlier turns
            if kind != "reasoning" and not search.has(part, anywhere=True):
                where = f"{message['role']} messages in prompts"
                notes.setdefault(where, Note(_lost_text(kind, where, tokenizer), part))
    for tool in map(_function, tools or ()):
        name = str(tool.get("name", ""))
        # the name alone may also stand in a call
        if not search.has(str(tool.get("description") or name), anywhere=True):
            notes["tools"] = Note(_LOST_TOOLS, name)
    return list(notes.values())


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


def _texts(message: Message) -> Iterator[tuple[str, str]]:
    """Yield the texts of a message that must be in its rendering, each with its kind."""
    for name in REASONING_FIELDS:
        if isinstance(message.get(name), str):
            yield "reasoning", message[name]
    *thoughts, text = _THINK.split(message.get("content") or "")
    for part in thoughts:
        if not _THINK.fullmatch(part):
            yield "reasoning", part
    yield "text", text
    for call in message.get("tool_calls", ()):
        function = _function(call)
        yield "tool calls", str(function.get("name", ""))
        if isinstance(function.get("arguments"), dict):
            for value in function["arguments"].values():
                if isinstance(value, str):
                    yield "tool calls", value


def _arguments(message: Message) -> Iterator[dict[str, Any]]:
    """Yield the arguments of a message's tool calls that are mappings."""
    for call in _with_mapped_arguments(message).get("tool_calls", ()):
        arguments = _function(call).get("arguments")
        if isinstance(arguments, dict):
            yield arguments


def _function(value: Any) -> dict[str, Any]:
    """Return the function of a tool or a tool call."""
    if not isinstance(value, dict):
        return {}
    return value["function"] if isinstance(value.get("function"), dict) else value


_SETTING = "(tokenizer.chat_template, model.chat_template in a configuration)"


def _lost_text(kind: str, where: str, tokenizer: Any) -> str:
    """Return the text of the note on texts of one kind that a template leaves out."""
    source = json.dumps(tokenizer.chat_template)
    options = [name for name in KEEPS_REASONING if re.search(rf"\b{name}\b", source)]
    fix = f"set one that does not {_SETTING}"
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

_NO_END = (
    "the chat template writes nothing after a response, so the model does not learn where to end "
    f"it; set one that writes an end token {_SETTING}"
)
_LOST_TOOLS = f"the chat template leaves out the tools of prompts; set one that does not {_SETTING}"
_PYTHON_ARGUMENTS = (
    "the chat template writes the arguments of tool calls as Python's repr, not as JSON; set one "
    f"that writes JSON {_SETTING}"
)
OTHER_OPENING = Note(
    "the chat template's generation prompt is not how it begins a response, so the model is asked "
    "with another prompt than it is trained on; set one that begins responses with its generation "
    f"prompt {_SETTING}"
)
REWRITTEN_PROMPT = Note(
    "the chat template writes prompts differently when a response follows; only responses are "
    "scored, but in another context than the model is asked with; set one that writes both alike "
    f"{_SETTING}"
)
