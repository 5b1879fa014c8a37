"""Log-probs that were computed elsewhere, from a table with one row per pair."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import polars as pl
import torch

from sage_select.data.dataset import PreferenceDataset
from sage_select.models.sequences import as_pair_logps
from sage_select.pairs import CHOSEN, REFERENCE, REJECTED, PairLogps


def has_column(path: str | Path, name: str) -> bool:
    """Whether a table has a column of this name."""
    file = Path(path)
    scans: dict[str, Callable[[Path], pl.LazyFrame]] = {
        ".parquet": pl.scan_parquet,
        ".csv": pl.scan_csv,
    }
    scan = scans.get(file.suffix, pl.scan_ndjson)
    return name in scan(file).collect_schema().names()


def read_reference(
    path: str | Path,
    dataset: PreferenceDataset,
    *,
    key: str = "pair_id",
    chosen: str = REFERENCE + CHOSEN,
    rejected: str = REFERENCE + REJECTED,
) -> PairLogps:
    """Reference log-probs that were computed elsewhere, from a Parquet, CSV or JSON Lines file.

    Args:
        path: The file: one row per pair, with summed log-probs in nats.
        dataset: The pairs; every one must stand in the file, which may have more.
        key: The column that names pairs, in the file and among the dataset's columns.
        chosen: The column of the chosen responses' log-probs; by default TRL's name.
        rejected: The same of the rejected ones.

    Returns:
        Log-probs of the dataset's pairs. Where the file has `chosen_tokens` and `rejected_tokens`
        they are compared with the dataset's. Where it has not, nobody can tell: whoever made it
        must have used the same tokenizer and template, and cut responses at the same length.

    Raises:
        ValueError: If a column or a pair is missing, a pair stands there twice with different
            values, or a log-prob is not a finite number of at most 0.
    """
    as_text = {key: pl.String}  # 007 is not 7
    readers: dict[str, Callable[[Path], pl.DataFrame]] = {
        ".parquet": pl.read_parquet,
        ".csv": partial(pl.read_csv, infer_schema_length=None, schema_overrides=as_text),
        ".jsonl": partial(pl.read_ndjson, infer_schema_length=None),
        ".ndjson": partial(pl.read_ndjson, infer_schema_length=None),
    }
    file = Path(path)
    if file.suffix not in readers:
        raise ValueError(
            f"read_reference: cannot read {file.name}; known endings are {', '.join(readers)}"
        )
    if not file.exists():
        raise FileNotFoundError(f"read_reference: no file {file}")
    try:
        table = readers[file.suffix](file)
    except pl.exceptions.PolarsError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"read_reference: {file} cannot be read: {reason}") from error
    for name in (key, chosen, rejected):
        if name not in table.columns:
            raise ValueError(
                f"read_reference: {file} has no column {name!r}; it has {table.columns}"
            )
    counts = [name for name in ("chosen_tokens", "rejected_tokens") if name in table.columns]
    given = table.select(
        *counts,
        pl.col(key).cast(pl.String).alias("key"),
        pl.col(chosen).cast(pl.Float64).alias("chosen"),
        pl.col(rejected).cast(pl.Float64).alias("rejected"),
    ).unique()
    for name in given.filter(pl.col("key").is_duplicated())["key"][:1]:
        raise ValueError(f"read_reference: {file} has different log-probs for pair {name}")
    wanted = pl.DataFrame({"key": dataset.column(key).cast(pl.String)})
    found = wanted.join(given, on="key", how="left", maintain_order="left")
    for name in found.filter(pl.col("chosen").is_null() | pl.col("rejected").is_null())["key"][:1]:
        raise ValueError(
            f"read_reference: {file} has no log-probs for pair {name} (by {key}); "
            "measure it, or take a dataset without it"
        )
    for count in counts:
        ours = pl.Series("ours", getattr(dataset, count))
        for name in found.filter(pl.col(count) != ours)["key"][:1]:
            raise ValueError(
                f"read_reference: the {count} of pair {name} in {file} are not the dataset's: it "
                "was made with another tokenizer, template or max_length"
            )
    both = pl.col("chosen", "rejected")
    for name in found.filter(pl.any_horizontal(~both.is_finite() | (both > 0)))["key"][:1]:
        raise ValueError(
            f"read_reference: {file} has a log-prob for pair {name} that is above 0 or not finite; "
            "log-probs are natural logarithms of probabilities, summed over a response"
        )
    logps = np.concatenate([found["chosen"].to_numpy(), found["rejected"].to_numpy()])
    return as_pair_logps(dataset, torch.from_numpy(logps))
