"""The distinct sequences of some pairs, and how they are batched, whatever the order of rows."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sage_select.arrays import BoolArray, Int64Array
from sage_select.data.dataset import PreferenceDataset
from sage_select.data.pair_table import TokenSequence
from sage_select.pairs import PairLogps

HASHED_AT_ONCE = 4096  # sequences whose tokens are in memory while keys are made

Keys = npt.NDArray[np.bytes_]
"""16 bytes per sequence. Fixed-size byte strings are compared whole: numpy ignores zeros at an end,
but two strings of one size that differ in nothing else are equal."""


class SequenceKeys(NamedTuple):
    """What tells the 2P sequences of some pairs apart, all chosen and then all rejected."""

    sequences: Keys  # [2P], of the tokens and of where the response starts
    prompts: Keys  # [2P], of the tokens before that
    starts: Int64Array  # [2P], where the response starts
    largest_token: int

    def at(self, rows: Int64Array) -> "SequenceKeys":
        """Those of some of the pairs, by their places."""
        places = np.concatenate([rows, rows + len(self.starts) // 2])
        return SequenceKeys(
            self.sequences[places], self.prompts[places], self.starts[places], self.largest_token
        )


@dataclass(frozen=True)
class DistinctSequences:
    """D different sequences among the 2P of some pairs, those of one prompt together.

    Pairs of one prompt often share a response. Ordered by length and content, what is batched with
    what does not depend on the order of the rows. Tokens are looked up when they are needed: a set
    larger than memory can be measured.

    Attributes:
        pairs: The pairs.
        keys: [D], a hash of each sequence's tokens and of where the response starts.
        prompts: int64 [D], a number for each prompt.
        starts: int64 [D], tokens of the prompt.
        lengths: int64 [D], tokens; those of one prompt descend.
        largest_token: Of all of them.
        of_pairs: int64 [2P], for all chosen and then all rejected, which sequence it is.
    """

    pairs: PreferenceDataset
    keys: Keys
    prompts: Int64Array
    starts: Int64Array
    lengths: Int64Array
    largest_token: int
    of_pairs: Int64Array
    _first: Int64Array  # [D], a place among the 2P where it stands

    def __len__(self) -> int:
        return len(self.keys)

    def sequences(self, places: Sequence[int]) -> list[TokenSequence]:
        """The sequences at these places."""
        return self.pairs.sequences_at(self._first[list(places)])

    def rows(self, places: Sequence[int]) -> tuple[int, int]:
        """The first and the last dataset row, of those in which these sequences stand first."""
        rows = self.pairs.index[self._first[list(places)] % len(self.pairs)]
        return int(rows.min()), int(rows.max())

    def tokens(self, places: Sequence[int], *, packed: bool) -> int:
        """Tokens of a batch of these places: padding counts, and a shared prompt once."""
        lengths = self.lengths[list(places)]
        if not packed:
            return int(lengths.max()) * len(lengths)
        return int(lengths.sum() - self.starts[places][~self.first_of_prompt(places)].sum())

    def first_of_prompt(self, places: Sequence[int] | Int64Array) -> BoolArray:
        """bool, False where the place before has the same prompt."""
        prompts = self.prompts[list(places)]
        return np.concatenate([[True], prompts[1:] != prompts[:-1]])[: len(prompts)]

    def needed(self, places: Int64Array) -> tuple[Int64Array, Int64Array, BoolArray]:
        """What `Shape.needed` takes: of these places, starts, lengths and which come first."""
        return self.starts[places], self.lengths[places], self.first_of_prompt(places)

    def batches(
        self, max_tokens: int, *, packed: bool, among: Sequence[int] | None = None
    ) -> Iterator[list[int]]:
        """Places in batches of at most so many tokens; a longer sequence stands alone.

        Args:
            max_tokens: Tokens that go through the model: padding counts, and a shared prompt once.
            packed: Whether batches are packed, or else padded to their longest.
            among: The places to batch, all by default.
        """
        order = np.arange(len(self)) if among is None else np.sort(np.asarray(among, np.int64))
        if not packed:
            order = order[np.argsort(-self.lengths[order], kind="stable")]
        prompts, starts, lengths = (
            x[order].tolist() for x in (self.prompts, self.starts, self.lengths)
        )
        batch: list[int] = []
        used = 0
        for i, place in enumerate(order.tolist()):
            if packed:
                shared = starts[i] if batch and prompts[i] == prompts[i - 1] else 0
                after = used + lengths[i] - shared
            else:
                after = (len(batch) + 1) * lengths[i - len(batch)]
            if batch and after > max_tokens:
                yield batch
                batch, after = [], lengths[i]
            batch.append(place)
            used = after
        if batch:
            yield batch


def sequence_keys(pairs: PreferenceDataset) -> SequenceKeys:
    """Hashes of all chosen sequences and then of all rejected ones."""
    hashes, prompts, starts, largest = [], [], [], 0
    for start in range(0, 2 * len(pairs), HASHED_AT_ONCE):
        places = np.arange(start, min(start + HASHED_AT_ONCE, 2 * len(pairs)))
        for tokens, begin in pairs.sequences_at(places):
            largest = max(largest, int(tokens.max()))
            salt = begin.to_bytes(16, "little")
            key = hashlib.blake2b(tokens[:begin].tobytes(), digest_size=16, salt=salt)
            prompts.append(key.digest())
            key.update(tokens[begin:].tobytes())
            hashes.append(key.digest())
            starts.append(begin)
    return SequenceKeys(
        np.frombuffer(b"".join(hashes), dtype="S16"),
        np.frombuffer(b"".join(prompts), dtype="S16"),
        np.array(starts, dtype=np.int64),
        largest,
    )


def distinct_sequences(
    pairs: PreferenceDataset, keys: SequenceKeys | None = None
) -> DistinctSequences:
    """Each sequence of these pairs once, the prompt of the longest first.

    Args:
        pairs: The pairs.
        keys: Their keys, where they are at hand.
    """
    sequences, prompts, starts, largest = sequence_keys(pairs) if keys is None else keys
    distinct, first, of_pairs = np.unique(sequences, return_index=True, return_inverse=True)
    lengths = pairs.sequence_lengths[first]
    _, prompt = np.unique(prompts[first], return_inverse=True)
    longest = np.zeros(len(first), dtype=np.int64)
    np.maximum.at(longest, prompt, lengths)
    order = np.lexsort((distinct, -lengths, prompt, -longest[prompt]))
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return DistinctSequences(
        pairs,
        distinct[order],
        prompt[order],
        starts[first][order],
        lengths[order],
        largest,
        rank[of_pairs],
        first[order],
    )


def as_pair_logps(pairs: PreferenceDataset, logps: Tensor) -> PairLogps:
    """Log-probs of pairs, from those of their sequences: all chosen, then all rejected.

    Args:
        pairs: P pairs.
        logps: [2P], in nats.

    Raises:
        ValueError: If one is not finite.
    """
    chosen, rejected = logps[: len(pairs)], logps[len(pairs) :]
    bad = ~(chosen.isfinite() & rejected.isfinite())
    if bool(bad.any()):
        first = int(bad.nonzero()[0])
        raise ValueError(
            f"measure: pair {pairs.ids[first]} (row {pairs.index[first]}) has log-probs "
            f"{chosen[first].item()} and {rejected[first].item()}; the model's weights or "
            "activations are not finite"
        )
    return PairLogps(
        index=torch.from_numpy(pairs.index),
        chosen=chosen,
        rejected=rejected,
        chosen_tokens=torch.from_numpy(pairs.chosen_tokens),
        rejected_tokens=torch.from_numpy(pairs.rejected_tokens),
    )
