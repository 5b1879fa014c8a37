"""Preference pairs on disk and in memory: read, checked, tokenised once, known by content."""

import hashlib
import json
import re
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Sized
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, Literal, NamedTuple
from warnings import warn

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

from sage_select.arrays import Float64Array, Int32Array, Int64Array, checked_rows
from sage_select.data.sources import iterate_records, read_records, rename, source_files
from sage_select.data.tokenising import (
    CHUNK_ROWS,
    FORMAT,
    INPUT,
    INPUT_AS_JSON,
    OWN_COLUMNS,
    TOKEN_FIELDS,
    as_json,
    chunk_path,
    fields_of,
    read_table,
    set_aside_rows,
    table_of_tokens,
    tokenised,
)
from sage_select.data.tokenizers import tokenizer_digest
from sage_select.hashing import hash_order
from sage_select.system.files import cache_folder, mark_as_used, partial_path, replace_durably
from sage_select.system.identity import digest

OnBad = Literal["set_aside", "error"]
DUPLICATE = "duplicate pair"


class TokenSequence(NamedTuple):
    """One response in its context: prompt and response tokens, and where the response starts."""

    tokens: Int32Array
    response_start: int


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
    _pairs: "_PairTable"

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
        folder = _writable(Path(cache) if cache is not None else tokens_folder())
        files = source_files(Path(path)) if Path(path).exists() else []
        manifest = _Manifest.of(folder, files, [FORMAT, identity, max_length, columns])
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
        pairs, set_aside = _joined(tables)
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


def tokens_folder() -> Path:
    """Where tokens are kept unless a call says otherwise."""
    return cache_folder() / "tokens"


def evict_tokens(unused_for: float, folder: str | Path | None = None) -> tuple[int, int]:
    """Delete tokens that were unused for so many seconds; files and bytes that went."""
    place = Path(folder) if folder is not None else tokens_folder()
    count = freed = 0
    for file in place.iterdir() if place.is_dir() else ():
        if not _TOKEN_FILE.fullmatch(file.name):
            continue  # somebody else's
        with suppress(FileNotFoundError):
            known = file.stat()
            if time.time() - known.st_mtime > unused_for:
                file.unlink()
                count, freed = count + 1, freed + known.st_size
    return count, freed


_TOKEN_FILE = re.compile(r"\.?[0-9a-f]{32}\.(arrow|json)(\.[0-9a-f]+\.partial)?")


