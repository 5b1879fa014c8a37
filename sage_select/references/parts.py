"""Parts of a reference on disk: entries by key, written whole, never changed, merged when many."""

import hashlib
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from warnings import warn

import numpy as np
import pyarrow as pa
from torch import Tensor

from sage_select.arrays import Float64Array
from sage_select.models.sequences import Keys
from sage_select.system.files import mark_as_used, partial_path, replace_durably

WRITE_EVERY = 5.0  # seconds between parts: what a kill can lose
MERGE_ABOVE = 32  # parts of one reference, before they are merged into one
ABANDONED = 24 * 3600.0  # seconds after which an unfinished part is some killed process's

_SCHEMA = pa.schema({"key": pa.binary(16), "logp": pa.float64()})


@dataclass(frozen=True)
class Entries:
    """Entries by ascending key."""

    keys: Keys  # [E]
    logps: Float64Array  # [E]

    def look_up(self, keys: Keys) -> Float64Array:
        """The log-prob of each key, in its shape; NaN where it is not known."""
        if not len(self.keys):
            return np.full(keys.shape, np.nan)
        places = np.searchsorted(self.keys, keys).clip(max=len(self.keys) - 1)
        return np.where(self.keys[places] == keys, self.logps[places], np.nan)


class PartWriter:
    """Puts entries on disk every few seconds, in parts."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._keys: list[Keys] = []
        self._logps: list[Float64Array] = []
        self._written = time.monotonic()

    def __enter__(self) -> "PartWriter":
        return self

    def __exit__(self, *error: object) -> None:
        self.flush()  # what was measured before an error is worth keeping

    def add(self, keys: Keys, logps: Tensor) -> None:
        """Take entries in, and put them on disk if it is time to."""
        self._keys.append(keys)
        self._logps.append(logps.numpy())
        if time.monotonic() - self._written >= WRITE_EVERY:
            self.flush()

    def flush(self) -> None:
        """Put on disk what was taken in."""
        if self._keys:
            _write_part(self._folder, np.concatenate(self._keys), np.concatenate(self._logps))
            mark_as_used(self._folder / "reference.json")
        self._keys, self._logps, self._written = [], [], time.monotonic()


def _write_part(folder: Path, keys: Keys, logps: Float64Array) -> Path:
    """One part, named by its content, so that a spoiled one is known."""
    column = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(16), len(keys), [None, pa.py_buffer(keys.tobytes())]
    )
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, _SCHEMA) as writer:
        writer.write_table(pa.table([column, pa.array(logps)], schema=_SCHEMA))
    content = sink.getvalue().to_pybytes()
    path = folder / f"part-{_checksum(content)}.arrow"
    folder.mkdir(parents=True, exist_ok=True)  # somebody may have evicted it
    partial = partial_path(path)
    partial.write_bytes(content)
    replace_durably(partial, path)
    return path


def _read_part(path: Path) -> tuple[Keys, Float64Array] | None:
    """A part's entries; None where it is gone, since somebody merged it, or spoiled."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    if path.stem != f"part-{_checksum(content)}":
        warn(
            f"ReferenceStore: {path} is not what was written and is passed over; delete it, its "
            "pairs are measured again",
            stacklevel=2,
        )
        return None
    table = pa.ipc.open_file(content).read_all()
    keys = b"".join(chunk.buffers()[1].to_pybytes() for chunk in table["key"].chunks)
    return np.frombuffer(keys, "S16"), table["logp"].to_numpy()


def _checksum(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def read_parts(folder: Path) -> Entries:
    """All entries of a reference; of one that stands in several parts, always the same one."""
    parts, seen = [], set[Path]()
    while fresh := sorted(set(folder.glob("part-*.arrow")) - seen):
        seen |= set(fresh)  # looked again: what vanished meanwhile stands merged in a new part
        parts += [part for part in map(_read_part, fresh) if part is not None]
    if not parts:
        return Entries(np.empty(0, "S16"), np.empty(0))
    keys = np.concatenate([keys for keys, _ in parts])
    logps = np.concatenate([logps for _, logps in parts])
    order = np.lexsort((logps, keys))
    first = np.ones(len(keys), dtype=bool)
    first[1:] = keys[order][1:] != keys[order][:-1]
    return Entries(keys[order][first], logps[order][first])


def merge_parts(folder: Path) -> None:
    """One part for many, and no leftovers of killed processes."""
    for path in folder.glob(".*.partial"):
        with suppress(FileNotFoundError):  # just finished by another process
            if time.time() - path.stat().st_mtime > ABANDONED:
                path.unlink()
    parts = list(folder.glob("part-*.arrow"))
    if len(parts) > MERGE_ABOVE:
        entries = read_parts(folder)
        merged = _write_part(folder, entries.keys, entries.logps)
        for path in parts:
            if path != merged:
                path.unlink(missing_ok=True)
