"""Logits in blocks of the vocabulary with PyTorch, on any device; [N, V] is never stored."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from sage_select.ops.logits import Logits
from sage_select.ops.products import precision, product, takes_half, wide

# Number of fp32 logits in memory at a time, by device: a block of this size stays in the cache.
# Blocks split the vocabulary, not the rows, so the weight is read once instead of once per block.
BLOCK_LOGITS = {"cpu": 1 << 20, "cuda": 1 << 23}


@dataclass(frozen=True)
class ChunkedLogits(Logits):
    """Logits computed block after block, each by one matrix product."""

    product_precision: str  # of fp32 products, as in torch.set_float32_matmul_precision

    @classmethod
    def of(
        cls,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        softcap: float | None,
        temperature: float,
    ) -> Self:
        """Prepare a head; the hidden states are widened here, once, and not for every block."""
        # "medium" may round factors to bf16, which is faster and changes nothing if both are bf16
        # already. All other dtypes need "highest", whatever precision the process permits
        # elsewhere, because rankings depend on these logits.
        both_bf16 = hidden_NH.dtype == weight_VH.dtype == torch.bfloat16
        if not takes_half(hidden_NH, weight_VH):
            hidden_NH = hidden_NH.to(wide(hidden_NH.dtype))
        return cls(
            hidden_NH, weight_VH, bias_V, softcap, temperature, "medium" if both_bf16 else "highest"
        )

    def blocks(self) -> Iterator[slice]:
        """Yield the slices of the vocabulary whose logits stay in the cache."""
        vocabulary = len(self.weight_VH)
        block_logits = BLOCK_LOGITS.get(self.hidden_NH.device.type, BLOCK_LOGITS["cuda"])
        height = max(len(self.hidden_NH), 1)
        if self.weight_VH.dtype != wide(self.weight_VH.dtype):
            # a block of the weight may be widened too, to [B, H]
            height = max(height, self.weight_VH.shape[1])
        width = max(256, block_logits // height)
        for start in range(0, vocabulary, width):
            yield slice(start, min(start + width, vocabulary))

    def of_targets(self, target_N: Tensor) -> Tensor:
        """[N], the logit of each token's target; 0 if the target is in another shard."""
        dtype = wide(self.hidden_NH.dtype)
        if len(self.weight_VH) == 0:  # an empty shard has no row to index
            return self.hidden_NH.new_zeros(target_N.shape, dtype=dtype)
        in_shard_N = (target_N >= 0) & (target_N < len(self.weight_VH))
        target_N = target_N.where(in_shard_N, 0)
        # indexing copies one row of the weight per token, so only a few tokens are done at a time
        chunk_rows = max(1, BLOCK_LOGITS["cpu"] // max(self.hidden_NH.shape[1], 1))
        chunks = [
            torch.linalg.vecdot(chunk_NH.to(dtype), self.weight_VH[chunk_N].to(dtype))
            for chunk_NH, chunk_N in zip(
                torch.split(self.hidden_NH, chunk_rows),
                torch.split(target_N, chunk_rows),
                strict=True,
            )
        ]
        return self._finished(torch.cat(chunks), target_N).where(in_shard_N, 0)

    def sum_exp(self, anchor_N: Tensor, target_N: Tensor) -> tuple[Tensor, Tensor]:
        """[N], sum_j exp(z_j - anchor), and [N], the targets' logits taken from the blocks."""
        total_N, logit_N = torch.zeros_like(anchor_N), torch.zeros_like(anchor_N)
        buffer = anchor_N.new_empty(0)  # reused by every block but the last, which may be narrower
        for block in self.blocks():
            shape = (len(anchor_N), block.stop - block.start)
            if buffer.shape != shape:
                buffer = anchor_N.new_empty(shape)
            logits_NB = self._block(block, buffer)
            row, column = _target_positions(target_N, block)
            logit_N[row] = logits_NB[row, column]  # before the in-place exponential below
            total_N += logits_NB.sub_(anchor_N[:, None]).exp_().sum(dim=-1)
        return total_N, logit_N

    def around_maximum(self) -> tuple[Tensor, Tensor]:
        """[N], the largest logit, and [N], sum_j exp(z_j - largest)."""
        dtype = wide(self.hidden_NH.dtype)
        # starts at the lowest finite number, so it stays finite if a bias of -inf excludes all
        maximum_N = self.hidden_NH.new_full(
            (len(self.hidden_NH),), torch.finfo(dtype).min, dtype=dtype
        )
        for block in self.blocks():
            maximum_N = torch.maximum(maximum_N, self._block(block).amax(dim=-1))
        no_target_N = torch.full_like(maximum_N, -1, dtype=torch.int64)
        return maximum_N, self.sum_exp(maximum_N, no_target_N)[0]

    def slopes(self, block: slice, target_N: Tensor, grad_N: Tensor, logsumexp_N: Tensor) -> Tensor:
        """[N, B], grad_i d log p_i / d (hidden_i . weight_j)."""
        # d logp / d logit_j = 1[j = target] - softmax_j
        logits_NB = self._block(block)
        slope_NB = (logits_NB - logsumexp_N[:, None]).exp_().neg_()
        slope_NB[_target_positions(target_N, block)] += 1
        slope_NB *= grad_N[:, None] / self.temperature
        if self.softcap is not None:
            # d (c tanh(x / c)) / dx = 1 - tanh(x / c)^2, from the capped logit itself
            slope_NB *= 1 - (logits_NB * (self.temperature / self.softcap)) ** 2
        in_half = takes_half(self.hidden_NH, self.weight_VH)
        return slope_NB.to(self.weight_VH.dtype) if in_half else slope_NB

    def _block(self, block: slice, out_NB: Tensor | None = None) -> Tensor:
        """[N, B], the logits of one block of the vocabulary."""
        with precision(self.product_precision):
            logits_NB = product(self.hidden_NH, self.weight_VH[block].T, out_NB)
        return self._finished(logits_NB, block)

    def _finished(self, logits: Tensor, columns: slice | Tensor) -> Tensor:
        """Add the bias and apply softcap and temperature, in place."""
        if self.bias_V is not None:
            logits += self.bias_V[columns]
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits if self.temperature == 1 else logits.div_(self.temperature)


def _target_positions(target_N: Tensor, block: slice) -> tuple[Tensor, Tensor]:
    """Rows whose target is in the block, and the column of each such target within it."""
    row = torch.nonzero((target_N >= block.start) & (target_N < block.stop)).squeeze(-1)
    return row, target_N[row] - block.start
