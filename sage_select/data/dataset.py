"""Preference pairs on disk and in memory: read, checked, tokenised once, known by content."""

from collections import Counter
from collections.abc import Mapping, Sized
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

from sage_select.arrays import Float64Array, Int64Array, checked_rows
from sage_select.data.chunks import CHUNK_ROWS, FORMAT, tokenised
from sage_select.data.pair_table import PairTable, TokenSequence, join_tables
from sage_select.data.records import TOKEN_FIELDS
from sage_select.data.sources import iterate_records, read_records, rename, source_files
from sage_select.data.token_cache import Manifest, tokens_folder, writable_folder
from sage_select.data.tokenising import fields_of, table_of_tokens
from sage_select.data.tokenizers import tokenizer_digest
from sage_select.hashing import hash_order

OnBad = Literal["set_aside", "error"]


@dataclass(frozen=True, eq=False)
class PreferenceDataset:
    """Usable preference pairs, tokenised, with their annotations; or some rows of such a set.

    A pair's row number is its position among the usable pairs, and stays the same in every view
    that `take` returns. Its `pair_id` is a hash of its text, the same in any file and any order.

    Attributes:
        index: int64 [P], the dataset rows in this view.
        set_aside: Rows that cannot be used: `source_row` and `reason`.
        max_length: Tokens of prompt and response together; longer ones were cut at the end.

    Example:
        >>> from transformers import AutoTokenizer  # doctest: +SKIP
        >>> tokenizer = AutoTokenizer.from_pretrained("Qwen/Qwen2.5-0.5B")  # doctest: +SKIP
        >>> dataset = PreferenceDataset.read(
        ...     "pairs.parquet", tokenizer=tokenizer, max_length=4096
        ... )  # doctest: +SKIP
    """

    index: Int64Array
    set_aside: pl.DataFrame
    max_length: int
    _pairs: "PairTable"

    @classmethod
    def read(
        cls,
        path: str | Path,
        *,
        tokenizer: Any,
        max_length: int,
        on_bad: OnBad = "set_aside",
        columns: Mapping[str, str] | None = None,
        split: str = "train",
        subset: str | None = None,
        revision: str | None = None,
        cache: str | Path | None = None,
        num_workers: int = 0,
        show_progress: bool | None = None,
    ) -> "PreferenceDataset":
        """Read a file of pairs, a folder of such files, or a dataset on a hub.

        Files are JSON Lines (`.jsonl`, `.ndjson`), JSON, CSV or TSV, all of them also with `.gz`,
        Parquet and Arrow. JSON Lines, Parquet and Arrow are read bit by bit; their tokens are kept
        in the cache, memory-mapped, so that a set larger than memory can be used and is tokenised
        once. A changed file, tokenizer, chat template or `max_length` is tokenised anew, and so
        much of it only as has changed.

        Args:
            path: A file, a folder, a folder written by `datasets`, or a hub name "org/set".
            tokenizer: The model's own tokenizer, with its chat template for conversational pairs.
            max_length: Tokens of prompt and response together, at least 2.
            on_bad: "set_aside" keeps unusable rows apart, with their reasons; "error" refuses them.
            columns: Where fields have other names, `{ours: theirs}`: `{"prompt": "question"}`.
            split: Which split of a hub's set.
            subset: Which subset (configuration) of a hub's set.
            revision: Which revision of a hub's set.
            cache: Folder of the tokens; by default `tokens` in the user's cache.
            num_workers: Processes that check and tokenise, for chat templates and tokenizers that
                are slow in Python; a script that uses them needs `if __name__ == "__main__":`.
            show_progress: False for no progress bar.

        Raises:
            FileNotFoundError: If there is no such file, and no such set on a hub.
            ValueError: If its kind is unknown, or no pair in it can be used.
        """
        _check_options(max_length, on_bad, num_workers)
        records = read_records(
            path,
            text=frozenset((columns or {}).values()),
            split=split,
            subset=subset,
            revision=revision,
        )
        identity = tokenizer_digest(tokenizer)
        folder = writable_folder(Path(cache) if cache is not None else tokens_folder())
        files = source_files(Path(path)) if Path(path).exists() else []
        manifest = Manifest.of(folder, files, [FORMAT, identity, max_length, columns])
        chunks = manifest.read() if manifest is not None else None
        if chunks is None:
            chunks = list(
                tokenised(
                    records if columns is None else rename(records, columns),
                    tokenizer,
                    max_length,
                    identity=identity,
                    cache=folder,
                    num_workers=num_workers,
                    show_progress=show_progress,
                )
            )
            if manifest is not None:
                manifest.write([name for name, _ in chunks])
        return cls._of([table for _, table in chunks], max_length, on_bad, str(path))

    @classmethod
    def from_records(
        cls,
        records: Any,
        *,
        tokenizer: Any,
        max_length: int,
        on_bad: OnBad = "set_aside",
        columns: Mapping[str, str] | None = None,
        cache: str | Path | None = None,
        num_workers: int = 0,
        show_progress: bool | None = None,
    ) -> "PreferenceDataset":
        """Take pairs from a list of dicts, a polars, pandas or Arrow table, or `datasets.Dataset`.

        Each record has `chosen` and `rejected`, and `prompt` or not: where it is missing, the
        prompt is what both responses start with. All three are strings, or lists of messages
        `{"role", "content"}`, to which the tokenizer's chat template is applied. The shapes of
        sharegpt, Alpaca and UltraFeedback are known as well, and records with more than two
        `responses` with `scores` or `ranks` (see the documentation of data formats). Other fields
        become annotations.

        Tokens: prompt and response are tokenised together and split where the prompt's own tokens
        end. A plain response ends with the tokenizer's end token; a conversational one ends as its
        template ends it. Sequences longer than `max_length` are cut at the end. Response tokens are
        counted after that, and this one count serves log-probs and L (Eq. 8) alike.

        Args:
            records: The pairs.
            tokenizer: The model's own tokenizer.
            max_length: Tokens of prompt and response together, at least 2.
            on_bad: "set_aside" keeps unusable rows apart, with their reasons; "error" refuses them.
            columns: Where fields have other names, `{ours: theirs}`.
            cache: Folder of the tokens, memory-mapped; by default they stay in memory.
            num_workers: Processes that check and tokenise, see `read`.
            show_progress: False for no progress bar.

        Raises:
            TypeError: If the records are of no known kind.
            ValueError: If no pair can be used, or, with `on_bad="error"`, if one cannot.
        """
        _check_options(max_length, on_bad, num_workers)
        rows = iterate_records(records)
        chunks = tokenised(
            rows if columns is None else rename(rows, columns),
            tokenizer,
            max_length,
            identity=tokenizer_digest(tokenizer) if cache is not None else "",
            cache=Path(cache) if cache is not None else None,
            num_workers=num_workers,
            total=len(records) if isinstance(records, Sized) else None,
            show_progress=show_progress,
        )
        return cls._of([table for _, table in chunks], max_length, on_bad, "what was given")

    @classmethod
    def from_tokens(
        cls, records: Any, *, max_length: int, on_bad: OnBad = "set_aside"
    ) -> "PreferenceDataset":
        """Take pairs that a trainer has tokenised, so that what is scored is what it trains on.

        Args:
            records: As for `from_records`, with the fields `prompt_ids`, `chosen_ids` and
                `rejected_ids`, lists of tokens. Other fields become annotations, `pair_id` among
                them the stable id; without it that is a hash of the text, if it is still there, or
                of the tokens.
            max_length: Tokens of prompt and response together; longer ones are cut at the end.
            on_bad: "set_aside" keeps unusable rows apart, with their reasons; "error" refuses them.

        Returns:
            The pairs; `column("source_row")` says which row of the records each one was.

        Example:
            >>> row = {"prompt_ids": [5, 6], "chosen_ids": [7, 1], "rejected_ids": [8, 1]}
            >>> PreferenceDataset.from_tokens([row], max_length=8)
            PreferenceDataset(1 of 1 pairs, 0 rows set aside, max_length 8)
        """
        _check_options(max_length, on_bad, 0)
        rows = iterate_records(records)
        tables = []
        while chunk := list(islice(rows, CHUNK_ROWS)):
            if missing := [name for name in TOKEN_FIELDS if name not in chunk[0]]:
                raise ValueError(
                    f"PreferenceDataset.from_tokens: the records have no {', '.join(missing)}; "
                    "they have " + ", ".join(chunk[0])
                )
            tables.append(table_of_tokens(chunk, max_length))
        return cls._of(tables, max_length, on_bad, "what was given")

    @classmethod
    def _of(
        cls, tables: list[pa.Table], max_length: int, on_bad: OnBad, place: str
    ) -> "PreferenceDataset":
        pairs, set_aside = join_tables(tables)
        total = len(pairs) + set_aside.height
        if set_aside.height and on_bad == "error":
            number, reason = set_aside.row(0)
            raise ValueError(
                f"PreferenceDataset: {set_aside.height} of {total} rows cannot be used, the first "
                f"is row {number}: {reason}; mend them, or pass on_bad='set_aside'"
            )
        if total == 0:
            raise ValueError(f"PreferenceDataset: there are no rows in {place}")
        if len(pairs) == 0:
            fields = ", ".join(fields_of(tables[0])) or "none"
            reasons = dict(Counter(set_aside["reason"].to_list()).most_common())
            cut = all("truncation" in reason for reason in reasons)
            raise ValueError(
                f"PreferenceDataset: none of the {total} rows can be used: {reasons}; "
                + (
                    f"raise max_length (data.max_length in a configuration), it is {max_length}"
                    if cut
                    else f"the first has the fields {fields}; columns={{'prompt': ...}} "
                    "(data.columns in a configuration) says where ours have other names"
                )
            )
        return cls(np.arange(len(pairs)), set_aside, max_length, pairs)

    def __len__(self) -> int:
        return len(self.index)

    def __repr__(self) -> str:
        return (
            f"PreferenceDataset({len(self)} of {len(self._pairs)} pairs, "
            f"{self.set_aside.height} rows set aside, max_length {self.max_length})"
        )

    @property
    def annotations(self) -> pl.DataFrame:
        """One row per pair of the whole set: `pair_id`, `prompt_id`, `source_row` (its row in what
        was read), `truncated` (whether a response was cut) and every other column of the input."""
        return self._pairs.annotations

    @property
    def columns(self) -> list[str]:
        """The names of the annotations."""
        return self._pairs.columns

    def column(self, name: str) -> pl.Series:
        """[P], an annotation of each pair in this view."""
        if name not in self.columns:
            raise KeyError(f"PreferenceDataset: no column {name!r}; there are {self.columns}")
        return self._pairs.column(name)[self.index]

    @property
    def ids(self) -> npt.NDArray[np.str_]:
        """[P], the stable id of each pair in this view."""
        return self.column("pair_id").to_numpy().astype(np.str_)

    @property
    def chosen_tokens(self) -> Int64Array:
        """int64 [P], response tokens of the chosen side, after truncation, end token counted."""
        return self._pairs.lengths("chosen")[self.index]

    @property
    def rejected_tokens(self) -> Int64Array:
        """int64 [P], the same of the rejected side."""
        return self._pairs.lengths("rejected")[self.index]

    @property
    def num_tokens(self) -> Int64Array:
        """int64 [P], tokens of both sequences of a pair: what a forward pass has to read."""
        chosen, rejected = self.sequence_lengths.reshape(2, -1)
        return chosen + rejected

    @property
    def num_responses(self) -> Int64Array:
        """int64 [P], responses of each row: 2, or more where the records ranked more."""
        return 2 + self._pairs.lengths("between")[self.index]

    @property
    def response_scores(self) -> Float64Array:
        """float64 [P, K], the scores the records gave to K responses, the best first.

        Raises:
            ValueError: If rows have different numbers of responses, or none were scored.
        """
        self._check_same_number("response_scores")
        scores = self._pairs.scores()[self.index]
        if scores.null_count():
            raise ValueError(
                "PreferenceDataset.response_scores: the records rank their responses but have no "
                "scores; give each record a list `scores`, higher is better"
            )
        return np.array(scores.to_list(), dtype=np.float64).reshape(len(self), -1)

    def take(self, rows: npt.ArrayLike) -> "PreferenceDataset":
        """A view of these dataset rows, in this order; row numbers keep their meaning."""
        index = checked_rows(rows, "PreferenceDataset.take")
        total = len(self._pairs)
        for row in index[(index < 0) | (index >= total)][:1]:
            raise IndexError(f"PreferenceDataset.take: no row {row} among {total}")
        return replace(self, index=index)

    def split(self, fraction: float, *, seed: int = 0) -> tuple[Int64Array, Int64Array]:
        """Rows to train on and rows to hold out, this fraction of the pairs, dealt by their ids.

        Pairs with the same prompt stay on the same side, so that the held-out ones are unseen.

        Raises:
            ValueError: If the fraction is not between 0 and 1, or leaves a side without pairs.
        """
        if not 0 < fraction < 1:
            raise ValueError(
                f"PreferenceDataset.split: fraction must lie in (0, 1), got {fraction}"
            )
        prompts, prompt_of = np.unique(
            self.column("prompt_id").to_numpy().astype(np.str_), return_inverse=True
        )
        count = max(1, round(fraction * len(prompts)))
        held_out = np.isin(prompt_of, hash_order(prompts, "split", seed)[:count])
        if held_out.all():
            raise ValueError(
                f"PreferenceDataset.split: cannot hold out {count} of {len(prompts)} prompts and "
                "keep some to train on; pass a smaller fraction"
            )
        return self.index[~held_out], self.index[held_out]

    def sequences(self) -> list[TokenSequence]:
        """The 2P sequences of this view: all chosen, then all rejected."""
        return self.sequences_at(np.arange(2 * len(self)))

    def sequences_at(self, places: Int64Array) -> list[TokenSequence]:
        """Some of the 2P sequences, by their places in `sequences()`."""
        size = len(self)
        return [
            self._pairs.sequence("chosen" if place < size else "rejected", i)
            for place, i in zip(places.tolist(), self.index[places % size].tolist(), strict=True)
        ]

    @property
    def sequence_lengths(self) -> Int64Array:
        """int64 [2P], tokens of each sequence, in the order of `sequences()`."""
        prompts = self._pairs.lengths("prompt")[self.index]
        return np.concatenate([prompts + self.chosen_tokens, prompts + self.rejected_tokens])

    def responses(self) -> list[TokenSequence]:
        """The P x K sequences of rows with K responses, row by row, the best first.

        For K-response losses: `response_logps(model, rows.responses()).reshape(len(rows), -1)`.

        Raises:
            ValueError: If rows have different numbers of responses.
        """
        self._check_same_number("responses")
        return [s for i in self.index.tolist() for s in self._pairs.responses(i)]

    def _check_same_number(self, call: str) -> None:
        if len(counts := np.unique(self.num_responses)) > 1:
            raise ValueError(
                f"PreferenceDataset.{call}: rows have {counts.min()} to {counts.max()} responses; "
                "take those of one number, dataset.take(dataset.index[dataset.num_responses == K])"
            )

    def waterfall(self) -> str:
        """Rows in, rows set aside by reason, rows out, as text."""
        reasons = Counter(self.set_aside["reason"].to_list())
        total = len(self._pairs)
        lines = [f"{total + self.set_aside.height:>9,} rows read"]
        lines += [f"{-count:>9,} {reason}" for reason, count in reasons.most_common()]
        cut = int(self._pairs.column("truncated").sum())
        if cut:
            lines += [f"{total:>9,} pairs, {cut:,} of them cut at {self.max_length} tokens"]
        else:
            lines += [f"{total:>9,} pairs"]
        return "\n".join(lines)


def _check_options(max_length: int, on_bad: str, num_workers: int) -> None:
    if max_length < 2:
        raise ValueError(f"PreferenceDataset: max_length must be at least 2, got {max_length}")
    if on_bad not in ("set_aside", "error"):
        raise ValueError(f"PreferenceDataset: on_bad must be set_aside or error, got {on_bad!r}")
    if num_workers < 0:
        raise ValueError(f"PreferenceDataset: num_workers must be at least 0, got {num_workers}")
