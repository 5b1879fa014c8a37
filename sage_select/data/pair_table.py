"""All usable pairs of a dataset, in columns that may be memory-mapped."""

from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import polars as pl
import pyarrow as pa

from sage_select.arrays import Int32Array, Int64Array
from sage_select.data.annotations import INPUT, INPUT_AS_JSON, concatenated
from sage_select.data.tokenising import OWN_COLUMNS, set_aside_rows


class TokenSequence(NamedTuple):
    """One response in its context: prompt and response tokens, and where the response starts."""

    tokens: Int32Array
    response_start: int


DUPLICATE = "duplicate pair"


class PairTable:
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
            self._columns[stored] = concatenated(stored, parts, texts)
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


def join_tables(tables: list[pa.Table]) -> tuple[PairTable, pl.DataFrame]:
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
    return PairTable(used, kept, first), set_aside
