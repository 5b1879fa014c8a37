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

from sage_select.data.tokenising import make_table
from sage_select.data.tokenizers import writes_the_date
from sage_select.system.files import mark_as_used, partial_path, replace_durably
from sage_select.system.progress_bars import progress_bar

# Part of every cache name: increase it when the content or the meaning of the tables changes
TABLE_VERSION = 3

# A chunk ends at the first of these limits; bytes are those of the records as JSON
CHUNK_ROWS = 4096
CHUNK_BYTES = 1 << 25


def tokenised(
    records: Iterable[Any],
    tokenizer: Any,
    max_length: int,
    *,
    identity: str,
    cache: Path | None,
    num_workers: int = 0,
    total: int | None = None,
    show_progress: bool | None = None,
) -> Iterator[tuple[str, pa.Table]]:
    """Yield chunks of records as tables of tokens, each with its name in the cache.

    A table has one row per usable pair: `pair_id`, `prompt_id`, `row` (in the chunk), `truncated`,
    `prompt`, `chosen`, `rejected` (lists of tokens), `between` (a list of such lists), `scores`,
    and the annotations as `input.*` or `json.*`. Its metadata holds the number of records in the
    chunk, and the rows that were set aside, with their reasons.

    Args:
        records: The records.
        tokenizer: The model's tokenizer.
        max_length: Maximum number of tokens in prompt and response together.
        identity: Fingerprint of the tokenizer, part of a chunk's name.
        cache: Folder of the tables, which are then memory-mapped; None keeps them in memory.
        num_workers: Processes that check and tokenise chunks; with 0 this process does it, and
            only the tokenizer's threads run in parallel.
        total: Number of records, if known.
        show_progress: False to hide the progress bar.
    """
    if writes_the_date(tokenizer):
        warn(
            "PreferenceDataset: the tokenizer's chat template writes today's date into every "
            "prompt (strftime_now), so tokens, log-probs and caches change every day; "
            "set tokenizer.chat_template to a template with a fixed date",
            stacklevel=2,
        )
    if cache is not None:
        cache.mkdir(parents=True, exist_ok=True)
    with progress_bar(total, "tokenising", "rows", show=show_progress) as bar:
        for name, size, table in _in_order(
            _chunks(records, f"{TABLE_VERSION} {identity} {max_length}"),
            _ChunkMaker(tokenizer, max_length, cache),
            num_workers,
        ):
            bar.update(size)
            yield name, table


def read_table(path: Path) -> pa.Table:
    """Memory-map a table of tokens: only the pages that are read take memory."""
    mark_as_used(path)
    with pa.memory_map(str(path)) as file:
        return pa.ipc.open_file(file).read_all()


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
        except TypeError:
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

    def __init__(self, tokenizer: Any, max_length: int, cache: Path | None) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.cache = cache

    def cached(self, chunk: _Chunk) -> pa.Table | None:
        """Return the table from the cache, or None if it is not there or not readable."""
        if self.cache is None or chunk.name is None:
            return None
        path = chunk_path(self.cache, chunk.name)
        try:
            return read_table(path) if path.exists() else None
        except (pa.ArrowException, OSError):
            return None  # a damaged file is made again

    def make(self, chunk: _Chunk) -> pa.Table:
        """Make the table, and write it to the cache if there is one."""
        table = make_table(chunk.rows, self.tokenizer, self.max_length)
        if self.cache is None or chunk.name is None:
            return table
        path = chunk_path(self.cache, chunk.name)
        partial = partial_path(path)
        try:
            with (
                pa.OSFile(str(partial), "wb") as file,
                pa.ipc.new_file(file, table.schema) as writer,
            ):
                writer.write_table(table)
            replace_durably(partial, path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            warn(f"tokens stay in memory, because {path} cannot be written: {error}", stacklevel=2)
            return table
        return read_table(path)


_worker_maker: _ChunkMaker | None = None


def _start_worker(maker: _ChunkMaker) -> None:
    global _worker_maker
    _worker_maker = maker


def _make_in_worker(chunk: _Chunk) -> pa.Table | None:
    """Make a chunk's table; return it only if it is not in the cache."""
    assert _worker_maker is not None
    table = _worker_maker.make(chunk)
    # the parent memory-maps the cached file: cheaper than sending the table between processes
    return table if _worker_maker.cached(chunk) is None else None


def _in_order(
    chunks: Iterator[_Chunk], maker: _ChunkMaker, num_workers: int
) -> Iterator[tuple[str, int, pa.Table]]:
    """Yield the name, size and table of each chunk, in the order of the input."""

    def table_of(chunk: _Chunk, future: "Future[pa.Table | None] | None") -> pa.Table:
        for table in (future.result() if future is not None else None, maker.cached(chunk)):
            if table is not None:
                return table
        return maker.make(chunk)

    if num_workers == 0:
        for chunk in chunks:
            yield chunk.name or "", len(chunk.rows), table_of(chunk, None)
        return
    waiting: deque[tuple[_Chunk, Future[pa.Table | None] | None]] = deque()
    # spawned, not forked: a fork would copy locks held by threads of other libraries
    with ProcessPoolExecutor(
        num_workers, get_context("spawn"), initializer=_start_worker, initargs=(maker,)
    ) as pool:
        for chunk in chunks:
            is_cached = maker.cached(chunk) is not None
            waiting.append((chunk, None if is_cached else pool.submit(_make_in_worker, chunk)))
            # a bounded queue: keeps the workers busy without holding the whole source in memory
            if len(waiting) > 2 * num_workers:
                chunk, future = waiting.popleft()
                yield chunk.name or "", len(chunk.rows), table_of(chunk, future)
        for chunk, future in waiting:
            yield chunk.name or "", len(chunk.rows), table_of(chunk, future)
