"""Log-probs of the responses in a batch, from one forward pass."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from sage_select.models.attention import attention_for
from sage_select.models.batches import Batch, Packing
from sage_select.models.flops import Shape, shape_of
from sage_select.models.heads import head_of, of_transformers
from sage_select.models.known import known
from sage_select.models.wrappers import (
    called_as_written,
    check_synchronises,
    computes_in,
    unwrapped,
)
from sage_select.ops.token_logps import Implementation, sequence_logps
from sage_select.system.ledger import Work, book, recording


def forward_logps(through: nn.Module, batch: Batch, impl: Implementation = "auto") -> Tensor:
    """Summed log-prob of each sequence's response, float64 [S], in the model's current mode.

    A hook replaces the head inside the model's own forward, where its weight is whole even if it
    is sharded. It computes log-probs only at positions that predict response tokens. They are the
    model's output then, so that wrappers see which output the gradients come from:
    DistributedDataParallel looks for unused parameters and records static graphs from there, and
    FSDP2 gathers weights for the backward pass.

    Args:
        through: The model, or a wrapper of it that synchronises gradients.
        batch: The sequences.
        impl: Implementation of the head's log-probs.

    Raises:
        TypeError: If the model does not call its head exactly once, with a hidden state for each
            token.
    """
    model = unwrapped(through)
    if torch.is_grad_enabled():
        check_synchronises(through)
    head = head_of(model)
    on_device = batch.to(device_of(model))
    shape = on_device.inputs["input_ids"].shape
    result: list[Tensor] = []

    def score_instead(module: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor]:
        hidden: Tensor = args[0]
        if hidden.shape[:2] != shape:
            raise TypeError(
                f"measure: the output head of {type(model).__name__} was given states of shape "
                f"{list(hidden.shape[:2])} for tokens of shape {list(shape)}; prompt tuning and "
                "other methods that insert virtual tokens cannot be measured"
            )
        result.append(
            sequence_logps(
                hidden.reshape(-1, hidden.shape[-1])[on_device.predicts] * head.scale,
                head.weight,
                on_device.targets,
                on_device.cu_seqlens,
                bias=head.bias,
                softcap=head.softcap,
                impl=impl,
            )
        )
        return (hidden[:, :0],)  # no positions are left, so the model computes no logits

    def leave_instead(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if len(result) != 1:
            return output
        if isinstance(head.module, FSDPModule):
            # a head that is sharded by itself is gathered when gradients reach its own output
            return result[0] + 0 * logits_of(output).sum()
        return result[0]

    with known(model).lock:  # a pass in another thread must not run into this batch's hooks
        hooks = (
            head.module.register_forward_pre_hook(score_instead),
            # first of the model's hooks, so that FSDP2's sees the log-probs
            model.register_forward_hook(leave_instead, prepend=True),
        )
        try:
            with called_as_written(through, head.module):
                output = call(through, on_device)
        finally:
            for hook in hooks:
                hook.remove()
    if len(result) != 1:
        raise TypeError(
            f"measure: the forward of {type(model).__name__} called its output head "
            f"{len(result)} times, not once"
        )
    if recording():
        book(_executed(model, batch))
    if not torch.is_grad_enabled():
        return result[0]
    left: Tensor = output
    if left.dtype == result[0].dtype:
        return left
    # FSDP2's `output_dtype` rounds outputs: keep the value, and the path of the gradient
    return result[0] + 0 * left.sum()


def logits_of(output: Any) -> Tensor:
    """Return the logits from a model's output."""
    logits: Tensor = output[0] if isinstance(output, tuple) else getattr(output, "logits", output)
    return logits


def call(through: nn.Module, batch: Batch) -> Any:
    """Run the model on a batch that is on its device, and return the model's own output.

    A module that is not from transformers gets only token ids: in a causal model, padding on the
    right cannot affect the tokens before it.
    """
    model = unwrapped(through)
    if not of_transformers(model):
        return through(batch.inputs["input_ids"])
    with attention_for(model, packed="packing" in batch.inputs):
        return through(**batch.inputs)


def recomputes(model: nn.Module) -> bool:
    """Return whether the backward pass recomputes layers (activation checkpointing)."""
    return any(getattr(m, "gradient_checkpointing", False) and m.training for m in model.modules())


def device_of(model: nn.Module) -> torch.device:
    """Device of the model's first parameter."""
    return next(model.parameters()).device


def precision_of(model: nn.Module) -> torch.dtype:
    """Dtype in which the model's body currently computes, autocast included."""
    device = device_of(model).type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return computes_in(model)


def known_shape(model: nn.Module) -> Shape:
    """Shape of the model, counted once per model."""
    record = known(model)
    if record.shape is None:
        record.shape = shape_of(model)
    return record.shape


def _executed(model: nn.Module, batch: Batch) -> Work:
    """Work of a batch, including its backward pass if gradients are enabled."""
    rows, length = batch.inputs["input_ids"].shape
    packing: Packing | None = batch.inputs.get("packing")
    lengths = np.full(rows, length) if packing is None else np.diff(packing.bounds)
    shape, scored = known_shape(model), len(batch.targets)
    work = shape.executed(rows * length, scored, lengths)
    if not torch.is_grad_enabled():
        return work
    head_recomputed = Work(executed=2.0 * shape.head * scored)  # logits are not kept for backward
    return work * (shape.passes + recomputes(model)) + head_recomputed


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Switch to eval mode without gradients; restore modes and random generators afterwards."""
    # module by module: a host may train some of them and keep others in eval mode
    training = [module for module in model.modules() if module.training]
    device = device_of(model)
    try:
        model.eval()
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def autocast(model: nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    """Run in mixed precision on the model's device; None switches off autocast, outer ones too."""
    with torch.autocast(device_of(model).type, dtype=dtype, enabled=dtype is not None):
        yield
