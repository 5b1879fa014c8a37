"""Blocks of logits in PyTorch, on any device: no [N, V] is ever stored."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from sage_select.ops.logits import Logits
from sage_select.ops.products import precision, product, takes_half, wide

# fp32 logits alive at a time, by device: a block stays in the cache, and vocabulary blocks with all
# rows re-read the weight once, where blocks of rows would re-read it for every block
BLOCK_LOGITS = {"cpu": 1 << 20, "cuda": 1 << 23}


@dataclass(frozen=True)
class ChunkedLogits(Logits):
    """One block after the other, by a matrix product each."""

    allowed: str  # the precision of fp32 products

    @classmethod
    def of(
        cls,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        softcap: float | None,
        temperature: float,
    ) -> Self:
        """With hidden states widened once, where they would be for each block."""
        # products of bf16 numbers are exact in fp32 also where factors are rounded to bf16 on the
        # way, which is faster; a ranking hangs on all others, whatever the process allows elsewhere
        both_bf16 = hidden_NH.dtype == weight_VH.dtype == torch.bfloat16
        if not takes_half(hidden_NH, weight_VH):
            hidden_NH = hidden_NH.to(wide(hidden_NH.dtype))
        return cls(
            hidden_NH, weight_VH, bias_V, softcap, temperature, "medium" if both_bf16 else "highest"
        )

    def blocks(self) -> Iterator[slice]:
        """The vocabulary in blocks whose logits stay in the cache."""
        vocabulary = len(self.weight_VH)
        at_once = BLOCK_LOGITS.get(self.hidden_NH.device.type, BLOCK_LOGITS["cuda"])
        tall = max(len(self.hidden_NH), 1)
        if self.weight_VH.dtype != wide(self.weight_VH.dtype):
            tall = max(tall, self.weight_VH.shape[1])  # a block of the weight may be widened, too
        width = max(256, at_once // tall)
        for start in range(0, vocabulary, width):
            yield slice(start, min(start + width, vocabulary))

    def of_targets(self, target_N: Tensor) -> Tensor:
        """[N], each token's logit of its target; some rows at once, since weights are copied."""
        dtype = wide(self.hidden_NH.dtype)
        if len(self.weight_VH) == 0:  # of a shard
            return self.hidden_NH.new_zeros(target_N.shape, dtype=dtype)
        here_N = (target_N >= 0) & (target_N < len(self.weight_VH))
        target_N = target_N.where(here_N, 0)
        at_once = max(1, BLOCK_LOGITS["cpu"] // max(self.hidden_NH.shape[1], 1))
        parts = [
            torch.linalg.vecdot(some_NH.to(dtype), self.weight_VH[some_N].to(dtype))
            for some_NH, some_N in zip(
                torch.split(self.hidden_NH, at_once), torch.split(target_N, at_once), strict=True
            )
        ]
        return self._finished(torch.cat(parts), target_N).where(here_N, 0)

    def sum_exp(self, anchor_N: Tensor, target_N: Tensor) -> tuple[Tensor, Tensor]:
        """[N], sum_j exp(z_j - anchor), by blocks; [N] the targets' logits, out of the blocks."""
        total_N, logit_N = torch.zeros_like(anchor_N), torch.zeros_like(anchor_N)
        buffer = anchor_N.new_empty(0)
        for block in self.blocks():
            shape = (len(anchor_N), block.stop - block.start)
            if buffer.shape != shape:
                buffer = anchor_N.new_empty(shape)
            logits_NB = self._block(block, buffer)
            row, column = _places(target_N, block)
            logit_N[row] = logits_NB[row, column]
            total_N += logits_NB.sub_(anchor_N[:, None]).exp_().sum(dim=-1)
        return total_N, logit_N

    def around_maximum(self) -> tuple[Tensor, Tensor]:
        """[N] the largest logit, finite also where a bias rules all out; [N] the sum around it."""
        dtype = wide(self.hidden_NH.dtype)
        maximum_N = self.hidden_NH.new_full(
            (len(self.hidden_NH),), torch.finfo(dtype).min, dtype=dtype
        )
        for block in self.blocks():
            maximum_N = torch.maximum(maximum_N, self._block(block).amax(dim=-1))
        nowhere_N = torch.full_like(maximum_N, -1, dtype=torch.int64)
        return maximum_N, self.sum_exp(maximum_N, nowhere_N)[0]

    def slopes(self, block: slice, target_N: Tensor, grad_N: Tensor, logsumexp_N: Tensor) -> Tensor:
        """[N, B], grad_i d log p_i / d (hidden_i . weight_j)."""
        # d logp / d logit_j = 1[j = target] - softmax_j
        logits_NB = self._block(block)
        slope_NB = (logits_NB - logsumexp_N[:, None]).exp_().neg_()
        slope_NB[_places(target_N, block)] += 1
        slope_NB *= grad_N[:, None] / self.temperature
        if self.softcap is not None:
            slope_NB *= 1 - (logits_NB * (self.temperature / self.softcap)) ** 2
        halved = takes_half(self.hidden_NH, self.weight_VH)
        return slope_NB.to(self.weight_VH.dtype) if halved else slope_NB

    def _block(self, block: slice, out_NB: Tensor | None = None) -> Tensor:
        """[N, B], the logits of a block."""
        with precision(self.allowed):
            logits_NB = product(self.hidden_NH, self.weight_VH[block].T, out_NB)
        return self._finished(logits_NB, block)

    def _finished(self, logits: Tensor, columns: slice | Tensor) -> Tensor:
        """Bias, softcap and temperature, in place."""
        if self.bias_V is not None:
            logits += self.bias_V[columns]
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits if self.temperature == 1 else logits.div_(self.temperature)


def _places(target_N: Tensor, block: slice) -> tuple[Tensor, Tensor]:
    """Rows whose target stands in a block, and in which of its columns."""
    row = torch.nonzero((target_N >= block.start) & (target_N < block.stop)).squeeze(-1)
    return row, target_N[row] - block.start
