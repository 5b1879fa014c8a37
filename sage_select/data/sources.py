"""Stream records from files, hubs and tables, without holding all of them in memory."""

import csv
import gzip
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet

from sage_select.data.records import FIELDS

BATCH_ROWS = 1024  # rows converted from a table at a time

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".feather")
COMPRESSIBLE = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")  # these may also end in .gz


def read_records(
    name: str | Path,
    *,
    text: frozenset[str] = frozenset(),
    split: str = "train",
    subset: str | None = None,
    revision: str | None = None,
) -> Iterator[Any]:
    """Return the records of a file, of a folder's files in the order of names, or of a hub dataset.

    Args:
        name: A path, or a hub name such as "org/set".
        text: Further columns of a CSV that are text, even if all their values look like numbers.
        split: Split of a hub dataset, or of one saved by `datasets`.
        subset: Subset (configuration) of a hub dataset.
        revision: Revision of a hub dataset.

    Raises:
        FileNotFoundError: If there is no such path, and no such dataset on a hub.
        ImportError: If the records need the datasets library, and it is not installed.
        ValueError: If a file's ending is unknown, or its content does not have that format.
    """
    path = Path(name)
    if not path.exists():
        if _could_be_on_a_hub(str(name)):
            return _from_hub(str(name), split, subset, revision)
        raise FileNotFoundError(
            f"PreferenceDataset.read: no file {path}; for a dataset on a hub, give its name as "
            '"organisation/name"'
        )
    files = source_files(path)
    if not files:
        return _saved_by_datasets(path, split)
    return (record for file in files for record in _file_records(file, text))


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


def iterate_records(records: Any) -> Iterator[Any]:
    """Return the records of a list, a polars, pandas or Arrow table, or a `datasets.Dataset`.

    Raises:
        TypeError: If the records are none of these.
    """
    if isinstance(records, pl.DataFrame):
        return (row for part in records.iter_slices(BATCH_ROWS) for row in part.to_dicts())
    if isinstance(records, pl.LazyFrame):
        return iterate_records(records.collect())
    # recognised by their attributes, so that neither library need be imported
    if hasattr(records, "features") and hasattr(records, "iter"):  # of `datasets`
        return _columns_to_records(records.with_format(None).iter(batch_size=BATCH_ROWS))
    if hasattr(records, "iloc"):  # of pandas
        return _from_pandas(records)
    if hasattr(records, "__arrow_c_stream__"):
        return iterate_records(pl.DataFrame(records))
    if isinstance(records, Iterable) and not isinstance(records, str | bytes | Mapping):
        return map(_plain, records)
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


def _file_records(path: Path, text: frozenset[str]) -> Iterator[Any]:
    ending = _ending(path)
    try:
        if ending in (".jsonl", ".ndjson"):
            yield from _json_lines(path)
        elif ending == ".json":
            yield from _json(path)
        elif ending in (".csv", ".tsv"):
            yield from _csv(path, "\t" if ending == ".tsv" else ",", text | _CSV_TEXT)
        else:
            for batch in _parquet(path) if ending == ".parquet" else _arrow(path):
                yield from pl.DataFrame(batch).to_dicts()
    except (
        pa.ArrowException,
        pl.exceptions.PolarsError,
        UnicodeDecodeError,
        gzip.BadGzipFile,
        zlib.error,
        EOFError,
    ) as error:
        raise ValueError(
            f"PreferenceDataset.read: {path} cannot be read as {ending[1:]}: {error}"
        ) from error


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
        yield from _parse_json(file.read(), str(path))


def _parse_json(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"PreferenceDataset.read: {place} is not JSON: {error}") from error


_CSV_TEXT = frozenset(["prompt", "chosen", "rejected", "instruction", "input"])


def _csv(path: Path, separator: str, text: frozenset[str]) -> Iterator[dict[str, Any]]:
    """Yield the records of a CSV; outside text columns, a column of numbers becomes numeric."""
    with _open_text(path) as file:
        header = next(csv.reader(file, delimiter=separator), [])
    try:
        table = pl.read_csv(
            path,
            separator=separator,
            infer_schema_length=None,
            schema_overrides=dict.fromkeys(text & set(header), pl.String),
        )
    except pl.exceptions.PolarsError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"PreferenceDataset.read: {path} is not CSV: {reason}") from error
    yield from table.to_dicts()


def _parquet(path: Path) -> Iterator[Any]:
    with pyarrow.parquet.ParquetFile(path, memory_map=True) as file:
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


def _columns_to_records(batches: Iterable[dict[str, list[Any]]]) -> Iterator[dict[str, Any]]:
    for columns in batches:
        for values in zip(*columns.values(), strict=True):
            yield dict(zip(columns, values, strict=True))


def _from_pandas(table: Any) -> Iterator[Any]:
    for start in range(0, len(table), BATCH_ROWS):
        for record in table.iloc[start : start + BATCH_ROWS].to_dict("records"):
            # pandas marks a missing value by one that is not equal to itself (NaN, NaT, NA)
            yield {
                name: None if _is_missing(value) else _plain(value)
                for name, value in record.items()
            }


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


def _from_hub(name: str, split: str, subset: str | None, revision: str | None) -> Iterator[Any]:
    datasets = _datasets(f"there is no file {name}, and reading it from a hub")
    try:
        loaded = datasets.load_dataset(name, subset, split=split, revision=revision)
    except Exception as error:  # datasets raises errors of many types, also for no network
        raise FileNotFoundError(
            f"PreferenceDataset.read: there is no file {name}, and no dataset of that name could "
            f"be loaded from a hub: {error}"
        ) from error
    return iterate_records(loaded)


def _saved_by_datasets(path: Path, split: str) -> Iterator[Any]:
    loaded = _datasets(f"{path} was saved by datasets; reading it").load_from_disk(str(path))
    if isinstance(loaded, Mapping):
        if split not in loaded:
            raise ValueError(
                f"PreferenceDataset.read: {path} has no split {split!r}; it has {', '.join(loaded)}"
            )
        loaded = loaded[split]
    return iterate_records(loaded)
