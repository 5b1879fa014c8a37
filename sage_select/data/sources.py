"""Stream records from files, hubs and tables, without holding all of them in memory."""

import csv
import gzip
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet

from sage_select.data.records import FIELDS
from sage_select.system.files import check_unchanged, user_path

BATCH_ROWS = 1024  # rows converted from a table at a time

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".feather")
MAX_DEPTH = 100  # levels of lists and records within a record of a JSON file

COMPRESSIBLE = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")  # these may also end in .gz


def read_records(
    name: str | Path,
    *,
    mapped: frozenset[str] = frozenset(),
    split: str = "train",
    subset: str | None = None,
    revision: str | None = None,
) -> Iterator[Any]:
    """Return the records of a file, of a folder's files in the order of names, or of a hub dataset.

    Args:
        name: A path, or a hub name such as "org/set".
        mapped: Columns that the caller renames to fields of the library. In a CSV they are text,
            even if all their values look like numbers.
        split: Split of a hub dataset, or of one saved by `datasets`.
        subset: Subset (configuration) of a hub dataset.
        revision: Revision of a hub dataset.

    Raises:
        FileNotFoundError: If there is no such path, and no such dataset on a hub.
        ImportError: If the records need the datasets library, and it is not installed.
        ValueError: If a file's ending is unknown, or its content does not have that format; the
            error names the file and, of a text file, the line. As in all of Python's JSON, the
            last of several fields of one name counts, and NaN and Infinity are numbers.
    """
    path = user_path(name)
    if not path.exists():
        if _could_be_on_a_hub(str(name)):
            return _from_hub(str(name), split, subset, revision, mapped)
        raise FileNotFoundError(
            f"PreferenceDataset.read: no file {path}; for a dataset on a hub, give its name as "
            '"organisation/name"'
        )
    files = source_files(path)
    if not files:
        return _saved_by_datasets(path, split, mapped)
    return (record for file in files for record in file_records(file, mapped))


def source_files(path: Path) -> list[Path]:
    """Return the data files of a path; none if it is a folder saved by `datasets`.

    Raises:
        ValueError: If a file's ending is unknown, or a folder has no file of a known ending.
    """
    if path.is_file():
        _ending(path)
        return [path]
    if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        return []
    files = sorted(file for file in path.iterdir() if file.is_file() and _is_data(file))
    if not files:
        raise ValueError(
            f"PreferenceDataset.read: no file in {path} has a known ending; known endings are "
            f"{', '.join(SUFFIXES)}, the first five also with .gz"
        )
    return files


def iterate_records(records: Any, mapped: frozenset[str] = frozenset()) -> Iterator[Any]:
    """Return the records of a list, a polars, pandas or Arrow table, or a `datasets.Dataset`.

    A table gives every nested record the fields of all rows, null where a row has none. In fields
    that become tokens these nulls are left out; those in a list of dicts are kept.

    Args:
        records: The records.
        mapped: Columns that the caller renames to fields of the library.

    Raises:
        TypeError: If the records are none of these.
        ValueError: If a record is nested so deeply that Python cannot process it.
    """
    fields = FIELDS | mapped
    if isinstance(records, pl.DataFrame):
        slices = records.iter_slices(BATCH_ROWS)
        return (row for part in slices for row in _frame_records(part, fields))
    if isinstance(records, pl.LazyFrame):
        return iterate_records(records.collect(), mapped)
    # recognised by their attributes, so that neither library need be imported
    if hasattr(records, "features") and hasattr(records, "iter"):  # of `datasets`
        return _from_datasets(records, fields)
    if hasattr(records, "iloc"):  # of pandas
        return _from_pandas(records, fields)
    if hasattr(records, "__arrow_c_stream__"):
        return iterate_records(pl.DataFrame(records), mapped)
    if isinstance(records, Iterable) and not isinstance(records, str | bytes | Mapping):
        return _from_list(records)
    raise TypeError(
        "PreferenceDataset.from_records: records must be a list of dicts, a polars, pandas or "
        f"Arrow table, or a datasets.Dataset, got {type(records).__name__}; for a file or a hub's "
        "name, call PreferenceDataset.read"
    )


