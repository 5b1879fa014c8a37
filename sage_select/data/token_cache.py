"""The cache of tokens: manifests of files that were read before, and deleting what is old."""

import hashlib
import json
import re
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple
from warnings import warn

import pyarrow as pa

from sage_select.data.chunks import chunk_path, read_table
from sage_select.system.files import cache_folder, mark_as_used, partial_path, replace_durably
from sage_select.system.identity import digest


def tokens_folder() -> Path:
    """Where tokens are kept unless a call says otherwise."""
    return cache_folder() / "tokens"


def evict_tokens(unused_for: float, folder: str | Path | None = None) -> tuple[int, int]:
    """Delete tokens that were unused for so many seconds; files and bytes that went."""
    place = Path(folder) if folder is not None else tokens_folder()
    count = freed = 0
    for file in place.iterdir() if place.is_dir() else ():
        if not _TOKEN_FILE.fullmatch(file.name):
            continue  # somebody else's
        with suppress(FileNotFoundError):
            known = file.stat()
            if time.time() - known.st_mtime > unused_for:
                file.unlink()
                count, freed = count + 1, freed + known.st_size
    return count, freed


_TOKEN_FILE = re.compile(r"\.?[0-9a-f]{32}\.(arrow|json)(\.[0-9a-f]+\.partial)?")


class Manifest(NamedTuple):
    """Which chunks a file was cut into, so that it need not be read again."""

    folder: Path
    path: Path
    files: Sequence[Path]
    state: list[tuple[int, int]]  # of the files when they were hashed

    @classmethod
    def of(cls, folder: Path | None, files: Sequence[Path], settings: Any) -> "Manifest | None":
        if folder is None or not files:
            return None
        content, state = hashlib.blake2b(digest_size=16), _state(files)
        for file in files:
            with file.open("rb") as stream:
                content.update(hashlib.file_digest(stream, "blake2b").digest())
        name = digest([content.hexdigest(), [f.suffixes for f in files], settings])
        return cls(folder, folder / f"{name}.json", files, state)

    def read(self) -> list[tuple[str, pa.Table]] | None:
        """The chunks, where all of them are still in the cache."""
        try:
            names = json.loads(self.path.read_text())
            mark_as_used(self.path)
            return [(name, read_table(chunk_path(self.folder, name))) for name in names] or None
        except (OSError, ValueError, TypeError, pa.ArrowException):
            return None

    def write(self, names: Iterable[str]) -> None:
        """Remember the chunks, where every one has a name and no file has changed meanwhile."""
        names = list(names)
        if not all(names) or _state(self.files) != self.state:
            return
        with suppress(OSError):  # without it the file is read again next time, no more
            partial = partial_path(self.path)
            partial.write_text(json.dumps(names))
            replace_durably(partial, self.path)


def _state(files: Sequence[Path]) -> list[tuple[int, int]]:
    """What changes when a file is written."""
    return [(file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def writable_folder(folder: Path) -> Path | None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        warn(
            f"PreferenceDataset.read: tokens stay in memory, since {folder} cannot be made "
            f"({error}); pass cache=..., or set SAGE_SELECT_CACHE to a folder that can be written",
            stacklevel=3,
        )
        return None
    return folder
