"""Chunks of a few thousand records, tokenised once and cached under a hash of their content."""

import hashlib
import json
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple
from warnings import warn

import pyarrow as pa

from sage_select.data.cache_files import read_table, write_table
from sage_select.data.tokenising import Tokenising, make_table
from sage_select.data.tokenizers import writes_the_date
from sage_select.system.progress_bars import progress_bar

# Part of every cache name: increase it when the content or the meaning of the tables changes
TABLE_VERSION = 4

# A chunk ends at the first of these limits; bytes are those of the records as JSON
CHUNK_ROWS = 4096
CHUNK_BYTES = 1 << 25


def tokenised(
    records: Iterable[Any],
    tokenising: Tokenising,
    *,
    identity: str,
    cache: Path | None,
    num_workers: int = 0,
    total: int | None = None,
    show_progress: bool | None = None,
) -> Iterator[tuple[str, pa.Table]]:
    """Yield chunks of records as tables of tokens, each with its name in the cache.

    A table has one row per usable pair: `pair_id`, `prompt_id`, `row` (in the chunk), `truncated`,
    `prompt`, `chosen`, `rejected` (lists of tokens), `between` (a list of such lists), `skipped`
    (of each response a list of ranges that are not scored), `scores`, and the annotations as
    `input.*` or `json.*`. Its metadata holds the number of records in the chunk, the rows that were
    set aside, with their reasons, and notes on the others.

    Args:
        records: The records.
        tokenising: Tokenizer and settings.
        identity: Fingerprint of tokenizer and settings, part of a chunk's name.
        cache: Folder of the tables, which are then memory-mapped; None keeps them in memory.
        num_workers: Processes that check and tokenise chunks; with 0 this process does it, and
            only the tokenizer's threads run in parallel.
        total: Number of records, if known.
        show_progress: False to hide the progress bar.
    """
    if writes_the_date(tokenising.tokenizer):
        warn(
            "PreferenceDataset: the tokenizer's chat template writes today's date into every "
            "prompt (strftime_now), so tokens, log-probs and caches change every day; "
            "set tokenizer.chat_template to a template with a fixed date",
            stacklevel=2,
        )
    with progress_bar(total, "tokenising", "rows", show=show_progress) as bar:
        for name, size, table in _in_order(
            _chunks(records, f"{TABLE_VERSION} {identity}"),
            _ChunkMaker(tokenising, cache),
            num_workers,
        ):
            bar.update(size)
            yield name, table


def chunk_path(cache: Path, name: str) -> Path:
    """Return the path of a chunk's table in the cache."""
    return cache / f"{name}.arrow"


class _Chunk(NamedTuple):
    name: str | None  # None if a value has no JSON form: the content cannot be hashed or cached
    rows: list[Any]


def _chunks(records: Iterable[Any], settings: str) -> Iterator[_Chunk]:
    """Yield chunks of records, cut by their content alone and so equal on every read."""
    rows: list[Any] = []
    size, content_hash = 0, _ContentHash(settings)
    for record in records:
        rows.append(record)
        size += content_hash.add(record)
        if len(rows) == CHUNK_ROWS or size >= CHUNK_BYTES:
            yield _Chunk(content_hash.name(), rows)
            rows, size, content_hash = [], 0, _ContentHash(settings)
    if rows:
        yield _Chunk(content_hash.name(), rows)


class _ContentHash:
    """Hash of a chunk's records and of all settings that decide their tokens."""

    def __init__(self, settings: str) -> None:
        self._hash = hashlib.blake2b(settings.encode(), digest_size=16)
        self._hashable = True

    def add(self, record: Any) -> int:
        """Add a record to the hash and return its size in bytes."""
        try:
            text = json.dumps(record, default=_as_json_value).encode()
        except (TypeError, ValueError, RecursionError):  # no JSON form, circular, or too deep
            self._hashable = False
            return 1000  # a guess: only the chunk's size depends on it
        # the length separates records: differently divided texts must not have equal hashes
        self._hash.update(len(text).to_bytes(8, "little"))
        self._hash.update(text)
        return len(text)

    def name(self) -> str | None:
        """Return the chunk's name, or None if a record could not be hashed."""
        return self._hash.hexdigest() if self._hashable else None


