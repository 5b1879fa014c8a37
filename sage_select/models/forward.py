"""One forward pass over a batch of sequences, to the log-probs of their responses."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sage_select.models.attention import attention_for
from sage_select.models.batches import Batch, Packing
from sage_select.models.flops import Shape, shape_of
from sage_select.models.heads import head_of, of_transformers
from sage_select.models.known import known
from sage_select.models.wrappers import computes_in, is_sharded, unwrapped
from sage_select.ops.token_logps import Implementation, sequence_logps
from sage_select.system.ledger import Work, book, recording


def forward_logps(through: nn.Module, batch: Batch, impl: Implementation = "auto") -> Tensor:
    """Summed log-prob of each sequence's response, float64 [S], in the mode the model is in.

    The head is reached from inside the model's own forward, where its weight is whole even when
    it is sharded. There it sees the positions that predict response tokens, and no others.

    Args:
        through: The model, or a wrapper of it that exchanges gradients.
        batch: The sequences.
        impl: How the head's log-probs are computed.

    Raises:
        TypeError: If the model does not call its head once, with a state for each token.
    """
    model = unwrapped(through)
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
                "others that put tokens of their own into a sequence cannot be measured"
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
        return (hidden[:, :0],)  # the model goes on with logits of no positions

    with known(model).lock:
        hook = head.module.register_forward_pre_hook(score_instead)
        try:
            output = call(through, on_device)
        finally:
            hook.remove()
    if len(result) != 1:
        raise TypeError(
            f"measure: the forward of {type(model).__name__} called its output head "
            f"{len(result)} times, not once"
        )
    if recording():
        book(_executed(model, batch))
    if torch.is_grad_enabled() and is_sharded(model):
        # gradients must come in by the model's output, where FSDP2 waits to gather weights again
        return result[0] + 0 * logits_of(output).sum()
    return result[0]


def logits_of(output: Any) -> Tensor:
    """The logits in what a model returns."""
    logits: Tensor = output[0] if isinstance(output, tuple) else getattr(output, "logits", output)
    return logits


def call(through: nn.Module, batch: Batch) -> Any:
    """The model's own output for a batch on its device.

    A module that is not of transformers gets token ids alone: padding on the right cannot reach the
    tokens before it.
    """
    model = unwrapped(through)
    if not of_transformers(model):
        return through(batch.inputs["input_ids"])
    with attention_for(model, packed="packing" in batch.inputs):
        return through(**batch.inputs)


def recomputes(model: nn.Module) -> bool:
    """Whether layers are computed again in the backward pass (activation checkpointing)."""
    return any(getattr(m, "gradient_checkpointing", False) and m.training for m in model.modules())


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's first parameter."""
    return next(model.parameters()).device


def precision_of(model: nn.Module) -> torch.dtype:
    """The dtype in which its body computes just now."""
    device = device_of(model).type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return computes_in(model)


def known_shape(model: nn.Module) -> Shape:
    """The model's shape, counted once."""
    record = known(model)
    if record.shape is None:
        record.shape = shape_of(model)
    return record.shape


def _executed(model: nn.Module, batch: Batch) -> Work:
    rows, length = batch.inputs["input_ids"].shape
    packing: Packing | None = batch.inputs.get("packing")
    lengths = np.full(rows, length) if packing is None else np.diff(packing.bounds)
    shape, scored = known_shape(model), len(batch.targets)
    work = shape.executed(rows * length, scored, lengths)
    if not torch.is_grad_enabled():
        return work
    head_again = Work(executed=2.0 * shape.head * scored)  # backward computes its logits again
    return work * (shape.passes + recomputes(model)) + head_again


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients inside; modes and generators as before afterwards."""
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
    """Mixed precision on the model's device; none where the dtype is None."""
    with torch.autocast(device_of(model).type, dtype=dtype, enabled=dtype is not None):
        yield
