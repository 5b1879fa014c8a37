"""The token cache: its folder, manifests of files already read, and eviction."""

import hashlib
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple
from warnings import warn

import pyarrow as pa

from sage_select.data.cache_files import read_names, read_table, write_names
from sage_select.data.chunks import chunk_path
from sage_select.system.files import cache_folder, user_path
from sage_select.system.identity import digest


def tokens_folder() -> Path:
    """Return the default folder of the token cache."""
    return cache_folder() / "tokens"


def evict_tokens(unused_for: float, folder: str | Path | None = None) -> tuple[int, int]:
    """Delete cached tokens that were not used for a time.

    Args:
        unused_for: Seconds since the last use.
        folder: Folder of the cache; by default `tokens_folder()`.

    Returns:
        Number of files and of bytes that were deleted.
    """
    count = freed = 0
    for file in cached_files(folder):
        with suppress(FileNotFoundError):  # another process may be evicting as well
            status = file.lstat()
            if time.time() - status.st_mtime > unused_for:
                file.unlink()
                count, freed = count + 1, freed + status.st_size
    return count, freed


def cached_files(folder: str | Path | None = None) -> Iterator[Path]:
    """Yield the files of the cache that this library has written.

    Args:
        folder: Folder of the cache; by default `tokens_folder()`.
    """
    cache = user_path(folder) if folder is not None else tokens_folder()
    for file in cache.iterdir() if cache.is_dir() else ():
        if _TOKEN_FILE.fullmatch(file.name) and not file.is_dir():
            yield file


# Tables, manifests, and partial files of both that a killed process left
_TOKEN_FILE = re.compile(r"\.?[0-9a-f]{32}\.(arrow|json)(\.[0-9a-f]+\.partial)?")


class Manifest(NamedTuple):
    """Names of the chunks of some source files, so that these need not be parsed again."""

    folder: Path
    path: Path
    files: Sequence[Path]
    state: list[tuple[int, int]]  # size and modification time of each file when it was hashed

    @classmethod
    def of(cls, folder: Path | None, files: Sequence[Path], settings: Any) -> "Manifest | None":
        """Return the manifest of these files and settings, or None without a cache or files."""
        if folder is None or not files:
            return None
        content, state = hashlib.blake2b(digest_size=16), _state(files)
        for file in files:
            with file.open("rb") as stream:
                content.update(hashlib.file_digest(stream, "blake2b").digest())
        name = digest([content.hexdigest(), [f.suffixes for f in files], settings])
        return cls(folder, folder / f"{name}.json", files, state)

    def read(self) -> list[tuple[str, pa.Table]] | None:
        """Return the chunks if all of them are still in the cache as they were written."""
        try:
            names = read_names(self.path)
        except FileNotFoundError:
            return None
        except OSError as error:
            warn(
                f"PreferenceDataset.read: {self.path} is spoiled and is made again: {error}; "
                "if this repeats, check the disk",
                stacklevel=3,
            )
            return None
        try:
            return [(name, read_table(chunk_path(self.folder, name))) for name in names] or None
        except OSError:
            return None  # reading the records again comes to the chunk, and says what is wrong

    def write(self, names: Iterable[str]) -> None:
        """Save the chunk names, if every chunk has one and no file has changed since hashing."""
        names = list(names)
        with suppress(OSError):  # without a manifest the files are parsed again, nothing worse
            if all(names) and _state(self.files) == self.state:
                write_names(names, self.path)


def _state(files: Sequence[Path]) -> list[tuple[int, int]]:
    """Return the size and modification time of each file."""
    return [(file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def writable_folder(folder: Path) -> Path | None:
    """Make a folder and return it, or warn and return None if it cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        warn(
            f"PreferenceDataset.read: tokens stay in memory, because {folder} cannot be made "
            f"({error}); pass cache=..., or set SAGE_SELECT_CACHE to a writable folder",
            stacklevel=3,
        )
        return None
    return folder