class _PairTable:
    """All usable pairs, in tables of some thousand rows that may be memory-mapped.

    Args:
        tables: Tables as `tokenised` makes them, none of them empty.
        kept: Rows of each table that are used.
        first: The source row that each table begins with.
    """

    def __init__(self, tables: list[pa.Table], kept: list[Int64Array], first: list[int]) -> None:
        self._tables = tables
        self._kept = kept
        self._views: dict[tuple[int, str], tuple[Int32Array, Int32Array]] = {}
        sizes = [len(rows) for rows in kept]
        self._starts = np.array([0, *accumulate(sizes)])
        self._lengths: dict[str, Int64Array] = {}
        source_rows = [
            t["row"].to_numpy()[k] + f for t, k, f in zip(tables, kept, first, strict=True)
        ]
        self._columns = {
            "source_row": pl.Series("source_row", np.concatenate(source_rows or [np.arange(0)]))
        }

    def __len__(self) -> int:
        return int(self._starts[-1])

    @cached_property
    def _stored_as(self) -> dict[str, str]:
        """Names of annotations, and what they are called in the tables: an input's column never
        hides one of ours."""
        given = dict.fromkeys(
            name.partition(".")[2]
            for table in self._tables
            for name in table.column_names
            if name.startswith((INPUT, INPUT_AS_JSON))
        )
        names = {name: name for name in OWN_COLUMNS}
        for name in given:
            public = f"input_{name}" if name in OWN_COLUMNS else name
            while public in names or (public != name and public in given):
                public = f"input_{public}"
            names[public] = f"{INPUT}{name}"
        return names

    @property
    def columns(self) -> list[str]:
        return list(self._stored_as)

    @cached_property
    def annotations(self) -> pl.DataFrame:
        return pl.DataFrame([self.column(name) for name in self.columns])

    def column(self, name: str) -> pl.Series:
        """[N], an annotation."""
        return self._read(self._stored_as[name]).rename(name)

    def scores(self) -> pl.Series:
        """[N], the scores of each row's responses, the best first; null where it has none."""
        return self._read("scores")

    def _read(self, stored: str) -> pl.Series:
        """A column of the tables, read when it is first asked for."""
        if stored not in self._columns:
            as_text = stored.replace(INPUT, INPUT_AS_JSON, 1)
            parts, texts = [], []
            for table, kept in zip(self._tables, self._kept, strict=True):
                names = [name for name in (stored, as_text) if name in table.column_names]
                values = pl.from_arrow(table[names[0]]) if names else [None] * table.num_rows
                parts.append(pl.Series(stored, values)[kept])
                texts.append(bool(names) and names[0] != stored)
            self._columns[stored] = _concatenated(stored, parts, texts)
        return self._columns[stored]

    def lengths(self, side: str) -> Int64Array:
        """int64 [N], tokens of this side; of "between", responses."""
        if side not in self._lengths:
            parts = [
                np.diff(table[side].chunk(0).offsets.to_numpy())[kept]
                for table, kept in zip(self._tables, self._kept, strict=True)
            ]
            self._lengths[side] = np.concatenate(parts).astype(np.int64)
        return self._lengths[side]

    def sequence(self, side: str, i: int) -> TokenSequence:
        """Prompt and one response of pair i."""
        number, row = self._place(i)
        prompt = self._tokens(number, "prompt", row)
        return TokenSequence(np.concatenate([prompt, self._tokens(number, side, row)]), len(prompt))

    def responses(self, i: int) -> list[TokenSequence]:
        """All responses of row i, the best first."""
        number, row = self._place(i)
        prompt = self._tokens(number, "prompt", row)
        between = [
            TokenSequence(np.concatenate([prompt, np.array(tokens, np.int32)]), len(prompt))
            for tokens in self._tables[number]["between"][row].as_py()
        ]
        return [self.sequence("chosen", i), *between, self.sequence("rejected", i)]

    def _place(self, i: int) -> tuple[int, int]:
        number = int(np.searchsorted(self._starts, i, side="right")) - 1
        return number, int(self._kept[number][i - self._starts[number]])

    def _tokens(self, number: int, side: str, row: int) -> Int32Array:
        """A list of tokens, without copying it."""
        if (number, side) not in self._views:
            column = self._tables[number][side].chunk(0)
            self._views[number, side] = (column.values.to_numpy(), column.offsets.to_numpy())
        values, offsets = self._views[number, side]
        return values[offsets[row] : offsets[row + 1]]


def _joined(tables: list[pa.Table]) -> tuple[_PairTable, pl.DataFrame]:
    """The pairs of all tables, each once, and the rows that are set aside."""
    aside: list[tuple[int, str]] = []
    used: list[pa.Table] = []
    first: list[int] = []
    total = 0
    for table in tables:
        count, reasons = set_aside_rows(table)
        aside += [(total + row, reason) for row, reason in reasons]
        if table.num_rows:
            used.append(table)
            first.append(total)
        total += count
    kept = [np.arange(table.num_rows) for table in used]
    if used:
        ids = pl.concat([pl.Series("id", pl.from_arrow(table["pair_id"])) for table in used])
        new = ids.is_first_distinct().to_numpy()
        starts = np.cumsum([0, *(table.num_rows for table in used)])
        for number, table in enumerate(used):
            fresh = new[starts[number] : starts[number + 1]]
            twice = table["row"].to_numpy()[~fresh]
            aside += [(first[number] + row, DUPLICATE) for row in twice.tolist()]
            kept[number] = np.flatnonzero(fresh)
    set_aside = pl.DataFrame(
        sorted(aside), schema={"source_row": pl.Int64, "reason": pl.String}, orient="row"
    )
    return _PairTable(used, kept, first), set_aside


