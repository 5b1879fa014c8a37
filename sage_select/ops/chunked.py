"""Token log-probs by blocks of the vocabulary, on any device: no [N, V] is ever stored.

N tokens, H hidden, V vocabulary, B columns of a block. The target's logit z_t is known beforehand
from one dot product a token, and log p = -log(sum_j exp(z_j - z_t)) needs no running maximum: one
subtraction, one exponential and one addition a logit. The sum holds exp(0) = 1 for the target
itself, so it cannot vanish; where it overflows (log p below -88) the row is done again around its
maximum. Backward computes each block's logits again.

Both are operators of their own to PyTorch, with shapes known beforehand: what depends on the
targets' values happens inside, and `torch.compile`, `torch.export` and autograd see one node.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

# fp32 logits alive at a time: a block stays in the cache, and vocabulary blocks with all rows
# re-read the weight once, where blocks of rows would re-read it for every block
BLOCK_LOGITS = 1 << 20

IGNORED = -100
"""Target of a token that is not scored, as in `torch.nn.functional.cross_entropy`."""


def token_logps_chunked(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    target_N: Tensor,
    bias_V: Tensor | None,
    softcap: float | None,
) -> Tensor:
    """What `token_logps_reference` says, in memory that does not grow with N x V; 0 if ignored."""
    result: Tensor = _forward(hidden_NH, weight_VH, target_N, bias_V, softcap)[0]
    return result


def check_targets(target_N: Tensor, vocabulary: int) -> None:
    """Raise a ValueError that names the first target that is neither ignored nor a token."""
    wrong_N = (target_N != IGNORED) & ((target_N < 0) | (target_N >= vocabulary))
    if bool(wrong_N.any()):
        position = int(wrong_N.nonzero()[0])
        raise ValueError(
            f"token_logps: target {int(target_N[position])} at position {position} is outside the "
            f"vocabulary of {vocabulary}; use {IGNORED} for tokens that are not scored"
        )


class _Logits(NamedTuple):
    """The logits of N tokens, block by block, in fp32 or wider."""

    wide_NH: Tensor
    weight_VH: Tensor
    bias_V: Tensor | None
    softcap: float | None
    precision: str

    @classmethod
    def of(
        cls, hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, softcap: float | None
    ) -> "_Logits":
        wide_NH = hidden_NH.to(torch.promote_types(hidden_NH.dtype, torch.float32))
        # products of bf16 numbers are exact in fp32 also where factors are rounded to bf16 on the
        # way, which is faster; a ranking hangs on all others, whatever the process allows elsewhere
        both_bf16 = hidden_NH.dtype == weight_VH.dtype == torch.bfloat16
        return cls(wide_NH, weight_VH, bias_V, softcap, "medium" if both_bf16 else "highest")

    def rows(self, chosen_N: Tensor) -> "_Logits":
        """Those of some tokens."""
        return self._replace(wide_NH=self.wide_NH[chosen_N])

    def blocks(self) -> Iterator[slice]:
        """The vocabulary in blocks whose logits stay in the cache."""
        vocabulary = len(self.weight_VH)
        width = max(256, BLOCK_LOGITS // max(len(self.wide_NH), 1))
        for start in range(0, vocabulary, width):
            yield slice(start, min(start + width, vocabulary))

    def block(self, block: slice, out_NB: Tensor | None = None) -> Tensor:
        """[N, B], the logits of a block."""
        weight_BH = self.weight_VH[block].to(self.wide_NH.dtype)
        with _precision(self.precision):
            logits_NB = torch.mm(self.wide_NH, weight_BH.T, out=out_NB)
        return self._finished(logits_NB, block)

    def of_targets(self, target_N: Tensor) -> Tensor:
        """[N], each token's logit of its target; some rows at once, since weights are copied."""
        at_once = max(1, BLOCK_LOGITS // max(self.wide_NH.shape[1], 1))
        parts = [
            torch.linalg.vecdot(some_NH, self.weight_VH[some_N].to(some_NH.dtype))
            for some_NH, some_N in zip(
                torch.split(self.wide_NH, at_once), torch.split(target_N, at_once), strict=True
            )
        ]
        return self._finished(torch.cat(parts), target_N)

    def maximum(self) -> Tensor:
        """[N], the largest logit; finite also where a bias rules everything out."""
        maximum_N = self.wide_NH.new_full((len(self.wide_NH),), torch.finfo(self.wide_NH.dtype).min)
        for block in self.blocks():
            maximum_N = torch.maximum(maximum_N, self.block(block).amax(dim=-1))
        return maximum_N

    def sum_exp(self, anchor_N: Tensor) -> Tensor:
        """[N], sum_j exp(z_j - anchor): in each block, then over blocks, that no mass be lost."""
        total_N = torch.zeros_like(anchor_N)
        buffer = self.wide_NH.new_empty(0)
        for block in self.blocks():
            shape = (len(self.wide_NH), block.stop - block.start)
            if buffer.shape != shape:
                buffer = self.wide_NH.new_empty(shape)
            total_N += self.block(block, buffer).sub_(anchor_N[:, None]).exp_().sum(dim=-1)
        return total_N

    def _finished(self, logits: Tensor, columns: slice | Tensor) -> Tensor:
        """Bias and softcap, in place."""
        if self.bias_V is not None:
            logits += self.bias_V[columns]
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits


@contextmanager
def _precision(name: str) -> Iterator[None]:
    """fp32 products at this precision inside, and as the process has it afterwards."""
    flags: list[Any] = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
    try:
        allowed, before = torch.get_float32_matmul_precision(), []
    except RuntimeError:  # it was set by the newer flags, which may differ from each other
        allowed, before = None, [flag.fp32_precision for flag in flags]
    if allowed == name:
        yield
        return
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        if allowed is not None:
            torch.set_float32_matmul_precision(allowed)
        for flag, precision in zip(flags, before, strict=False):
            flag.fp32_precision = precision


def _spread(some_n: Tensor, chosen_N: Tensor) -> Tensor:
    """The rows of chosen tokens in their places, zeros elsewhere."""
    return some_n.new_zeros(len(chosen_N), *some_n.shape[1:]).index_put((chosen_N,), some_n)


@torch.library.custom_op("sage_select::token_logps", mutates_args=())
def _forward(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    target_N: Tensor,
    bias_V: Tensor | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Each token's log-prob and the logsumexp of its logits, both 0 where it is ignored."""
    check_targets(target_N, len(weight_VH))
    scored_N = target_N != IGNORED
    everything = bool(scored_N.all())
    if not everything:
        hidden_NH, target_N = hidden_NH[scored_N], target_N[scored_N]
    with torch.autocast(hidden_NH.device.type, enabled=False):  # it would round the logits to bf16
        logits = _Logits.of(hidden_NH, weight_VH, bias_V, softcap)
        target_logit_N = logits.of_targets(target_N)
        anchor_N, sum_N = target_logit_N, logits.sum_exp(target_logit_N)
        far_N = ~sum_N.isfinite()
        if bool(far_N.any()):
            some = logits.rows(far_N)
            maximum_N = some.maximum()
            anchor_N = anchor_N.clone()
            anchor_N[far_N], sum_N[far_N] = maximum_N, some.sum_exp(maximum_N)
    # the dot product and the matrix product round the target's logit apart by a unit or two
    logps_N = (target_logit_N - anchor_N - sum_N.log()).clamp(max=0)
    logsumexp_N = anchor_N + sum_N.log()
    if everything:
        return logps_N, logsumexp_N
    return _spread(logps_N, scored_N), _spread(logsumexp_N, scored_N)


# the schema in words: before 2.7, PyTorch derives none from lists
@torch.library.custom_op(
    "sage_select::token_logps_backward",
    mutates_args=(),
    schema="(bool[] needed, Tensor grad, Tensor hidden, Tensor weight, Tensor targets, "
    "Tensor? bias, Tensor logsumexp, float? softcap) -> Tensor[]",
)
def _backward(
    needed: Sequence[bool],
    grad_N: Tensor,
    hidden_NH: Tensor,
    weight_VH: Tensor,
    target_N: Tensor,
    bias_V: Tensor | None,
    logsumexp_N: Tensor,
    softcap: float | None,
) -> list[Tensor]:
    """The gradients of those of hidden, weight and bias that are needed."""
    # tokens that are ignored or weigh nothing in the loss are left out; the last bits of others may
    # change with it, as products of other shapes add in another order
    counts_N = (target_N != IGNORED) & (grad_N != 0)
    everything = bool(counts_N.all())
    if not everything:
        grad_N, hidden_NH, target_N, logsumexp_N = (
            rows[counts_N] for rows in (grad_N, hidden_NH, target_N, logsumexp_N)
        )
    with torch.autocast(hidden_NH.device.type, enabled=False), _precision("highest"):
        logits = _Logits.of(hidden_NH, weight_VH, bias_V, softcap)
        wide_NH = logits.wide_NH
        need_hidden, need_weight, need_bias = needed
        hidden_grad_NH = wide_NH.new_zeros(wide_NH.shape) if need_hidden else None
        weight_grad_VH = weight_VH.new_empty(weight_VH.shape) if need_weight else None
        bias_grad_V = bias_V.new_empty(bias_V.shape) if need_bias and bias_V is not None else None
        for block in logits.blocks():
            # d logp / d logit_j = 1[j = target] - softmax_j
            logits_NB = logits.block(block)
            slope_NB = (logits_NB - logsumexp_N[:, None]).exp_().neg_()
            local_N = target_N - block.start
            row = torch.nonzero((local_N >= 0) & (local_N < logits_NB.shape[1])).squeeze(-1)
            slope_NB[row, local_N[row]] += 1
            slope_NB *= grad_N[:, None]
            if softcap is not None:
                slope_NB *= 1 - (logits_NB / softcap) ** 2
            if hidden_grad_NH is not None:
                hidden_grad_NH += slope_NB @ weight_VH[block].to(wide_NH.dtype)
            if weight_grad_VH is not None:
                weight_grad_VH[block] = (slope_NB.T @ wide_NH).to(weight_VH.dtype)
            if bias_grad_V is not None:
                bias_grad_V[block] = slope_NB.sum(dim=0).to(bias_grad_V.dtype)
    if hidden_grad_NH is not None:
        hidden_grad_NH = hidden_grad_NH.to(hidden_NH.dtype)
        if not everything:
            hidden_grad_NH = _spread(hidden_grad_NH, counts_N)
    gradients = (hidden_grad_NH, weight_grad_VH, bias_grad_V)
    return [gradient for gradient in gradients if gradient is not None]


@_forward.register_fake
def _(hidden_NH: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(hidden_NH.dtype, torch.float32)
    logps_N = hidden_NH.new_empty(hidden_NH.shape[:1], dtype=dtype)
    return logps_N, torch.empty_like(logps_N)


@_backward.register_fake
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
    *tensors, ctx.softcap = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, output[1])


def _gradients(ctx: Any, grad_N: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    hidden, weight, _, bias, _ = ctx.needs_input_grad
    found = iter(_backward((hidden, weight, bias), grad_N, *ctx.saved_tensors, ctx.softcap))
    return tuple(next(found) if needed else None for needed in ctx.needs_input_grad)


def _refuse(ctx: Any, grads: list[Tensor]) -> NoReturn:
    raise NotImplementedError(
        'token_logps: impl="chunked" has no gradients of gradients; use impl="reference"'
    )


_forward.register_autograd(_gradients, setup_context=_save)
_backward.register_autograd(_refuse)
