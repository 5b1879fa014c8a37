"""The usable pairs of a dataset, stored in columns that can be memory-mapped."""

import re
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import pyarrow as pa

from sage_select.arrays import Int32Array, Int64Array
from sage_select.data.annotations import JSON_PREFIX, VALUE_PREFIX, concatenated
from sage_select.data.reasons import Note
from sage_select.data.records import FIELDS
from sage_select.data.tokenising import PAIR_COLUMNS, Remark, set_aside_rows


class TokenSequence(NamedTuple):
    """Tokens of a prompt and a response, and which of them are scored.

    Attributes:
        tokens: int32 [T].
        response_start: Position of the first scored token.
        skipped: Ranges after it, as (start, end), that are not scored: in a response of several
            turns, all that the model did not write, such as the user's turns.

    Example:
        >>> TokenSequence(np.arange(8, dtype=np.int32), 2, ((4, 6),)).scored.tolist()
        [2, 3, 6, 7]
    """

    tokens: Int32Array
    response_start: int
    skipped: tuple[tuple[int, int], ...] = ()

    @property
    def scored(self) -> Int64Array:
        """Positions of the scored tokens, int64 [n]."""
        positions = np.arange(self.response_start, len(self.tokens))
        for start, end in self.skipped:
            positions = positions[(positions < start) | (positions >= end)]
        return positions


DUPLICATE = "duplicate pair"
REPEATED_ID = "its pair_id is that of another pair"


class PairTable:
    """Usable pairs, in tables of a few thousand rows that can be memory-mapped.

    Args:
        tables: Tables as `tokenised` makes them, none of them empty.
        kept: Rows of each table that are used.
        first: Source row at which each table begins.
    """

    def __init__(self, tables: list[pa.Table], kept: list[Int64Array], first: list[int]) -> None:
        self._tables = tables
        self._kept = kept
        self._views: dict[tuple[int, str], tuple[Int32Array, Int32Array]] = {}
        sizes = [len(rows) for rows in kept]
        self._starts = np.array([0, *accumulate(sizes)])
        self._lengths: dict[str, Int64Array] = {}
        self._has_skipped: dict[int, bool] = {}  # by table
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
        """Column name in the tables for each public name of an annotation.

        An input column that has the name of a built-in column gets the prefix `input_`.
        """
        input_names = dict.fromkeys(
            name.partition(".")[2]
            for table in self._tables
            for name in table.column_names
            if name.startswith((VALUE_PREFIX, JSON_PREFIX))
        )
        names = {name: name for name in PAIR_COLUMNS}
        for name in input_names:
            public = f"input_{name}" if name in PAIR_COLUMNS else name
            # the input may itself have a column of that name: prefix until it is free
            while public in names or (public != name and public in input_names):
                public = f"input_{public}"
            names[public] = f"{VALUE_PREFIX}{name}"
        return names

    @property
    def columns(self) -> list[str]:
        """Names of the annotations."""
        return list(self._stored_as)

    @cached_property
    def annotations(self) -> pl.DataFrame:
        """Annotations, one row per pair."""
        return pl.DataFrame([self.column(name) for name in self.columns])

    def column(self, name: str) -> pl.Series:
        """Return an annotation of each pair, [N]."""
        return self._read(self._stored_as[name]).rename(name)

    def scores(self) -> pl.Series:
        """Return the scores of each row's responses, best first, [N]; null if it has none."""
        return self._read("scores")

    def _read(self, stored: str) -> pl.Series:
        """Return a column of the tables, joined on first use."""
        if stored not in self._columns:
            as_text = stored.replace(VALUE_PREFIX, JSON_PREFIX, 1)
            parts, are_json = [], []
            for table, kept in zip(self._tables, self._kept, strict=True):
                names = [name for name in (stored, as_text) if name in table.column_names]
                # a chunk in which no record has the field gets nulls
                values = pl.from_arrow(table[names[0]]) if names else [None] * table.num_rows
                parts.append(pl.Series(stored, values)[kept])
                are_json.append(bool(names) and names[0] != stored)
            self._columns[stored] = concatenated(stored, parts, are_json)
        return self._columns[stored]

    def lengths(self, side: str) -> Int64Array:
        """Return the number of tokens on a side ("between": the number of responses), int64 [N]."""
        if side not in self._lengths:
            # list lengths follow from the offsets; the tokens themselves are not read
            parts = [
                np.diff(table[side].chunk(0).offsets.to_numpy())[kept]
                for table, kept in zip(self._tables, self._kept, strict=True)
            ]
            self._lengths[side] = np.concatenate(parts).astype(np.int64)
        return self._lengths[side]

    def sequence(self, side: str, i: int) -> TokenSequence:
        """Return prompt and one response of pair i."""
        number, row = self._place(i)
        prompt = self._tokens(number, "prompt", row)
        tokens = np.concatenate([prompt, self._tokens(number, side, row)])
        skipped = self._skipped(number, row, 0 if side == "chosen" else -1)
        return _sequence(tokens, len(prompt), skipped)

    def skipped_tokens(self, side: str) -> Int64Array:
        """Return the number of response tokens on a side that are not scored, int64 [N]."""
        key = f"skipped {side}"
        if key not in self._lengths:
            response = 0 if side == "chosen" else -1
            counts = [np.zeros(len(kept), np.int64) for kept in self._kept]
            for number, kept in enumerate(self._kept):
                for i, row in enumerate(kept.tolist() if self._skips(number) else ()):
                    ranges = self._skipped(number, row, response)
                    counts[number][i] = sum(end - start for start, end in ranges)
            self._lengths[key] = np.concatenate(counts)
        return self._lengths[key]

    def _skips(self, number: int) -> bool:
        """Return whether any token of a table's responses is not scored."""
        if number not in self._has_skipped:
            # of a list of lists of lists, the innermost values
            responses = self._tables[number]["skipped"].combine_chunks().flatten()
            self._has_skipped[number] = len(responses.flatten()) > 0
        return self._has_skipped[number]

    def _skipped(self, number: int, row: int, response: int) -> tuple[tuple[int, int], ...]:
        """Return the ranges of a response that are not scored."""
        if not self._skips(number):
            return ()
        bounds = self._tables[number]["skipped"][row].as_py()[response]
        return tuple(zip(bounds[::2], bounds[1::2], strict=True))

    def responses(self, i: int) -> list[TokenSequence]:
        """Return all responses of row i, best first."""
        number, row = self._place(i)
        prompt = self._tokens(number, "prompt", row)
        between = [
            _sequence(
                np.concatenate([prompt, np.array(tokens, np.int32)]),
                len(prompt),
                self._skipped(number, row, response),
            )
            for response, tokens in enumerate(self._tables[number]["between"][row].as_py(), 1)
        ]
        return [self.sequence("chosen", i), *between, self.sequence("rejected", i)]

    def _place(self, i: int) -> tuple[int, int]:
        """Return the number of the table that holds pair i, and its row there."""
        number = int(np.searchsorted(self._starts, i, side="right")) - 1
        return number, int(self._kept[number][i - self._starts[number]])

    def _tokens(self, number: int, side: str, row: int) -> Int32Array:
        """Return a list of tokens without copying it."""
        if (number, side) not in self._views:
            column = self._tables[number][side].chunk(0)
            self._views[number, side] = (column.values.to_numpy(), column.offsets.to_numpy())
        values, offsets = self._views[number, side]
        return values[offsets[row] : offsets[row + 1]]


