"""Sources: records one by one from files, hubs and tables, without holding them all in memory."""

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

AT_ONCE = 1024  # rows brought from a table at once

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".feather")
COMPRESSED = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")  # these may end in .gz as well


def read_records(
    name: str | Path,
    *,
    text: frozenset[str] = frozenset(),
    split: str = "train",
    subset: str | None = None,
    revision: str | None = None,
) -> Iterator[Any]:
    """The records of a file, of a folder of files in the order of their names, or of a hub's set.

    Args:
        name: A path, or a hub name such as "org/set".
        text: Columns of a CSV that hold text whatever they look like, besides ours.
        split: Which split of a hub's set, or of one that `datasets` has saved.
        subset: Which subset (configuration) of a hub's set.
        revision: Which revision of a hub's set.

    Raises:
        FileNotFoundError: If there is no such path, and the name cannot be a hub's.
        ValueError: If the kind of a file is unknown, or what is in it is not of that kind.
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
    """The files that a path stands for; none where `datasets` has saved a set there.

    Raises:
        ValueError: If a file's ending is unknown, or a folder has no file of a known ending.
    """
    if path.is_file():
        _kind(path)
        return [path]
    if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        return []
    files = sorted(file for file in path.iterdir() if file.is_file() and _known(file))
    if not files:
        raise ValueError(
            f"PreferenceDataset.read: no file in {path} has a known ending; known endings are "
            f"{', '.join(SUFFIXES)}, the first five also with .gz"
        )
    return files


def iterate_records(records: Any) -> Iterator[Any]:
    """The records of a list, a polars, pandas or Arrow table, or a `datasets.Dataset`.

    Raises:
        TypeError: If it is none of these.
    """
    if isinstance(records, pl.DataFrame):
        return (row for part in records.iter_slices(AT_ONCE) for row in part.to_dicts())
    if isinstance(records, pl.LazyFrame):
        return iterate_records(records.collect())
    if hasattr(records, "features") and hasattr(records, "iter"):  # of `datasets`, not imported
        return _columns_to_records(records.with_format(None).iter(batch_size=AT_ONCE))
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
    """Records under our field names, `columns` being `{ours: theirs}`.

    Raises:
        ValueError: If the first record has not one of the fields.
    """
    for name in columns.keys() - FIELDS:
        raise ValueError(
            f"PreferenceDataset: columns maps {name!r}, which is not a field of ours; these are "
            f"{', '.join(sorted(FIELDS))}"
        )
    ours = {theirs: name for name, theirs in columns.items()}
    for number, record in enumerate(records):
        if isinstance(record, dict):
            if missing := [name for name in ours if number == 0 and name not in record]:
                raise ValueError(
                    f"PreferenceDataset: columns names {missing[0]!r}, which is not a field of the "
                    f"first record; it has {', '.join(map(str, record))}"
                )
            kept = {name: value for name, value in record.items() if name not in columns}
            yield {ours.get(name, name): value for name, value in kept.items()} | {
                name: record.get(theirs) for name, theirs in columns.items()
            }
        else:
            yield record


# Files


def _kind(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes] or [""]
    kind = suffixes[-1]
    if kind == ".gz" and len(suffixes) > 1 and suffixes[-2] in COMPRESSED:
        return suffixes[-2]
    if kind not in SUFFIXES:
        raise ValueError(
            f"PreferenceDataset.read: cannot read {path.name}; known endings are "
            f"{', '.join(SUFFIXES)}, the first five also with .gz; for others, pass a list of "
            "dicts to from_records"
        )
    return kind


def _known(path: Path) -> bool:
    """Whether a file in a folder is data: not what describes data, nor our own decisions."""
    if path.name == "dataset_info.json" or path.name.endswith(".selection.parquet"):
        return False
    try:
        return bool(_kind(path))
    except ValueError:
        return False


def _file_records(path: Path, text: frozenset[str]) -> Iterator[Any]:
    kind = _kind(path)
    try:
        if kind in (".jsonl", ".ndjson"):
            yield from _json_lines(path)
        elif kind == ".json":
            yield from _json(path)
        elif kind in (".csv", ".tsv"):
            yield from _csv(path, "\t" if kind == ".tsv" else ",", text | _CSV_TEXT)
        else:
            for batch in _parquet(path) if kind == ".parquet" else _arrow(path):
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
            f"PreferenceDataset.read: {path} cannot be read as {kind[1:]}: {error}"
        ) from error


def _text(path: Path) -> TextIO:
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="")
    return path.open(encoding="utf-8-sig", newline="")


def _json_lines(path: Path) -> Iterator[Any]:
    # line by line: one odd row must not decide the types of all others
    with _text(path) as lines:
        for number, line in enumerate(lines):
            if line.strip():
                yield _parsed(line, f"line {number + 1} of {path}")


def _json(path: Path) -> Iterator[Any]:
    with _text(path) as file:
        start = file.read(1)
        while start.isspace():
            start = file.read(1)
    if start != "[":  # some call their JSON Lines .json
        try:
            yield from _json_lines(path)
        except ValueError as error:
            raise ValueError(
                f"{error}; a .json file is a list of records, or a record on each line"
            ) from None
        return
    with _text(path) as file:
        yield from _parsed(file.read(), str(path))


def _parsed(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"PreferenceDataset.read: {place} is not JSON: {error}") from error


_CSV_TEXT = frozenset(["prompt", "chosen", "rejected", "instruction", "input"])


def _csv(path: Path, separator: str, text: frozenset[str]) -> Iterator[dict[str, Any]]:
    """Texts stay texts; a column whose every value is a number becomes one."""
    with _text(path) as file:
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
        yield from file.iter_batches(AT_ONCE)


def _arrow(path: Path) -> Iterator[Any]:
    with pa.memory_map(str(path)) as file:
        magic = file.read(6)
        file.seek(0)
        if magic == b"ARROW1":
            reader = pa.ipc.open_file(file)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            batches = iter(pa.ipc.open_stream(file))
        for batch in batches:
            for start in range(0, batch.num_rows, AT_ONCE):
                yield batch.slice(start, AT_ONCE)


# Tables and hubs


def _columns_to_records(batches: Iterable[dict[str, list[Any]]]) -> Iterator[dict[str, Any]]:
    for columns in batches:
        for values in zip(*columns.values(), strict=True):
            yield dict(zip(columns, values, strict=True))


def _from_pandas(table: Any) -> Iterator[Any]:
    for start in range(0, len(table), AT_ONCE):
        for record in table.iloc[start : start + AT_ONCE].to_dict("records"):
            # pandas marks what is missing with a value that is not equal to itself
            yield {
                name: None if _is_missing(value) else _plain(value)
                for name, value in record.items()
            }


def _is_missing(value: Any) -> bool:
    same = value == value
    return same is False or type(same).__name__ == "NAType"


def _plain(value: Any) -> Any:
    """The same with lists for tuples and arrays, and Python's numbers for numpy's."""
    if isinstance(value, dict):
        return {name: _plain(x) for name, x in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(x) for x in value]
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    return value.item() if isinstance(value, np.generic) else value


def _could_be_on_a_hub(name: str) -> bool:
    parts = name.split("/")
    looks_like_a_file = Path(name).suffix in (*SUFFIXES, ".gz") or name.startswith((".", "~"))
    return len(parts) == 2 and all(parts) and not looks_like_a_file


def _datasets(purpose: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"PreferenceDataset.read: {purpose} needs the datasets library; pip install datasets"
        ) from error
    return datasets


def _from_hub(name: str, split: str, subset: str | None, revision: str | None) -> Iterator[Any]:
    datasets = _datasets(f"there is no file {name}, and reading it from a hub")
    try:
        loaded = datasets.load_dataset(name, subset, split=split, revision=revision)
    except Exception as error:
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
