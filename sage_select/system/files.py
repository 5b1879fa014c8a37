"""Files that outlive a run: the user's paths, writes that are complete or absent, and checksums."""

import errno
import os
import stat
import uuid
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO


def user_path(path: str | os.PathLike[str]) -> Path:
    """Return a path that a user gave: `~` is the home folder, everything else is literal.

    Hand the file to other libraries as bytes or opened, since some expand `[ ]`, `*` and `~`.

    Args:
        path: The path. A second call changes nothing.

    Example:
        >>> user_path("runs/lr=[1e-4]").as_posix()
        'runs/lr=[1e-4]'
    """
    expanded = Path(os.path.expanduser(path))  # noqa: PTH111 - "~nobody" stays, without an error
    # "./~" names a folder here: Path drops the dot, and the next call would expand what is left
    return expanded.absolute() if str(expanded).startswith("~") else expanded


def cache_folder() -> Path:
    """Return the default folder for cached tokens and reference log-probs.

    `$SAGE_SELECT_CACHE`, else `sage-select` in `$XDG_CACHE_HOME` or in `~/.cache`.
    """
    if chosen := os.environ.get("SAGE_SELECT_CACHE"):
        return user_path(chosen)
    return user_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "sage-select"


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


class SpoiledFile(OSError):
    """A file whose content is not what was written to it; the message names the file."""


def content_checksum(path: Path) -> str:
    """Return the CRC-32 checksum of a file's content, 8 hexadecimal digits, as `crc32 FILE` does.

    The file is streamed, not memory-mapped: an unreadable sector is then an error, where under a
    memory map it would end the process.
    """
    _require_file(path)
    checksum, block = 0, memoryview(bytearray(_BLOCK_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            checksum = zlib.crc32(block[:count], checksum)
    return f"{checksum:08x}"


_BLOCK_BYTES = 1 << 20


def check_content(path: Path) -> None:
    """Compare a file with the checksum that `written_whole` has put beside it.

    Call this before the content is parsed: parsers of spoiled bytes may crash the process. A file
    of an older version of this library has no checksum, and passes.

    Raises:
        SpoiledFile: If the content is not what was written.
    """
    _compare(path, content_checksum)


def check_unchanged(path: Path, call: str) -> None:
    """Compare a file that users may change with its checksum, if it has one.

    Args:
        path: The file, such as an exported table.
        call: The caller, for the error message.

    Raises:
        SpoiledFile: If the content is not what was written; it says what to do.
    """
    try:
        check_content(path)
    except SpoiledFile as error:
        raise SpoiledFile(
            f"{call}: {error}; make it again or, if you have changed it yourself, delete "
            f"{checksum_path(path)}"
        ) from None


def read_checked(path: Path) -> bytes:
    """Return the content of a file that `written_whole` has written, compared with its checksum.

    Raises:
        SpoiledFile: If the content is not what was written.
    """
    _require_file(path)
    content = path.read_bytes()
    _compare(path, lambda _: f"{zlib.crc32(content):08x}")
    return content


def _require_file(path: Path) -> None:
    if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for its writer
        raise SpoiledFile(f"{path} is spoiled: it is not a file")


def _compare(path: Path, checksum_of: Callable[[Path], str]) -> None:
    beside = checksum_path(path)
    try:
        accepted = beside.read_bytes().split()
    except FileNotFoundError:
        return
    if checksum_of(path).encode() not in accepted:
        raise SpoiledFile(
            f"{path} is spoiled: its content does not match its checksum in {beside.name}"
        )


def checksum_path(path: Path) -> Path:
    """Return the path of a file's checksum, which lies beside it."""
    return path.with_name(f"{path.name}.crc32")


@contextmanager
def written_whole(path: Path, *, checked: bool = False) -> Iterator[Path]:
    """Yield the path of a partial file to write, which becomes `path` at the end of the block.

    After an error, such as a full disk, `path` is as it was before and no partial file is left.

    Args:
        path: The file's final path.
        checked: Also write the file's checksum beside it, for `check_content`.

    Raises:
        OSError: If the file cannot be written; it names `path` and the reason.

    Example:
        >>> with written_whole(Path("notes.txt"), checked=True) as partial:  # doctest: +SKIP
        ...     partial.write_text("kept")
    """
    partial = partial_path(path)
    try:
        with named_on_failure(path):
            yield partial
            if checked:
                _add_checksum(path, content_checksum(partial))
            replace_durably(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _add_checksum(path: Path, new: str) -> None:
    """Write the checksum of the content that `path` will have, with that of its present content.

    Two files cannot be replaced at once: a crash in between must leave both contents acceptable.
    """
    accepted = [new]
    if path.exists():
        with suppress(SpoiledFile):
            check_content(path)
            accepted.append(content_checksum(path))
    with written_whole(checksum_path(path)) as partial:
        partial.write_text("".join(f"{checksum}\n" for checksum in accepted))


class Lock:
    """A locked file; the system releases it however the process ends, so no stale lock remains.

    Threads and objects of one process exclude each other, too. Where the operating system or the
    file system has no locks, it excludes nobody.
    """

    def __init__(self, file: IO[str]) -> None:
        self._file = file

    @classmethod
    def taken(cls, path: Path) -> "Lock | None":
        """Lock a file, which is created if it does not exist; None if it is locked already."""
        with named_on_failure(path):
            file = path.open("w")
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
        except (ImportError, OSError):  # no locks here: go on without
            pass
        return cls(file)

    def release(self) -> None:
        """Release the lock."""
        self._file.close()

    __del__ = release


@contextmanager
def named_on_failure(path: Path) -> Iterator[None]:
    """Name a file in the error of a write that fails, with the remedy for a full disk.

    Raises:
        OSError: Instead of an OSError of the block; of the same class, with the same errno. Instead
            of the own error of a library that found the disk full, too.
    """
    try:
        yield
    except Exception as error:
        number = getattr(error, "errno", None) or _disk_full(error)
        if number is None and not isinstance(error, OSError):
            raise
        reason = getattr(error, "strerror", None) or str(error)
        if number in DISK_FULL and _REMEDY not in reason:
            reason += _REMEDY
        kind = type(error) if isinstance(error, OSError) else OSError
        failure = kind(f"{path} cannot be written: {reason}")
        failure.errno = number
        raise failure from error


_REMEDY = (
    "; free space, or raise the quota or the limit of a file's size, and start again: what was "
    "complete before is unchanged"
)

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of a write for which there is no room."""


def _disk_full(error: Exception) -> int | None:
    """Return the errno that an error quotes, since some libraries hide it in their own errors."""
    return next((number for number in DISK_FULL if os.strerror(number) in str(error)), None)
