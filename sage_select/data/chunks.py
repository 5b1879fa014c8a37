"""Chunks: some thousand records each, tokenised once and cached under a hash of their content."""

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

FORMAT = 2  # of the tables; a change of what they hold or mean needs a new number


CHUNK_ROWS = 4096


CHUNK_BYTES = 1 << 25  # of records as JSON, whichever comes first


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
    """Chunks of records as tables of tokens, each with the name it has in the cache.

    A table has one row per usable pair: `pair_id`, `prompt_id`, `row` (in the chunk), `truncated`,
    `prompt`, `chosen`, `rejected` (lists of tokens), `between` (lists of them), `scores`, and the
    annotations as `input.*` or `json.*`. Its metadata says how many records the chunk had, and
    which were set aside for what reason.

    Args:
        records: The records.
        tokenizer: The model's own.
        max_length: Tokens of prompt and response together.
        identity: Fingerprint of the tokenizer, part of a chunk's name.
        cache: Folder of the tables, which are then memory-mapped; None keeps them in memory.
        num_workers: Processes that check and tokenise chunks; 0 does it here, where the
            tokenizer's own threads are all that is parallel.
        total: Number of records, where it is known.
        show_progress: False for no bar.
    """
    if writes_the_date(tokenizer):
        warn(
            "PreferenceDataset: the tokenizer's chat template writes today's date into every "
            "prompt (strftime_now), so tokens, log-probs and caches are others tomorrow; "
            "set tokenizer.chat_template to one with a fixed date",
            stacklevel=2,
        )
    if cache is not None:
        cache.mkdir(parents=True, exist_ok=True)
    with progress_bar(total, "tokenising", "rows", show=show_progress) as bar:
        for name, size, table in _in_order(
            _chunks(records, f"{FORMAT} {identity} {max_length}"),
            _ChunkMaker(tokenizer, max_length, cache),
            num_workers,
        ):
            bar.update(size)
            yield name, table


def read_table(path: Path) -> pa.Table:
    """A table of tokens, memory-mapped: what is not looked at takes no memory."""
    mark_as_used(path)
    with pa.memory_map(str(path)) as file:
        return pa.ipc.open_file(file).read_all()


def chunk_path(cache: Path, name: str) -> Path:
    """Where a chunk's table stands in the cache."""
    return cache / f"{name}.arrow"


class _Chunk(NamedTuple):
    name: str | None  # None where an annotation has no plain value, so that content has no name
    rows: list[Any]


def _chunks(records: Iterable[Any], settings: str) -> Iterator[_Chunk]:
    """Records in chunks that are cut by their own content, hence the same on every reading."""
    rows: list[Any] = []
    size, name = 0, _Name(settings)
    for record in records:
        rows.append(record)
        size += name.add(record)
        if len(rows) == CHUNK_ROWS or size >= CHUNK_BYTES:
            yield _Chunk(name.finish(), rows)
            rows, size, name = [], 0, _Name(settings)
    if rows:
        yield _Chunk(name.finish(), rows)


class _Name:
    """The name of a chunk: a hash of its records and of all that makes tokens of them."""

    def __init__(self, settings: str) -> None:
        self._hash = hashlib.blake2b(settings.encode(), digest_size=16)
        self._plain = True

    def add(self, record: Any) -> int:
        """Take a record in, and return its size in bytes."""
        try:
            text = json.dumps(record, default=_plain).encode()
        except TypeError:
            self._plain = False
            return 1000
        self._hash.update(len(text).to_bytes(8, "little"))
        self._hash.update(text)
        return len(text)

    def finish(self) -> str | None:
        return self._hash.hexdigest() if self._plain else None


def _plain(value: Any) -> Any:
    """Text for the values of tables that JSON does not know; a TypeError for all else."""
    if isinstance(value, date | datetime | time | timedelta | Decimal | bytes):
        return repr(value)
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(type(value).__name__)


class _ChunkMaker:
    """Makes the table of a chunk; picklable, so that it can be done in another process."""

    def __init__(self, tokenizer: Any, max_length: int, cache: Path | None) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.cache = cache

    def known(self, chunk: _Chunk) -> pa.Table | None:
        """The table, where it is in the cache."""
        if self.cache is None or chunk.name is None:
            return None
        path = chunk_path(self.cache, chunk.name)
        try:
            return read_table(path) if path.exists() else None
        except (pa.ArrowException, OSError):
            return None  # what a failing disk has spoiled is made again

    def make(self, chunk: _Chunk) -> pa.Table:
        """The table, made, and put into the cache where there is one."""
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
            warn(f"tokens stay in memory, since {path} cannot be written: {error}", stacklevel=2)
            return table
        return read_table(path)


_worker_maker: _ChunkMaker | None = None


def _start_worker(maker: _ChunkMaker) -> None:
    global _worker_maker
    _worker_maker = maker


def _work(chunk: _Chunk) -> pa.Table | None:
    assert _worker_maker is not None
    table = _worker_maker.make(chunk)
    return table if _worker_maker.known(chunk) is None else None  # the parent maps the file itself


def _in_order(
    chunks: Iterator[_Chunk], maker: _ChunkMaker, num_workers: int
) -> Iterator[tuple[str, int, pa.Table]]:
    def finished(chunk: _Chunk, future: "Future[pa.Table | None] | None") -> pa.Table:
        for table in (future.result() if future is not None else None, maker.known(chunk)):
            if table is not None:
                return table
        return maker.make(chunk)

    if num_workers == 0:
        for chunk in chunks:
            yield chunk.name or "", len(chunk.rows), finished(chunk, None)
        return
    waiting: deque[tuple[_Chunk, Future[pa.Table | None] | None]] = deque()
    # processes are spawned: a fork would copy locks that the threads of other libraries hold
    with ProcessPoolExecutor(
        num_workers, get_context("spawn"), initializer=_start_worker, initargs=(maker,)
    ) as pool:
        for chunk in chunks:
            known = maker.known(chunk) is not None
            waiting.append((chunk, None if known else pool.submit(_work, chunk)))
            if len(waiting) > 2 * num_workers:
                chunk, future = waiting.popleft()
                yield chunk.name or "", len(chunk.rows), finished(chunk, future)
        for chunk, future in waiting:
            yield chunk.name or "", len(chunk.rows), finished(chunk, future)
