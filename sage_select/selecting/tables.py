"""Tables of decisions: one selection, candidate by candidate, and two runs side by side."""

from typing import Any

import numpy as np
import polars as pl

from sage_select.data.dataset import PreferenceDataset
from sage_select.pairs import REFERENCE
from sage_select.selecting.log import SelectionLog
from sage_select.selection import Selection


def decisions(selection: Selection, dataset: PreferenceDataset) -> pl.DataFrame:
    """One row per candidate: `row`, `source_row`, `pair_id`, `score`, `kept`, `weight` (0 where it
    was dropped) and the log-probs it was decided by."""
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
    """Where two runs of the same plan kept different pairs, interval by interval.

    Whole runs on different numbers of processes, hosts or devices differ by rounding, which adds
    up; pairs near the cut may then fall on either side.

    Args:
        one: The log of a run.
        other: The log of another.

    Returns:
        One row per interval that both have: `interval`, `kept`, `flipped` (pairs that `one` kept
        and `other` dropped; as many went the other way), and `distance`: how far the flipped
        pairs' scores were from the cut at most, as a share of it; null where none flipped or the
        scores did not decide.

    Raises:
        ValueError: If an interval has other candidates in the two.

    Example:
        >>> import tempfile
        >>> log = SelectionLog(tempfile.mkdtemp())
        >>> flips_of_logs(log, log).height
        0
    """
    ours, theirs = one.read(), other.read()
    shared = set(ours["interval"]) & set(theirs["interval"])
    ours, theirs = (log.filter(pl.col("interval").is_in(shared)) for log in (ours, theirs))
    keys = ["interval", "pair_id"]
    both = ours.join(theirs, on=keys, how="full", coalesce=True, suffix="_other")
    alone = both.filter(pl.col("kept").is_null() | pl.col("kept_other").is_null())
    for interval in alone["interval"].sort()[:1]:
        raise ValueError(
            f"flips: the two runs have other candidates in interval {interval}; compare runs of "
            "the same pairs, plan and seed"
        )
    decided = pl.col("rule") == "score"
    cut = pl.col("score").filter(pl.col("kept") & decided).min()
    gone = pl.col("kept") & ~pl.col("kept_other")
    moved = pl.col("kept") != pl.col("kept_other")
    return (
        both.group_by("interval")
        .agg(
            pl.col("kept").sum(),
            gone.sum().alias("flipped"),
            ((pl.col("score").filter(moved & decided) - cut) / cut).abs().max().alias("distance"),
        )
        .sort("interval")
    )