def rename(records: Iterable[Any], columns: Mapping[str, str]) -> Iterator[Any]:
    """Yield records with their fields renamed, `columns` being `{field: column}`.

    Raises:
        ValueError: If `columns` maps an unknown field, or the first record lacks a column.
    """
    for name in columns.keys() - FIELDS:
        raise ValueError(
            f"PreferenceDataset: columns maps {name!r}, which is not a known field; known "
            f"fields are {', '.join(sorted(FIELDS))}"
        )
    field_of = {column: name for name, column in columns.items()}
    for number, record in enumerate(records):
        if isinstance(record, dict):
            # only the first record must have all columns: later ones may leave some out
            if missing := [name for name in field_of if number == 0 and name not in record]:
                raise ValueError(
                    f"PreferenceDataset: columns names {missing[0]!r}, which is not a field of the "
                    f"first record; it has {', '.join(map(str, record))}"
                )
            kept = {name: value for name, value in record.items() if name not in columns}
            yield {field_of.get(name, name): value for name, value in kept.items()} | {
                name: record.get(column) for name, column in columns.items()
            }
        else:
            yield record  # not a record: set aside later, with its row number


# Files


def _ending(path: Path) -> str:
    """Return the ending that names a file's format, without `.gz`."""
    suffixes = [suffix.lower() for suffix in path.suffixes] or [""]
    ending = suffixes[-1]
    if ending == ".gz" and len(suffixes) > 1 and suffixes[-2] in COMPRESSIBLE:
        return suffixes[-2]
    if ending not in SUFFIXES:
        raise ValueError(
            f"PreferenceDataset.read: cannot read {path.name}; known endings are "
            f"{', '.join(SUFFIXES)}, the first five also with .gz; for other formats, pass a "
            "list of dicts to from_records"
        )
    return ending


def _is_data(path: Path) -> bool:
    """Return whether a file in a folder holds pairs, not metadata or a record of a selection."""
    if path.name == "dataset_info.json" or path.name.endswith(".selection.parquet"):
        return False
    try:
        return bool(_ending(path))
    except ValueError:
        return False


# An error inside polars, which is no Exception: left alone, it would pass every handler
_POLARS_PANIC: Any = getattr(pl.exceptions, "PanicException", pl.exceptions.PolarsError)


def file_records(path: Path, mapped: frozenset[str], ending: str = "") -> Iterator[Any]:
    """Yield the records of one file; its ending names the format unless another one is given."""
    ending = ending or _ending(path)
    check_unchanged(path, "PreferenceDataset.read")
    try:
        if ending in (".jsonl", ".ndjson"):
            yield from _json_lines(path)
        elif ending == ".json":
            yield from _json(path)
        elif ending in (".csv", ".tsv"):
            yield from _csv(path, "\t" if ending == ".tsv" else ",", mapped | _CSV_TEXT)
        else:
            for batch in _parquet(path) if ending == ".parquet" else _arrow(path):
                # offsets or text of a spoiled file may be wrong: using them can end the process
                batch.validate(full=True)
                yield from _frame_records(pl.DataFrame(batch), FIELDS | mapped)
    # parsers raise errors of any type for spoiled content
    except (Exception, _POLARS_PANIC) as error:
        if str(path) in str(error):
            raise
        reason = _undecodable_line(path) if isinstance(error, UnicodeError) else str(error)
        raise ValueError(
            f"PreferenceDataset.read: {path} cannot be read as {ending[1:]}: {reason}"
        ) from error


def _undecodable_line(path: Path) -> str:
    """Return a description of the first line of a text file that is not UTF-8."""
    with _open_bytes(path) as lines:
        for number, line in enumerate(lines, 1):
            if number == 1 and line.startswith((b"\xff\xfe", b"\xfe\xff")):
                return "it is UTF-16; save it as UTF-8"
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return f"line {number} is not UTF-8 ({error.reason}); save the file as UTF-8"
    return "it is not UTF-8"


def _open_bytes(path: Path) -> "BinaryIO | gzip.GzipFile":
    return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb")


def _open_text(path: Path) -> TextIO:
    # utf-8-sig skips the byte order mark that some programs write
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="")
    return path.open(encoding="utf-8-sig", newline="")


def _json_lines(path: Path) -> Iterator[Any]:
    # parsed line by line: in a table, one odd row would decide the types of all others
    with _open_text(path) as lines:
        for number, line in enumerate(lines):
            if line.strip():
                yield _parse_json(line, f"line {number + 1} of {path}")


