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


def checked_pair(row: dict[str, Any]) -> Pair:
    """The fields of a row, with the prompt made explicit; raises BadRecord with the reason."""
    for name in ("chosen", "rejected"):
        _check_response(name, row.get(name))
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    if type(chosen) is not type(rejected):
        raise BadRecord("chosen and rejected are of different kinds")
    if isinstance(chosen, list) and not isinstance(prompt, list):
        # some sets repeat the prompt as text beside full conversations; the conversations rule
        prompt, chosen, rejected = _split_common_messages(chosen, rejected)
    elif prompt is None:
        prompt, chosen, rejected = _split_common_text(chosen, rejected)
    elif isinstance(prompt, list):
        if isinstance(chosen, str):
            raise BadRecord("prompt is a list of messages but the responses are text")
        _check_messages("prompt", prompt)
    elif not isinstance(prompt, str):
        raise BadRecord("prompt is not text")
    if chosen == rejected:
        raise BadRecord("chosen and rejected are identical")
    return Pair(prompt, chosen, rejected)


def _check_response(name: str, response: Any) -> None:
    if response is None:
        raise BadRecord(f"{name} is missing")
    if isinstance(response, list):
        _check_messages(name, response)
        if response[-1]["role"] != "assistant":
            raise BadRecord(f"{name} does not end with an assistant message")
        response = response[-1]["content"]
    if not isinstance(response, str):
        raise BadRecord(f"{name} is not text")
    if not response.strip():
        raise BadRecord(f"{name} is empty")


def _check_messages(name: str, messages: list[Any]) -> None:
    if not messages:
        raise BadRecord(f"{name} is empty")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise BadRecord(f"{name} has a message without a role")
        if not isinstance(message.get("content"), str):
            raise BadRecord(f"{name} has a message without text")


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
