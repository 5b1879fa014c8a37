"""Conversations as text: rendered by a chat template, and checked for what it does to them.

A template may leave out or rewrite any part of a conversation. So after rendering, every text of a
response must be in what is scored, the prompt must be the start of every sequence, and only the
model's own words may be scored. If the template needs another form of the messages for that, such
as content parts, it gets that form; whatever is still left out becomes a note.
"""

import json
import re
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from functools import cached_property
from typing import Any, NamedTuple

from sage_select.data.left_out import PARTS_AS_DATA, SETTING, Range, left_out
from sage_select.data.message_forms import REASONING_FIELDS, THINK, Form, forms_of
from sage_select.data.messages import Message
from sage_select.data.reasons import BadRecord, Note
from sage_select.data.records import Pair, shared_start


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


class Renderer:
    """A tokenizer's chat template, applied to conversations.

    Args:
        tokenizer: The tokenizer.
        options: Options of the chat template for all pairs.
    """

    def __init__(self, tokenizer: Any, options: Mapping[str, Any] | None = None) -> None:
        self.tokenizer = tokenizer
        self.options = options or {}
        self._best_forms: dict[Hashable, int] = {}  # by fields, and what the first form loses

    @cached_property
    def _source(self) -> str:
        return json.dumps(self.tokenizer.chat_template)

    @cached_property
    def _added_tokens(self) -> list[str]:
        return list(self.tokenizer.get_added_vocab())

    def rendered(self, pair: Pair) -> Rendered:
        """Render a conversation.

        Args:
            pair: The pair; its own `chat_template_kwargs` take precedence.

        Raises:
            BadRecord: If the template cannot render the messages, or the turns of a response cannot
                be found in what it writes.
            ValueError: If the tokenizer has no chat template.
        """
        if self.tokenizer.chat_template is None:
            raise ValueError(
                "PreferenceDataset: the pairs are conversations (messages, or text with a system "
                "prompt or a history), but the tokenizer has no chat template; use the "
                "instruction-tuned model's tokenizer, set tokenizer.chat_template "
                "(model.chat_template in a configuration), or rename a column (system, history, "
                "initial_reason_steps) that is no part of the prompt"
            )
        options = {
            **self.options,
            **({} if pair.tools is None else {"tools": pair.tools}),
            **(pair.chat_template_kwargs or {}),
        }
        template = _Template(self.tokenizer, options, self._added_tokens)
        messages = [m for part in (pair.prompt, *pair.responses) for m in part]
        forms = forms_of(messages)
        untried = list(range(len(forms)))
        failure: BadRecord | None = None
        best: tuple[Rendered, list[Note], int] | None = None
        kind: Hashable = None
        while untried:
            number = untried.pop(0)
            try:
                rendered, lost = self._in_form(forms[number], pair, template)
            except BadRecord as bad:
                failure = failure or bad
                continue
            if not lost:
                return rendered
            if PARTS_AS_DATA in lost:  # this template takes no parts
                continue
            if best is None:
                # the fields decide which forms there are
                fields = frozenset(name for message in messages for name in message)
                kind = (len(forms), fields, frozenset(note.text for note in lost))
                # rows that lose the same do so in the same form: it need not be searched again
                if kind in self._best_forms:
                    untried = [n for n in untried if n == self._best_forms[kind]]
            if best is None or len(lost) < len(best[1]):
                best = rendered, lost, number
        if best is not None:
            rendered, lost, self._best_forms[kind] = best
            return rendered._replace(notes=(*rendered.notes, *lost))
        assert failure is not None
        if any("tool_calls" in message for message in messages):
            raise BadRecord(f"{failure} (with the arguments of tool calls as mapping and as text)")
        raise failure

    def _in_form(
        self, form: Form, pair: Pair, template: "_Template"
    ) -> tuple[Rendered, list[Note]]:
        """Render a pair in one form of its messages, and note what is left out."""
        responses = [form(response) for response in pair.responses]
        rendered, start, turns = _rendered(form(pair.prompt), responses, template)
        lost = left_out(
            pair, rendered.sequences, turns, start, source=self._source, options=template.options
        )
        return rendered, lost


class _Template(NamedTuple):
    """A tokenizer's chat template with its options."""

    tokenizer: Any
    options: Mapping[str, Any]
    added_tokens: list[str]

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


def _rendered(
    prompt: list[Message], responses: list[list[Message]], template: _Template
) -> tuple[Rendered, int, list[list[Range]]]:
    """Render a pair, and find the model's own words.

    Returns:
        The rendered pair, the length of the start that prompt and sequences share, and the model's
        ranges in each sequence.
    """
    continued = _is_continued(prompt)
    lead = template.render(
        prompt, add_generation_prompt=not continued, continue_final_message=continued
    )
    sequences = [template.render(_joined(prompt, response)) for response in responses]
    start = min(shared_start(lead, text) for text in sequences)
    several = any(len(response) > 1 for response in responses)
    notes = {}
    if any(not text.startswith(lead) for text in sequences):
        opening = _opening(prompt, lead, template)
        body = lead.removesuffix(opening)
        rewritten = [text for text in sequences if not text.startswith(body)]
        if rewritten:
            place = shared_start(lead, rewritten[0])
            notes[REWRITTEN_PROMPT.text] = REWRITTEN_PROMPT._replace(example=lead[place:])
        if len(rewritten) < len(sequences) and start < len(lead):
            # the template begins a response otherwise than with its generation prompt
            begun = min(shared_start(lead, text) for text in sequences if text.startswith(body))
            if begun < len(lead):
                notes[OTHER_OPENING.text] = OTHER_OPENING._replace(example=lead[begun:])
    else:
        rewritten = []
    turns: list[list[Range] | None] = []
    for response, text in zip(responses, sequences, strict=True):
        if several or text in rewritten:
            turns.append(_turns(prompt, response, text, lead, template, several=several))
        elif rewritten:  # the shared start is not the whole prompt
            turns.append([(shared_start(lead, text), len(text))])
        elif prompt[-1]["role"] == "tool":
            turns.append(_without_late_opening(prompt, text, lead, template))
        else:
            turns.append(None)
    own = [ranges or [(start, len(text))] for ranges, text in zip(turns, sequences, strict=True)]
    return Rendered(lead, sequences, turns, tuple(notes.values())), start, own


