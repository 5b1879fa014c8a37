"""Token log-probs by blocks of the vocabulary, on any device: no [N, V] is ever stored.

N tokens, H hidden, V vocabulary, B columns of a block. Forward keeps a running maximum and sum per
token (Milakov and Gimelshein, 2018); backward computes each block's logits again.
"""

from collections.abc import Iterator
from typing import Any

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


def _blocks(num_tokens: int, vocabulary: int) -> Iterator[slice]:
    width = max(256, BLOCK_LOGITS // max(num_tokens, 1))
    for start in range(0, vocabulary, width):
        yield slice(start, min(start + width, vocabulary))


def _block_logits(
    hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, softcap: float | None, block: slice
) -> Tensor:
    """Logits of one block in the dtype of `hidden_NH`, fp32 or wider."""
    logits_NB = hidden_NH @ weight_VH[block].to(hidden_NH.dtype).T
    if bias_V is not None:
        logits_NB += bias_V[block]
    if softcap is not None:
        logits_NB = softcap * torch.tanh(logits_NB / softcap)
    return logits_NB


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
        wide_NH = hidden_NH.to(torch.promote_types(hidden_NH.dtype, torch.float32))
        num_tokens, vocabulary = len(target_N), len(weight_VH)
        maximum_N = wide_NH.new_full((num_tokens,), -torch.inf)
        sum_N = wide_NH.new_zeros(num_tokens)
        target_logit_N = wide_NH.new_zeros(num_tokens)
        for block in _blocks(num_tokens, vocabulary):
            logits_NB = _block_logits(wide_NH, weight_VH, bias_V, softcap, block)
            local_N = target_N - block.start
            inside_N = (local_N >= 0) & (local_N < logits_NB.shape[1])
            picked_N = logits_NB.gather(
                -1, local_N.clamp(0, logits_NB.shape[1] - 1)[:, None]
            ).squeeze(-1)
            target_logit_N = torch.where(inside_N, picked_N, target_logit_N)
            new_maximum_N = torch.maximum(maximum_N, logits_NB.amax(dim=-1))
            # a bias may rule out all tokens so far; -inf - -inf would be NaN
            anchor_N = new_maximum_N.clamp(min=torch.finfo(wide_NH.dtype).min)
            sum_N = sum_N * (maximum_N - anchor_N).exp() + (
                (logits_NB - anchor_N[:, None]).exp_().sum(dim=-1)
            )
            maximum_N = new_maximum_N
        logsumexp_N = maximum_N + sum_N.log()
        ctx.save_for_backward(hidden_NH, weight_VH, target_N, bias_V, logsumexp_N)
        ctx.softcap = softcap
        return target_logit_N - logsumexp_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        hidden_NH, weight_VH, target_N, bias_V, logsumexp_N = ctx.saved_tensors
        need_hidden, need_weight, _, need_bias, _ = ctx.needs_input_grad
        with torch.autocast(hidden_NH.device.type, enabled=False):
            wide_NH = hidden_NH.to(logsumexp_N.dtype)
            hidden_grad_NH = torch.zeros_like(wide_NH) if need_hidden else None
            weight_grad_VH = torch.empty_like(weight_VH) if need_weight else None
            bias_grad_V = torch.empty_like(bias_V) if need_bias else None
            for block in _blocks(len(target_N), len(weight_VH)):
                # d logp / d logit_j = 1[j = target] - softmax_j
                logits_NB = _block_logits(wide_NH, weight_VH, bias_V, ctx.softcap, block)
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
