"""The folder of a run: where each of its files is, and who may write there."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sage_select.system.files import partial_path, replace_durably

CHECKPOINT = re.compile(r"checkpoint-(\d{8,})")


class RunFolder:
    """The files of a run, each named once.

    Args:
        path: The folder; it need not exist yet.

    Example:
        >>> RunFolder("runs/one").checkpoint(50).as_posix()
        'runs/one/checkpoint-00000050'
    """

    def __init__(self, path: "str | Path | RunFolder") -> None:
        self.path: Path = path.path if isinstance(path, RunFolder) else Path(path)
        self._held = 0

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
        """The best weights on held-out pairs, and the evaluation they won."""
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
        """Locked by the process that trains here."""
        return self.path / "lock"

    def checkpoint(self, step: int) -> Path:
        """The checkpoint after this many updates."""
        return self.path / f"checkpoint-{step:08d}"

    def checkpoints(self) -> list[Path]:
        """The checkpoints that are there, the newest first; other names are left alone."""
        found = (self.path.iterdir()) if self.path.is_dir() else ()
        named = [path for path in found if CHECKPOINT.fullmatch(path.name)]
        return sorted(named, key=checkpoint_step, reverse=True)

    def holds_a_run(self) -> bool:
        """Whether a run was begun here."""
        return self.metrics.exists() or bool(self.checkpoints())

    def write_lines(self, path: Path, records: list[dict[str, Any]]) -> None:
        """Replace a file of JSON lines, whole or not at all."""
        partial = partial_path(path)
        partial.write_text("".join(json.dumps(record) + "\n" for record in records))
        replace_durably(partial, path)

    def append_line(self, path: Path, record: dict[str, Any]) -> None:
        """Add a line to a file of JSON lines."""
        with path.open("a") as file:
            file.write(json.dumps(record) + "\n")

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Hold the folder for this process alone; released when the process ends, however it ends.

        The same object may hold it again inside.

        Raises:
            FileExistsError: If another process holds it.
        """
        if self._held:
            yield
            return
        self.path.mkdir(parents=True, exist_ok=True)
        with self.lock.open("w") as file:
            with suppress(ImportError):  # a system without these locks
                import fcntl

                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise FileExistsError(
                        f"train: another process is training in {self.path}; wait until it ends, "
                        "or use another folder"
                    ) from None
                except OSError:
                    pass  # a file system without these locks
            self._held += 1
            try:
                yield
            finally:
                self._held -= 1


def checkpoint_step(path: Path) -> int:
    """The step of a checkpoint, from its name."""
    match = CHECKPOINT.fullmatch(path.name)
    assert match is not None
    return int(match[1])
