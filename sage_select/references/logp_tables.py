"""Reference log-probs computed by other programs, read from a table with one row per pair."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO

import numpy as np
import polars as pl
import torch

from sage_select.data.dataset import PreferenceDataset
from sage_select.models.sequences import as_pair_logps
from sage_select.pairs import CHOSEN, REFERENCE, REJECTED, PairLogps
from sage_select.system.files import check_unchanged, user_path


def has_column(path: str | Path, name: str) -> bool:
    """Return whether a Parquet, CSV or JSON Lines file has a column of this name."""
    file = user_path(path)
    check_unchanged(file, "read_reference")
    # opened here, since polars expands "*" and "~" in a path
    with file.open("rb") as opened, _errors_of_parsers(file):
        if file.suffix == ".parquet":
            return name in pl.read_parquet_schema(opened)
        if file.suffix == ".csv":
            return name in pl.read_csv(opened, n_rows=0).columns
        first_lines = b"".join(islice(opened, 100))
        return name in pl.read_ndjson(first_lines).columns


@contextmanager
def _errors_of_parsers(file: Path) -> Iterator[None]:
    """Name the file in errors of parsers, which are of any class for spoiled content."""
    try:
        yield
    # the panic of a parser is no Exception
    except (Exception, pl.exceptions.PanicException) as error:
        reason = (str(error) or repr(error)).splitlines()[0]
        raise ValueError(f"read_reference: {file} cannot be read: {reason}") from error


def read_reference(
    path: str | Path,
    dataset: PreferenceDataset,
    *,
    key: str = "pair_id",
    chosen: str = REFERENCE + CHOSEN,
    rejected: str = REFERENCE + REJECTED,
) -> PairLogps:
    """Read reference log-probs from a Parquet, CSV or JSON Lines file.

    If the file has the columns `chosen_tokens` and `rejected_tokens`, they are compared with the
    dataset's token counts. Without them nothing can be checked: the file must have been made with
    the same tokenizer, chat template and max_length. Nor does it say in which precision they were
    measured: name it with `read_reference(...).measured_in(torch.bfloat16)`, or the `Selector` can
    only warn where they differ from the policy's by rounding.

    Args:
        path: The file: one row per pair, with log-probs in nats, summed over each response.
        dataset: The pairs; the file must contain all of them and may contain more.
        key: The column that names pairs, in the file and in the dataset.
        chosen: The column of the chosen responses' log-probs; the default is TRL's name.
        rejected: The column of the rejected responses' log-probs; the default is TRL's name.

    Returns:
        Log-probs of the dataset's pairs, in the dataset's order.

    Raises:
        FileNotFoundError: If there is no such file.
        SpoiledFile: If the file was written by `sage-select score` and has changed since.
        ValueError: If the file cannot be read, lacks a column or a pair, has different values for
            one pair or other token counts than the dataset, or if a log-prob is above 0 or not
            finite.
    """
    as_text = {key: pl.String}  # a CSV key 007 must not be inferred as the number 7
    readers: dict[str, Callable[[IO[bytes]], pl.DataFrame]] = {
        ".parquet": pl.read_parquet,
        ".csv": partial(pl.read_csv, infer_schema_length=None, schema_overrides=as_text),
        ".jsonl": partial(pl.read_ndjson, infer_schema_length=None),
        ".ndjson": partial(pl.read_ndjson, infer_schema_length=None),
    }
    file = user_path(path)
    if file.suffix not in readers:
        raise ValueError(
            f"read_reference: cannot read {file.name}; known endings are {', '.join(readers)}"
        )
    if not file.exists():
        raise FileNotFoundError(f"read_reference: no file {file}")
    check_unchanged(file, "read_reference")
    with file.open("rb") as opened, _errors_of_parsers(file):
        table = readers[file.suffix](opened)
    for name in (key, chosen, rejected):
        if name not in table.columns:
            raise ValueError(
                f"read_reference: {file} has no column {name!r}; it has {table.columns}"
            )
    counts = [name for name in ("chosen_tokens", "rejected_tokens") if name in table.columns]
    for name in (chosen, rejected):
        try:
            table = table.with_columns(pl.col(name).cast(pl.Float64))
        except pl.exceptions.PolarsError:
            raise ValueError(
                f"read_reference: the column {name!r} of {file} has values of type "
                f"{table[name].dtype} that are no numbers; log-probs must be numbers, in nats"
            ) from None
    # keys are compared as text, because a number in the file may be text in the dataset
    measured = table.select(
        *counts,
        pl.col(key).cast(pl.String).alias("key"),
        pl.col(chosen).alias("chosen"),
        pl.col(rejected).alias("rejected"),
    ).unique()  # a pair repeated with equal values is harmless
    for name in measured.filter(pl.col("key").is_duplicated())["key"][:1]:
        raise ValueError(
            f"read_reference: {file} has different log-probs for pair {name} in several rows; keep "
            "one row per pair"
        )
    keys = pl.DataFrame({"key": dataset.column(key).cast(pl.String)})
    rows = keys.join(measured, on="key", how="left", maintain_order="left")
    for name in rows.filter(pl.col("chosen").is_null() | pl.col("rejected").is_null())["key"][:1]:
        raise ValueError(
            f"read_reference: {file} has no log-probs for pair {name} (by {key}); "
            "measure it, or use a dataset without it"
        )
    for count in counts:
        expected = pl.Series("expected", getattr(dataset, count))
        for name in rows.filter(pl.col(count) != expected)["key"][:1]:
            raise ValueError(
                f"read_reference: the {count} of pair {name} in {file} differ from the dataset's; "
                "the file was made with another tokenizer, template or max_length: make it again "
                "with the dataset's"
            )
    both = pl.col("chosen", "rejected")
    for name in rows.filter(pl.any_horizontal(~both.is_finite() | (both > 0)))["key"][:1]:
        raise ValueError(
            f"read_reference: {file} has a log-prob for pair {name} that is above 0 or not finite; "
            "log-probs are natural logarithms of probabilities, summed over a response"
        )
    # all chosen and then all rejected, the order that as_pair_logps takes
    logps = np.concatenate([rows["chosen"].to_numpy(), rows["rejected"].to_numpy()])
    return as_pair_logps(dataset, torch.from_numpy(logps))
