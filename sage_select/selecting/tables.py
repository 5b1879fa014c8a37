"""Tables of decisions: one selection by candidate, and the differences between two runs."""

from typing import Any

import numpy as np
import polars as pl

from sage_select.data.dataset import PreferenceDataset
from sage_select.pairs import REFERENCE
from sage_select.selecting.log import SelectionLog
from sage_select.selection import Selection


def decisions(selection: Selection, dataset: PreferenceDataset) -> pl.DataFrame:
    """Return a table of a selection with one row per candidate.

    Columns: `row`, `source_row`, `pair_id`, `score`, `kept`, `weight` (1 if kept, 0 if dropped) and
    the log-probs that the scores were computed from.
    """
    pool = dataset.take(selection.pool)
    table: dict[str, Any] = {
        "row": selection.pool,
        "source_row": pool.column("source_row"),
        "pair_id": pool.column("pair_id"),
        "score": selection.scores,
        "kept": selection.kept,
        "weight": selection.kept.astype(np.float64),
    }
    for prefix, logps in (("", selection.policy), (REFERENCE, selection.reference)):
        if logps is not None:
            table |= logps.columns(prefix)
    return pl.DataFrame(table, nan_to_null=True)


def flips_of_logs(one: SelectionLog, other: SelectionLog) -> pl.DataFrame:
    """Count the pairs that two runs of the same plan decided differently, by interval.

    Rounding differs between numbers of processes, hosts and devices and accumulates over a run;
    pairs near the cut can then be kept by one run and dropped by the other.

    Args:
        one: The log of the first run.
        other: The log of the second run.

    Returns:
        One row per interval that both logs contain: `interval`, `kept`, `flipped` (pairs that `one`
        kept and `other` dropped; the same number flipped in the opposite direction), and
        `distance`, the largest distance of a flipped pair's score in `one` from the cut, relative
        to the cut; null if no pair flipped or the scores did not decide. All three are null for an
        interval whose file cannot be read in one of the logs: nothing is known of its pairs.

    Raises:
        ValueError: If an interval has different candidates in the two logs.

    Example:
        >>> import tempfile
        >>> log = SelectionLog(tempfile.mkdtemp())
        >>> flips_of_logs(log, log).height
        0
    """
    first, second = one.read(), other.read()
    # a run may not have reached the other's last intervals yet
    shared = set(first["interval"]) & set(second["interval"])
    unreadable = sorted((set(one.intervals()) & set(other.intervals())) - shared)
    first, second = (table.filter(pl.col("interval").is_in(shared)) for table in (first, second))
    keys = ["interval", "pair_id"]
    both = first.join(second, on=keys, how="full", coalesce=True, suffix="_other")
    unmatched = both.filter(pl.col("kept").is_null() | pl.col("kept_other").is_null())
    for interval in unmatched["interval"].sort()[:1]:
        raise ValueError(
            f"flips: the two runs have different candidates in interval {interval}; compare runs "
            "of the same pairs, plan and seed"
        )
    # only scored pools have a cut: not those kept whole, or at random
    by_score = pl.col("rule") == "score"
    cut = pl.col("score").filter(pl.col("kept") & by_score).min()
    only_first = pl.col("kept") & ~pl.col("kept_other")
    flipped = pl.col("kept") != pl.col("kept_other")
    counts = both.group_by("interval").agg(
        pl.col("kept").sum(),
        only_first.sum().alias("flipped"),
        ((pl.col("score").filter(flipped & by_score) - cut) / cut).abs().max().alias("distance"),
    )
    unknown = pl.DataFrame({"interval": unreadable}, schema_overrides={"interval": pl.Int32})
    return pl.concat([counts, unknown], how="diagonal").sort("interval")
