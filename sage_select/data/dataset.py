"""Preference pairs from files or memory: checked, tokenised once, identified by content."""

from collections import Counter
from collections.abc import Mapping, Sized
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal
from warnings import warn

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

from sage_select.arguments import shown, whole_number
from sage_select.arrays import Float64Array, Int64Array, checked_rows
from sage_select.data.chunks import CHUNK_ROWS, TABLE_VERSION, tokenised
from sage_select.data.messages import RESERVED_OPTIONS
from sage_select.data.pair_table import PairTable, TokenSequence, join_tables
from sage_select.data.records import TOKEN_FIELDS, advice
from sage_select.data.sources import iterate_records, read_records, rename, source_files
from sage_select.data.token_cache import Manifest, tokens_folder, writable_folder
from sage_select.data.tokenising import (
    Remark,
    SpecialTokens,
    Tokenising,
    fields_of,
    remarks,
    set_aside_rows,
    table_of_tokens,
)
from sage_select.data.tokenizers import tokenizer_digest
from sage_select.hashing import hash_order
from sage_select.system.files import user_path
from sage_select.system.identity import digest

OnBad = Literal["set_aside", "error"]


@dataclass(frozen=True, eq=False)
class PreferenceDataset:
    """Tokenised preference pairs with their annotations, or a view of some of their rows.

    A pair's row number is its position among the usable pairs; views made by `take` keep it.
    Its `pair_id` is a hash of its text, so it does not depend on the file or the order of rows.

    Attributes:
        index: int64 [P], row numbers of the pairs in this view.
        set_aside: Rows that cannot be used, with columns `source_row` and `reason`.
        max_length: Maximum number of tokens in prompt and response together; longer sequences were
            cut at the end.

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
        chat_template_kwargs: Mapping[str, Any] | None = None,
        special_tokens: SpecialTokens = "allow",
    ) -> "PreferenceDataset":
        """Read a file of pairs, a folder of such files, or a dataset on a hub.

        Files are JSON Lines (`.jsonl`, `.ndjson`), JSON, CSV or TSV, each also with `.gz`, Parquet
        or Arrow. JSON Lines, Parquet and Arrow are streamed in chunks, never loaded whole. Tokens
        are kept in the cache and memory-mapped, so a dataset larger than memory can be used and is
        tokenised once. A changed tokenizer, chat template or `max_length` tokenises all of it
        again, a changed file only the chunks that changed.

        Args:
            path: A file, a folder, a folder written by `datasets`, or a hub name "org/set".
            tokenizer: The model's tokenizer, with its chat template for conversational pairs.
            max_length: Maximum number of tokens in prompt and response together, at least 2.
            on_bad: "set_aside" lists unusable rows in `set_aside`, with reasons; "error" raises.
            columns: Fields that have other names in the file, as `{field: column}`:
                `{"prompt": "question"}`.
            split: Split of a hub dataset, or of one saved by `datasets`.
            subset: Subset (configuration) of a hub dataset.
            revision: Revision of a hub dataset.
            cache: Folder of the tokens; by default `tokens` in the user's cache folder.
            num_workers: Processes that check and tokenise, for chat templates and tokenizers that
                are slow in Python; a script that uses them needs `if __name__ == "__main__":`.
            show_progress: False to hide the progress bar.
            chat_template_kwargs: Options of the chat template for all rows, such as
                `{"enable_thinking": False}`; a row's own `chat_template_kwargs` take precedence.
            special_tokens: "set_aside" sets rows aside whose texts contain a special token of the
                tokenizer, such as `<|im_end|>`; "allow" makes it that token, as trainers do.

        Raises:
            FileNotFoundError: If there is neither such a file nor such a dataset on a hub.
            ValueError: If the file format is unknown, no pair can be used, or, with
                `on_bad="error"`, a row cannot be used.
        """
        max_length = _check_options(max_length, on_bad, num_workers)
        tokenising = _tokenising(tokenizer, max_length, chat_template_kwargs, special_tokens)
        records = read_records(
            path,
            mapped=frozenset((columns or {}).values()),
            split=split,
            subset=subset,
            revision=revision,
        )
        identity = _identity(tokenising)
        folder = writable_folder(user_path(cache) if cache is not None else tokens_folder())
        files = source_files(source) if (source := user_path(path)).exists() else []
        manifest = Manifest.of(folder, files, [TABLE_VERSION, identity, columns])
        # unchanged files are not parsed again: their manifest names the chunks in the cache
        chunks = manifest.read() if manifest is not None else None
        if chunks is None:
            chunks = list(
                tokenised(
                    records if columns is None else rename(records, columns),
                    tokenising,
                    identity=identity,
                    cache=folder,
                    num_workers=num_workers,
                    show_progress=show_progress,
                )
            )
            if manifest is not None:
                manifest.write([name for name, _ in chunks])
        return cls._from_tables([table for _, table in chunks], max_length, on_bad, str(path))

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
        chat_template_kwargs: Mapping[str, Any] | None = None,
        special_tokens: SpecialTokens = "allow",
    ) -> "PreferenceDataset":
        """Take pairs from a list of dicts, a polars, pandas or Arrow table, or `datasets.Dataset`.

        Each record has `chosen`, `rejected` and optionally `prompt`: without it, the common start
        of both responses is the prompt. All three are strings, or lists of messages
        `{"role", "content"}`, to which the tokenizer's chat template is applied. The formats of
        ShareGPT, Alpaca and UltraFeedback are accepted as well, and records with more than two
        `responses` and their `scores` or `ranks` (see the page on data formats). Other fields
        become annotations.

        Prompt and response are tokenised together and split where the prompt's tokens end. A plain
        response ends with the tokenizer's end token, a conversational one as its template ends it.
        In a response of several turns only the model's own turns are scored. Sequences longer than
        `max_length` are cut at the end. Response tokens are counted after that; log-probs and L
        (Eq. 8) both use this count.

        What a chat template leaves out or rewrites is reported in a warning, once for each kind,
        with the number of rows, an example and what to set.

        Args:
            records: The pairs.
            tokenizer: The model's tokenizer.
            max_length: Maximum number of tokens in prompt and response together, at least 2.
            on_bad: "set_aside" lists unusable rows in `set_aside`, with reasons; "error" raises.
            columns: Fields that have other names in the records, as `{field: column}`.
            cache: Folder of the tokens, memory-mapped; by default they stay in memory.
            num_workers: Processes that check and tokenise, see `read`.
            show_progress: False to hide the progress bar.
            chat_template_kwargs: Options of the chat template for all rows, see `read`.
            special_tokens: "allow" or "set_aside", see `read`.

        Raises:
            TypeError: If the records are not one of these types.
            ValueError: If no pair can be used, or, with `on_bad="error"`, a row cannot be used.
        """
        max_length = _check_options(max_length, on_bad, num_workers)
        tokenising = _tokenising(tokenizer, max_length, chat_template_kwargs, special_tokens)
        rows = iterate_records(records, frozenset((columns or {}).values()))
        chunks = tokenised(
            rows if columns is None else rename(rows, columns),
            tokenising,
            # the fingerprint serialises the whole vocabulary, and only cache names need it
            identity=_identity(tokenising) if cache is not None else "",
            cache=user_path(cache) if cache is not None else None,
            num_workers=num_workers,
            total=len(records) if isinstance(records, Sized) else None,
            show_progress=show_progress,
        )
        return cls._from_tables([table for _, table in chunks], max_length, on_bad, "the records")

    @classmethod
    def from_tokens(
        cls, records: Any, *, max_length: int, on_bad: OnBad = "set_aside"
    ) -> "PreferenceDataset":
        """Take pairs that a trainer has tokenised, to score exactly the tokens it trains on.

        Args:
            records: As for `from_records`, with the fields `prompt_ids`, `chosen_ids` and
                `rejected_ids`, lists of tokens. `pair_id`, if present, is the stable id; without it
                the id is a hash of the text, if the records still have it, or of the tokens. Other
                fields become annotations.
            max_length: Maximum number of tokens in prompt and response together; longer sequences
                are cut at the end.
            on_bad: "set_aside" lists unusable rows in `set_aside`, with reasons; "error" raises.

        Returns:
            The pairs; `column("source_row")` holds the row of the records that each came from.

        Raises:
            TypeError: If the records are not of a type that `from_records` takes.
            ValueError: If a field is missing, no pair can be used, or, with `on_bad="error"`, a row
                cannot be used.

        Example:
            >>> row = {"prompt_ids": [5, 6], "chosen_ids": [7, 1], "rejected_ids": [8, 1]}
            >>> PreferenceDataset.from_tokens([row], max_length=8)
            PreferenceDataset(1 of 1 pairs, 0 rows set aside, max_length 8)
        """
        max_length = _check_options(max_length, on_bad, 0)
        rows = iterate_records(records)
        tables = []
        while chunk := list(islice(rows, CHUNK_ROWS)):
            first = chunk[0] if isinstance(chunk[0], dict) else {}
            if missing := [name for name in TOKEN_FIELDS if name not in first]:
                raise ValueError(
                    f"PreferenceDataset.from_tokens: the records have no {', '.join(missing)}; "
                    "they have " + (", ".join(first) or "none")
                )
            tables.append(table_of_tokens(chunk, max_length))
        return cls._from_tables(tables, max_length, on_bad, "the records")

    @classmethod
    def _from_tables(
        cls, tables: list[pa.Table], max_length: int, on_bad: OnBad, source: str
    ) -> "PreferenceDataset":
        pairs, set_aside, duplicates = join_tables(tables)
        total = len(pairs) + set_aside.height
        if set_aside.height and on_bad == "error":
            number, reason = set_aside.row(0)
            raise ValueError(
                f"PreferenceDataset: {set_aside.height} of {total} rows cannot be used, the first "
                f"is row {number}: {reason}; fix them, or pass on_bad='set_aside'"
            )
        if total == 0:
            raise ValueError(f"PreferenceDataset: there are no rows in {source}")
        if len(pairs) == 0:
            fields = ", ".join(fields_of(tables[0])) or "none"
            reasons = dict(Counter(set_aside["reason"].to_list()).most_common())
            number, reason = set_aside.row(0)
            raise ValueError(
                f"PreferenceDataset: none of the {total} rows can be used: {reasons}; the first is "
                f"row {number}: {reason}; {advice(list(reasons), fields, max_length)}"
            )
        for remark in (*_joined_remarks(tables), *duplicates):
            example = f": {remark.note.example!r}" if remark.note.example else ""
            warn(
                f"PreferenceDataset: in {remark.num_rows} of {total} rows {remark.note.text}. The "
                f"first is row {remark.row}{example}",
                stacklevel=3,
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
        """One row per pair of the whole dataset, not only of this view: `pair_id`, `prompt_id`,
        `source_row` (row in the source), `truncated` (if a response was cut) and every input column
        that does not become tokens."""
        return self._pairs.annotations

    @property
    def columns(self) -> list[str]:
        """Names of the annotations."""
        return self._pairs.columns

    def column(self, name: str) -> pl.Series:
        """Return an annotation of each pair in this view, [P].

        Raises:
            KeyError: If there is no such annotation.
        """
        if name not in self.columns:
            raise KeyError(f"PreferenceDataset: no column {name!r}; there are {self.columns}")
        return self._pairs.column(name)[self.index]

    @property
    def ids(self) -> npt.NDArray[np.str_]:
        """Stable id of each pair in this view, [P]."""
        return self.column("pair_id").to_numpy().astype(np.str_)

    @property
    def chosen_tokens(self) -> Int64Array:
        """Number of scored chosen tokens, after truncation and with the end token, int64 [P]."""
        return self._scored_tokens("chosen")

    @property
    def rejected_tokens(self) -> Int64Array:
        """Number of scored rejected tokens, counted like `chosen_tokens`, int64 [P]."""
        return self._scored_tokens("rejected")

    def _scored_tokens(self, side: str) -> Int64Array:
        return (self._pairs.lengths(side) - self._pairs.skipped_tokens(side))[self.index]

    @property
    def num_tokens(self) -> Int64Array:
        """Number of tokens in both sequences of a pair, prompts included, int64 [P]."""
        chosen, rejected = self.sequence_lengths.reshape(2, -1)
        return chosen + rejected

    @property
    def num_responses(self) -> Int64Array:
        """Number of responses of each row, int64 [P]: 2, or more if the record ranks more."""
        return 2 + self._pairs.lengths("between")[self.index]

    @property
    def response_scores(self) -> Float64Array:
        """Scores of the K responses in the records, best first, float64 [P, K].

        Raises:
            ValueError: If rows have different numbers of responses, or a row has no scores.
        """
        self._check_equal_num_responses("response_scores")
        scores = self._pairs.scores()[self.index]
        if scores.null_count():
            raise ValueError(
                "PreferenceDataset.response_scores: some records rank their responses but have no "
                "scores; give each record a list `scores`, higher is better"
            )
        return np.array(scores.to_list(), dtype=np.float64).reshape(len(self), -1)

    def take(self, rows: npt.ArrayLike) -> "PreferenceDataset":
        """Return a view of these rows, in this order; pairs keep their row numbers.

        Args:
            rows: [P] row numbers, as in `index`.

        Raises:
            TypeError: If the rows are not whole numbers.
            ValueError: If the rows are not one-dimensional.
            IndexError: If a row does not exist.
        """
        index = checked_rows(rows, "PreferenceDataset.take")
        total = len(self._pairs)
        # a negative row is refused: it would silently count from the end
        for row in index[(index < 0) | (index >= total)][:1]:
            raise IndexError(f"PreferenceDataset.take: no row {row} among {total} pairs")
        return replace(self, index=index)

    def split(self, fraction: float, *, seed: int = 0) -> tuple[Int64Array, Int64Array]:
        """Split the rows of this view into rows to train on and rows to hold out.

        Pairs with the same prompt stay on the same side, so that held-out prompts are unseen. A
        hash of prompt and seed decides the side, not the order of the rows.

        Args:
            fraction: Fraction of the prompts to hold out.
            seed: Seed of the hash.

        Returns:
            Row numbers to train on and row numbers to hold out, both int64.

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
        # prompts are ordered by hash, not by position: the order of the rows changes nothing
        held_out = np.isin(prompt_of, hash_order(prompts, "split", seed)[:count])
        if held_out.all():
            raise ValueError(
                f"PreferenceDataset.split: holding out {count} of {len(prompts)} prompts leaves "
                "none to train on; pass a smaller fraction"
            )
        return self.index[~held_out], self.index[held_out]

    def sequences(self) -> list[TokenSequence]:
        """Return the 2P sequences of this view: all chosen, then all rejected."""
        return self.sequences_at(np.arange(2 * len(self)))

    def sequences_at(self, places: Int64Array) -> list[TokenSequence]:
        """Return the sequences at these positions of `sequences()`."""
        size = len(self)
        return [
            self._pairs.sequence("chosen" if place < size else "rejected", i)
            for place, i in zip(places.tolist(), self.index[places % size].tolist(), strict=True)
        ]

    @property
    def sequence_lengths(self) -> Int64Array:
        """Number of tokens in each sequence, in the order of `sequences()`, int64 [2P]."""
        prompts = self._pairs.lengths("prompt")
        lengths = [(prompts + self._pairs.lengths(s))[self.index] for s in ("chosen", "rejected")]
        return np.concatenate(lengths)

    def responses(self) -> list[TokenSequence]:
        """Return the P x K sequences of rows with K responses, row by row, best first.

        For K-response losses: `response_logps(model, rows.responses()).reshape(len(rows), -1)`.

        Raises:
            ValueError: If rows have different numbers of responses.
        """
        self._check_equal_num_responses("responses")
        return [s for i in self.index.tolist() for s in self._pairs.responses(i)]

    def _check_equal_num_responses(self, call: str) -> None:
        if len(counts := np.unique(self.num_responses)) > 1:
            raise ValueError(
                f"PreferenceDataset.{call}: rows have {counts.min()} to {counts.max()} responses; "
                "take rows with the same number, "
                "dataset.take(dataset.index[dataset.num_responses == K])"
            )

    def waterfall(self) -> str:
        """Return a text table of rows read, rows set aside by reason, and pairs left."""
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


