"""The folder of a run: the path of each file, and the lock of the process that writes there."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sage_select.system.files import partial_path, replace_durably

CHECKPOINT = re.compile(r"checkpoint-(\d{8,})")  # excludes the .partial folders of killed runs


class RunFolder:
    """The files and folders of a run.

    Args:
        path: The folder; it need not exist yet.

    Example:
        >>> RunFolder("runs/one").checkpoint(50).as_posix()
        'runs/one/checkpoint-00000050'
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._held = 0

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

    def checkpoints(self) -> list[Path]:
        """Return the existing checkpoints, the newest first; files with other names are ignored."""
        entries = (self.path.iterdir()) if self.path.is_dir() else ()
        checkpoints = [path for path in entries if CHECKPOINT.fullmatch(path.name)]
        return sorted(checkpoints, key=checkpoint_step, reverse=True)

    def holds_a_run(self) -> bool:
        """Return whether a run was started here."""
        return self.metrics.exists() or bool(self.checkpoints())

    def write_lines(self, path: Path, records: list[dict[str, Any]]) -> None:
        """Replace a file of JSON lines, whole or not at all."""
        partial = partial_path(path)
        partial.write_text("".join(json.dumps(record) + "\n" for record in records))
        replace_durably(partial, path)

    def append_line(self, path: Path, record: dict[str, Any]) -> None:
        """Append a record to a file of JSON lines."""
        with path.open("a") as file:
            file.write(json.dumps(record) + "\n")

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Lock the folder for this process; the lock is released on exit, even if it is killed.

        The same object may lock it again inside the block.

        Raises:
            FileExistsError: If another process holds the lock.
        """
        if self._held:
            yield
            return
        self.path.mkdir(parents=True, exist_ok=True)
        with self.lock.open("w") as file:
            # flock, since the system releases it however the process ends: no stale lock remains.
            with suppress(ImportError):  # no fcntl on this operating system: train without a lock
                import fcntl

                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise FileExistsError(
                        f"train: another process is training in {self.path}; wait until it ends, "
                        "or use another folder"
                    ) from None
                except OSError:
                    pass  # the file system has no locks: train without one
            self._held += 1
            try:
                yield
            finally:
                self._held -= 1


def checkpoint_step(path: Path) -> int:
    """Return the step of a checkpoint, from its name."""
    match = CHECKPOINT.fullmatch(path.name)
    assert match is not None
    return int(match[1])
