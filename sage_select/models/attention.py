"""Packed attention for transformers: causal, within each sequence of a packed row."""

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

ATTENTION_NAME = "sage_select_packed"
"""Name under which packed attention is registered with transformers."""
UNSUPPORTED_ARGUMENTS = ("s_aux", "position_bias", "indices", "block_indices")
"""Arguments that change the result of attention and are refused: sinks, biases, selected keys."""


@contextmanager
def packed_attention(model: nn.Module) -> Iterator[None]:
    """Switch a model to packed attention for forward and backward passes of packed batches.

    Forward passes of this library switch it on by themselves. A backward pass needs it if
    activation checkpointing recomputes layers. Other threads block until it exits.
    """
    with attention_for(model, packed=True):
        yield


def packs(model: nn.Module) -> bool:
    """Return whether `packed_attention` is on."""
    return getattr(getattr(model, "config", None), "_attn_implementation", None) == ATTENTION_NAME


@contextmanager
def attention_for(model: nn.Module, *, packed: bool) -> Iterator[None]:
    """Switch a model to packed attention, or back to its own; calls may be nested."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION_NAME, attend)
    record = known(model)
    # held until the switch is undone: configurations belong to the model, not to a thread
    with record.lock:
        # layers share configurations, and nested models have several: switch each of them once
        candidates = (getattr(module, "config", None) for module in model.modules())
        configs: dict[int, Any] = {
            id(c): c for c in candidates if hasattr(c, "_attn_implementation")
        }
        before = [(config, config._attn_implementation) for config in configs.values()]
        try:
            for config, name in before:
                if name != ATTENTION_NAME:
                    record.own_attention[id(config)] = name
                config._attn_implementation = ATTENTION_NAME if packed else own_attention(config)
            yield
        finally:
            for config, name in before:
                config._attn_implementation = name
                if name != ATTENTION_NAME:
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
    """Compute causal attention within each sequence of a packed row; called by transformers.

    Args:
        module: The attention module of a layer.
        query: [1, heads, T, head size].
        key: [1, key heads, T, head size].
        value: [1, key heads, T, value size].
        attention_mask: Ignored: `packing` has the positions of the sequences.
        packing: Positions of the sequences in the row.
        scaling: Factor of query-key products; by default 1 / sqrt(head size).
        dropout: Share of the attention weights to drop.
        softcap: Products become softcap * tanh(products / softcap), as in Gemma 2.
        sliding_window: Number of tokens each token sees, including itself; None for all.
        others: Ignored, except for arguments that would change the result.

    Returns:
        [1, T, heads, value size], and None in place of the attention weights.

    Raises:
        NotImplementedError: If the layer does not pass on `packing`, or passes an argument that is
            not supported, such as attention sinks.
    """
    unsupported = [name for name in UNSUPPORTED_ARGUMENTS if others.get(name) is not None]
    if packing is None:
        raise NotImplementedError("packed attention: the model's layers do not pass on `packing`")
    if unsupported:
        raise NotImplementedError(
            f"packed attention does not support the argument {', '.join(unsupported)}"
        )
    if packing.gather is not None:
        query, key, value = (x.index_select(2, packing.gather) for x in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if _varlen_fits(query, value) and softcap is None and not dropout:
        output = _varlen(query, key, value, packing.bounds, scale, sliding_window)
    else:
        sizes = [end - start for start, end in pairwise(packing.bounds)]
        parts = zip(*(torch.split(x, sizes, dim=2) for x in (query, key, value)), strict=True)
        width = sliding_window or packing.bounds[-1]
        output = torch.cat(
            [_attend_one(packing, q, k, v, scale, width, softcap, dropout) for q, k, v in parts],
            dim=2,
        )
    output = output.transpose(1, 2)
    return output if packing.scatter is None else output.index_select(1, packing.scatter), None


def _attend_one(
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
    # without a mask tensor, PyTorch can choose its fastest kernel
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
    # scaled_dot_product_attention has no softcap, which applies before the mask
    products = softcap * torch.tanh(query @ key.transpose(2, 3) * (scale / softcap))
    weights = products.masked_fill(~sees, -torch.inf).softmax(dim=-1, dtype=torch.float32)
    return torch.dropout(weights.to(query.dtype), dropout, train=True) @ value


def _varlen_fits(query: Tensor, value: Tensor) -> bool:
    """Return whether PyTorch's variable-length attention applies: only in 16 bits on CUDA."""
    return (
        query.is_cuda
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.shape[-1] == value.shape[-1] <= 256
        and {"scale", "window_size"} <= _varlen_options()
    )


@cache
def _varlen_options() -> frozenset[str]:
    """Options that this PyTorch's `varlen_attn` has, which differ by version; none without it."""
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
    """Attention within all sequences in one call, [1, heads, A, head size]."""
    from torch.nn.attention.varlen import varlen_attn

    groups = query.shape[1] // key.shape[1]
    options: dict[str, Any] = {
        "enable_gqa": groups > 1,
        "num_splits": 1,  # bits that do not depend on the other sequences of the batch
    }
    if "enable_gqa" not in _varlen_options():
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    starts = torch.tensor(bounds, dtype=torch.int32, device=query.device)
    longest = max(end - start for start, end in pairwise(bounds))
    options = {name: option for name, option in options.items() if name in _varlen_options()}
    options["scale"] = scale
    # sliding_window counts the token itself, the kernel's window only the tokens to its left
    options["window_size"] = (-1 if sliding_window is None else sliding_window - 1, 0)
    output: Any = varlen_attn(q, k, v, starts, starts, longest, longest, **options)
    return cast(Tensor, output.transpose(0, 1)[None])