def _concatenated(name: str, parts: list[pl.Series], are_json: list[bool]) -> pl.Series:
    """Parts of a column; where they have no common type, their values as JSON text."""
    kinds = {part.dtype for part in parts if part.dtype != pl.Null}
    common = _common_type(kinds, parts) if not any(are_json) else None
    if common is None:
        common = pl.String()
        parts = [
            part if is_json else pl.Series(name, as_json(part.to_list()), dtype=pl.String)
            for part, is_json in zip(parts, are_json, strict=True)
        ]
    return pl.concat([part.cast(common) for part in parts]).rename(name)


def _common_type(kinds: set[pl.DataType], parts: list[pl.Series]) -> pl.DataType | None:
    """A type that all values have without losing anything, if there is one."""
    if len(kinds) <= 1:
        return next(iter(kinds), pl.Null())
    if not all(kind.is_numeric() for kind in kinds):
        return None
    extremes: list[Any] = [0]
    for part in parts:
        if part.dtype.is_integer() and part.null_count() < len(part):
            extremes += [part.min(), part.max()]
    least, most = min(extremes), max(extremes)
    if all(kind.is_integer() for kind in kinds):
        if most < 1 << 63:
            return pl.Int64()
        return pl.UInt64() if least >= 0 else None
    return pl.Float64() if max(most, -least) <= 1 << 53 else None


class _Manifest(NamedTuple):
    """Which chunks a file was cut into, so that it need not be read again."""

    folder: Path
    path: Path
    files: Sequence[Path]
    state: list[tuple[int, int]]  # of the files when they were hashed

    @classmethod
    def of(cls, folder: Path | None, files: Sequence[Path], settings: Any) -> "_Manifest | None":
        if folder is None or not files:
            return None
        content, state = hashlib.blake2b(digest_size=16), _state(files)
        for file in files:
            with file.open("rb") as stream:
                content.update(hashlib.file_digest(stream, "blake2b").digest())
        name = digest([content.hexdigest(), [f.suffixes for f in files], settings])
        return cls(folder, folder / f"{name}.json", files, state)

    def read(self) -> list[tuple[str, pa.Table]] | None:
        """The chunks, where all of them are still in the cache."""
        try:
            names = json.loads(self.path.read_text())
            mark_as_used(self.path)
            return [(name, read_table(chunk_path(self.folder, name))) for name in names] or None
        except (OSError, ValueError, TypeError, pa.ArrowException):
            return None

    def write(self, names: Iterable[str]) -> None:
        """Remember the chunks, where every one has a name and no file has changed meanwhile."""
        names = list(names)
        if not all(names) or _state(self.files) != self.state:
            return
        with suppress(OSError):  # without it the file is read again next time, no more
            partial = partial_path(self.path)
            partial.write_text(json.dumps(names))
            replace_durably(partial, self.path)


def _state(files: Sequence[Path]) -> list[tuple[int, int]]:
    """What changes when a file is written."""
    return [(file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def _writable(folder: Path) -> Path | None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        warn(
            f"PreferenceDataset.read: tokens stay in memory, since {folder} cannot be made "
            f"({error}); pass cache=..., or set SAGE_SELECT_CACHE to a folder that can be written",
            stacklevel=3,
        )
        return None
    return folder


def _check_options(max_length: int, on_bad: str, num_workers: int) -> None:
    if max_length < 2:
        raise ValueError(f"PreferenceDataset: max_length must be at least 2, got {max_length}")
    if on_bad not in ("set_aside", "error"):
        raise ValueError(f"PreferenceDataset: on_bad must be set_aside or error, got {on_bad!r}")
    if num_workers < 0:
        raise ValueError(f"PreferenceDataset: num_workers must be at least 0, got {num_workers}")
