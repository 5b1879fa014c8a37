"""Files of the token cache. Each ends with its checksum, verified before anything else is read."""

import json
import os
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path

import pyarrow as pa

from sage_select.system.files import SpoiledFile, mark_as_used, partial_path, replace_durably

# In the file itself, not beside it: a rename then replaces content and checksum at once, and
# processes that write the same chunk, or evict it, cannot leave one without the other.
# CRC-32, since the threat is bit rot and not an attacker: it finds every flip of one or two bits,
# and of all other damage it misses one case in four billion. It is several times as fast as the
# standard library's cryptographic hashes, and so the whole of a large cache can be verified.
_TRAILER = b"\ncrc32 %08x\n"
_TRAILER_BYTES = 16

_BLOCK_BYTES = 1 << 18  # stays in the processor's cache between reading and summing


def write_table(table: pa.Table, path: Path) -> None:
    """Write a table of tokens, complete or not at all.

    Raises:
        OSError: If it cannot be written.
    """
    with (
        _finished(path) as partial,
        pa.OSFile(str(partial), "wb") as file,
        pa.ipc.new_file(file, table.schema) as writer,
    ):
        writer.write_table(table)


def read_table(path: Path) -> pa.Table:
    """Verify and memory-map a table of tokens: only the pages that are used stay in memory.

    Raises:
        FileNotFoundError: If there is no such file.
        SpoiledFile: If the content is not what was written.
        OSError: If the file cannot be read.
    """
    size = _verified_size(path)
    try:
        with pa.memory_map(str(path)) as file:
            table = pa.ipc.open_file(file, footer_offset=size).read_all()
    except pa.ArrowException as error:  # another program has just replaced the file
        raise SpoiledFile(f"{path} is not a table of tokens: {error}") from error
    mark_as_used(path)
    return table


def write_names(names: list[str], path: Path) -> None:
    """Write the names of chunks, complete or not at all.

    Raises:
        OSError: If they cannot be written.
    """
    with _finished(path) as partial:
        partial.write_text(json.dumps(names))


def read_names(path: Path) -> list[str]:
    """Verify and read the names of chunks.

    Raises:
        FileNotFoundError: If there is no such file.
        SpoiledFile: If the content is not what was written.
        OSError: If the file cannot be read.
    """
    size = _verified_size(path)
    with path.open("rb") as file:
        names: list[str] = json.loads(file.read(size))
    mark_as_used(path)
    return names


@contextmanager
def _finished(path: Path) -> Iterator[Path]:
    """Yield a partial file to write, which gets its checksum and becomes `path` at the end."""
    partial = partial_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)  # it may have been deleted meanwhile
        yield partial
        with FileIO(partial, "r+") as file:
            trailer = _trailer(file, os.fstat(file.fileno()).st_size, path.name)
        with partial.open("ab") as end:
            end.write(trailer)
        replace_durably(partial, path)
    finally:
        with suppress(OSError):  # an error that left the partial file is the one to report
            partial.unlink()


def _verified_size(path: Path) -> int:
    """Verify a file's checksum and return the number of bytes before it.

    The file is streamed in constant memory. It is read rather than memory-mapped: an unreadable
    sector is then an error, where under a memory map it would end the process.
    """
    if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for its writer
        raise SpoiledFile(f"{path} is not a file")
    with FileIO(path) as file:
        size = os.fstat(file.fileno()).st_size - _TRAILER_BYTES
        if size < 0 or _trailer(file, size, path.name) != file.read(_TRAILER_BYTES):
            raise SpoiledFile(f"the content of {path} does not match its checksum")
    return size


def _trailer(file: FileIO, size: int, name: str) -> bytes:
    """Return the trailer for a file's first `size` bytes, and leave the position there."""
    # the name is part of the content: a good file in another's place is noticed as well
    checksum = zlib.crc32(name.encode())
    block = memoryview(bytearray(min(size, _BLOCK_BYTES)))
    while size and (count := file.readinto(block[:size])):
        checksum = zlib.crc32(block[:count], checksum)
        size -= count
    return _TRAILER % checksum