def _sequence(
    tokens: Int32Array, start: int, skipped: tuple[tuple[int, int], ...]
) -> TokenSequence:
    """Return a sequence whose response begins at `start`, perhaps with a range to skip."""
    if skipped and skipped[0][0] == start:
        return TokenSequence(tokens, skipped[0][1], skipped[1:])
    return TokenSequence(tokens, start, skipped)


def join_tables(tables: list[pa.Table]) -> tuple[PairTable, pl.DataFrame, list[Remark]]:
    """Join tables to one, without duplicate pairs.

    Returns:
        The usable pairs, the rows that are set aside with their reasons, and notes on these.
    """
    aside: list[tuple[int, str]] = []
    differing: dict[str, list[int]] = {}  # rows of duplicates, by the column in which they differ
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
        is_first = ids.is_first_distinct().to_numpy()
        starts = np.cumsum([0, *(table.num_rows for table in used)])

        def value(place: int, name: str) -> Any:
            number = int(np.searchsorted(starts, place, side="right")) - 1
            table = used[number]
            row = place - int(starts[number])
            return table[name][row].as_py() if name in table.column_names else None

        repeated = set(ids.filter(~pl.Series(is_first)))
        first_place = {
            ids[place]: place
            for place in (np.flatnonzero(is_first).tolist() if repeated else ())
            if ids[place] in repeated
        }
        for number, table in enumerate(used):
            is_kept = is_first[starts[number] : starts[number + 1]]
            for row in np.flatnonzero(~is_kept).tolist():
                here = int(starts[number]) + row
                earlier = first_place[ids[here]]
                source_row = first[number] + table["row"][row].as_py()
                # a hash of the content cannot repeat with other tokens, but a trainer's id can
                same = all(value(earlier, side) == value(here, side) for side in _TOKENS)
                aside.append((source_row, DUPLICATE if same else REPEATED_ID))
                for name in _possible_context(table) if same and len(aside) < COMPARED else ():
                    if value(earlier, name) != value(here, name):
                        differing.setdefault(name, []).append(source_row)
            kept[number] = np.flatnonzero(is_kept)
    set_aside = pl.DataFrame(
        sorted(aside), schema={"source_row": pl.Int64, "reason": pl.String}, orient="row"
    )
    remarks = [
        Remark(_differing(name.partition(".")[2]), len(rows), rows[0])
        for name, rows in differing.items()
    ]
    return PairTable(used, kept, first), set_aside, remarks


COMPARED = 10_000  # duplicates that are compared with the pair that they repeat
_TOKENS = ("prompt", "chosen", "rejected")
_LABEL = re.compile(
    r"id|uuid|idx|index|hash|source|origin|url|date|time|split|subset|set|dataset|model|score|margin"
    r"|label|tag|rank|judge|rating|critique|feedback|comment|category|type|lang|language|user|name"
    r"|author|file|path|reason|rationale|explanation|metadata|meta|info|version|annotator"
)
"""Words in the names of fields that describe a pair, and are no part of its prompt."""


def _possible_context(table: pa.Table) -> list[str]:
    """Return the columns of texts, lists and records that may be a part of the prompt."""
    return [
        name
        for name in table.column_names
        if name.startswith((VALUE_PREFIX, JSON_PREFIX))
        and (pa.types.is_nested(kind := table.schema.field(name).type) or _is_text(kind))
        and not any(_LABEL.fullmatch(w.rstrip("s")) for w in _words(name.partition(".")[2]))
        and name.partition(".")[2] not in FIELDS
    ]


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _words(name: str) -> list[str]:
    return re.split(r"[^a-z]+", name.lower())


def _differing(name: str) -> Note:
    return Note(
        f"a pair is set aside as a duplicate, although the rows differ from an earlier one in the "
        f"field {name!r}, which is not used; if it is part of the prompt, write it into the prompt"
    )
