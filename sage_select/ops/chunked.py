"""Token log-probs by blocks of the vocabulary, on any device: no [N, V] is ever stored.

N tokens, H hidden, V vocabulary, B columns of a block. The target's logit z_t is known beforehand
from one dot product a token, and log p = -log(sum_j exp(z_j - z_t)) needs no running maximum: one
subtraction, one exponential and one addition a logit. The sum holds exp(0) = 1 for the target
itself, so it cannot vanish; where it overflows (log p below -88) the row is done again around its
maximum. Backward computes each block's logits again.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# fp32 logits alive at a time: a block stays in the cache, and vocabulary blocks with all rows
# re-read the weight once, where blocks of rows would re-read it for every block
BLOCK_LOGITS = 1 << 20


def token_logps_chunked(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    target_N: Tensor,
    bias_V: Tensor | None,
    softcap: float | None,
) -> Tensor:
    """What `token_logps_reference` says, in memory that does not grow with N x V."""
    result: Tensor = _ChunkedLogps.apply(  # type: ignore[no-untyped-call]
        hidden_NH, weight_VH, target_N, bias_V, softcap
    )
    return result


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
    allowed = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(allowed)


class _ChunkedLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        target_N: Tensor,
        bias_V: Tensor | None,
        softcap: float | None,
    ) -> Tensor:
        logits = _Logits.of(hidden_NH, weight_VH, bias_V, softcap)
        target_logit_N = logits.of_targets(target_N)
        anchor_N, sum_N = target_logit_N, logits.sum_exp(target_logit_N)
        far_N = ~sum_N.isfinite()
        if bool(far_N.any()):
            some = logits.rows(far_N)
            maximum_N = some.maximum()
            anchor_N = anchor_N.clone()
            anchor_N[far_N], sum_N[far_N] = maximum_N, some.sum_exp(maximum_N)
        ctx.save_for_backward(hidden_NH, weight_VH, target_N, bias_V, anchor_N + sum_N.log())
        ctx.softcap = softcap
        # the dot product and the matrix product round the target's logit apart by a unit or two
        return (target_logit_N - anchor_N - sum_N.log()).clamp(max=0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        hidden_NH, weight_VH, target_N, bias_V, logsumexp_N = ctx.saved_tensors
        need_hidden, need_weight, _, need_bias, _ = ctx.needs_input_grad
        with torch.autocast(hidden_NH.device.type, enabled=False), _precision("highest"):
            logits = _Logits.of(hidden_NH, weight_VH, bias_V, ctx.softcap)
            wide_NH = logits.wide_NH
            hidden_grad_NH = torch.zeros_like(wide_NH) if need_hidden else None
            weight_grad_VH = torch.empty_like(weight_VH) if need_weight else None
            bias_grad_V = torch.empty_like(bias_V) if need_bias else None
            for block in logits.blocks():
                # d logp / d logit_j = 1[j = target] - softmax_j
                logits_NB = logits.block(block)
                slope_NB = (logits_NB - logsumexp_N[:, None]).exp_().neg_()
                local_N = target_N - block.start
                row = torch.nonzero((local_N >= 0) & (local_N < logits_NB.shape[1])).squeeze(-1)
                slope_NB[row, local_N[row]] += 1
                slope_NB *= grad_N[:, None]
                if ctx.softcap is not None:
                    slope_NB *= 1 - (logits_NB / ctx.softcap) ** 2
                if hidden_grad_NH is not None:
                    hidden_grad_NH += slope_NB @ weight_VH[block].to(wide_NH.dtype)
                if weight_grad_VH is not None:
                    weight_grad_VH[block] = (slope_NB.T @ wide_NH).to(weight_VH.dtype)
                if bias_grad_V is not None:
                    bias_grad_V[block] = slope_NB.sum(dim=0).to(bias_grad_V.dtype)
        if hidden_grad_NH is not None:
            hidden_grad_NH = hidden_grad_NH.to(hidden_NH.dtype)
        return hidden_grad_NH, weight_grad_VH, None, bias_grad_V, None
