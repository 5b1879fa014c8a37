"""Batches for one forward pass: padded, or packed into one row without padding.

A packed row holds sequences end to end; a prompt that several of them share is stored once:
p c r | p c r | ... Token-wise layers process each token once. Attention sees each sequence whole
and alone: `attention.py` gathers its tokens, prompt first; its causal mask ends with it.

    row           p p p c c r r r            what embedding, projections and MLP compute
    gathered      p p p c c p p p r r r      what attention sees, with bounds 0, 5, 11
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sage_select.data.pair_table import TokenSequence


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


def lay_out(sequences: Sequence[TokenSequence], *, packed: bool) -> Batch:
    """A batch of these sequences, packed or padded."""
    return pack(sequences) if packed else pad(sequences)


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
