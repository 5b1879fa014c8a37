"""Checks of the fields of a record: text, messages, tool calls and options."""

import json
import re
from collections.abc import Mapping
from typing import Any

from sage_select.data.reasons import BadRecord

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


def role_of(message: Any) -> str | None:
    """Return a message's role as chat templates name it, or None if it has no known role."""
    role = message.get("from", message.get("role")) if isinstance(message, dict) else None
    return ROLES.get(role.strip().lower()) if isinstance(role, str) else None


def as_messages(response: Any) -> Any:
    """Return a response given as text as a list of one message."""
    response = messages_of_text(response)
    is_text = isinstance(response, str)
    return [{"role": "assistant", "content": response}] if is_text else response


_MEDIA = re.compile(
    r"(^|_)(images?|img|imgs|pictures?|photos?|pixel|videos?|audios?|speech)(_|$)", re.IGNORECASE
)


_NO_MEDIA = re.compile(
    r"caption|descri|text|prompt|count|num|size|width|height|_id$", re.IGNORECASE
)


def check_media(where: str, record: Mapping[Any, Any]) -> None:
    """Refuse a record or a message with an image, a video or sound."""
    for name, value in record.items():
        if (
            _MEDIA.search(str(name))
            and not _NO_MEDIA.search(str(name))
            and isinstance(value, str | bytes | list | dict)
            and not is_empty(value)
        ):
            raise BadRecord(f"{where} {name} is not empty, but only text can be measured")


def checked_field(name: str, value: Any) -> Any:
    """Return a field's text, its messages in the form of chat templates, or None."""
    value = messages_of_text(value)
    if isinstance(value, dict) and name != "prompt":
        value = [value]  # a response of one message may be given without a list
    if isinstance(value, list):
        if not value:
            raise BadRecord(f"{name} is empty")
        return [checked_message(name, message) for message in value]
    if value is not None:
        check_text(name, value, f"{name} is not text")
        # a CSV stores a list of messages as text; as plain text it would be trained on wrongly
        if _SAVED_MESSAGES.match(value) and not _is_json(value):
            raise BadRecord(f"{name} is a list of messages saved as text that is not valid JSON")
    return value


_SAVED_MESSAGES = re.compile(
    r"""\s*(array\()?\s*\[?\s*\{(?=.{0,300}['"](role|from)['"]\s*:)(?=.{0,300}['"](content|value)['"]\s*:)""",
    re.DOTALL,
)
"""Messages as Python writes them, or numpy."""


def messages_of_text(value: Any) -> Any:
    """Return messages that are saved as JSON text as messages, and any other value as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
        return value
    try:
        parsed = json.loads(value)
    except (ValueError, RecursionError):
        return value
    if isinstance(parsed, dict) and role_of(parsed) is None:
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


def checked_message(name: str, message: Any) -> Message:
    """Return a message in the form of chat templates, without null fields."""
    if not isinstance(message, dict):
        raise BadRecord(f"{name} has a message without a role")
    message = {key: value for key, value in message.items() if value is not None}
    check_media(f"{name} has a message whose field", message)
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
    check_text(name, content, f"{name} has a message without text")
    return {"role": role, "content": content, **message}


def _tool_calls(name: str, calls: Any) -> list[dict[str, Any]]:
    """Return a message's tool calls, without null fields outside their arguments."""
    calls = parsed_json("tool_calls", calls, list) or []
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


def parsed_json(name: str, value: Any, kind: type) -> Any:
    """Return a list or mapping, parsed if it is JSON text, or None if it is empty."""
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise BadRecord(f"{name} is not valid JSON") from None
    if value and not isinstance(value, kind):
        raise BadRecord(f"{name} is not a {'list' if kind is list else 'mapping'}")
    return value or None


def template_options(options: Any) -> dict[str, Any] | None:
    """Return further options of the chat template, or None if there are none."""
    options = parsed_json("chat_template_kwargs", options, dict)
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


def is_empty(value: Any) -> bool:
    """Return whether a field is missing or null, or has no content, also in a table or as text."""
    if isinstance(value, dict):
        return all(map(is_empty, value.values()))
    if isinstance(value, list):
        return all(map(is_empty, value))
    if isinstance(value, str):
        return value.strip().lower() in ("", "[]", "{}", "null", "none", "nan")
    return value is None or value != value  # NaN, of a CSV


def parsed_list(value: Any) -> Any:
    """Return a list that is saved as JSON text as a list, and any other value as it is."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def check_text(name: str, value: Any, reason: str) -> None:
    if not isinstance(value, str):
        raise BadRecord(reason)
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadRecord(f"{name} is not valid Unicode") from None


def check_response(name: str, response: Any) -> None:
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
