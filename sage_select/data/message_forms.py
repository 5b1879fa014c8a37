"""Forms of messages that chat templates expect, and the texts and calls in a message."""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any

from sage_select.data.messages import Message

REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
"""Names under which messages have reasoning apart from their content."""

THINK = re.compile(r"(</?think(?:ing)?>)")
"""Marks of reasoning inside a message's content."""

Form = Callable[[list[Message]], list[Message]]
"""A function that changes messages to a form that a template may need."""


def forms_of(messages: list[Message]) -> list[Form]:
    """Return the forms that these messages can have, those with the fewest changes first."""
    choices: list[tuple[Callable[[Message], Message], ...]] = [(dict, _with_parts)]
    if any("tool_calls" in m for m in messages):
        choices.append((with_mapped_arguments, _with_text_arguments))
    if any("content" not in m for m in messages):
        choices.append((dict, _with_null_content, _with_empty_content))
    if any(name in m for m in messages for name in REASONING_FIELDS):
        choices.append((dict, _with_all_reasoning_fields))
    combinations = sorted(product(*map(enumerate, choices)), key=lambda c: sum(i for i, _ in c))
    return [_form([change for _, change in combination]) for combination in combinations]


def _form(changes: Sequence[Callable[[Message], Message]]) -> Form:
    def form(messages: list[Message]) -> list[Message]:
        for change in changes:
            messages = [change(message) for message in messages]
        return messages

    return form


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


def with_mapped_arguments(message: Message) -> Message:
    """Return a message whose tool calls have their arguments as a mapping, if they are JSON."""

    def mapping(arguments: Any) -> Any:
        parsed = arguments
        for _ in range(2):  # some data sets have encoded the text twice
            if not isinstance(parsed, str):
                break
            try:
                parsed = json.loads(parsed) if parsed.strip() else {}
            except (ValueError, RecursionError):
                break
        return parsed if isinstance(parsed, dict | list) else arguments

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


def texts_of(message: Message) -> Iterator[tuple[str, str]]:
    """Yield the texts of a message that must be in its rendering, each with its kind."""
    for name in REASONING_FIELDS:
        if isinstance(message.get(name), str):
            yield "reasoning", message[name]
            break  # templates read one of them
    *thoughts, text = THINK.split(message.get("content") or "")
    for part in thoughts:
        if not THINK.fullmatch(part):
            yield "reasoning", part
    yield "text", text
    if isinstance(message.get("function_call"), dict):  # as OpenAI had it before tool calls
        yield "tool calls", str(message["function_call"].get("name", ""))
    for call in message.get("tool_calls", ()):
        yield "tool calls", str(function_of(call).get("name", ""))
    for arguments in arguments_of(message):
        for value in _leaves(arguments):
            yield "tool calls", value


def arguments_of(message: Message) -> Iterator[Any]:
    """Yield the arguments of a message's tool calls, parsed if they are JSON text."""
    for call in with_mapped_arguments(message).get("tool_calls", ()):
        yield function_of(call).get("arguments")


def function_of(value: Any) -> dict[str, Any]:
    """Return the function of a tool or a tool call."""
    if not isinstance(value, dict):
        return {}
    return value["function"] if isinstance(value.get("function"), dict) else value


def _leaves(value: Any) -> Iterator[str]:
    """Yield the texts in nested lists and mappings."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, str):
        yield value
