"""Distinct sequences of pairs, and batches of them that do not depend on the order of rows."""

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

HASHED_AT_ONCE = 4096  # sequences whose tokens are in memory at a time while keys are computed

Keys = npt.NDArray[np.bytes_]
"""16 bytes per sequence. numpy ignores trailing zeros of byte strings, which is harmless among
strings of one size."""


class SequenceKeys(NamedTuple):
    """Hashes that identify the 2P sequences of P pairs, all chosen and then all rejected."""

    sequences: Keys  # [2P], of the tokens and of which of them are scored
    prompts: Keys  # [2P], of the tokens before the response
    starts: Int64Array  # [2P], start of the response
    scored: Int64Array  # [2P], number of scored tokens
    largest_token: int

    def at(self, rows: Int64Array) -> "SequenceKeys":
        """Return the keys of some pairs, by their positions."""
        places = np.concatenate([rows, rows + len(self.starts) // 2])
        return SequenceKeys(
            self.sequences[places],
            self.prompts[places],
            self.starts[places],
            self.scored[places],
            self.largest_token,
        )


@dataclass(frozen=True)
class DistinctSequences:
    """The D distinct sequences among the 2P of P pairs; those with the same prompt are adjacent.

    Pairs of one prompt often share a response. Sequences are ordered by length and content, so that
    batches do not depend on the order of the rows. Tokens are looked up on use: a dataset larger
    than memory can be measured.

    Attributes:
        pairs: The pairs.
        keys: [D], hash of each sequence's tokens and of which of them are scored.
        prompts: int64 [D], number of the sequence's prompt.
        starts: int64 [D], tokens of the prompt.
        scored: int64 [D], scored tokens.
        lengths: int64 [D], tokens of the sequence; descending within a prompt.
        largest_token: Largest token id in any of them.
        of_pairs: int64 [2P], index of each pair's sequence, all chosen and then all rejected.
    """

    pairs: PreferenceDataset
    keys: Keys
    prompts: Int64Array
    starts: Int64Array
    scored: Int64Array
    lengths: Int64Array
    largest_token: int
    of_pairs: Int64Array
    _first: Int64Array  # [D], first occurrence among the 2P

    def __len__(self) -> int:
        return len(self.keys)

    def sequences(self, places: Sequence[int]) -> list[TokenSequence]:
        """Return the sequences with these indices."""
        return self.pairs.sequences_at(self._first[list(places)])

    def rows(self, places: Sequence[int]) -> tuple[int, int]:
        """First and last dataset row among the first occurrences of these sequences."""
        rows = self.pairs.index[self._first[list(places)] % len(self.pairs)]
        return int(rows.min()), int(rows.max())

    def tokens(self, places: Sequence[int], *, packed: bool) -> int:
        """Tokens of a batch of these sequences: padding counts, and a shared prompt once."""
        lengths = self.lengths[list(places)]
        if not packed:
            return int(lengths.max()) * len(lengths)
        return int(lengths.sum() - self.starts[places][~self.first_of_prompt(places)].sum())

    def first_of_prompt(self, places: Sequence[int] | Int64Array) -> BoolArray:
        """Mask, False for a sequence whose predecessor in `places` has the same prompt."""
        prompts = self.prompts[list(places)]
        return np.concatenate([[True], prompts[1:] != prompts[:-1]])[: len(prompts)]

    def needed(self, places: Int64Array) -> tuple[Int64Array, Int64Array, Int64Array, BoolArray]:
        """Arguments of `Shape.needed` for these sequences."""
        first = self.first_of_prompt(places)
        return self.starts[places], self.lengths[places], self.scored[places], first

    def batches(
        self, max_tokens: int, *, packed: bool, among: Sequence[int] | None = None
    ) -> Iterator[list[int]]:
        """Yield indices in batches of at most `max_tokens`; a longer sequence gets its own batch.

        Args:
            max_tokens: Tokens that go through the model: padding counts, and a shared prompt once.
            packed: True for packed batches, False for batches padded to their longest sequence.
            among: The indices to batch, by default all.
        """
        order = np.arange(len(self)) if among is None else np.sort(np.asarray(among, np.int64))
        if not packed:  # padding is least if batches hold sequences of similar lengths
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
    """Hash all chosen sequences and then all rejected ones."""
    hashes, prompts, starts, scored, largest = [], [], [], [], 0
    for start in range(0, 2 * len(pairs), HASHED_AT_ONCE):
        places = np.arange(start, min(start + HASHED_AT_ONCE, 2 * len(pairs)))
        for tokens, begin, skipped in pairs.sequences_at(places):
            largest = max(largest, int(tokens.max()))
            # the same tokens with a longer prompt are a different response
            salt = begin.to_bytes(16, "little")
            key = hashlib.blake2b(tokens[:begin].tobytes(), digest_size=16, salt=salt)
            prompts.append(key.digest())
            key.update(tokens[begin:].tobytes())
            if skipped:
                key.update(np.array(skipped, np.int64).tobytes())
            hashes.append(key.digest())
            starts.append(begin)
            scored.append(len(tokens) - begin - sum(end - start for start, end in skipped))
    return SequenceKeys(
        np.frombuffer(b"".join(hashes), dtype="S16"),
        np.frombuffer(b"".join(prompts), dtype="S16"),
        np.array(starts, dtype=np.int64),
        np.array(scored, dtype=np.int64),
        largest,
    )


def distinct_sequences(
    pairs: PreferenceDataset, keys: SequenceKeys | None = None
) -> DistinctSequences:
    """Return each distinct sequence of these pairs once, starting with the longest.

    Args:
        pairs: The pairs.
        keys: Their keys, if they are already computed.
    """
    sequences, prompts, starts, scored, largest = sequence_keys(pairs) if keys is None else keys
    distinct, first, of_pairs = np.unique(sequences, return_index=True, return_inverse=True)
    lengths = pairs.sequence_lengths[first]
    _, prompt = np.unique(prompts[first], return_inverse=True)
    longest = np.zeros(len(first), dtype=np.int64)
    np.maximum.at(longest, prompt, lengths)
    # prompts by their longest sequence, sequences of a prompt by length and then by hash
    order = np.lexsort((distinct, -lengths, prompt, -longest[prompt]))
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return DistinctSequences(
        pairs,
        distinct[order],
        prompt[order],
        starts[first][order],
        scored[first][order],
        lengths[order],
        largest,
        rank[of_pairs],
        first[order],
    )


def as_pair_logps(pairs: PreferenceDataset, logps: Tensor) -> PairLogps:
    """Log-probs of pairs, from the log-probs of their sequences.

    Args:
        pairs: P pairs.
        logps: [2P], in nats, all chosen and then all rejected.

    Raises:
        ValueError: If there are not two log-probs per pair, or one is not finite.
    """
    if logps.shape != (2 * len(pairs),):
        raise ValueError(
            f"as_pair_logps: {len(pairs)} pairs need log-probs of shape [{2 * len(pairs)}], all "
            f"chosen and then all rejected, got {list(logps.shape)}"
        )
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