def _as_json_value(value: Any) -> Any:
    """Return a JSON form of table values that JSON lacks; raise TypeError for anything else."""
    if isinstance(value, date | datetime | time | timedelta | Decimal | bytes):
        return repr(value)
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(type(value).__name__)


class _ChunkMaker:
    """Maker of chunk tables, picklable so that worker processes can use it."""

    def __init__(self, tokenising: Tokenising, cache: Path | None) -> None:
        self.tokenising = tokenising
        self.cache = cache

    def cached(self, chunk: _Chunk) -> pa.Table | None:
        """Return the table from the cache, or None if it is not there or not as it was written."""
        if self.cache is None or chunk.name is None:
            return None
        path = chunk_path(self.cache, chunk.name)
        try:
            return read_table(path)
        except FileNotFoundError:
            return None
        except OSError as error:
            warn(
                f"PreferenceDataset: {path} is spoiled and is made again: {error}; "
                "if this repeats, check the disk",
                stacklevel=2,
            )
            return None

    def make(self, chunk: _Chunk) -> pa.Table:
        """Make the table, and write it to the cache if there is one."""
        table = make_table(chunk.rows, self.tokenising)
        on_disk = self.cached(chunk) if self._write(chunk, table) else None
        return table if on_disk is None else on_disk

    def make_in_worker(self, chunk: _Chunk) -> pa.Table | None:
        """Make the table; return it only if it is not in the cache."""
        table = make_table(chunk.rows, self.tokenising)
        # the parent memory-maps the cached file: cheaper than sending the table between processes
        return None if self._write(chunk, table) else table

    def _write(self, chunk: _Chunk, table: pa.Table) -> bool:
        """Write the table to the cache; return False if there is none, or it is not writable."""
        if self.cache is None or chunk.name is None:
            return False
        try:
            write_table(table, chunk_path(self.cache, chunk.name))
        except OSError as error:
            warn(
                f"PreferenceDataset: tokens stay in memory, because {self.cache} cannot be "
                f"written: {error.strerror or error}; pass cache=..., or set SAGE_SELECT_CACHE to "
                "a writable folder",
                stacklevel=2,
            )
            return False
        return True


_worker_maker: _ChunkMaker | None = None


def _start_worker(maker: _ChunkMaker) -> None:
    global _worker_maker
    _worker_maker = maker


def _make_in_worker(chunk: _Chunk) -> pa.Table | None:
    assert _worker_maker is not None
    return _worker_maker.make_in_worker(chunk)


def _in_order(
    chunks: Iterator[_Chunk], maker: _ChunkMaker, num_workers: int
) -> Iterator[tuple[str, int, pa.Table]]:
    """Yield the name, size and table of each chunk, in the order of the input."""
    if num_workers == 0:
        for chunk in chunks:
            table = maker.cached(chunk)
            yield chunk.name or "", len(chunk.rows), maker.make(chunk) if table is None else table
        return

    def finished(chunk: _Chunk, table: "pa.Table | Future[pa.Table | None]") -> pa.Table:
        result = table.result() if isinstance(table, Future) else table
        if result is None:  # the worker has written it to the cache
            result = maker.cached(chunk)
        return maker.make(chunk) if result is None else result

    waiting: deque[tuple[_Chunk, pa.Table | Future[pa.Table | None]]] = deque()
    # spawned, not forked: a fork would copy locks held by threads of other libraries
    with ProcessPoolExecutor(
        num_workers, get_context("spawn"), initializer=_start_worker, initargs=(maker,)
    ) as pool:
        for chunk in chunks:
            table = maker.cached(chunk)
            waiting.append((chunk, pool.submit(_make_in_worker, chunk) if table is None else table))
            # a bounded queue: keeps the workers busy without holding the whole source in memory
            if len(waiting) > 2 * num_workers:
                chunk, entry = waiting.popleft()
                yield chunk.name or "", len(chunk.rows), finished(chunk, entry)
        for chunk, entry in waiting:
            yield chunk.name or "", len(chunk.rows), finished(chunk, entry)
