"""Log-probs and their gradients from logits that are never all in memory.

N tokens, H hidden, V vocabulary, B columns of a block. The target's logit z_t is computed first,
from one dot product per token, and log p = -log(sum_j exp(z_j - z_t)) needs no running maximum: one
subtraction, one exponential and one addition per logit. The sum contains exp(0) = 1 for the target
itself, so it cannot vanish; if it overflows (log p below -88), the row is recomputed around its
maximum. The backward pass recomputes the logits of each block.

`Logits` computes and sums the logits: `chunked` in PyTorch, `fused` in Triton. If the vocabulary is
sharded over ranks, each has some of the columns, and z_t and the sum are all-reduced.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from sage_select.ops.products import add_product, precision, product, wide
from sage_select.system.processes import Processes

IGNORED = -100
"""Target of a token to skip, as in `torch.nn.functional.cross_entropy`."""


@dataclass(frozen=True)
class Logits(ABC):
    """z = softcap(hidden @ weight.T + bias) / temperature, in fp32 or wider."""

    hidden_NH: Tensor
    weight_VH: Tensor
    bias_V: Tensor | None
    softcap: float | None
    temperature: float

    def rows(self, chosen_N: Tensor) -> Self:
        """Return the logits of selected tokens."""
        return replace(self, hidden_NH=self.hidden_NH[chosen_N])

    @abstractmethod
    def of_targets(self, target_N: Tensor) -> Tensor:
        """[N], the logit of each token's target; 0 if the target is in another shard."""

    @abstractmethod
    def sum_exp(self, anchor_N: Tensor, target_N: Tensor) -> tuple[Tensor, Tensor | None]:
        """[N], sum_j exp(z_j - anchor), and [N], the targets' logits as they enter that sum.

        Each block is summed first, then the blocks, so that small terms are not lost. A target's
        logit is 0 if the target is in another shard. A logit from the sum cancels an error that all
        logits of a row share; the second result is None if those of `of_targets` do so already.
        """

    @abstractmethod
    def around_maximum(self) -> tuple[Tensor, Tensor]:
        """[N], the largest logit, and [N], sum_j exp(z_j - largest).

        The largest logit is finite even if a bias of -inf excludes every column.
        """

    @abstractmethod
    def blocks(self) -> Iterator[slice]:
        """Yield the slices of the vocabulary for which `slopes` is called."""

    @abstractmethod
    def slopes(self, block: slice, target_N: Tensor, grad_N: Tensor, logsumexp_N: Tensor) -> Tensor:
        """[N, B], grad_i d log p_i / d (hidden_i . weight_j), in the dtype of the next product."""


def forward(logits: Logits, target_N: Tensor, processes: Processes) -> tuple[Tensor, Tensor]:
    """[N], log-probs of the targets, and [N], the logsumexp of each token's logits."""
    # only the rank that has a target's column contributes a nonzero logit
    anchor_N = processes.all_reduce(logits.of_targets(target_N))
    sum_N, target_logit_N = logits.sum_exp(anchor_N, target_N)
    sum_N = processes.all_reduce(sum_N)
    target_logit_N = anchor_N if target_logit_N is None else processes.all_reduce(target_logit_N)
    # sums are all-reduced, so all ranks take this branch together and their collectives match
    overflow_N = ~sum_N.isfinite()
    if bool(overflow_N.any()):
        maximum_n, sum_n = logits.rows(overflow_N).around_maximum()
        anchor_n = processes.all_reduce_max(maximum_n)
        anchor_N = anchor_N.masked_scatter(overflow_N, anchor_n)
        sum_N = sum_N.masked_scatter(
            overflow_N, processes.all_reduce(sum_n * (maximum_n - anchor_n).exp())
        )
    # the sum includes the target's own term, but rounding can still leave log p slightly above 0
    logps_N = (target_logit_N - anchor_N - sum_N.log()).clamp(max=0)
    return logps_N, anchor_N + sum_N.log()


def backward(
    logits: Logits,
    target_N: Tensor,
    grad_N: Tensor,
    logsumexp_N: Tensor,
    needed: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden, weight and bias, each None if not needed.

    The gradient of hidden is in fp32 or wider and covers only the columns of this rank.
    """
    hidden_NH, weight_VH, bias_V = logits.hidden_NH, logits.weight_VH, logits.bias_V
    need_hidden, need_weight, need_bias = needed
    hidden_grad_NH = (
        hidden_NH.new_zeros(hidden_NH.shape, dtype=wide(hidden_NH.dtype)) if need_hidden else None
    )
    weight_grad_VH = weight_VH.new_empty(weight_VH.shape) if need_weight else None
    bias_grad_V = bias_V.new_empty(bias_V.shape) if need_bias and bias_V is not None else None
    # slopes are computed in units of `scale`, a power of two, so multiplying back is exact
    scale = _gradient_scale(grad_N, hidden_NH.dtype)
    for block in logits.blocks():
        slope_NB = logits.slopes(block, target_N, grad_N / scale, logsumexp_N)
        with precision("highest"):
            if hidden_grad_NH is not None:
                add_product(hidden_grad_NH, slope_NB, weight_VH[block])
            if weight_grad_VH is not None:
                weight_grad_VH[block] = product(slope_NB.T, hidden_NH).mul_(scale)
        if bias_grad_V is not None:
            bias_grad_V[block] = slope_NB.sum(dim=0, dtype=grad_N.dtype) * scale
    if hidden_grad_NH is not None:
        hidden_grad_NH *= scale
    return hidden_grad_NH, weight_grad_VH, bias_grad_V


def _gradient_scale(grad_N: Tensor, dtype: torch.dtype) -> Tensor:
    """Power of two near the largest upstream gradient for fp16, where slopes of a small loss would
    underflow; 1 for other dtypes.
    """
    if dtype != torch.float16 or len(grad_N) == 0:
        return grad_N.new_ones(())
    return grad_N.nan_to_num(0, 0, 0).abs().amax().clamp(min=2.0**-100).log2().ceil().exp2()
