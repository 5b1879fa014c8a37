"""The selection log: every decision on disk before the first update that uses it.

One Parquet file per interval, written atomically, with a checksum beside it. A file that was
damaged, by a failing disk or another program, is named and skipped on reading: its decision cannot
be made again, as the weights have moved on. A run that resumes from before an interval selects its
pairs again and replaces its file, so the log always contains the pairs that the weights were
trained on.
"""

import io
import re
from collections.abc import Iterator
from pathlib import Path
from warnings import warn
from weakref import WeakValueDictionary

import numpy as np
import numpy.typing as npt
import polars as pl

from sage_select.pairs import CHOSEN, REFERENCE, REJECTED
from sage_select.selection import Selection
from sage_select.system.files import Lock, read_checked, user_path, written_whole

SCHEMA_VERSION = 2
VERSION_1_COLUMNS = {
    "policy_chosen": CHOSEN,
    "policy_rejected": REJECTED,
    "reference_chosen": REFERENCE + CHOSEN,
    "reference_rejected": REFERENCE + REJECTED,
}
"""Columns that version 1 named differently; its files are read with the current names."""

_FILE = re.compile(r"interval-(\d{6,})\.parquet")
# Partial files of killed runs
_LEFT_BEHIND = re.compile(rf"\.{_FILE.pattern}(\.crc32)?\.[0-9a-f]{{32}}\.partial")

_locks: WeakValueDictionary[Path, Lock] = WeakValueDictionary()
"""Locks that this process holds, by folder; shared by all logs of a folder, and freed with them."""


class SelectionLog:
    """A folder of decisions, with one row per interval and candidate pair.

    Columns: `schema_version`, `run`, `interval`, `step`, `progress`, `pair_id`, `row`, `score`,
    `rank` (from 1, among all candidates; null if the score did not decide), `kept`, `rule`,
    `signal`, and the evidence: `chosen_logps`, `rejected_logps`, `ref_chosen_logps`,
    `ref_rejected_logps` (nats), `chosen_tokens`, `rejected_tokens`. Any decision can be
    reproduced from these.

    Args:
        folder: The folder of the log; created if it does not exist. `~` is the home folder, all
            else is literal. A process that writes locks it until it drops the log or ends.

    Example:
        >>> import tempfile
        >>> SelectionLog(tempfile.mkdtemp()).read().height
        0
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = user_path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._run: str | None = None  # the run that the files belong to, read at the first write
        self._lock: Lock | None = None  # taken at the first write

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
            FileExistsError: If the folder contains decisions of another run, or another process
                writes there.
            OSError: If the file cannot be written, such as for a full disk.
        """
        self._hold()
        self._check_run(run)
        content = io.BytesIO()  # a path would be expanded: a "*" or "~" in it is meant literally
        _rows(interval, selection, ids, run).write_parquet(content)
        with written_whole(self.folder / f"interval-{interval:06d}.parquet", checked=True) as file:
            file.write_bytes(content.getbuffer())

    def _hold(self) -> None:
        """Lock the folder against other processes; the system releases a killed one's lock."""
        if self._lock is not None:
            return
        folder = self.folder.resolve()
        self._lock = _locks.get(folder) or Lock.taken(folder / "lock")
        if self._lock is None:
            raise FileExistsError(
                f"SelectionLog: another process is writing to {self.folder}; wait until it ends, "
                "or use another folder"
            )
        _locks[folder] = self._lock
        for path in self.folder.iterdir():
            if _LEFT_BEHIND.fullmatch(path.name):
                path.unlink(missing_ok=True)

    def _check_run(self, run: str) -> None:
        """Refuse to mix the decisions of two runs in one folder."""
        if self._run is None:  # once, from one file: all belong to one run, and they may be many
            tables = (table for _, table in self._tables(["run", *_IDENTITY]))
            self._run = next((table["run"][0] for table in tables), run)
        if self._run != run:
            raise FileExistsError(
                f"SelectionLog: {self.folder} contains the decisions of another run (the pairs, "
                "plan, schedule, batch size, score or a seed differ); use a separate folder for "
                "each run (with TRL, another output_dir)"
            )

    def intervals(self) -> list[int]:
        """Return the intervals that the log has a file of, readable or not, in their order.

        Example:
            >>> import tempfile
            >>> SelectionLog(tempfile.mkdtemp()).intervals()
            []
        """
        # names of others, such as of a copy, are no part of the log
        matches = (_FILE.fullmatch(path.name) for path in self.folder.iterdir())
        return sorted(int(match[1]) for match in matches if match)

    def read(self) -> pl.DataFrame:
        """Read all decisions, in the order of the intervals.

        A damaged file is skipped with a warning that names it; `intervals` counts it. Files of
        older versions have no checksum and are read as they are.

        Raises:
            ValueError: If a file was written by a later version.
        """
        tables = [_table({}), *(table for _, table in self._tables())]
        return pl.concat(tables, how="diagonal")  # a column that an older file lacks is null

    def _tables(self, columns: list[str] | None = None) -> Iterator[tuple[int, pl.DataFrame]]:
        """Yield the readable intervals and their tables, with all columns or only these."""
        for interval in self.intervals():
            path = self.folder / f"interval-{interval:06d}.parquet"
            try:
                table = _parsed(read_checked(path), interval, columns)
            except _LaterVersion as error:
                raise ValueError(
                    f"SelectionLog: {path} has schema version {error.args[0]}, this version of "
                    f"sage-select reads 1 to {SCHEMA_VERSION}; update sage-select"
                ) from None
            # parsers of damaged bytes raise errors of any class; the panic of one is no Exception
            except (Exception, pl.exceptions.PanicException) as error:
                reason = str(error).removeprefix(f"{path} is spoiled: ")
                warn(f"SelectionLog: {path} cannot be read and is skipped: {reason}", stacklevel=3)
                continue
            yield interval, table


class _LaterVersion(Exception):
    """A file of a later schema version, which is its argument."""


def _parsed(content: bytes, interval: int, columns: list[str] | None) -> pl.DataFrame:
    """Parse the file of an interval, with the current names, and check what it claims to be."""
    table = pl.read_parquet(io.BytesIO(content), columns=columns)
    if any(table[name].n_unique() != 1 for name in _IDENTITY):
        raise ValueError("it mixes intervals or schema versions, or has no rows")
    if (version := table["schema_version"][0]) > SCHEMA_VERSION:
        raise _LaterVersion(version)
    if table["interval"][0] != interval:
        raise ValueError(f"it contains interval {table['interval'][0]}")
    if version == 1:
        table = table.rename(VERSION_1_COLUMNS, strict=columns is None)
    for name, kind in table.schema.items():
        if name in _COLUMNS and kind != _COLUMNS[name]:
            raise ValueError(f"its column {name} has the type {kind}, not {_COLUMNS[name]}")
    return table


_IDENTITY = ["schema_version", "interval"]

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