def _json(path: Path) -> Iterator[Any]:
    with _open_text(path) as file:
        start = file.read(1)
        while start.isspace():
            start = file.read(1)
    if start != "[":  # some datasets name JSON Lines files .json
        try:
            yield from _json_lines(path)
        except ValueError as error:
            raise ValueError(
                f"{error}; a .json file must be a list of records, or have one record per line"
            ) from None
        return
    with _open_text(path) as file:
        records = _parse_json(file.read(), str(path))
    yield from records


def _parse_json(text: str, place: str) -> Any:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # also integers of thousands of digits
        reason = "nested too deeply" if isinstance(error, RecursionError) else f"not JSON: {error}"
        raise ValueError(f"PreferenceDataset.read: {place} is {reason}") from error
    if text.count("[") + text.count("{") > MAX_DEPTH and _is_deep(value):
        raise ValueError(
            f"PreferenceDataset.read: {place} is nested too deeply, more than {MAX_DEPTH} levels"
        )
    return value


def _is_deep(value: Any) -> bool:
    """Return whether a value has more than MAX_DEPTH levels of lists and records."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        inner = (x.values() if isinstance(x, dict) else x for x in level)
        level = [x for values in inner for x in values if isinstance(x, dict | list)]
        if not level:
            return False
    return True


_CSV_TEXT = frozenset(["prompt", "chosen", "rejected", "instruction", "input"])


def _csv(path: Path, separator: str, text: frozenset[str]) -> Iterator[dict[str, Any]]:
    """Yield the records of a CSV; outside text columns, a column of numbers becomes numeric."""
    with _open_text(path) as file:
        header = next(csv.reader(file, delimiter=separator), [])
    for name in (FIELDS | text) & {name for name in header if header.count(name) > 1}:
        raise ValueError(
            f"PreferenceDataset.read: {path} has more than one column {name!r}; rename one of them"
        )
    try:
        # opened here: polars expands "~", "*" and "[ ]" in a path; gzip verifies its checksum
        with _open_bytes(path) as opened:
            source: Any = opened.read() if isinstance(opened, gzip.GzipFile) else opened
            table = pl.read_csv(
                source,
                separator=separator,
                infer_schema_length=None,
                schema_overrides=dict.fromkeys(text & set(header), pl.String),
            )
    except pl.exceptions.PolarsError as error:
        reason = str(error).splitlines()[0] if "utf" not in str(error) else _undecodable_line(path)
        raise ValueError(f"PreferenceDataset.read: {path} is not CSV: {reason}") from error
    yield from table.to_dicts()


def _parquet(path: Path) -> Iterator[Any]:
    with (
        pa.memory_map(str(path)) as opened,  # a path would be taken for an address by some names
        pyarrow.parquet.ParquetFile(opened, page_checksum_verification=True) as file,
    ):
        yield from file.iter_batches(BATCH_ROWS)


def _arrow(path: Path) -> Iterator[Any]:
    with pa.memory_map(str(path)) as file:
        magic = file.read(6)
        file.seek(0)
        if magic == b"ARROW1":  # the file format; anything else is read as a stream
            reader = pa.ipc.open_file(file)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            batches = iter(pa.ipc.open_stream(file))
        for batch in batches:
            for start in range(0, batch.num_rows, BATCH_ROWS):
                yield batch.slice(start, BATCH_ROWS)


# Tables and hubs


def _from_list(records: Iterable[Any]) -> Iterator[Any]:
    for number, record in enumerate(records):
        try:
            yield _plain(record)
        except RecursionError:
            raise ValueError(
                f"PreferenceDataset.from_records: row {number} is nested too deeply"
            ) from None


def _frame_records(table: pl.DataFrame, fields: frozenset[str]) -> list[dict[str, Any]]:
    records = table.to_dicts()
    for name, dtype in table.schema.items():
        if name in fields and _has_records(dtype):
            for record in records:
                record[name] = _without_nulls(record[name])
    return records


def _has_records(dtype: Any) -> bool:
    """Return whether values of a polars type contain records."""
    inner = getattr(dtype, "inner", None)  # of a list
    return isinstance(dtype, pl.Struct) or (inner is not None and _has_records(inner))


def _without_nulls(value: Any) -> Any:
    """Return a value without the null fields of its records."""
    if isinstance(value, dict):
        return {
            name: _without_nulls(x) if isinstance(x, dict | list) else x
            for name, x in value.items()
            if x is not None
        }
    return [_without_nulls(x) for x in value] if isinstance(value, list) else value


def _from_datasets(table: Any, fields: frozenset[str]) -> Iterator[dict[str, Any]]:
    features = table.features or {}  # None for some streams
    for columns in table.with_format(None).iter(batch_size=BATCH_ROWS):
        for name in fields & columns.keys():
            feature = features.get(name)
            if feature is None or isinstance(feature, dict) or _inner(feature) is not None:
                columns[name] = [_without_fillers(value, feature) for value in columns[name]]
        for values in zip(*columns.values(), strict=True):
            yield dict(zip(columns, values, strict=True))


def _without_fillers(value: Any, feature: Any) -> Any:
    """Return a value without null fields, except in those of the type `datasets.Json`."""
    if feature is None:
        return _without_nulls(value)
    if isinstance(feature, dict) and isinstance(value, dict):
        return {
            name: _without_fillers(x, feature.get(name)) if isinstance(x, dict | list) else x
            for name, x in value.items()
            if x is not None
        }
    inner = _inner(feature)
    if inner is not None and isinstance(value, list):
        return [_without_fillers(x, inner) for x in value]
    return value


def _inner(feature: Any) -> Any:
    """Return the type of a list's values in `datasets`, or None for any other type."""
    return feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)


