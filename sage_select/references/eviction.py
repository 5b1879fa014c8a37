"""What a store holds, and deleting what is no longer needed."""

import json
import re
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sage_select.references.parts import read_parts
from sage_select.system.files import cache_folder


def default_store() -> Path:
    """Where stores stand unless a call says otherwise."""
    return cache_folder() / "reference"


@dataclass(frozen=True)
class StoredReference:
    """One reference of a store, for people.

    Attributes:
        identity: Its name.
        description: What it is: the model's name, its dtype and path.
        sequences: Entries.
        size: Bytes on disk.
        used: When it was last used, in seconds since the epoch.
    """

    identity: str
    description: dict[str, Any]
    sequences: int
    size: int
    used: float


def stored_references(folder: str | Path | None = None) -> list[StoredReference]:
    """The references of a store, the most recently used first."""
    root = Path(folder) if folder is not None else default_store()
    found = []
    for place in root.iterdir() if root.is_dir() else ():
        if not _IDENTITY.fullmatch(place.name) or not place.is_dir():
            continue  # somebody else's
        states = []
        for file in place.iterdir():
            with suppress(FileNotFoundError):  # merged or finished meanwhile
                states.append(file.stat())
        description = {}
        with suppress(OSError, ValueError):
            description = json.loads((place / "reference.json").read_text())
        found.append(
            StoredReference(
                identity=place.name,
                description=description,
                sequences=len(read_parts(place).keys),
                size=sum(state.st_size for state in states),
                used=max((state.st_mtime for state in states), default=0.0),
            )
        )
    return sorted(found, key=lambda reference: -reference.used)


_IDENTITY = re.compile(r"[0-9a-f]{32}")


def evict(
    folder: str | Path | None = None,
    *,
    identity: str | None = None,
    unused_for: float | None = None,
    max_size: int | None = None,
) -> list[StoredReference]:
    """Delete references: one by its name, those unused for long, or the oldest above a size.

    Args:
        folder: The store.
        identity: The one to delete.
        unused_for: Seconds.
        max_size: Bytes that may stay; the least recently used go first.

    Returns:
        What was deleted.

    Raises:
        ValueError: If nothing says what to delete, or there is no reference of this identity.
    """
    if identity is None and unused_for is None and max_size is None:
        raise ValueError("evict: say what to delete: identity, unused_for or max_size")
    root = Path(folder) if folder is not None else default_store()
    references = stored_references(root)
    if identity is not None and identity not in {r.identity for r in references}:
        raise ValueError(f"evict: {root} has no reference {identity}")
    going, total = [], 0
    for reference in references:  # the most recently used first
        total += reference.size
        stale = unused_for is not None and time.time() - reference.used > unused_for
        above = max_size is not None and total > max_size
        if reference.identity == identity or stale or above:
            going.append(reference)
    for reference in going:
        place = root / reference.identity
        for pattern in ("part-*.arrow", ".*.partial", "reference.json"):
            for file in place.glob(pattern):
                file.unlink(missing_ok=True)
        with suppress(OSError):  # what else stands there is somebody else's
            place.rmdir()
    return going
