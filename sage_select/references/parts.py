"""Part files of a stored reference: written atomically, never modified, merged if many."""

import hashlib
import json
import re
import stat
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from warnings import warn

import numpy as np
import pyarrow as pa
from torch import Tensor

from sage_select.arrays import Float64Array
from sage_select.models.sequences import Keys
from sage_select.system.files import (
    mark_as_used,
    named_on_failure,
    partial_path,
    read_checked,
    replace_durably,
    written_whole,
)

WRITE_EVERY = 5.0  # seconds between parts: the most work that a kill can lose
MERGE_ABOVE = 32  # more parts than this are merged into one
ABANDONED_AFTER = 24 * 3600.0  # seconds after which the writer of an unfinished part is dead

WRITE_ATTEMPTS = 20  # of a file whose folder other processes evict at the same time

# The names of this library's files; others, such as copies, are the user's
PART = re.compile(r"part-[0-9a-f]{32}\.arrow")
PARTIAL = re.compile(r"\.(part-.+\.arrow|reference\.json(\.crc32)?)\.[0-9a-f]+\.partial")

_PART_SCHEMA = pa.schema({"key": pa.binary(16), "logp": pa.float64()})


@dataclass(frozen=True)
class Entries:
    """Log-probs by sequence key, in ascending order of the keys."""

    keys: Keys  # [E]
    logps: Float64Array  # [E]

    def look_up(self, keys: Keys) -> Float64Array:
        """Return the log-prob of each key, in the shape of `keys`; NaN if a key has no entry."""
        if not len(self.keys):
            return np.full(keys.shape, np.nan)
        places = np.searchsorted(self.keys, keys).clip(max=len(self.keys) - 1)
        return np.where(self.keys[places] == keys, self.logps[places], np.nan)


class PartWriter:
    """Context manager that buffers entries and writes them to disk in parts, every few seconds."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._keys: list[Keys] = []
        self._logps: list[Float64Array] = []
        self._written = time.monotonic()

    def __enter__(self) -> "PartWriter":
        return self

    def __exit__(self, *error: object) -> None:
        self.flush()  # also after an error: what was measured before it is valid

    def add(self, keys: Keys, logps: Tensor) -> None:
        """Add entries, and write the buffer if the last part is `WRITE_EVERY` seconds old."""
        self._keys.append(keys)
        self._logps.append(logps.numpy())
        if time.monotonic() - self._written >= WRITE_EVERY:
            self.flush()

    def flush(self) -> None:
        """Write the buffered entries as one part."""
        if self._keys:
            _write_part(self._folder, np.concatenate(self._keys), np.concatenate(self._logps))
            mark_as_used(self._folder / "reference.json")
        self._keys, self._logps, self._written = [], [], time.monotonic()


def _write_part(folder: Path, keys: Keys, logps: Float64Array) -> Path:
    """Write one part. Its name is a checksum of its content, so that corruption is detected."""
    column = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(16), len(keys), [None, pa.py_buffer(keys.tobytes())]
    )
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, _PART_SCHEMA) as writer:
        writer.write_table(pa.table([column, pa.array(logps)], schema=_PART_SCHEMA))
    content = sink.getvalue().to_pybytes()
    path = folder / f"part-{_checksum(content)}.arrow"

    def write() -> None:
        partial = partial_path(path)
        try:
            with named_on_failure(path):
                partial.write_bytes(content)
                replace_durably(partial, path)
        finally:
            partial.unlink(missing_ok=True)

    _write_into(folder, write)
    return path


def _write_into(folder: Path, write: Callable[[], None]) -> None:
    """Write a file into the folder of a reference, which another process may evict meanwhile.

    Raises:
        OSError: If it cannot be written.
    """
    for attempt in range(1, WRITE_ATTEMPTS + 1):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write()
            return
        except FileNotFoundError:
            if attempt == WRITE_ATTEMPTS:
                raise


def _read_part(path: Path) -> tuple[Keys, Float64Array] | None:
    """Read a part's entries; None if another process merged it away, or if it is corrupted."""
    reason = "its content does not match the checksum in its name"
    try:
        # opening a pipe would wait for its writer
        content = path.read_bytes() if stat.S_ISREG(path.stat().st_mode) else b""
    except FileNotFoundError:
        return None
    except OSError as error:  # an unreadable sector, a loop of links, a missing permission
        content, reason = b"", str(error)
    if path.stem != f"part-{_checksum(content)}":
        warn(
            f"ReferenceStore: {path} is corrupted ({reason}) and is skipped; its pairs are "
            "measured again. Delete the file",
            stacklevel=2,
        )
        return None
    table = pa.ipc.open_file(content).read_all()
    # the raw buffers keep keys as 16-byte strings; to_numpy would make Python objects of them
    keys = b"".join(chunk.buffers()[1].to_pybytes() for chunk in table["key"].chunks)
    return np.frombuffer(keys, "S16"), table["logp"].to_numpy()


def _checksum(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def read_parts(folder: Path) -> Entries:
    """Read all entries of a reference, one per key.

    Two processes may have measured the same sequence with different rounding. The lower log-prob is
    used then, so that every reader gets the same value whatever the order of the parts.
    """
    parts, seen = [], set[Path]()
    # list the folder again until it has no new part: entries of a part that another process merged
    # away between listing and reading are in a new one
    while unread := sorted(set(_named(folder, PART)) - seen):
        seen |= set(unread)
        parts += [part for part in map(_read_part, unread) if part is not None]
    if not parts:
        return Entries(np.empty(0, "S16"), np.empty(0))
    keys = np.concatenate([keys for keys, _ in parts])
    logps = np.concatenate([logps for _, logps in parts])
    order = np.lexsort((logps, keys))  # by key, then by log-prob
    first = np.ones(len(keys), dtype=bool)
    first[1:] = keys[order][1:] != keys[order][:-1]
    return Entries(keys[order][first], logps[order][first])


def _named(folder: Path, pattern: re.Pattern[str]) -> list[Path]:
    entries = folder.iterdir() if folder.is_dir() else ()
    return [path for path in entries if pattern.fullmatch(path.name)]


def merge_parts(folder: Path) -> None:
    """Merge the parts of a reference if there are many; delete leftovers of killed processes."""
    for path in _named(folder, PARTIAL):
        with suppress(FileNotFoundError):  # another process has just renamed it
            if time.time() - path.stat().st_mtime > ABANDONED_AFTER:
                path.unlink()
    parts = _named(folder, PART)
    if len(parts) > MERGE_ABOVE:
        entries = read_parts(folder)
        merged = _write_part(folder, entries.keys, entries.logps)
        # delete only after the merged part is durable: a crash leaves duplicates, never a gap
        for path in parts:
            if path != merged:  # a name follows from the content, so the two can be the same file
                path.unlink(missing_ok=True)


def read_description(folder: Path) -> dict[str, Any]:
    """Return the content of `reference.json`; empty, with a warning if it is there but spoiled."""
    path = folder / "reference.json"
    try:
        description = json.loads(read_checked(path))
        if isinstance(description, dict):
            return description
        reason = "it is not a mapping"
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        reason = str(error)
    warn(
        f"ReferenceStore: {path} is spoiled ({reason}), so the model and the precision of this "
        "reference are unknown until it is filled again, which writes the file anew; its log-probs "
        "have checksums of their own",
        stacklevel=3,
    )
    return {}


def write_description(folder: Path, description: dict[str, Any]) -> None:
    """Write `reference.json` with its checksum beside it."""

    def write() -> None:
        with written_whole(folder / "reference.json", checked=True) as partial:
            partial.write_text(json.dumps(description))

    _write_into(folder, write)
