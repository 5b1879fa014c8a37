"""List the references of a store, and delete those that are no longer needed."""

import re
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sage_select.references.parts import PART, PARTIAL, read_description, read_parts
from sage_select.system.files import cache_folder, checksum_path, user_path


def default_store() -> Path:
    """Return the folder of the default store."""
    return cache_folder() / "reference"


@dataclass(frozen=True)
class StoredReference:
    """Summary of one reference of a store.

    Attributes:
        identity: Hash that names the reference, see `ReferenceStore`.
        description: Name of the model and the settings that decide rounding, such as its dtype;
            empty if the file is missing.
        sequences: Number of stored sequences.
        size: Bytes on disk.
        used: Time of the last use, in seconds since the epoch.
    """

    identity: str
    description: dict[str, Any]
    sequences: int
    size: int
    used: float


def stored_references(folder: str | Path | None = None) -> list[StoredReference]:
    """Return the references of a store, the most recently used first."""
    root = user_path(folder) if folder is not None else default_store()
    references = []
    for place in root.iterdir() if root.is_dir() else ():
        if not _IDENTITY.fullmatch(place.name) or not place.is_dir():
            continue  # not written by this library
        stats = []
        for file in place.iterdir():
            with suppress(OSError):  # another process merged or renamed it meanwhile
                stats.append(file.lstat())
        references.append(
            StoredReference(
                identity=place.name,
                description=read_description(place),
                sequences=len(read_parts(place).keys),
                size=sum(stat.st_size for stat in stats),
                used=max((stat.st_mtime for stat in stats), default=0.0),
            )
        )
    return sorted(references, key=lambda reference: -reference.used)


_IDENTITY = re.compile(r"[0-9a-f]{32}")
_DESCRIPTION = ("reference.json", checksum_path(Path("reference.json")).name)
_OWN_FILE = re.compile("|".join([PART.pattern, PARTIAL.pattern, *map(re.escape, _DESCRIPTION)]))


def evict(
    folder: str | Path | None = None,
    *,
    identity: str | None = None,
    unused_for: float | None = None,
    max_size: int | None = None,
) -> list[StoredReference]:
    """Delete references by identity, by time since the last use, or down to a total size.

    Args:
        folder: The store; by default `reference` in the user's cache.
        identity: The reference to delete.
        unused_for: Delete references that were not used for this many seconds.
        max_size: Bytes that may remain; the least recently used references are deleted first.

    Returns:
        The deleted references.

    Raises:
        ValueError: If no criterion is given, or the store has no reference of this identity.
    """
    if identity is None and unused_for is None and max_size is None:
        raise ValueError(
            "evict: nothing to delete was given; pass identity, unused_for or max_size"
        )
    root = user_path(folder) if folder is not None else default_store()
    references = stored_references(root)
    if identity is not None and identity not in {r.identity for r in references}:
        raise ValueError(
            f"evict: {root} has no reference {identity}; `sage-select store list` lists them"
        )
    evicted, total = [], 0
    for reference in references:  # most recently used first, so that the oldest exceed max_size
        total += reference.size
        stale = unused_for is not None and time.time() - reference.used > unused_for
        over_size = max_size is not None and total > max_size
        if reference.identity == identity or stale or over_size:
            evicted.append(reference)
    for reference in evicted:
        place = root / reference.identity
        # delete only the files this library writes; users may keep files of their own beside them
        for file in place.iterdir():
            if _OWN_FILE.fullmatch(file.name):
                file.unlink(missing_ok=True)
        with suppress(OSError):  # not empty: it contains files of the user
            place.rmdir()
    return evicted
