"""Annotations: columns of any values, stored under one type without losing any of them."""

import json
from collections.abc import Iterable
from typing import Any

import polars as pl

from sage_select.data.records import TEXT_FIELDS, TOKEN_FIELDS

INPUT = "input."  # what the names of annotation columns start with


INPUT_AS_JSON = "json."  # the same of those whose values have no common type: they are JSON text


def annotation_series(rows: list[dict[str, Any]]) -> list[pl.Series]:
    ours = {*TEXT_FIELDS, *TOKEN_FIELDS}
    names = dict.fromkeys(name for row in rows for name in row if name not in ours)
    return [_series(str(name), [row.get(name) for row in rows]) for name in names]


def _series(name: str, values: list[Any]) -> pl.Series:
    kinds = {type(value) for value in values if value is not None}
    mixed = kinds == {int, float} and all(map(_is_exact, values))
    try:
        series = pl.Series(
            f"{INPUT}{name}", values, dtype=pl.Float64 if mixed else None, strict=not mixed
        )
    except (TypeError, OverflowError, UnicodeError, pl.exceptions.PolarsError):
        return _json_series(name, values)
    if series.dtype in (pl.Object, pl.Int128):
        return _json_series(name, values)
    # of lists and records the first few decide the type, and what does not fit it is lost
    if series.dtype.is_nested() and series.to_list() != values:
        return _json_series(name, values)
    return series


def _is_exact(value: Any) -> bool:
    """Whether a number is the same as a 64-bit float."""
    return not isinstance(value, int) or abs(value) <= 1 << 53


def _json_series(name: str, values: list[Any]) -> pl.Series:
    return pl.Series(f"{INPUT_AS_JSON}{name}", as_json(values), dtype=pl.String)


def as_json(values: Iterable[Any]) -> list[str | None]:
    """Values as JSON text, and None as None."""
    return [None if value is None else json.dumps(value, default=str) for value in values]


def concatenated(name: str, parts: list[pl.Series], are_json: list[bool]) -> pl.Series:
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
