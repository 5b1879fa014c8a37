"""`token_logps` and `sequence_logps`: argument checks and dispatch to the implementations."""

import math
from typing import Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from sage_select.ops.logits import IGNORED
from sage_select.ops.operators import TAGS, check_targets, token_logps_operator
from sage_select.ops.reference import token_logps_reference
from sage_select.ops.shards import Shard, named

Implementation = Literal["auto", "reference", "chunked", "fused"]


def token_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    temperature: float = 1.0,
    impl: Implementation = "auto",
    shard: Shard | None = None,
) -> Tensor:
    """Log-probability of each target token, from hidden states and the output head's weight.

    Equal to `log_softmax(hidden @ weight.T + bias)` at the targets, with fp32 logits whatever the
    inputs' dtype. Differentiable in hidden, weight and bias; second derivatives only with
    `impl="reference"`. `torch.compile` and `torch.export` trace it without a graph break.

    Args:
        hidden: [N, H], states that predict the targets.
        weight: [V, H], the output head. If the head is sharded over ranks, this rank's rows, with
            `shard`; or a DTensor sharded by rows over a mesh of one dimension.
        targets: int64 [N]; -100 is ignored and gives 0.
        bias: [V].
        softcap: Logits become softcap * tanh(logits / softcap), as in Gemma 2.
        temperature: Logits are divided by it, after the softcap.
        impl: "reference" stores all logits; "chunked" (also "auto") stores one block of the
            vocabulary at a time; "fused" stores none, using Triton kernels, and raises if they
            cannot run: see `sage_select.ops.fused`.
        shard: Position of this rank's rows in the vocabulary, and the group that has the others.
            All targets are ids of the whole vocabulary. Every rank gets complete log-probs and
            hidden-state gradients for its tokens, and the gradient of its own rows of the weight,
            summed over the tokens of all ranks.

    Returns:
        float32 [N] (float64 for float64 inputs), in nats.

    Raises:
        ValueError: If shapes, targets, options or the ranks' shards do not fit.
        TypeError: If the targets are not int64, or hidden and weight are not floating-point.
        NotImplementedError: If second derivatives are requested, unless impl is "reference".

    Example:
        >>> token_logps(torch.zeros(2, 3), torch.zeros(4, 3), torch.tensor([1, -100])).exp()
        tensor([0.2500, 1.0000])
    """
    if isinstance(weight, DTensor):
        hidden, weight, targets, bias, shard = _unwrapped(hidden, weight, targets, bias, shard)
    _check(hidden, weight, targets, bias, softcap, temperature)
    impl = resolved(impl)
    if impl == "reference":
        if shard is not None:
            raise ValueError(
                'token_logps: impl="reference" needs the whole vocabulary, but got a shard; use '
                'impl="chunked"'
            )
        return _reference(hidden, weight, targets, bias, softcap, temperature)
    if impl not in ("chunked", "fused"):
        raise ValueError(
            f"token_logps: impl must be auto, reference, chunked or fused, got {impl!r}"
        )
    shard_options = (
        (0, None, False) if shard is None else (shard.start, named(shard.group), shard.own_tokens)
    )
    logps: Tensor = token_logps_operator(
        hidden, weight, targets, bias, softcap, temperature, impl, *shard_options
    )[0]
    return logps


def _unwrapped(
    hidden: Tensor, weight: DTensor, targets: Tensor, bias: Tensor | None, shard: Shard | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Shard | None]:
    """Return the local tensors of DTensors, and the shard of the vocabulary that they form."""
    mesh, placements = weight.device_mesh, weight.placements
    row_sharded = [i for i, placement in enumerate(placements) if placement.is_shard(0)]
    if shard is not None or len(row_sharded) != 1 or mesh.ndim != 1:
        raise ValueError(
            "token_logps: a DTensor weight must be sharded by rows over a mesh of one dimension, "
            f"with shard=None; got {placements} on {mesh.ndim} dimensions and shard={shard}. "
            "Otherwise pass weight.to_local() with a Shard"
        )
    _, offset = compute_local_shape_and_global_offset(weight.shape, mesh, placements)
    own_tokens = False
    if isinstance(hidden, DTensor):
        own_tokens = hidden.placements[0].is_shard(0)
        if hidden.device_mesh != mesh or not (own_tokens or hidden.placements[0].is_replicate()):
            raise ValueError(
                "token_logps: hidden must be on the mesh of the weight, replicated or sharded by "
                f"rows, got {hidden.placements} on {hidden.device_mesh}"
            )
        hidden = hidden.to_local()
    if isinstance(targets, DTensor):
        targets = targets.to_local()
    if isinstance(bias, DTensor):
        bias = bias.to_local()
    return (
        hidden,
        weight.to_local(),
        targets,
        bias,
        Shard(offset[0], mesh.get_group(), own_tokens),
    )


