"""The folder of a run: the path of each file, and the lock of the process that writes there."""

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sage_select.system.files import Lock, named_on_failure, user_path, written_whole
from sage_select.system.processes import Processes

CHECKPOINT = re.compile(r"checkpoint-(\d{8,})")
# What killed runs leave: unfinished checkpoints, half-deleted ones, and partial files
LEFT_BEHIND = re.compile(r"checkpoint-\d{8,}\.(partial|deleted)|\..+\.[0-9a-f]{32}\.partial")


class RunFolder:
    """The files and folders of a run.

    Args:
        path: The folder; it need not exist yet. `~` is the home folder, all else is literal.

    Example:
        >>> RunFolder("runs/one").checkpoint(50).as_posix()
        'runs/one/checkpoint-00000050'
    """

    def __init__(self, path: str | Path) -> None:
        self.path = user_path(path)
        self._holders = 0
        self._lock: Lock | None = None

    @classmethod
    def of(cls, folder: "str | Path | RunFolder") -> "RunFolder":
        """The folder at a path; a `RunFolder` itself, which may hold its lock already."""
        return folder if isinstance(folder, RunFolder) else cls(folder)

    def __repr__(self) -> str:
        return f"RunFolder({str(self.path)!r})"

    @property
    def config(self) -> Path:
        """The configuration that describes the run."""
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        """One JSON line per step."""
        return self.path / "metrics.jsonl"

    @property
    def evaluations(self) -> Path:
        """One JSON line per evaluation on held-out pairs."""
        return self.path / "evaluations.jsonl"

    @property
    def costs(self) -> Path:
        """One JSON line per interval and phase: FLOPs, tokens, seconds."""
        return self.path / "costs.jsonl"

    @property
    def selection(self) -> Path:
        """Folder of the selection log."""
        return self.path / "selection"

    @property
    def best(self) -> Path:
        """The best weights on held-out pairs, and their evaluation."""
        return self.path / "best.pt"

    @property
    def model(self) -> Path:
        """The model after the last step, with its tokenizer."""
        return self.path / "model"

    @property
    def best_model(self) -> Path:
        """The model with the best weights, with its tokenizer."""
        return self.path / "best-model"

    @property
    def lock(self) -> Path:
        """Lock file, held by the process that trains here."""
        return self.path / "lock"

    def checkpoint(self, step: int) -> Path:
        """Return the path of the checkpoint after `step` updates."""
        return self.path / f"checkpoint-{step:08d}"

    def partial_checkpoint(self, step: int) -> Path:
        """Return the path at which this checkpoint is written, before it is renamed."""
        return self.path / f"checkpoint-{step:08d}.partial"

    def checkpoints(self) -> list[Path]:
        """Return the existing checkpoints, the newest first; other names are ignored."""
        checkpoints = [path for path in self._named(CHECKPOINT) if path.is_dir()]
        return sorted(checkpoints, key=checkpoint_step, reverse=True)

    def remove_left_behind(self) -> None:
        """Delete unfinished files of killed runs; the caller holds the lock."""
        for path in self._named(LEFT_BEHIND):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)

    def _named(self, pattern: re.Pattern[str]) -> list[Path]:
        entries = self.path.iterdir() if self.path.is_dir() else ()
        return [path for path in entries if pattern.fullmatch(path.name)]

    def holds_a_run(self) -> bool:
        """Return whether a run was started here."""
        return self.metrics.exists() or bool(self.checkpoints())

    def write_lines(self, path: Path, records: list[dict[str, Any]]) -> None:
        """Replace a file of JSON lines, whole or not at all."""
        with written_whole(path) as partial:
            partial.write_text("".join(json.dumps(record) + "\n" for record in records))

    def append_line(self, path: Path, record: dict[str, Any]) -> None:
        """Append a record to a file of JSON lines."""
        with named_on_failure(path), path.open("a") as file:
            file.write(json.dumps(record) + "\n")

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Make and lock the folder for this run (a collective call; rank 0 locks).

        The lock is released on exit, even if the process is killed. The same object may lock it
        again inside the block.

        Raises:
            FileExistsError: If another process, or another loop of this one, holds the lock; on all
                ranks.
            OSError: If the folder cannot be made; on all ranks.
        """
        if self._holders == 0:
            self._take()
        self._holders += 1
        try:
            yield
        finally:
            self._holders -= 1
            if self._holders == 0 and self._lock is not None:
                self._lock.release()

    def _take(self) -> None:
        processes, refusal = Processes.all(), None
        if processes.rank == 0:
            try:
                with named_on_failure(self.path):
                    self.path.mkdir(parents=True, exist_ok=True)
                if (lock := Lock.taken(self.lock)) is None:
                    raise FileExistsError(
                        f"train: another process is training in {self.path}; wait until it ends, "
                        "or use another folder"
                    )
                self._lock = lock
            except OSError as error:
                refusal = error
        if (refusal := processes.all_gather_object(refusal)[0]) is not None:
            raise refusal  # on all ranks, so that none waits for rank 0


def checkpoint_step(path: Path) -> int:
    """Return the step of a checkpoint, from its name."""
    match = CHECKPOINT.fullmatch(path.name)
    assert match is not None
    return int(match[1])
