"""From a record of any accepted shape to a pair, or to the reason why it is none."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

Message = dict[str, Any]
"""One turn of a conversation: `{"role": ..., "content": ...}`."""


class Pair(NamedTuple):
    """A pair whose fields were checked: all three are text, or all three are messages."""

    prompt: Any  # str | list[Message]
    chosen: Any
    rejected: Any


class BadRecord(Exception):
    """Why a record cannot be used, in the same words for the same reason: they are counted."""


def checked_pair(row: Any) -> Pair:
    """The fields of a record, with the prompt made explicit; raises BadRecord with the reason."""
    if not isinstance(row, dict):
        raise BadRecord("not a record")
    prompt, chosen, rejected = (_checked(name, row.get(name)) for name in Pair._fields)
    for name, response in (("chosen", chosen), ("rejected", rejected)):
        _check_response(name, response)
    if type(chosen) is not type(rejected):
        raise BadRecord("chosen and rejected are of different kinds")
    if isinstance(chosen, list):
        prompt, chosen, rejected = _conversation(prompt, chosen, rejected)
    elif isinstance(prompt, list):
        raise BadRecord("prompt is a list of messages but the responses are text")
    elif prompt is None:
        prompt, chosen, rejected = _split_common_text(chosen, rejected)
    if chosen == rejected:
        raise BadRecord("chosen and rejected are identical")
    return Pair(prompt, chosen, rejected)


def _checked(name: str, value: Any) -> Any:
    """Text or messages, or None; what is absent from a message is left out of it."""
    if isinstance(value, list):
        _check_messages(name, value)
        return [{key: x for key, x in message.items() if x is not None} for message in value]
    if value is not None:
        _check_text(name, value, f"{name} is not text")
    return value


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
        response = response[-1]["content"]
    if not response.strip():
        raise BadRecord(f"{name} is empty")


def _conversation(
    prompt: Any, chosen: list[Message], rejected: list[Message]
) -> tuple[list[Message], list[Message], list[Message]]:
    """Prompt and responses of a conversation, however the set divides them."""
    if isinstance(prompt, str) and chosen[0]["role"] == rejected[0]["role"] == "assistant":
        return [{"role": "user", "content": prompt}], chosen, rejected
    if isinstance(prompt, list):
        # some sets repeat the prompt's messages in both responses
        size = len(prompt)
        if chosen[:size] == prompt == rejected[:size]:
            return prompt, chosen[size:], rejected[size:]
        if chosen[0] == prompt[0] or rejected[0] == prompt[0]:
            raise BadRecord("a response repeats a part of the prompt")
        return prompt, chosen, rejected
    # without a prompt, or with its text beside full conversations, the conversations rule
    return _split_common_messages(chosen, rejected)


def _check_messages(name: str, messages: list[Any]) -> None:
    if not messages:
        raise BadRecord(f"{name} is empty")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise BadRecord(f"{name} has a message without a role")
        _check_text(name, message.get("content"), f"{name} has a message without text")


def _split_common_messages(
    chosen: list[Message], rejected: list[Message]
) -> tuple[list[Message], list[Message], list[Message]]:
    shared = _check_split(shared_start(chosen, rejected), chosen, rejected)
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _split_common_text(chosen: str, rejected: str) -> tuple[str, str, str]:
    shared = _check_split(shared_start(chosen, rejected), chosen, rejected)
    prompt = chosen[:shared].removesuffix(" ")  # a word's leading space belongs to the word
    return prompt, chosen[len(prompt) :], rejected[len(prompt) :]


def _check_split(shared: int, chosen: Sequence[Any], rejected: Sequence[Any]) -> int:
    if chosen == rejected:
        raise BadRecord("chosen and rejected are identical")
    if shared == 0:
        raise BadRecord("chosen and rejected share no prompt")
    if shared in (len(chosen), len(rejected)):
        raise BadRecord("one response is the beginning of the other")
    return shared


def shared_start(*sequences: Sequence[Any]) -> int:
    """How many items these sequences have in common at their start."""
    for position, items in enumerate(zip(*sequences, strict=False)):
        if any(item != items[0] for item in items):
            return position
    return min(map(len, sequences))


def content_id(value: Any) -> str:
    """A hash of the text: the same whatever file, row or process it stands in."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()
