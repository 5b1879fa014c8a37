"""Files that outlive a run: the cache folder, and writes that are complete or absent."""

import os
import uuid
from contextlib import suppress
from pathlib import Path


def cache_folder() -> Path:
    """Return the default folder for cached tokens and reference log-probs.

    `$SAGE_SELECT_CACHE`, else `sage-select` in `$XDG_CACHE_HOME` or in `~/.cache`.
    """
    if chosen := os.environ.get("SAGE_SELECT_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sage-select"


def mark_as_used(path: Path) -> None:
    """Set a file's time of last use to now, so that eviction keeps it."""
    # a read-only cache is fine: its files just look older than they are
    with suppress(OSError):
        os.utime(path)


def partial_path(path: Path) -> Path:
    """Return a unique name to write to, until `replace_durably` renames the file to `path`."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")


def replace_durably(partial: Path, path: Path) -> None:
    """Rename a finished file to `path`, so that a crash leaves the old file or the new one."""
    flush(partial)  # content first: the new name must never point to a file with missing data
    partial.replace(path)
    flush(path.parent)


def flush(path: Path) -> None:
    """Wait until the content of a file, or the file list of a folder, is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
