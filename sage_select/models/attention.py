"""Packed attention: causal attention within each sequence of a packed row, for transformers."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from inspect import signature
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from sage_select.models.batches import Packing
from sage_select.models.known import known, own_attention

NAME = "sage_select_packed"
"""Of the attention, among those that transformers knows."""
CHANGE_THE_RESULT = ("s_aux", "position_bias", "indices", "block_indices")
"""Arguments of an attention that ours does not know: sinks, biases, a choice of keys."""


@contextmanager
def packed_attention(model: nn.Module) -> Iterator[None]:
    """Around forward and backward of packed batches: inside, the model's attention takes them.

    The forward passes of this library turn it on by themselves. It is the backward pass that needs
    it, where activation checkpointing computes layers again. Another thread that wants the model
    meanwhile waits.
    """
    with attention_for(model, packed=True):
        yield


def packs(model: nn.Module) -> bool:
    """Whether `packed_attention` is on."""
    return getattr(getattr(model, "config", None), "_attn_implementation", None) == NAME


@contextmanager
def attention_for(model: nn.Module, *, packed: bool) -> Iterator[None]:
    """The attention that packed batches need, or the model's own; nested in whatever way."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attend)
    record = known(model)
    with record.lock:
        found = (getattr(module, "config", None) for module in model.modules())
        configs: dict[int, Any] = {id(c): c for c in found if hasattr(c, "_attn_implementation")}
        before = [(config, config._attn_implementation) for config in configs.values()]
        try:
            for config, name in before:
                if name != NAME:
                    record.own_attention[id(config)] = name
                config._attn_implementation = NAME if packed else own_attention(config)
            yield
        finally:
            for config, name in before:
                config._attn_implementation = name
                if name != NAME:
                    record.own_attention.pop(id(config), None)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packing: Packing | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each sequence of a packed row, as transformers calls it.

    Args:
        module: The layer's attention.
        query: [1, heads, T, head size].
        key: [1, key heads, T, head size].
        value: [1, key heads, T, value size].
        attention_mask: Not looked at: `packing` says all.
        packing: Where sequences stand.
        scaling: Of the products; by default the root of the head size.
        dropout: Share of the weights to drop.
        softcap: Products become softcap * tanh(products / softcap), as in Gemma 2.
        sliding_window: How many tokens each one sees, itself counted; None: all before it.
        others: What would change the result, such as sinks, is refused.

    Returns:
        [1, T, heads, value size], and no weights.
    """
    unknown = [name for name in CHANGE_THE_RESULT if others.get(name) is not None]
    if packing is None:
        raise NotImplementedError(
            "packed attention: its layers do not hand on where sequences stand"
        )
    if unknown:
        raise NotImplementedError(f"packed attention: it was called with {', '.join(unknown)}")
    if packing.gather is not None:
        query, key, value = (x.index_select(2, packing.gather) for x in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if _varlen_fits(query, value) and softcap is None and not dropout:
        whole = _varlen(query, key, value, packing.bounds, scale, sliding_window)
    else:
        sizes = [end - start for start, end in pairwise(packing.bounds)]
        parts = zip(*(torch.split(x, sizes, dim=2) for x in (query, key, value)), strict=True)
        width = sliding_window or packing.bounds[-1]
        whole = torch.cat(
            [_one(packing, q, k, v, scale, width, softcap, dropout) for q, k, v in parts], dim=2
        )
    whole = whole.transpose(1, 2)
    return whole if packing.scatter is None else whole.index_select(1, packing.scatter), None


def _one(
    packing: Packing,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    width: int,
    softcap: float | None,
    dropout: float,
) -> Tensor:
    """Attention within one sequence, [1, heads, L, value size]."""
    length, groups = query.shape[2], query.shape[1] // key.shape[1]
    if softcap is None and length <= width:
        return scaled_dot_product_attention(
            query, key, value, dropout_p=dropout, scale=scale, is_causal=True, enable_gqa=groups > 1
        )
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    sees = packing.window(length, width, query.device)
    if softcap is None:
        return scaled_dot_product_attention(
            query, key, value, attn_mask=sees, dropout_p=dropout, scale=scale
        )
    products = softcap * torch.tanh(query @ key.transpose(2, 3) * (scale / softcap))
    weights = products.masked_fill(~sees, -torch.inf).softmax(dim=-1, dtype=torch.float32)
    return torch.dropout(weights.to(query.dtype), dropout, train=True) @ value


def _varlen_fits(query: Tensor, value: Tensor) -> bool:
    """Whether PyTorch's attention over sequences of various lengths can be had: on CUDA alone."""
    return (
        query.is_cuda
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.shape[-1] == value.shape[-1] <= 256
        and {"scale", "window_size"} <= _varlen_options()
    )


@cache
def _varlen_options() -> frozenset[str]:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return frozenset()
    return frozenset(signature(varlen_attn).parameters)


def _varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: tuple[int, ...],
    scale: float,
    sliding_window: int | None,
) -> Tensor:
    """All sequences in one call, [1, heads, A, head size]."""
    from torch.nn.attention.varlen import varlen_attn

    groups = query.shape[1] // key.shape[1]
    options: dict[str, Any] = {
        "enable_gqa": groups > 1,
        "num_splits": 1,  # the same bits whatever stands beside a sequence
    }
    if "enable_gqa" not in _varlen_options():
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    starts = torch.tensor(bounds, dtype=torch.int32, device=query.device)
    longest = max(end - start for start, end in pairwise(bounds))
    options = {name: option for name, option in options.items() if name in _varlen_options()}
    options["scale"] = scale
    # a width counts the token itself, and the kernel's window does not
    options["window_size"] = (-1 if sliding_window is None else sliding_window - 1, 0)
    whole: Any = varlen_attn(q, k, v, starts, starts, longest, longest, **options)
    return cast(Tensor, whole.transpose(0, 1)[None])
