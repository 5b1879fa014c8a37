"""Files that outlive a run: where they stand, and how they are written whole or not at all."""

import os
import uuid
from contextlib import suppress
from pathlib import Path


def cache_folder() -> Path:
    """Where tokens and reference log-probs are kept, unless a call says otherwise.

    `$SAGE_SELECT_CACHE`, else `sage-select` in `$XDG_CACHE_HOME` or in `~/.cache`.
    """
    if chosen := os.environ.get("SAGE_SELECT_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sage-select"


def mark_as_used(path: Path) -> None:
    """Note that a file was of use now, so that eviction spares it; no matter if that cannot be."""
    with suppress(OSError):
        os.utime(path)


def partial_path(path: Path) -> Path:
    """A name of this process's own, to write under until `replace_durably` gives the real one."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")


def replace_durably(partial: Path, path: Path) -> None:
    """Give a finished file its name, so that after a crash there is the old file or the new one."""
    flush(partial)
    partial.replace(path)
    flush(path.parent)


def flush(path: Path) -> None:
    """Wait until a file's content, or a folder's list of files, is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
