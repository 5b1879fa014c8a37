"""Log-probs and their gradients from logits that never exist all at once.

N tokens, H hidden, V vocabulary, B columns of a block. The target's logit z_t is known beforehand
from one dot product a token, and log p = -log(sum_j exp(z_j - z_t)) needs no running maximum: one
subtraction, one exponential and one addition a logit. The sum holds exp(0) = 1 for the target
itself, so it cannot vanish; where it overflows (log p below -88) the row is done again around its
maximum. Backward computes each block's logits again.

How logits are made and folded is left to `Logits`: `chunked` does it in PyTorch, `fused` in Triton.
Over several processes each has some columns, and what is added up is z_t and the sum.
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
"""Target of a token that is not scored, as in `torch.nn.functional.cross_entropy`."""


@dataclass(frozen=True)
class Logits(ABC):
    """z = softcap(hidden @ weight.T + bias) / temperature, in fp32 or wider."""

    hidden_NH: Tensor
    weight_VH: Tensor
    bias_V: Tensor | None
    softcap: float | None
    temperature: float

    def rows(self, chosen_N: Tensor) -> Self:
        """Those of some tokens."""
        return replace(self, hidden_NH=self.hidden_NH[chosen_N])

    @abstractmethod
    def of_targets(self, target_N: Tensor) -> Tensor:
        """[N], each token's logit of its target; 0 where that is none of the columns."""

    @abstractmethod
    def sum_exp(self, anchor_N: Tensor, target_N: Tensor) -> tuple[Tensor, Tensor | None]:
        """[N], sum_j exp(z_j - anchor): in each block, then over blocks, that no mass be lost.

        And [N], the targets' logits as they stand in the sum, or 0 where a target is none of the
        columns; None if `of_targets` gives just these. An error that all logits of a row share
        then cancels.
        """

    @abstractmethod
    def around_maximum(self) -> tuple[Tensor, Tensor]:
        """[N] the largest logit, finite also where a bias rules all out; [N] the sum around it."""

    @abstractmethod
    def blocks(self) -> Iterator[slice]:
        """The vocabulary in the blocks of which the slopes are made."""

    @abstractmethod
    def slopes(self, block: slice, target_N: Tensor, grad_N: Tensor, logsumexp_N: Tensor) -> Tensor:
        """[N, B], grad_i d log p_i / d (hidden_i . weight_j): in the dtype to be multiplied in."""


def forward(logits: Logits, target_N: Tensor, processes: Processes) -> tuple[Tensor, Tensor]:
    """Each token's log-prob and the logsumexp of its logits."""
    anchor_N = processes.all_reduce(logits.of_targets(target_N))
    sum_N, own_N = logits.sum_exp(anchor_N, target_N)
    sum_N = processes.all_reduce(sum_N)
    target_logit_N = anchor_N if own_N is None else processes.all_reduce(own_N)
    far_N = ~sum_N.isfinite()
    if bool(far_N.any()):
        maximum_n, sum_n = logits.rows(far_N).around_maximum()
        anchor_n = processes.all_reduce_max(maximum_n)
        anchor_N = anchor_N.masked_scatter(far_N, anchor_n)
        sum_N = sum_N.masked_scatter(
            far_N, processes.all_reduce(sum_n * (maximum_n - anchor_n).exp())
        )
    # a sum of rounded exponentials, of which one is that of the target
    logps_N = (target_logit_N - anchor_N - sum_N.log()).clamp(max=0)
    return logps_N, anchor_N + sum_N.log()


def backward(
    logits: Logits,
    target_N: Tensor,
    grad_N: Tensor,
    logsumexp_N: Tensor,
    needed: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden (wide, and of these columns alone), weight and bias."""
    hidden_NH, weight_VH, bias_V = logits.hidden_NH, logits.weight_VH, logits.bias_V
    need_hidden, need_weight, need_bias = needed
    hidden_grad_NH = (
        hidden_NH.new_zeros(hidden_NH.shape, dtype=wide(hidden_NH.dtype)) if need_hidden else None
    )
    weight_grad_VH = weight_VH.new_empty(weight_VH.shape) if need_weight else None
    bias_grad_V = bias_V.new_empty(bias_V.shape) if need_bias and bias_V is not None else None
    unit = _unit(grad_N, hidden_NH.dtype)
    for block in logits.blocks():
        slope_NB = logits.slopes(block, target_N, grad_N / unit, logsumexp_N)
        with precision("highest"):
            if hidden_grad_NH is not None:
                add_product(hidden_grad_NH, slope_NB, weight_VH[block])
            if weight_grad_VH is not None:
                weight_grad_VH[block] = product(slope_NB.T, hidden_NH).mul_(unit)
        if bias_grad_V is not None:
            bias_grad_V[block] = slope_NB.sum(dim=0, dtype=grad_N.dtype) * unit
    if hidden_grad_NH is not None:
        hidden_grad_NH *= unit
    return hidden_grad_NH, weight_grad_VH, bias_grad_V


def _unit(grad_N: Tensor, dtype: torch.dtype) -> Tensor:
    """A power of two near the largest gradient, for fp16: smaller slopes would vanish in it."""
    if dtype != torch.float16 or len(grad_N) == 0:
        return grad_N.new_ones(())
    return grad_N.nan_to_num(0, 0, 0).abs().amax().clamp(min=2.0**-100).log2().ceil().exp2()
