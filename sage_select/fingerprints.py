"""Fingerprints: one short name for all that decides what a tokenizer or a model computes."""

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

HASH_AT_ONCE = 1 << 26  # elements of a tensor brought to the CPU at once


def digest(value: Any) -> str:
    """A fingerprint of plain values, the same in every process.

    Example:
        >>> digest({"a": 1, "b": [2, 3]}) == digest({"b": [2, 3], "a": 1})
        True
    """
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


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
    return digest(
        [
            vocabulary,
            tokenizer.eos_token_id,
            {str(k): str(v) for k, v in tokenizer.special_tokens_map.items()},
            tokenizer.chat_template,
        ]
    )


def model_digest(model: nn.Module) -> str:
    """A fingerprint of a causal language model's weights and of the settings that shape its logits.

    Every byte of every parameter and persistent buffer counts, and so does its dtype. Adapters of a
    PEFT model do not: the fingerprint is that of the base model, which is what the reference is.
    """
    whole = hashlib.blake2b(digest_size=16)
    whole.update(digest(_settings(model)).encode())
    for name, tensor in sorted(_base_weights(model), key=lambda named: named[0]):
        whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        for piece in torch.split(tensor.detach().reshape(-1), HASH_AT_ONCE):
            whole.update(piece.contiguous().cpu().view(torch.uint8).numpy().data)
    return whole.hexdigest()


def has_adapters(model: nn.Module) -> bool:
    """Whether this is a PEFT model, whose adapters can be switched off."""
    return hasattr(model, "peft_config") and hasattr(model, "disable_adapter")


def _base_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Weights under the names they have in the base model; tied ones once."""
    adapters = has_adapters(model)
    prefix = getattr(getattr(model, "base_model", None), "prefix", "lora_")
    added = (prefix, "lora_", "modules_to_save", "prompt_encoder")
    seen = set()
    for name, tensor in model.state_dict().items():
        if adapters:
            parts = name.removeprefix("base_model.").removeprefix("model.").split(".")
            if any(part.startswith(added) for part in parts):
                continue
            name = ".".join(p for p in parts if p not in ("base_layer", "original_module"))
        place = (tensor.data_ptr(), tensor.dtype, tensor.shape)
        if tensor.numel() and place in seen:
            continue
        seen.add(place)
        yield name, tensor


_NO_MATTER = (
    "_name_or_path",
    "_commit_hash",
    "transformers_version",
    "use_cache",
    "dtype",
    "torch_dtype",
    "architectures",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)


def _settings(model: nn.Module) -> Any:
    """The configuration, without what changes no log-prob or is part of the weights anyway."""
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "to_dict"):
        return type(model).__qualname__
    return {k: v for k, v in config.to_dict().items() if k not in _NO_MATTER}
