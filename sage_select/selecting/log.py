"""The selection log: every decision on disk before the first update that follows from it.

One Parquet file per interval, written whole or not at all. A file that a crash cut short, or a
disk spoiled, is passed over on reading. A run that resumes before an interval decides it again and
replaces its file: what stands in the log is what the weights were trained on.
"""

from pathlib import Path
from warnings import warn

import numpy as np
import numpy.typing as npt
import polars as pl

from sage_select.pairs import CHOSEN, REFERENCE, REJECTED, PairLogps
from sage_select.selection import Selection
from sage_select.system.files import replace_durably

SCHEMA_VERSION = 2
VERSION_1 = {
    "policy_chosen": CHOSEN,
    "policy_rejected": REJECTED,
    "reference_chosen": REFERENCE + CHOSEN,
    "reference_rejected": REFERENCE + REJECTED,
}
"""What version 1 called some columns; its files are read under today's names."""


class SelectionLog:
    """A folder of decisions, one row per interval and pair.

    Columns: `schema_version`, `run`, `interval`, `step`, `progress`, `pair_id`, `row`, `score`,
    `rank` (from 1, among all candidates; null where the score did not decide), `kept`, `rule`,
    `signal`, and the evidence: `chosen_logps`, `rejected_logps`, `ref_chosen_logps`,
    `ref_rejected_logps` (nats), `chosen_tokens`, `rejected_tokens`. From these any decision can be
    made again.

    Args:
        folder: Where the log stands; made if it does not exist.

    Example:
        >>> import tempfile
        >>> SelectionLog(tempfile.mkdtemp()).read().height
        0
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._run: str | None = None  # whose decisions stand here, once somebody has looked

    def write(
        self, interval: int, selection: Selection, ids: npt.ArrayLike, *, run: str = ""
    ) -> None:
        """Put an interval's decision on disk, and return when it is there.

        Args:
            interval: The interval's number, from 0.
            selection: The decision.
            ids: [P], the pairs' stable ids, aligned with `selection.pool`.
            run: What tells this run from others, such as a digest of its plan.

        Raises:
            FileExistsError: If the folder holds decisions of another run.
        """
        self._check_run(run)
        path = self.folder / f"interval-{interval:06d}.parquet"
        partial = path.with_suffix(".partial")
        _rows(interval, selection, ids, run).write_parquet(partial)
        replace_durably(partial, path)

    def _check_run(self, run: str) -> None:
        if self._run is None:
            runs = self.read()["run"].unique().to_list()
            self._run = runs[0] if runs else run
        if self._run != run:
            raise FileExistsError(
                f"SelectionLog: {self.folder} holds the decisions of another run (other pairs, "
                "plan, schedule, batch size, score or seeds); give each run a folder of its own "
                "(with TRL, another output_dir)"
            )

    def read(self) -> pl.DataFrame:
        """All decisions, in the order in which they were made."""
        tables = [_table({})]
        for path in sorted(self.folder.glob("interval-*.parquet")):
            try:
                table = pl.read_parquet(path)
                if table["schema_version"].n_unique() != 1:
                    raise pl.exceptions.ComputeError("mixed schema versions")
            except (pl.exceptions.PolarsError, OSError) as error:
                warn(
                    f"SelectionLog: {path} cannot be read and is passed over: {error}", stacklevel=2
                )
                continue
            if (version := table["schema_version"][0]) not in (1, SCHEMA_VERSION):
                raise ValueError(
                    f"SelectionLog: {path} has schema version {version}, this version of "
                    f"sage-select reads 1 to {SCHEMA_VERSION}; update sage-select"
                )
            tables.append(table.rename(VERSION_1) if version == 1 else table)
        return pl.concat(tables)


_SCHEMA: dict[str, pl.DataType] = {
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
    return pl.DataFrame(columns, schema=_SCHEMA, nan_to_null=True)


def _rows(interval: int, selection: Selection, ids: npt.ArrayLike, run: str) -> pl.DataFrame:
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
            "chosen_tokens": _column(policy, "chosen_tokens", size),
            "rejected_tokens": _column(policy, "rejected_tokens", size),
            CHOSEN: None,  # unless something was measured
            REJECTED: None,
            REFERENCE + CHOSEN: None,
            REFERENCE + REJECTED: None,
            **({} if policy is None else policy.columns()),
            **({} if reference is None else reference.columns(REFERENCE)),
        }
    )


def _ranks(selection: Selection) -> npt.NDArray[np.int64]:
    """Rank of each candidate from 1: the kept in their order, then the dropped by their scores."""
    position = {row: i for i, row in enumerate(selection.pool.tolist())}
    kept = np.array([position[row] for row in selection.indices.tolist()], dtype=np.int64)
    dropped = np.flatnonzero(~selection.kept)
    dropped = dropped[np.argsort(-selection.scores[dropped], kind="stable")]
    ranks = np.empty(len(selection.pool), dtype=np.int64)
    ranks[np.concatenate([kept, dropped])] = np.arange(1, len(ranks) + 1)
    return ranks


def _column(logps: PairLogps | None, name: str, size: int) -> npt.NDArray[np.generic] | list[None]:
    if logps is None:
        return [None] * size
    values: npt.NDArray[np.generic] = getattr(logps, name).numpy(force=True)
    return values