def _from_pandas(table: Any, fields: frozenset[str]) -> Iterator[Any]:
    for start in range(0, len(table), BATCH_ROWS):
        for record in table.iloc[start : start + BATCH_ROWS].to_dict("records"):
            # pandas marks a missing value by one that is not equal to itself (NaN, NaT, NA)
            plain = {
                name: None if _is_missing(value) else _plain(value)
                for name, value in record.items()
            }
            yield {n: _without_nulls(x) if n in fields else x for n, x in plain.items()}


def _is_missing(value: Any) -> bool:
    equals_itself = value == value
    return equals_itself is False or type(equals_itself).__name__ == "NAType"


def _plain(value: Any) -> Any:
    """Return a value with tuples and arrays as lists, and numpy numbers as Python numbers."""
    if isinstance(value, dict):
        return {name: _plain(x) for name, x in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(x) for x in value]
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    return value.item() if isinstance(value, np.generic) else value


def _could_be_on_a_hub(name: str) -> bool:
    """Return whether a name has the form organisation/name and does not look like a file."""
    parts = name.split("/")
    looks_like_a_file = Path(name).suffix in (*SUFFIXES, ".gz") or name.startswith((".", "~"))
    return len(parts) == 2 and all(parts) and not looks_like_a_file


def _datasets(purpose: str) -> Any:
    """Import the datasets library; without it, the error names the purpose."""
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"PreferenceDataset.read: {purpose} needs the datasets library; run "
            "pip install datasets"
        ) from error
    return datasets


def _from_hub(
    name: str, split: str, subset: str | None, revision: str | None, mapped: frozenset[str]
) -> Iterator[Any]:
    datasets = _datasets(f"there is no file {name}, and reading it from a hub")
    try:
        loaded = datasets.load_dataset(name, subset, split=split, revision=revision)
    except Exception as error:  # datasets raises errors of many types, also for no network
        raise FileNotFoundError(
            f"PreferenceDataset.read: there is no file {name}, and no dataset of that name could "
            f"be loaded from a hub: {error}"
        ) from error
    return iterate_records(loaded, mapped)


def _saved_by_datasets(path: Path, split: str, mapped: frozenset[str]) -> Iterator[Any]:
    datasets = _datasets(f"{path} was saved by datasets; reading it")
    try:
        loaded = datasets.load_from_disk(str(path.absolute()))
    except Exception as error:  # datasets raises errors of many types for a spoiled folder
        raise ValueError(
            f"PreferenceDataset.read: {path} cannot be read as saved by datasets: {error}"
        ) from error
    if isinstance(loaded, Mapping):
        if split not in loaded:
            raise ValueError(
                f"PreferenceDataset.read: {path} has no split {split!r}; it has {', '.join(loaded)}"
            )
        loaded = loaded[split]
    try:
        for batch in loaded.data.to_batches():
            batch.validate(full=True)
    except pa.ArrowException as error:
        raise ValueError(f"PreferenceDataset.read: {path} is spoiled: {error}") from error
    return iterate_records(loaded, mapped)