def _identity(tokenising: Tokenising) -> str:
    """Return a fingerprint of everything that decides how records become tokens."""
    tokenizer, *settings = tokenising
    return digest([tokenizer_digest(tokenizer), settings])


def _joined_remarks(tables: list[pa.Table]) -> list[Remark]:
    """Return the notes on all rows, each once."""
    joined: dict[str, Remark] = {}
    first = 0
    for table in tables:
        for remark in remarks(table):
            earlier = joined.setdefault(
                remark.note.text, Remark(remark.note, 0, first + remark.row)
            )
            num_rows = earlier.num_rows + remark.num_rows
            joined[remark.note.text] = earlier._replace(num_rows=num_rows)
        first += set_aside_rows(table)[0]
    return list(joined.values())


def _tokenising(
    tokenizer: Any,
    max_length: int,
    chat_template_kwargs: Mapping[str, Any] | None,
    special_tokens: SpecialTokens,
) -> Tokenising:
    """Return the settings by which records become tokens, checked."""
    call = "PreferenceDataset"
    if not callable(getattr(tokenizer, "apply_chat_template", None)):
        raise TypeError(
            f"{call}: tokenizer must be a tokenizer of transformers, got {shown(tokenizer)}; load "
            "it with AutoTokenizer.from_pretrained"
        )
    options = chat_template_kwargs
    if options is not None and not isinstance(options, Mapping):
        raise TypeError(f"{call}: chat_template_kwargs must be a mapping, got {shown(options)}")
    for name in RESERVED_OPTIONS & (options or {}).keys():
        raise ValueError(f"{call}: chat_template_kwargs sets {name}, which is set for every record")
    if special_tokens not in ("allow", "set_aside"):
        raise ValueError(
            f"{call}: special_tokens must be allow or set_aside, got {shown(special_tokens)}"
        )
    return Tokenising(
        tokenizer, max_length, None if options is None else dict(options), special_tokens
    )


def _check_options(max_length: int, on_bad: str, num_workers: int) -> int:
    """Refuse invalid options, and return the maximum length as an int."""
    if on_bad not in ("set_aside", "error"):
        raise ValueError(
            f"PreferenceDataset: on_bad must be set_aside or error, got {shown(on_bad)}"
        )
    whole_number(num_workers, "PreferenceDataset: num_workers", least=0, most=1024)
    return whole_number(max_length, "PreferenceDataset: max_length", least=2)
