"""Batches for one forward pass: padded, or packed into one row without padding.

A packed row holds sequences end to end; a prompt that several of them share is stored once:
p c r | p c r | ... Token-wise layers process each token once. Attention treats each sequence by
itself: `attention.py` gathers its tokens, prompt first, and masks causally within them.

    row           p p p c c r r r            input of embedding, projections and MLP
    gathered      p p p c c p p p r r r      input of attention, with bounds 0, 5, 11
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sage_select.data.pair_table import TokenSequence


class Batch(NamedTuple):
    """S sequences for one forward pass, and their n scored tokens.

    The last token of a sequence predicts nothing and is left out of the inputs.
    """

    inputs: dict[str, Any]  # arguments of the model's forward; input_ids are int64 [rows, tokens]
    predicts: Tensor  # int64 [n], flat positions in rows x tokens whose next token is scored
    targets: Tensor  # int64 [n], the tokens to score, sequence by sequence
    cu_seqlens: Tensor  # int64 [S + 1], cumulative counts of targets

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on a device; `cu_seqlens` is not moved."""
        inputs = {
            name: value.to(device) if hasattr(value, "to") else value
            for name, value in self.inputs.items()
        }
        return Batch(inputs, self.predicts.to(device), self.targets.to(device), self.cu_seqlens)


def lay_out(sequences: Sequence[TokenSequence], *, packed: bool) -> Batch:
    """Return a batch of these sequences, packed or padded.

    Raises:
        ValueError: If a sequence has no prompt, or no response.
    """
    for s in sequences:
        # the first token has no context: position -1 would be a token of another sequence
        if not 1 <= s.response_start < len(s.tokens):
            raise ValueError(
                f"measure: a sequence of {len(s.tokens)} tokens has its response at position "
                f"{s.response_start}; prompt and response must each have at least one token"
            )
    return pack(sequences) if packed else pad(sequences)


def pad(sequences: Sequence[TokenSequence]) -> Batch:
    """Return a batch with one row per sequence, padded on the right."""
    lengths = [len(s.tokens) - 1 for s in sequences]
    input_ids = np.zeros((len(sequences), max(lengths)), np.int64)
    attention_mask = np.zeros_like(input_ids)
    for i, (length, s) in enumerate(zip(lengths, sequences, strict=True)):
        input_ids[i, :length] = s.tokens[:-1]
        attention_mask[i, :length] = 1
    starts = np.arange(len(sequences)) * max(lengths)
    predicts = [start + s.scored - 1 for start, s in zip(starts, sequences, strict=True)]
    inputs = {
        "input_ids": torch.from_numpy(input_ids),
        "attention_mask": torch.from_numpy(attention_mask),
        "use_cache": False,
    }
    return Batch(inputs, torch.from_numpy(np.concatenate(predicts)), *_targets(sequences))


def pack(sequences: Sequence[TokenSequence]) -> Batch:
    """Return a batch with all sequences in one row, unpadded, and each distinct prompt once."""
    groups: dict[bytes, list[int]] = {}  # sequences by prompt
    for i, s in enumerate(sequences):
        groups.setdefault(s.tokens[: s.response_start].tobytes(), []).append(i)
    row, positions, used = [], [], 0
    row_positions = [np.empty(0, np.int64)] * len(sequences)  # of each sequence's tokens
    for group in groups.values():
        start = sequences[group[0]].response_start
        row.append(sequences[group[0]].tokens[:start])
        positions.append(np.arange(start))
        prompt, used = used + np.arange(start), used + start
        for i in group:
            response = sequences[i].tokens[start:-1]
            row.append(response)
            # position ids continue from the prompt, which may be far away in the row
            positions.append(start + np.arange(len(response)))
            row_positions[i] = np.concatenate([prompt, used + np.arange(len(response))])
            used += len(response)
    predicts = [at[s.scored - 1] for at, s in zip(row_positions, sequences, strict=True)]
    # gathered in the order of the row, so that nothing is gathered if no prompt is shared
    in_row_order = [row_positions[i] for group in groups.values() for i in group]
    inputs = {
        "input_ids": torch.from_numpy(np.concatenate(row).astype(np.int64))[None],
        "position_ids": torch.from_numpy(np.concatenate(positions))[None],
        # transformers passes a four-dimensional mask to the attention unchanged. Packed attention
        # ignores it; any other attention, called by mistake, gives NaN instead of a wrong number
        "attention_mask": torch.full((1, 1, 1, 1), torch.nan),
        "use_cache": False,
        "packing": Packing.of(in_row_order, used),
    }
    return Batch(inputs, torch.from_numpy(np.concatenate(predicts)), *_targets(sequences))


def _targets(sequences: Sequence[TokenSequence]) -> tuple[Tensor, Tensor]:
    """Scored tokens of all sequences, and their cumulative counts."""
    responses = [s.tokens[s.scored] for s in sequences]
    bounds = np.cumsum([0, *map(len, responses)])
    return torch.from_numpy(np.concatenate(responses).astype(np.int64)), torch.from_numpy(bounds)


@dataclass(frozen=True)
class Packing:
    """Positions by which attention gathers whole sequences from a packed row of T tokens.

    Attributes:
        bounds: Start of each sequence among the A gathered tokens, and A at the end.
        gather: int64 [A], positions in the row; None if no prompt is shared, so that A = T.
        scatter: int64 [T], for each token of the row a position among the gathered tokens.
    """

    bounds: tuple[int, ...]
    gather: Tensor | None
    scatter: Tensor | None
    _masks: dict[tuple[int, int], Tensor] = field(default_factory=dict)  # shared by all layers

    @classmethod
    def of(cls, wholes: Sequence[np.ndarray], used: int) -> "Packing":
        """Return the packing of a row of `used` tokens from each sequence's positions in it."""
        bounds = tuple(np.cumsum([0, *map(len, wholes)]).tolist())
        if bounds[-1] == used:
            return cls(bounds, None, None)
        gather = np.concatenate(wholes)
        # a shared prompt is gathered several times: any copy of its output will do, here the last
        scatter = np.empty(used, np.int64)
        scatter[gather] = np.arange(len(gather))
        return cls(bounds, torch.from_numpy(gather), torch.from_numpy(scatter))

    def to(self, device: torch.device) -> "Packing":
        """Return the packing with its indices on a device."""
        if self.gather is None or self.scatter is None:
            return self
        return Packing(self.bounds, self.gather.to(device), self.scatter.to(device))

    def window(self, length: int, width: int, device: torch.device) -> Tensor:
        """Mask, bool [length, length]: each token sees the last `width` tokens up to itself."""
        if (length, width) not in self._masks:
            causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
            self._masks[length, width] = causal.triu(1 - width)
        return self._masks[length, width]
