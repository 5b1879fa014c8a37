"""The head, forward and backward, as operators of PyTorch's own kind, with shapes foretold.

What depends on the targets' values happens inside, and `torch.compile`, `torch.export` and autograd
see one node. Tokens that are ignored, or weigh nothing in the loss, are left out before any logits
are made.
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
    """The position of the first target that is neither ignored nor a token; -1 if all are right."""
    wrong_N = (target_N != IGNORED) & ((target_N < 0) | (target_N >= vocabulary))
    return int(wrong_N.nonzero()[0]) if bool(wrong_N.any()) else -1


def check_targets(target_N: Tensor, vocabulary: int) -> None:
    """Raise a ValueError that names the first target that is neither ignored nor a token."""
    position = first_wrong(target_N, vocabulary)
    if position >= 0:
        raise ValueError(
            f"token_logps: target {int(target_N[position])} at position {position} is outside the "
            f"vocabulary of {vocabulary}; use {IGNORED} for tokens that are not scored"
        )


def _agreed(
    processes: Processes,
    weight_VH: Tensor,
    target_N: Tensor,
    start: int,
    own_tokens: bool,
    options: str,
) -> list[int]:
    """How many tokens each process scores; or an error, on all of them, if they do not fit."""
    if processes.group is None:
        check_targets(target_N, len(weight_VH))
        return []
    # one exchange says all, since a process that raised alone would leave the others waiting
    scored_N = target_N != IGNORED
    checksum = int((target_N * torch.arange(1, len(target_N) + 1, device=target_N.device)).sum())
    said = hashlib.blake2b(f"{own_tokens} {options}".encode(), digest_size=7).digest()
    facts = [int(scored_N.sum()), checksum, start, len(weight_VH), int.from_bytes(said)]
    every = processes.all_gather(facts, target_N.device)
    for process, fact in enumerate(every):
        if fact[-1] != every[0][-1]:
            raise ValueError(
                f"token_logps: process {process} came with another impl, dtype, hidden size, "
                "softcap, temperature, bias or own_tokens than process 0; processes that share a "
                f"vocabulary need the same. Here it is {options}, own_tokens={own_tokens}"
            )
    end = 0
    for process, (_, _, first, rows, _) in enumerate(every):
        if first != end:
            raise ValueError(
                f"token_logps: process {process} has rows {first} to {first + rows} of the "
                f"vocabulary, but those before it end at {end}; shards follow each other by rank"
            )
        end += rows
    if not own_tokens and len({tuple(fact[:2]) for fact in every}) > 1:
        raise ValueError(
            "token_logps: processes that share a vocabulary have other targets than each other; "
            "give all the same tokens, or say Shard(..., own_tokens=True), with weight.to_local() "
            "where it is a DTensor"
        )
    wrong = processes.all_gather([first_wrong(target_N, end)], target_N.device)
    check_targets(target_N, end)
    for process, (position,) in enumerate(wrong):
        if position >= 0:
            raise ValueError(
                f"token_logps: the target at position {position} of process {process} is outside "
                f"the vocabulary of {end}"
            )
    return [fact[0] for fact in every]


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


def _kept(keep_N: Tensor, *rows: Tensor) -> tuple[Tensor, ...]:
    """The rows of tokens that count; without a copy if all do."""
    return rows if bool(keep_N.all()) else tuple(x[keep_N] for x in rows)


def _spread(some_n: Tensor, keep_N: Tensor) -> Tensor:
    """The rows of tokens that count in their places, zeros elsewhere."""
    if len(some_n) == len(keep_N):
        return some_n
    return some_n.new_zeros(len(keep_N), *some_n.shape[1:]).index_put((keep_N,), some_n)


# they ask for values, which a recording of CUDA graphs does not allow
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
    """Each token's log-prob and the logsumexp of its logits, both 0 where it is ignored."""
    processes = named_processes(group)
    options = (
        f"impl={impl}, hidden {hidden_NH.dtype} of {hidden_NH.shape[1]}, weight {weight_VH.dtype}, "
        f"softcap={softcap}, temperature={temperature}, bias={bias_V is not None}"
    )
    counts = _agreed(processes, weight_VH, target_N, start, own_tokens, options)
    keep_N = target_N != IGNORED
    hidden_nH, target_n = _kept(keep_N, hidden_NH, target_N)
    if own_tokens:
        hidden_nH, target_n = (processes.all_gather_rows(x, counts) for x in (hidden_nH, target_n))
    with torch.autocast(hidden_NH.device.type, enabled=False):  # it would round the logits to bf16
        logits = _logits(impl, hidden_nH, weight_VH, bias_V, softcap, temperature)
        logps_n, logsumexp_n = forward(logits, target_n - start, processes)
    if own_tokens:
        logps_n, logsumexp_n = (processes.own_rows(x, counts) for x in (logps_n, logsumexp_n))
    return _spread(logps_n, keep_N), _spread(logsumexp_n, keep_N)


# the schema in words: before 2.7, PyTorch derives none from lists
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
    """The gradients of those of hidden, weight and bias that are needed."""
    processes = named_processes(group)
    keep_N = target_N != IGNORED
    if group is None or own_tokens:
        # what weighs nothing in the loss is left out, too; the last bits of others may change with
        # it, as products of other shapes add in another order
        keep_N &= grad_N != 0
    rows = _kept(keep_N, hidden_NH, target_N, grad_N, logsumexp_N)
    need_hidden, need_weight, need_bias = needed
    if group is not None:
        # what one process needs, all must help with
        every = processes.all_gather([len(rows[0]), need_hidden], target_N.device)
        counts, need_hidden = [count for count, _ in every], any(need for _, need in every)
    if own_tokens:
        rows = tuple(processes.all_gather_rows(x, counts) for x in rows)
    hidden_nH, target_n, grad_n, logsumexp_n = rows
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
        hidden_grad = _spread(hidden_grad.to(hidden_NH.dtype), keep_N) if needed[0] else None
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
    found = iter(
        token_logps_backward_operator(
            (hidden, weight, bias), grad_N, *ctx.saved_tensors, *ctx.options
        )
    )
    return tuple(next(found) if needed else None for needed in ctx.needs_input_grad)


def _refuse(ctx: Any, grads: list[Tensor]) -> NoReturn:
    raise NotImplementedError(
        'token_logps: there are no gradients of gradients; use impl="reference"'
    )


token_logps_operator.register_autograd(_gradients, setup_context=_save)
token_logps_backward_operator.register_autograd(_refuse)