def _is_continued(prompt: list[Message]) -> bool:
    """Return whether the prompt ends with the start of a response, which the response continues."""
    last = prompt[-1]
    return last["role"] == "assistant" and "tool_calls" not in last and "content" in last


def _joined(prompt: list[Message], response: list[Message]) -> list[Message]:
    """Return the whole conversation; the start of a response is one message with its rest."""
    if not _is_continued(prompt):
        return prompt + response
    if any(name in response[0] for name in REASONING_FIELDS):
        raise BadRecord("a response that continues a message has reasoning before its content")
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
    prompt: list[Message],
    response: list[Message],
    text: str,
    lead: str,
    template: _Template,
    *,
    several: bool,
) -> list[Range]:
    """Return the ranges of a rendered conversation that are the model's turns in a response.

    The model's texts are replaced by marks, so that the template shows where it writes each. A turn
    begins after the template's opening of it, and ends with the mark that ends it.

    Args:
        prompt: Messages of the prompt.
        response: Messages of the response.
        text: Both, rendered.
        lead: The prompt with the generation prompt, rendered.
        template: The template.
        several: Leave out white space after the end of a turn: it is not the model's.

    Raises:
        BadRecord: If the template writes other text around the marks.
    """
    word = "mark"
    while word in text:
        word += "k"
    marked, texts = _marked(response, word)
    mark = re.compile(rf"{word}(\d+)x")
    skeleton = template.render(_joined(prompt, marked))
    places: list[tuple[int, Range]] = []  # of each mark in the text, in order
    ends = [(0, 0)]  # of each mark in the skeleton, and of its text in the text
    written, end = "", 0
    for match in mark.finditer(skeleton):
        written += skeleton[end : match.start()]
        own_text = texts[int(match[1])][1]
        places.append((int(match[1]), (len(written), len(written) + len(own_text))))
        written, end = written + own_text, match.end()
        ends.append((end, len(written)))
    written += skeleton[end:]
    opening = _opening(prompt, lead, template)
    turns: list[Range] = []
    for number in range(len(response)):
        own = [(m, place) for m, place in places if texts[m][0] == number]
        # the conversation up to this turn: text after it may repeat the name of its tool
        cut = template.render(_joined(prompt, marked[: number + 1])) if own else ""
        left = Counter(int(m[1]) for m in mark.finditer(cut))
        own = [(m, place) for m, place in own if left[m] and not left.subtract([m])]
        if not own:  # the template writes nothing of this message
            continue
        first, (last_mark, (_, last)) = own[0][1][0], own[-1]
        before = turns[-1][1] if turns else 0
        for message in response[:number]:  # a turn begins after what others have said
            said = _text_of(message).strip()
            if message["role"] != "assistant" and said:
                before = max(before, text.rfind(said, before, first) + len(said))
        start = _after_opening(text, before, first, opening)
        if number == 0 and text.startswith(lead):
            start = len(lead)
        elif number and start == first:
            # the template has no generation prompt: see where the earlier messages end
            until = template.render(_joined(prompt, marked[:number]), add_generation_prompt=True)
            place, place_in_text = max(pair for pair in ends if pair[0] <= len(until))
            if skeleton.startswith(until):
                start = min(max(place_in_text + len(until) - place, before), first)
        *_, after_mark = (m for m in mark.finditer(cut) if int(m[1]) == last_mark)
        ending = _common_start(text[last:], cut[after_mark.end() :], template.added_tokens)
        if several:
            ending = ending.rstrip() or ending
        turns.append((start, last + len(ending)))
    if written != text or not turns:
        raise BadRecord("the turns of a response cannot be found in what the chat template writes")
    return turns


def _text_of(message: Message) -> str:
    """Return the content of a message as text."""
    content = message.get("content") or ""
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


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
        parts = THINK.split(content)
        return "".join(x if THINK.fullmatch(x) else mark(message, x) for x in parts)

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


OTHER_OPENING = Note(
    "the chat template's generation prompt is not how it begins a response, so the model is asked "
    "with another prompt than it is trained on; set one that begins responses with its generation "
    f"prompt {SETTING}"
)
REWRITTEN_PROMPT = Note(
    "the chat template writes prompts differently when a response follows; only responses are "
    "scored, but in another context than the model is asked with; set one that writes both alike "
    f"{SETTING}"
)