def _reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    temperature: float,
) -> Tensor:
    """Log-probs by the specification, 0 for ignored tokens.

    Ignored tokens are masked rather than dropped, so that no shape depends on the targets.
    """
    # a compiled graph cannot read the targets' values here; its gather refuses wrong ones itself
    if not torch.compiler.is_compiling():
        check_targets(targets, len(weight))
    scored = targets != IGNORED
    with torch.autocast(hidden.device.type, enabled=False):  # it would round the logits to bf16
        logps = token_logps_reference(
            hidden.where(scored[:, None], 0),  # a NaN would reach the weight's gradient
            weight,
            targets.where(scored, 0),
            bias,
            softcap,
            temperature,
        )
    return logps.where(scored, 0)


def resolved(impl: Implementation) -> Implementation:
    """Return the implementation that "auto" selects; any other is returned unchanged."""
    return "chunked" if impl == "auto" else impl


def sequence_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    cu_seqlens: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    temperature: float = 1.0,
    impl: Implementation = "auto",
    shard: Shard | None = None,
) -> Tensor:
    """Sum of the log-probabilities of each sequence's targets, in float64 and in token order.

    Args:
        hidden: [N, H], the hidden states of all sequences, end to end.
        weight: [V, H].
        targets: int64 [N]; -100 is ignored and adds 0.
        cu_seqlens: int [S + 1], the position at which each sequence starts, then N.
        bias: As in `token_logps`.
        softcap: As in `token_logps`.
        temperature: As in `token_logps`.
        impl: As in `token_logps`.
        shard: As in `token_logps`.

    Returns:
        float64 [S], in nats; 0 for an empty sequence.

    Example:
        >>> hidden, weight, targets = torch.zeros(3, 2), torch.zeros(4, 2), torch.tensor([0, 1, 2])
        >>> sequence_logps(hidden, weight, targets, torch.tensor([0, 1, 3])).exp()
        tensor([0.2500, 0.0625], dtype=torch.float64)
    """
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(
            "sequence_logps: cu_seqlens must be [S + 1] and start at 0, got shape "
            f"{list(cu_seqlens.shape)}"
        )
    lengths = _lengths(cu_seqlens, targets.shape[0]).to(hidden.device)
    logps = token_logps(
        hidden,
        weight,
        targets,
        bias=bias,
        softcap=softcap,
        temperature=temperature,
        impl=impl,
        shard=shard,
    )
    if lengths.shape[0] == 0:
        return logps.double()  # also empty; segment_reduce refuses zero segments
    # each segment is summed alone in token order, so its bits do not depend on the other sequences
    sums: Tensor = torch.segment_reduce(logps.double(), "sum", lengths=lengths, initial=0.0)
    return sums


@torch.library.custom_op("sage_select::lengths", mutates_args=(), **TAGS)
def _lengths(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """Lengths of the sequences, int64 [S].

    A custom operator, so that the values are also checked each time compiled code runs.
    """
    lengths = cu_seqlens.diff().to(torch.int64)
    if cu_seqlens[0] != 0:
        raise ValueError(
            f"sequence_logps: cu_seqlens must be [S + 1] and start at 0, got {cu_seqlens}"
        )
    if bool((lengths < 0).any()) or int(cu_seqlens[-1]) != tokens:
        raise ValueError(
            f"sequence_logps: cu_seqlens must rise from 0 to {tokens}, the number of tokens, got "
            f"{cu_seqlens}"
        )
    return lengths


@_lengths.register_fake
def _(cu_seqlens: Tensor, tokens: int) -> Tensor:
    return cu_seqlens.new_empty(cu_seqlens.shape[0] - 1, dtype=torch.int64)


def _check(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    temperature: float,
) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            "token_logps: hidden must be [N, H] and weight [V, H], got "
            f"{list(hidden.shape)} and {list(weight.shape)}"
        )
    if not hidden.is_floating_point() or not weight.is_floating_point():
        raise TypeError(
            "token_logps: hidden and weight must be floating-point, got "
            f"{hidden.dtype} and {weight.dtype}"
        )
    if targets.dtype != torch.int64:
        raise TypeError(
            f"token_logps: targets must be int64, got {targets.dtype}; use targets.long()"
        )
    if targets.shape != hidden.shape[:1]:
        raise ValueError(
            f"token_logps: targets must be [N] = [{len(hidden)}], one per hidden state, got "
            f"{list(targets.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"token_logps: bias must be [V] = [{len(weight)}], got {list(bias.shape)}")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"token_logps: softcap must be positive and finite, got {softcap}")
    if not 0 < temperature < math.inf:
        raise ValueError(f"token_logps: temperature must be positive and finite, got {temperature}")
