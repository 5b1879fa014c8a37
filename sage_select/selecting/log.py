"""The selection log: every decision on disk before the first update that uses it.

One Parquet file per interval, written atomically. A file that cannot be read, because of a crash or
a failing disk, is skipped on reading. A run that resumes from before an interval selects its pairs
again and replaces its file, so the log always contains the pairs that the weights were trained on.
"""

from pathlib import Path
from warnings import warn

import numpy as np
import numpy.typing as npt
import polars as pl

from sage_select.pairs import CHOSEN, REFERENCE, REJECTED
from sage_select.selection import Selection
from sage_select.system.files import replace_durably

SCHEMA_VERSION = 2
VERSION_1_COLUMNS = {
    "policy_chosen": CHOSEN,
    "policy_rejected": REJECTED,
    "reference_chosen": REFERENCE + CHOSEN,
    "reference_rejected": REFERENCE + REJECTED,
}
"""Columns that version 1 named differently; its files are read with the current names."""


class SelectionLog:
    """A folder of decisions, with one row per interval and candidate pair.

    Columns: `schema_version`, `run`, `interval`, `step`, `progress`, `pair_id`, `row`, `score`,
    `rank` (from 1, among all candidates; null if the score did not decide), `kept`, `rule`,
    `signal`, and the evidence: `chosen_logps`, `rejected_logps`, `ref_chosen_logps`,
    `ref_rejected_logps` (nats), `chosen_tokens`, `rejected_tokens`. Any decision can be
    reproduced from these.

    Args:
        folder: The folder of the log; created if it does not exist.

    Example:
        >>> import tempfile
        >>> SelectionLog(tempfile.mkdtemp()).read().height
        0
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._run: str | None = None  # the run that the files belong to, read at the first write

    def write(
        self, interval: int, selection: Selection, ids: npt.ArrayLike, *, run: str = ""
    ) -> None:
        """Write an interval's decision to disk, and return when it is durable.

        Args:
            interval: The interval's number, from 0.
            selection: The decision.
            ids: [P], the pairs' stable ids, aligned with `selection.pool`.
            run: An identifier of the run, such as a digest of its plan.

        Raises:
            FileExistsError: If the folder contains decisions of another run.
        """
        self._check_run(run)
        path = self.folder / f"interval-{interval:06d}.parquet"
        partial = path.with_suffix(".partial")  # ignored by `read` if a crash leaves it behind
        _rows(interval, selection, ids, run).write_parquet(partial)
        replace_durably(partial, path)

    def _check_run(self, run: str) -> None:
        """Refuse to mix the decisions of two runs in one folder."""
        if self._run is None:  # once: reading all files at every write would be quadratic
            runs = self.read()["run"].unique().to_list()
            self._run = runs[0] if runs else run
        if self._run != run:
            raise FileExistsError(
                f"SelectionLog: {self.folder} contains the decisions of another run (the pairs, "
                "plan, schedule, batch size, score or a seed differ); use a separate folder for "
                "each run (with TRL, another output_dir)"
            )

    def read(self) -> pl.DataFrame:
        """Read all decisions, in the order of the intervals."""
        tables = [_table({})]  # an empty log still has its columns
        for path in sorted(self.folder.glob("interval-*.parquet")):
            try:
                table = pl.read_parquet(path)
                if table["schema_version"].n_unique() != 1:  # skipped like an unreadable file
                    raise pl.exceptions.ComputeError("mixed schema versions")
            except (pl.exceptions.PolarsError, OSError) as error:
                warn(f"SelectionLog: {path} cannot be read and is skipped: {error}", stacklevel=2)
                continue
            if (version := table["schema_version"][0]) > SCHEMA_VERSION:
                raise ValueError(
                    f"SelectionLog: {path} has schema version {version}, this version of "
                    f"sage-select reads 1 to {SCHEMA_VERSION}; update sage-select"
                )
            tables.append(table.rename(VERSION_1_COLUMNS) if version == 1 else table)
        return pl.concat(tables, how="diagonal")  # a column that an older file lacks is null


_COLUMNS: dict[str, pl.DataType] = {
    "schema_version": pl.Int32(),
    "run": pl.String(),
    "interval": pl.Int32(),
    "step": pl.Int64(),
    "progress": pl.Float64(),
    "pair_id": pl.String(),
    "row": pl.Int64(),
    "score": pl.Float64(),
    "rank": pl.Int64(),
    "kept": pl.Boolean(),
    "rule": pl.String(),
    "signal": pl.Float64(),
    CHOSEN: pl.Float64(),
    REJECTED: pl.Float64(),
    REFERENCE + CHOSEN: pl.Float64(),
    REFERENCE + REJECTED: pl.Float64(),
    "chosen_tokens": pl.Int64(),
    "rejected_tokens": pl.Int64(),
}


def _table(columns: dict[str, object]) -> pl.DataFrame:
    """Make a table of the log's schema; a missing column or None is null, as is NaN."""
    return pl.DataFrame(columns, schema=_COLUMNS, nan_to_null=True)


def _rows(interval: int, selection: Selection, ids: npt.ArrayLike, run: str) -> pl.DataFrame:
    """Make the rows of one interval, one per candidate in pool order."""
    size = len(selection.pool)
    policy, reference = selection.policy, selection.reference
    return _table(
        {
            "schema_version": np.full(size, SCHEMA_VERSION),
            "run": [run] * size,
            "interval": np.full(size, interval),
            "step": np.full(size, selection.step),
            "progress": np.full(size, selection.progress),
            "pair_id": [str(name) for name in np.asarray(ids)],
            "row": selection.pool,
            "score": selection.scores,
            "rank": _ranks(selection) if selection.rule == "score" else [None] * size,
            "kept": selection.kept,
            "rule": [selection.rule] * size,
            "signal": np.full(size, selection.signal),
            # null if the pool was not measured, because nothing could be dropped
            "chosen_tokens": None if policy is None else policy.chosen_tokens.numpy(force=True),
            "rejected_tokens": None if policy is None else policy.rejected_tokens.numpy(force=True),
            CHOSEN: None,
            REJECTED: None,
            REFERENCE + CHOSEN: None,
            REFERENCE + REJECTED: None,
            **({} if policy is None else policy.columns()),
            **({} if reference is None else reference.columns(REFERENCE)),
        }
    )


def _ranks(selection: Selection) -> npt.NDArray[np.int64]:
    """Return each candidate's rank from 1: kept pairs, best first, then dropped ones by score."""
    position = {row: i for i, row in enumerate(selection.pool.tolist())}
    # the order of the selection, not a new sort: it has already broken the ties at the cut
    kept = np.array([position[row] for row in selection.indices.tolist()], dtype=np.int64)
    dropped = np.flatnonzero(~selection.kept)
    dropped = dropped[np.argsort(-selection.scores[dropped], kind="stable")]
    ranks = np.empty(len(selection.pool), dtype=np.int64)
    ranks[np.concatenate([kept, dropped])] = np.arange(1, len(ranks) + 1)
    return ranks
