"""Batches for one forward pass: padded, or packed into one row without any padding.

A packed row holds sequences end to end, and a prompt that several of them share stands in it once:
p c r | p c r | ... Layers that look at tokens one by one see each token once. Attention sees every
sequence whole and alone: its tokens are gathered, prompt first, and its causal mask ends with it.

    row           p p p c c r r r            what embedding, projections and MLP compute
    gathered      p p p c c p p p r r r      what attention sees, with bounds 0, 5, 11
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from inspect import signature
from itertools import pairwise
from threading import RLock
from typing import Any, NamedTuple, cast
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from sage_select.data.dataset import TokenSequence

NAME = "sage_select_packed"
"""Of the attention, among those that transformers knows."""
CHANGE_THE_RESULT = ("s_aux", "position_bias", "indices", "block_indices")
"""Arguments of an attention that ours does not know: sinks, biases, a choice of keys."""


class Batch(NamedTuple):
    """S sequences for one forward pass, and their n response tokens.

    The last token of a sequence predicts nothing, and is not in it.
    """

    inputs: dict[str, Any]  # of the model's forward; input_ids are int64 [rows, tokens]
    predicts: Tensor  # int64 [n], places among rows x tokens: the next token is scored
    targets: Tensor  # int64 [n], these tokens, sequence by sequence
    cu_seqlens: Tensor  # int64 [S + 1]

    def to(self, device: torch.device) -> "Batch":
        """The same on a device; the bounds stay where they are."""
        inputs = {
            name: value.to(device) if hasattr(value, "to") else value
            for name, value in self.inputs.items()
        }
        return Batch(inputs, self.predicts.to(device), self.targets.to(device), self.cu_seqlens)


def pad(sequences: Sequence[TokenSequence]) -> Batch:
    """One row for each sequence, filled up on the right."""
    lengths = [len(s.tokens) - 1 for s in sequences]
    input_ids = np.zeros((len(sequences), max(lengths)), np.int64)
    attention_mask = np.zeros_like(input_ids)
    for i, (length, s) in enumerate(zip(lengths, sequences, strict=True)):
        input_ids[i, :length] = s.tokens[:-1]
        attention_mask[i, :length] = 1
    starts = np.arange(len(sequences)) * max(lengths)
    predicts = [
        start + np.arange(s.response_start - 1, length)
        for start, length, s in zip(starts, lengths, sequences, strict=True)
    ]
    inputs = {
        "input_ids": torch.from_numpy(input_ids),
        "attention_mask": torch.from_numpy(attention_mask),
        "use_cache": False,
    }
    return Batch(inputs, torch.from_numpy(np.concatenate(predicts)), *_targets(sequences))


def pack(sequences: Sequence[TokenSequence]) -> Batch:
    """One row for all sequences, without padding; prompts that are the same stand in it once."""
    groups: dict[bytes, list[int]] = {}
    for i, s in enumerate(sequences):
        groups.setdefault(s.tokens[: s.response_start].tobytes(), []).append(i)
    row, positions, used = [], [], 0
    wholes = [np.empty(0, np.int64)] * len(sequences)  # where in the row a sequence's tokens stand
    for group in groups.values():
        start = sequences[group[0]].response_start
        row.append(sequences[group[0]].tokens[:start])
        positions.append(np.arange(start))
        prompt, used = used + np.arange(start), used + start
        for i in group:
            response = sequences[i].tokens[start:-1]
            row.append(response)
            positions.append(start + np.arange(len(response)))
            wholes[i] = np.concatenate([prompt, used + np.arange(len(response))])
            used += len(response)
    predicts = [whole[s.response_start - 1 :] for whole, s in zip(wholes, sequences, strict=True)]
    in_row = [wholes[i] for group in groups.values() for i in group]
    inputs = {
        "input_ids": torch.from_numpy(np.concatenate(row).astype(np.int64))[None],
        "position_ids": torch.from_numpy(np.concatenate(positions))[None],
        # transformers hands a mask of four dimensions to the attention as it is; ours does not
        # look at it, and any other that is called by mistake gives NaN, not the wrong number
        "attention_mask": torch.full((1, 1, 1, 1), torch.nan),
        "use_cache": False,
        "packing": Packing.of(in_row, used),
    }
    return Batch(inputs, torch.from_numpy(np.concatenate(predicts)), *_targets(sequences))


def _targets(sequences: Sequence[TokenSequence]) -> tuple[Tensor, Tensor]:
    responses = [s.tokens[s.response_start :] for s in sequences]
    bounds = np.cumsum([0, *map(len, responses)])
    return torch.from_numpy(np.concatenate(responses).astype(np.int64)), torch.from_numpy(bounds)


@dataclass(frozen=True)
class Packing:
    """How attention finds whole sequences in a packed row of T tokens.

    Attributes:
        bounds: Where each sequence starts among the A gathered tokens, and A at the end.
        gather: int64 [A], places in the row; None where nothing is shared, and A = T.
        scatter: int64 [T], a place among the gathered for each token of the row.
    """

    bounds: tuple[int, ...]
    gather: Tensor | None
    scatter: Tensor | None
    _masks: dict[tuple[int, int], Tensor] = field(default_factory=dict)  # the same in every layer

    @classmethod
    def of(cls, wholes: Sequence[np.ndarray], used: int) -> "Packing":
        """From the places in a row of `used` tokens at which each sequence's tokens stand."""
        bounds = tuple(np.cumsum([0, *map(len, wholes)]).tolist())
        if bounds[-1] == used:
            return cls(bounds, None, None)
        gather = np.concatenate(wholes)
        scatter = np.empty(used, np.int64)
        scatter[gather] = np.arange(len(gather))
        return cls(bounds, torch.from_numpy(gather), torch.from_numpy(scatter))

    def to(self, device: torch.device) -> "Packing":
        """The same with its indices on a device."""
        if self.gather is None or self.scatter is None:
            return self
        return Packing(self.bounds, self.gather.to(device), self.scatter.to(device))

    def window(self, length: int, width: int, device: torch.device) -> Tensor:
        """bool [length, length]: each token sees the `width` up to itself."""
        if (length, width) not in self._masks:
            sees = torch.ones(length, length, dtype=torch.bool, device=device).tril()
            self._masks[length, width] = sees.triu(1 - width)
        return self._masks[length, width]


