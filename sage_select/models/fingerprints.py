"""Fingerprints of models: base weights and settings, without adapters."""

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from sage_select.system.identity import digest

HASH_AT_ONCE = 1 << 26  # elements of a tensor copied to the CPU at a time


def model_digest(model: nn.Module) -> str:
    """Fingerprint of a causal language model: its weights, and settings that affect its logits.

    Every byte of every parameter and buffer counts, and so does its dtype. Adapters of a PEFT model
    do not: the fingerprint is that of the base model, which serves as the reference. A sharded
    model has the same fingerprint as the whole one; all of its processes must call this function.
    """
    whole = hashlib.blake2b(digest_size=16)
    whole.update(digest(_logit_settings(model)).encode())
    for name, tensor in sorted(_base_weights(model), key=lambda named: named[0]):
        whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        whole_tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        # in pieces, since they are copied to the CPU
        for piece in torch.split(whole_tensor.detach().reshape(-1), HASH_AT_ONCE):
            whole.update(piece.contiguous().cpu().view(torch.uint8).numpy().data)
    return whole.hexdigest()


def has_adapters(model: nn.Module) -> bool:
    """Return whether this is a PEFT model, whose adapters can be disabled."""
    return hasattr(model, "peft_config") and hasattr(model, "disable_adapter")


def check_adapters_come_off(model: nn.Module) -> None:
    """Refuse a model that is not the base model when its adapters are disabled.

    Raises:
        ValueError: If adapters were added without PEFT's own wrapper, are merged, or have changed
            the base model's weights.
    """
    if getattr(model, "_hf_peft_config_loaded", False) and not has_adapters(model):
        raise ValueError(
            "ReferenceStore: the model has adapters of transformers' own, without PEFT's wrapper; "
            + _REMEDY
        )
    if any(getattr(module, "merged", False) for module in model.modules()):
        raise ValueError(
            "ReferenceStore: the adapters are merged into the weights; call "
            f"model.unmerge_adapter() first, or {_REMEDY}"
        )
    for config in getattr(model, "peft_config", {}).values() if has_adapters(model) else ():
        initialisation = str(getattr(config, "init_lora_weights", "")).lower()
        if initialisation.startswith(("pissa", "olora", "corda", "loftq")):
            raise ValueError(
                f"ReferenceStore: init_lora_weights={initialisation!r} changes the base model's "
                f"weights; {_REMEDY}"
            )
        if getattr(config, "bias", "none") != "none":
            raise ValueError(
                f"ReferenceStore: the adapters train biases of the base model "
                f"(bias={config.bias!r}); {_REMEDY}"
            )


def adapters_change(model: nn.Module) -> bool:
    """Return whether the low-rank adapters of a PEFT model change it, as they do once trained."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "lora_embedding_B" in name:
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            if bool(local.detach().any()):
                return True
    return False


_REMEDY = "pass the reference as a separate model, loaded from the weights the policy started from"


def _base_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Weights and all buffers, under the names that they have in the base model; tied ones once."""
    prefix = getattr(getattr(model, "base_model", None), "prefix", "lora_")
    added = (prefix, *_ADDED) if has_adapters(model) else ()
    saved = model.state_dict()
    unsaved = {name: buffer for name, buffer in model.named_buffers() if name not in saved}
    seen = set()
    for name, tensor in {**saved, **unsaved}.items():
        parts = [part for part in name.split(".") if part not in _WRAPPERS]
        if any(part.startswith(added) for part in parts if added):
            continue
        if parts[-1] == "inv_freq" and f"{name.rpartition('.')[0]}.original_inv_freq" in unsaved:
            tensor = tensor[:0]  # long sequences may rewrite it from the original; its dtype counts
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        storage = (local.data_ptr(), tensor.dtype, tensor.shape)
        if local.numel() and storage in seen:  # all empty tensors have the address 0
            continue
        seen.add(storage)
        yield ".".join(parts), tensor


_ADDED = ("lora_", "vera_", "modules_to_save", "prompt_encoder", "ranknum", "trainable_tokens")
_WRAPPERS = ("base_model", "model", "base_layer", "original_module", "_orig_mod", "module")
"""Parts of parameter names that adapters, compilation and parallelism insert."""


_IRRELEVANT_SETTINGS = (
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
    "id2label",
    "label2id",
    "problem_type",
)
"""Settings that change no log-prob, or that the weights determine."""


def _logit_settings(model: nn.Module) -> Any:
    """Class and configuration of the base model, without `_IRRELEVANT_SETTINGS`."""
    base: Any = getattr(model, "_orig_mod", model)
    base = base.get_base_model() if has_adapters(base) else base
    config: Any = getattr(base, "config", None)
    settings = config.to_dict() if hasattr(config, "to_dict") else {}
    # fully_shard changes the class of a model to a new one, derived from FSDPModule and the model's
    model_class = type(base).__bases__[1] if isinstance(base, FSDPModule) else type(base)
    relevant = {k: v for k, v in settings.items() if k not in _IRRELEVANT_SETTINGS}
    return [model_class.__qualname__, relevant]
