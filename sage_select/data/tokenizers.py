"""Fingerprints of tokenizers: everything that decides how text becomes tokens."""

import json
from datetime import date
from typing import Any

from sage_select.system.identity import digest


def tokenizer_digest(tokenizer: Any) -> str:
    """A fingerprint of a tokenizer's text-to-token map, its end token and its chat template.

    Padding and truncation are left out: they belong to the last call, not to the tokenizer.
    """
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if hasattr(backend, "to_str"):
        parts = json.loads(backend.to_str())
        vocabulary = {k: v for k, v in parts.items() if k not in ("padding", "truncation")}
    else:
        vocabulary = {"vocabulary": tokenizer.get_vocab(), "class": type(tokenizer).__qualname__}
    template = tokenizer.chat_template
    return digest(
        [
            vocabulary,
            str(date.today()) if writes_the_date(tokenizer) else None,
            [getattr(tokenizer, name, None) for name in _TOKENIZER_SETTINGS],
            tokenizer.eos_token_id,
            {str(k): str(v) for k, v in tokenizer.special_tokens_map.items()},
            template,
        ]
    )


def writes_the_date(tokenizer: Any) -> bool:
    """Whether the chat template puts the day on which it is applied into prompts."""
    return "strftime_now" in json.dumps(tokenizer.chat_template)


_TOKENIZER_SETTINGS = ("split_special_tokens", "add_bos_token", "add_eos_token", "legacy")