@contextmanager
def packed_attention(model: nn.Module) -> Iterator[None]:
    """Around forward and backward of packed batches: inside, the model's attention takes them.

    The forward passes of this library turn it on by themselves. It is the backward pass that needs
    it, where activation checkpointing computes layers again. Another thread that wants the model
    meanwhile waits.
    """
    with attention_for(model, packed=True):
        yield


def attention_of(model: nn.Module) -> str | None:
    """The name of the model's own attention, also while it is packed."""
    config: Any = getattr(model, "config", None)
    return _own.get(id(config), getattr(config, "_attn_implementation", None))


def packs(model: nn.Module) -> bool:
    """Whether `packed_attention` is on."""
    return getattr(getattr(model, "config", None), "_attn_implementation", None) == NAME


_own: dict[int, str] = {}  # by a configuration's identity: its own attention, while it is packed
_locks: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()


def exclusive(model: nn.Module) -> Any:
    """A lock for what changes a model for a while; the same thread may take it again."""
    return _locks.setdefault(model, RLock())


@contextmanager
def attention_for(model: nn.Module, *, packed: bool) -> Iterator[None]:
    """The attention that packed batches need, or the model's own; nested in whatever way."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attend)
    with exclusive(model):
        found = (getattr(module, "config", None) for module in model.modules())
        configs: dict[int, Any] = {id(c): c for c in found if hasattr(c, "_attn_implementation")}
        before = [(config, config._attn_implementation) for config in configs.values()]
        try:
            for config, name in before:
                if name != NAME:
                    _own[id(config)] = name
                config._attn_implementation = NAME if packed else _own[id(config)]
            yield
        finally:
            for config, name in before:
                config._attn_implementation = name
                if name != NAME:
                    _own.pop(id(config), None)


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
