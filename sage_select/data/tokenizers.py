"""Fingerprints of tokenizers: hashes of everything that decides how text becomes tokens."""

import json
from datetime import date
from typing import Any

from sage_select.system.identity import digest


def tokenizer_digest(tokenizer: Any) -> str:
    """Return a fingerprint of a tokenizer's vocabulary, settings, end token and chat template.

    Padding and truncation are left out: they are settings of the last call, not of the tokenizer.
    """
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if hasattr(backend, "to_str"):
        parts = json.loads(backend.to_str())
        vocabulary = {k: v for k, v in parts.items() if k not in ("padding", "truncation")}
    else:
        vocabulary = {"vocabulary": tokenizer.get_vocab(), "class": type(tokenizer).__qualname__}
    return digest(
        [
            vocabulary,
            # a prompt that contains the date has other tokens tomorrow
            str(date.today()) if writes_the_date(tokenizer) else None,
            [getattr(tokenizer, name, None) for name in _TOKENIZER_SETTINGS],
            tokenizer.eos_token_id,
            {str(k): str(v) for k, v in tokenizer.special_tokens_map.items()},
            tokenizer.chat_template,
        ]
    )


def writes_the_date(tokenizer: Any) -> bool:
    """Return whether the chat template writes the current date into prompts."""
    return "strftime_now" in json.dumps(tokenizer.chat_template)


_TOKENIZER_SETTINGS = ("split_special_tokens", "add_bos_token", "add_eos_token", "legacy")
