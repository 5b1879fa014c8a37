"""The head's forward and backward pass, registered as custom operators with fake (meta) kernels.

Everything that depends on the targets' values happens inside the operators, so `torch.compile`,
`torch.export` and autograd see one node. Tokens that are ignored, or have zero weight in the loss,
are dropped before any logits are computed.
"""

import hashlib
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from sage_select.ops.chunked import ChunkedLogits
from sage_select.ops.logits import IGNORED, Logits, backward, forward
from sage_select.ops.products import wide
from sage_select.ops.shards import named_processes
from sage_select.system.processes import Processes


def first_wrong(target_N: Tensor, vocabulary: int) -> int:
    """Position of the first target that is neither ignored nor a token id; -1 if there is none."""
    wrong_N = (target_N != IGNORED) & ((target_N < 0) | (target_N >= vocabulary))
    return int(wrong_N.nonzero()[0]) if bool(wrong_N.any()) else -1


def check_targets(target_N: Tensor, vocabulary: int) -> None:
    """Raise a ValueError that names the first target that is neither ignored nor a token id."""
    position = first_wrong(target_N, vocabulary)
    if position >= 0:
        raise ValueError(
            f"token_logps: target {int(target_N[position])} at position {position} is outside the "
            f"vocabulary of {vocabulary}; use {IGNORED} for tokens to skip"
        )


def _check_ranks(
    processes: Processes,
    weight_VH: Tensor,
    target_N: Tensor,
    start: int,
    own_tokens: bool,
    options: str,
) -> list[int]:
    """Return each rank's number of scored tokens, by rank; raise on all ranks if their inputs do
    not fit together. Without a group only the targets are checked, and the list is empty.
    """
    if processes.group is None:
        check_targets(target_N, len(weight_VH))
        return []
    # everything is gathered before any check: a rank that raised alone would leave the others
    # waiting in the next collective
    scored_N = target_N != IGNORED
    checksum = int((target_N * torch.arange(1, len(target_N) + 1, device=target_N.device)).sum())
    options_hash = hashlib.blake2b(f"{own_tokens} {options}".encode(), digest_size=7).digest()
    inputs = [int(scored_N.sum()), checksum, start, len(weight_VH), int.from_bytes(options_hash)]
    inputs_by_rank = processes.all_gather(inputs, target_N.device)
    for rank, rank_inputs in enumerate(inputs_by_rank):
        if rank_inputs[-1] != inputs_by_rank[0][-1]:
            raise ValueError(
                f"token_logps: impl, dtype, hidden size, softcap, temperature, bias or own_tokens "
                f"differs between rank {rank} and rank 0; ranks that share a vocabulary must pass "
                f"the same. This rank passed {options}, own_tokens={own_tokens}"
            )
    end = 0
    for rank, (_, _, first, rows, _) in enumerate(inputs_by_rank):
        if first != end:
            raise ValueError(
                f"token_logps: rank {rank} has rows {first} to {first + rows} of the vocabulary, "
                f"but the ranks before it end at {end}; give the ranks consecutive shards"
            )
        end += rows
    if not own_tokens and len({tuple(rank_inputs[:2]) for rank_inputs in inputs_by_rank}) > 1:
        raise ValueError(
            "token_logps: ranks that share a vocabulary got different targets; pass the same "
            "tokens on all ranks, or use Shard(..., own_tokens=True), with weight.to_local() if "
            "the weight is a DTensor"
        )
    wrong_positions = processes.all_gather([first_wrong(target_N, end)], target_N.device)
    check_targets(target_N, end)
    for rank, (position,) in enumerate(wrong_positions):
        if position >= 0:
            raise ValueError(
                f"token_logps: the target at position {position} of rank {rank} is outside the "
                f"vocabulary of {end}; use {IGNORED} for tokens to skip"
            )
    return [rank_inputs[0] for rank_inputs in inputs_by_rank]


def _logits(
    impl: str,
    hidden_NH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    softcap: float | None,
    temperature: float,
) -> Logits:
    if impl == "chunked":
        return ChunkedLogits.of(hidden_NH, weight_VH, bias_V, softcap, temperature)
    try:
        from sage_select.ops.fused import FusedLogits
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'token_logps: impl="fused" needs Triton; pip install triton, or use impl="chunked"'
        ) from error
    return FusedLogits.of(hidden_NH, weight_VH, bias_V, softcap, temperature)


