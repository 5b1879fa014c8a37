"""Annotations: input columns of any values, each stored as one type without losing a value."""

import json
from collections.abc import Iterable
from typing import Any

import polars as pl

from sage_select.data.records import TEXT_FIELDS, TOKEN_FIELDS

# Prefixes of annotation columns in the tables: values of one type, and values without a common
# type, which are stored as JSON text
VALUE_PREFIX = "input."
JSON_PREFIX = "json."

MAX_LEVELS = 50  # of nested types; Arrow files may have 64


def annotation_series(rows: list[dict[str, Any]]) -> list[pl.Series]:
    """Return one series per input field that does not become tokens."""
    tokenised_fields = {*TEXT_FIELDS, *TOKEN_FIELDS}
    names = dict.fromkeys(name for row in rows for name in row if name not in tokenised_fields)
    return [_series(_as_text(name), [row.get(name) for row in rows]) for name in names]


def _as_text(name: Any) -> str:
    """Return a field's name as text that every library can encode."""
    # JSON can spell half a character, which is in no encoding
    return str(name).encode(errors="backslashreplace").decode()


def _series(name: str, values: list[Any]) -> pl.Series:
    types = {type(value) for value in values if value is not None}
    # polars refuses integers among floats in strict mode; as float64 these lose nothing
    mixed = types == {int, float} and all(map(_is_exact, values))
    try:
        series = pl.Series(
            f"{VALUE_PREFIX}{name}", values, dtype=pl.Float64 if mixed else None, strict=not mixed
        )
    except (TypeError, ValueError, OverflowError, pl.exceptions.PolarsError):
        return _json_series(name, values)
    if not _can_be_stored(series.dtype):
        return _json_series(name, values)
    # polars infers a nested type from the first few values and drops what does not fit it
    if series.dtype.is_nested() and series.to_list() != values:
        return _json_series(name, values)
    return series


# Later versions of polars have a second type of 128 bits
_NOT_IN_ARROW = (pl.Object, pl.Int128, getattr(pl, "UInt128", pl.Int128))


def _can_be_stored(dtype: Any, levels: int = MAX_LEVELS) -> bool:
    """Return whether an Arrow file can hold a polars type."""
    if isinstance(dtype, pl.Struct):
        return levels > 0 and all(_can_be_stored(f.dtype, levels - 1) for f in dtype.fields)
    if isinstance(dtype, pl.List | pl.Array):
        return levels > 0 and _can_be_stored(dtype.inner, levels - 1)
    return not isinstance(dtype, _NOT_IN_ARROW)


def _is_exact(value: Any) -> bool:
    """Return whether float64 represents a number exactly."""
    return not isinstance(value, int) or abs(value) <= 1 << 53


def _json_series(name: str, values: list[Any]) -> pl.Series:
    return pl.Series(f"{JSON_PREFIX}{name}", as_json(values), dtype=pl.String)


def as_json(values: Iterable[Any]) -> list[str | None]:
    """Return values as JSON text, with None kept as None."""
    return [None if value is None else json.dumps(value, default=str) for value in values]


def concatenated(name: str, parts: list[pl.Series], are_json: list[bool]) -> pl.Series:
    """Return the parts of a column as one series, of JSON text if they have no common type."""
    types = {part.dtype for part in parts if part.dtype != pl.Null}
    common = _common_type(types, parts) if not any(are_json) else None
    if common is None:
        common = pl.String()
        parts = [
            part if is_json else pl.Series(name, as_json(part.to_list()), dtype=pl.String)
            for part, is_json in zip(parts, are_json, strict=True)
        ]
    return pl.concat([part.cast(common) for part in parts]).rename(name)


def _common_type(types: set[pl.DataType], parts: list[pl.Series]) -> pl.DataType | None:
    """Return a type that holds all values exactly, or None if there is none."""
    if len(types) <= 1:
        return next(iter(types), pl.Null())
    if not all(dtype.is_numeric() for dtype in types):
        return None
    # the values decide, not their types: a small int64 fits float64, a large one does not
    extremes: list[Any] = [0]
    for part in parts:
        if part.dtype.is_integer() and part.null_count() < len(part):
            extremes += [part.min(), part.max()]
    lowest, highest = min(extremes), max(extremes)
    if all(dtype.is_integer() for dtype in types):
        if highest < 1 << 63:
            return pl.Int64()
        return pl.UInt64() if lowest >= 0 else None
    return pl.Float64() if max(highest, -lowest) <= 1 << 53 else None
