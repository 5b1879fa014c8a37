"""The two operations, checked and dispatched."""

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

    The same as `log_softmax(hidden @ weight.T + bias)` at the targets, with fp32 logits whatever
    the inputs' dtype. Differentiable in hidden, weight and bias: once, unless by the reference.
    `torch.compile` and `torch.export` trace it without a break.

    Args:
        hidden: [N, H], states that predict the targets.
        weight: [V, H], the output head. If processes share the head, this one's rows of it, with
            `shard`; or a DTensor that is sharded by rows over one dimension of a mesh.
        targets: int64 [N]; -100 is ignored and gives 0.
        bias: [V].
        softcap: Logits become softcap * tanh(logits / softcap), as in Gemma 2.
        temperature: Logits are divided by it, after the softcap.
        impl: "reference" keeps all logits; "chunked" (also "auto") keeps one block of the
            vocabulary at a time; "fused" keeps none, in Triton kernels, and never runs anything
            else instead: see `sage_select.ops.fused`.
        shard: Which rows these are, and who has the others. All targets are ids of the whole
            vocabulary. Every process gets the log-probs and the gradient of the hidden states of
            its tokens whole, and the gradient of its own rows, summed over all processes' tokens.

    Returns:
        float32 [N] (float64 for float64 inputs), in nats.

    Raises:
        ValueError: If shapes, targets, options or the processes' shards do not fit.
        TypeError: If the targets are not int64, or hidden and weight are not floating.

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
                'token_logps: impl="reference" needs the whole vocabulary; use impl="chunked"'
            )
        return _reference(hidden, weight, targets, bias, softcap, temperature)
    if impl not in ("chunked", "fused"):
        raise ValueError(
            f"token_logps: impl must be auto, reference, chunked or fused, got {impl!r}"
        )
    where = (
        (0, None, False) if shard is None else (shard.start, named(shard.group), shard.own_tokens)
    )
    logps: Tensor = token_logps_operator(
        hidden, weight, targets, bias, softcap, temperature, impl, *where
    )[0]
    return logps


def _unwrapped(
    hidden: Tensor, weight: DTensor, targets: Tensor, bias: Tensor | None, shard: Shard | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Shard | None]:
    """This process's part of DTensors, and what shard of the vocabulary it is."""
    mesh, placements = weight.device_mesh, weight.placements
    by_rows = [i for i, placement in enumerate(placements) if placement.is_shard(0)]
    if shard is not None or len(by_rows) != 1 or mesh.ndim != 1:
        raise ValueError(
            "token_logps: a weight that is a DTensor must be sharded by rows over a mesh of one "
            f"dimension, without a shard beside it, got {placements} on {mesh.ndim} dimensions "
            f"and shard={shard}; or give its local part, with a Shard"
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
    """The specification, and 0 where ignored; no shape hangs on the targets, as in the others."""
    if not torch.compiler.is_compiling():  # compiled, gather refuses them, in its own words
        check_targets(targets, len(weight))
    scored = targets != IGNORED
    with torch.autocast(hidden.device.type, enabled=False):  # it would round the logits to bf16
        logps = token_logps_reference(
            hidden.where(scored[:, None], 0),  # else a NaN would reach the weight's gradient
            weight,
            targets.where(scored, 0),
            bias,
            softcap,
            temperature,
        )
    return logps.where(scored, 0)


def resolved(impl: Implementation) -> Implementation:
    """What "auto" stands for; any other implementation stands for itself."""
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
    """Summed log-probability of each sequence's targets, added up in float64 in token order.

    Args:
        hidden: [N, H], the tokens of all sequences one after the other.
        weight: [V, H].
        targets: int64 [N]; -100 is ignored and adds 0.
        cu_seqlens: int [S + 1], where each sequence starts, and N at the end.
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
        raise ValueError("sequence_logps: cu_seqlens must be [S + 1] and start at 0")
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
        return logps.double()  # no sequence, no token
    # a segment's own tokens in their own order: the same bits whatever stands beside it
    total: Tensor = torch.segment_reduce(logps.double(), "sum", lengths=lengths, initial=0.0)
    return total


@torch.library.custom_op("sage_select::lengths", mutates_args=(), **TAGS)
def _lengths(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """int64 [S]; an operator, so that values are checked when compiled code runs, too."""
    lengths = cu_seqlens.diff().to(torch.int64)
    if cu_seqlens[0] != 0:
        raise ValueError("sequence_logps: cu_seqlens must be [S + 1] and start at 0")
    if bool((lengths < 0).any()) or int(cu_seqlens[-1]) != tokens:
        raise ValueError(
            f"sequence_logps: cu_seqlens must rise from 0 to {tokens}, got {cu_seqlens}"
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
            "token_logps: hidden and weight must be floating, got "
            f"{hidden.dtype} and {weight.dtype}"
        )
    if targets.dtype != torch.int64:
        raise TypeError(f"token_logps: targets must be int64, got {targets.dtype}")
    if targets.shape != hidden.shape[:1]:
        raise ValueError(
            f"token_logps: {len(hidden)} hidden states but targets of shape {list(targets.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"token_logps: bias must be [V] = [{len(weight)}], got {list(bias.shape)}")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"token_logps: softcap must be positive and finite, got {softcap}")
    if not 0 < temperature < math.inf:
        raise ValueError(f"token_logps: temperature must be positive and finite, got {temperature}")