def _select(keep_N: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the kept tokens' rows of each tensor, without a copy if all are kept."""
    return tensors if bool(keep_N.all()) else tuple(x[keep_N] for x in tensors)


def _scatter(kept_n: Tensor, keep_N: Tensor) -> Tensor:
    """Return the kept tokens' rows at their positions among all tokens, with zeros elsewhere."""
    if len(kept_n) == len(keep_N):
        return kept_n
    return kept_n.new_zeros(len(keep_N), *kept_n.shape[1:]).index_put((keep_N,), kept_n)


# the operators read tensor values on the host, which CUDA graph capture does not allow
TAGS: dict[str, Any] = (
    {"tags": (torch.Tag.cudagraph_unsafe,)} if hasattr(torch.Tag, "cudagraph_unsafe") else {}
)


@torch.library.custom_op("sage_select::token_logps", mutates_args=(), **TAGS)
def token_logps_operator(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    target_N: Tensor,
    bias_V: Tensor | None,
    softcap: float | None,
    temperature: float,
    impl: str,
    start: int,
    group: str | None,
    own_tokens: bool,
) -> tuple[Tensor, Tensor]:
    """[N], log-probs of the targets, and [N], logsumexp of the logits; both 0 if ignored."""
    processes = named_processes(group)
    options = (
        f"impl={impl}, hidden {hidden_NH.dtype} of {hidden_NH.shape[1]}, weight {weight_VH.dtype}, "
        f"softcap={softcap}, temperature={temperature}, bias={bias_V is not None}"
    )
    counts = _check_ranks(processes, weight_VH, target_N, start, own_tokens, options)
    keep_N = target_N != IGNORED
    hidden_nH, target_n = _select(keep_N, hidden_NH, target_N)
    if own_tokens:
        # every rank needs all tokens for its columns; gathering them is cheaper than the weight
        hidden_nH, target_n = (processes.all_gather_rows(x, counts) for x in (hidden_nH, target_n))
    with torch.autocast(hidden_NH.device.type, enabled=False):  # it would round the logits to bf16
        logits = _logits(impl, hidden_nH, weight_VH, bias_V, softcap, temperature)
        logps_n, logsumexp_n = forward(logits, target_n - start, processes)
    if own_tokens:
        logps_n, logsumexp_n = (processes.own_rows(x, counts) for x in (logps_n, logsumexp_n))
    return _scatter(logps_n, keep_N), _scatter(logsumexp_n, keep_N)


# an explicit schema, because PyTorch before 2.7 cannot infer one for lists
@torch.library.custom_op(
    "sage_select::token_logps_backward",
    mutates_args=(),
    schema="(bool[] needed, Tensor grad, Tensor hidden, Tensor weight, Tensor targets, "
    "Tensor? bias, Tensor logsumexp, float? softcap, float temperature, str impl, int start, "
    "str? group, bool own_tokens) -> Tensor[]",
    **TAGS,
)
def token_logps_backward_operator(
    needed: Sequence[bool],
    grad_N: Tensor,
    hidden_NH: Tensor,
    weight_VH: Tensor,
    target_N: Tensor,
    bias_V: Tensor | None,
    logsumexp_N: Tensor,
    softcap: float | None,
    temperature: float,
    impl: str,
    start: int,
    group: str | None,
    own_tokens: bool,
) -> list[Tensor]:
    """Gradients of hidden, weight and bias, in this order; those not needed are left out."""
    processes = named_processes(group)
    keep_N = target_N != IGNORED
    if group is None or own_tokens:
        # Tokens with zero weight in the loss are dropped too. This may change the last bits of the
        # other gradients, since a product of another shape may add in another order. Ranks that
        # share their tokens keep them, because they must all keep the same rows.
        keep_N &= grad_N != 0
    kept = _select(keep_N, hidden_NH, target_N, grad_N, logsumexp_N)
    need_hidden, need_weight, need_bias = needed
    if group is not None:
        # the gradient of hidden is summed over ranks: if one rank needs it, all must compute theirs
        by_rank = processes.all_gather([len(kept[0]), need_hidden], target_N.device)
        counts, need_hidden = [count for count, _ in by_rank], any(need for _, need in by_rank)
    if own_tokens:
        kept = tuple(processes.all_gather_rows(x, counts) for x in kept)
    hidden_nH, target_n, grad_n, logsumexp_n = kept
    with torch.autocast(hidden_NH.device.type, enabled=False):
        logits = _logits(impl, hidden_nH, weight_VH, bias_V, softcap, temperature)
        gradients = backward(
            logits, target_n - start, grad_n, logsumexp_n, (need_hidden, need_weight, need_bias)
        )
    hidden_grad, weight_grad, bias_grad = gradients
    if hidden_grad is not None:
        hidden_grad = (
            processes.reduce_scatter_rows(hidden_grad, counts)
            if own_tokens
            else processes.all_reduce(hidden_grad)
        )
        hidden_grad = _scatter(hidden_grad.to(hidden_NH.dtype), keep_N) if needed[0] else None
    return [x for x in (hidden_grad, weight_grad, bias_grad) if x is not None]


@token_logps_operator.register_fake
def _(hidden_NH: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    logps_N = hidden_NH.new_empty(hidden_NH.shape[:1], dtype=wide(hidden_NH.dtype))
    return logps_N, torch.empty_like(logps_N)


@token_logps_backward_operator.register_fake
def _(
    needed: Sequence[bool],
    grad_N: Tensor,
    hidden_NH: Tensor,
    weight_VH: Tensor,
    target_N: Tensor,
    bias_V: Tensor | None,
    *_: Any,
) -> list[Tensor]:
    inputs = zip(needed, (hidden_NH, weight_VH, bias_V), strict=True)
    return [x.new_empty(x.shape) for need, x in inputs if need and x is not None]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    hidden, weight, target, bias, *ctx.options = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(hidden, weight, target, bias, output[1])


def _gradients(ctx: Any, grad_N: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    hidden, weight, _, bias, *_ = ctx.needs_input_grad
    gradients = iter(
        token_logps_backward_operator(
            (hidden, weight, bias), grad_N, *ctx.saved_tensors, *ctx.options
        )
    )
    # autograd expects one entry per input of the forward operator
    return tuple(next(gradients) if needed else None for needed in ctx.needs_input_grad)


def _refuse(ctx: Any, grads: list[Tensor]) -> NoReturn:
    raise NotImplementedError(
        'token_logps: second derivatives are not implemented by this impl; use impl="reference"'
    )


token_logps_operator.register_autograd(_gradients, setup_context=_save)
token_logps_backward_operator.register_autograd(_refuse)
