"""Tokenising: records, some thousand at a time, to tables of tokens that are kept by content."""

import hashlib
import json
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple
from warnings import warn

import polars as pl
import pyarrow as pa
from jinja2 import TemplateError

from sage_select.data.records import (
    TEXT_FIELDS,
    BadRecord,
    Pair,
    checked_pair,
    content_id,
    pair_id,
    shared_start,
)
from sage_select.data.tokenizers import writes_the_date
from sage_select.system.files import mark_as_used, partial_path, replace_durably
from sage_select.system.progress_bars import progress_bar

FORMAT = 2  # of the tables; a change of what they hold or mean needs a new number
CHUNK_ROWS = 4096
CHUNK_BYTES = 1 << 25  # of records as JSON, whichever comes first
ENCODE_BYTES = 1 << 22  # of text handed to the tokenizer in one call
INPUT = "input."  # what the names of annotation columns start with
INPUT_AS_JSON = "json."  # the same of those whose values have no common type: they are JSON text

OWN_COLUMNS = ("pair_id", "prompt_id", "source_row", "truncated")


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


def fields_of(table: pa.Table) -> list[str]:
    """The fields of a chunk's first record."""
    fields: list[str] = json.loads(table.schema.metadata[b"records"])["fields"]
    return fields


def set_aside_rows(table: pa.Table) -> tuple[int, list[tuple[int, str]]]:
    """How many records a chunk had, and which of them were set aside for what reason."""
    known = json.loads(table.schema.metadata[b"records"])
    return known["count"], [(row, reason) for row, reason in known["set_aside"]]


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


# One chunk


_LIST = pa.list_(pa.int32())


def make_table(rows: list[Any], tokenizer: Any, max_length: int) -> pa.Table:
    """Check, render and tokenise records: a table as `tokenised` describes it."""
    reasons: dict[int, str] = {}
    pairs: dict[int, Pair] = {}
    for number, row in enumerate(rows):
        try:
            pairs[number] = checked_pair(row)
        except BadRecord as bad:
            reasons[number] = str(bad)
    tokens = _tokenise(pairs, tokenizer, max_length, reasons)
    names = {n: (pair_id(pairs[n]), content_id(pairs[n].prompt)) for n in tokens}
    return _table(rows, tokens, names, {n: pairs[n].scores for n in tokens}, reasons)


TOKEN_FIELDS = ("prompt_ids", "chosen_ids", "rejected_ids")


def table_of_tokens(rows: list[dict[str, Any]], max_length: int) -> pa.Table:
    """The same of records that a trainer has tokenised, with `TOKEN_FIELDS`.

    A pair's id is its field `pair_id`, or the hash of its text where that is still there, or else
    of its tokens.
    """
    reasons: dict[int, str] = {}
    tokens: dict[int, _Tokens] = {}
    names: dict[int, tuple[str, str]] = {}
    for number, row in enumerate(rows):
        prompt, chosen, rejected = (list(row[name]) for name in TOKEN_FIELDS)
        full = [prompt + chosen, prompt + rejected]
        try:
            tokens[number] = _cut(len(prompt), *full, max_length=max_length)
        except BadRecord as bad:
            reasons[number] = str(bad)
            continue
        try:
            pair = checked_pair({name: row[name] for name in row if name not in TOKEN_FIELDS})
        except BadRecord:
            pair = Pair(prompt, chosen, rejected)
        names[number] = (str(row.get("pair_id") or pair_id(pair)), content_id(pair.prompt))
    return _table(rows, tokens, names, dict.fromkeys(tokens), reasons)


def _table(
    rows: list[Any],
    tokens: "dict[int, _Tokens]",
    names: dict[int, tuple[str, str]],
    scores: Mapping[int, tuple[float, ...] | None],
    reasons: dict[int, str],
) -> pa.Table:
    columns = {
        "pair_id": pa.array([names[n][0] for n in tokens], pa.string()),
        "prompt_id": pa.array([names[n][1] for n in tokens], pa.string()),
        "row": pa.array(list(tokens), pa.int64()),
        "truncated": pa.array([t.truncated for t in tokens.values()], pa.bool_()),
        "prompt": pa.array([t.prompt for t in tokens.values()], _LIST),
        "chosen": pa.array([t.responses[0] for t in tokens.values()], _LIST),
        "rejected": pa.array([t.responses[-1] for t in tokens.values()], _LIST),
        "between": pa.array([t.responses[1:-1] for t in tokens.values()], pa.list_(_LIST)),
        "scores": pa.array([scores[n] for n in tokens], pa.list_(pa.float64())),
    }
    for series in _annotations([rows[number] for number in tokens]):
        columns[series.name] = series.to_arrow(compat_level=pl.CompatLevel.oldest())
    first = next((row for row in rows if isinstance(row, dict)), {})
    known = {
        "count": len(rows),
        "set_aside": sorted(reasons.items()),
        "fields": [str(name) for name in first],
    }
    return pa.table(columns).replace_schema_metadata({b"records": json.dumps(known).encode()})


def _annotations(rows: list[dict[str, Any]]) -> list[pl.Series]:
    ours = {*TEXT_FIELDS, *TOKEN_FIELDS}
    names = dict.fromkeys(name for row in rows for name in row if name not in ours)
    return [_series(str(name), [row.get(name) for row in rows]) for name in names]


def _series(name: str, values: list[Any]) -> pl.Series:
    kinds = {type(value) for value in values if value is not None}
    mixed = kinds == {int, float} and all(map(_is_exact, values))
    try:
        series = pl.Series(
            f"{INPUT}{name}", values, dtype=pl.Float64 if mixed else None, strict=not mixed
        )
    except (TypeError, OverflowError, UnicodeError, pl.exceptions.PolarsError):
        return _json_series(name, values)
    if series.dtype in (pl.Object, pl.Int128):
        return _json_series(name, values)
    # of lists and records the first few decide the type, and what does not fit it is lost
    if series.dtype.is_nested() and series.to_list() != values:
        return _json_series(name, values)
    return series


def _is_exact(value: Any) -> bool:
    """Whether a number is the same as a 64-bit float."""
    return not isinstance(value, int) or abs(value) <= 1 << 53


def _json_series(name: str, values: list[Any]) -> pl.Series:
    return pl.Series(f"{INPUT_AS_JSON}{name}", as_json(values), dtype=pl.String)


def as_json(values: Iterable[Any]) -> list[str | None]:
    """Values as JSON text, and None as None."""
    return [None if value is None else json.dumps(value, default=str) for value in values]


class _Tokens(NamedTuple):
    prompt: list[int]
    responses: list[list[int]]
    truncated: bool  # whether a response was cut


def _tokenise(
    pairs: dict[int, Pair], tokenizer: Any, max_length: int, reasons: dict[int, str]
) -> dict[int, _Tokens]:
    """Tokens of each usable pair; the others' reasons are added."""
    tokens: dict[int, _Tokens] = {}
    for conversational in (False, True):
        kind = {n: p for n, p in pairs.items() if isinstance(p.prompt, list) is conversational}
        if not kind:
            continue
        end = None if conversational else _end_token(tokenizer)
        render = _rendered_conversation if conversational else _rendered_text
        texts: dict[int, list[str]] = {}
        for n, pair in kind.items():
            try:
                texts[n] = render(pair, tokenizer)
            except BadRecord as bad:
                reasons[n] = str(bad)
        for n, encoded in _encoded(texts, tokenizer, add_special_tokens=not conversational):
            try:
                if encoded is None:
                    raise BadRecord("the tokenizer cannot encode the text")
                tokens[n] = _split_and_cut(*encoded, end=end, max_length=max_length)
            except BadRecord as bad:
                reasons[n] = str(bad)
    return dict(sorted(tokens.items()))


def _end_token(tokenizer: Any) -> int:
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "PreferenceDataset: the tokenizer has no end token, so the model would not learn "
            "where a response ends; set tokenizer.eos_token (model.eos_token in a configuration) "
            "to the one it was trained with"
        )
    return int(tokenizer.eos_token_id)


def _rendered_text(pair: Pair, tokenizer: Any) -> list[str]:
    """The prompt's text, and prompt and response's text for each response."""
    del tokenizer  # plain text is tokenised as it is
    return [pair.prompt, *(pair.prompt + response for response in pair.responses)]


def _rendered_conversation(pair: Pair, tokenizer: Any) -> list[str]:
    """The same of a conversation, by the tokenizer's chat template."""
    if tokenizer.chat_template is None:
        raise ValueError(
            "PreferenceDataset: the pairs are conversations, but the tokenizer has no chat "
            "template; use the instruction-tuned model's tokenizer, or set "
            "tokenizer.chat_template (model.chat_template in a configuration)"
        )
    open_ended = pair.prompt[-1]["role"] == "assistant"  # the response continues this message
    options = {"tokenize": False} | ({} if pair.tools is None else {"tools": pair.tools})
    try:
        texts = [
            tokenizer.apply_chat_template(
                pair.prompt,
                add_generation_prompt=not open_ended,
                continue_final_message=open_ended,
                **options,
            ),
            *(
                tokenizer.apply_chat_template(pair.prompt + response, **options)
                for response in pair.responses
            ),
        ]
        for text in texts:
            text.encode()
        return texts
    except (TemplateError, KeyError, TypeError, ValueError) as error:
        raise BadRecord("the chat template refuses the messages") from error


def _encoded(
    texts: dict[int, list[str]], tokenizer: Any, *, add_special_tokens: bool
) -> Iterator[tuple[int, list[list[int]] | None]]:
    """Tokens of each row's texts, some megabytes of text at a time; None where it cannot be."""
    options = {
        "add_special_tokens": add_special_tokens,
        "return_attention_mask": False,
        "verbose": False,
    }
    batch: list[int] = []
    size = 0
    for position, (n, row) in enumerate(texts.items()):
        batch.append(n)
        size += sum(map(len, row))
        if size >= ENCODE_BYTES or position == len(texts) - 1:
            yield from _encoded_batch({m: texts[m] for m in batch}, tokenizer, options)
            batch, size = [], 0


def _encoded_batch(
    texts: dict[int, list[str]], tokenizer: Any, options: dict[str, bool]
) -> Iterator[tuple[int, list[list[int]] | None]]:
    try:
        found = tokenizer([text for row in texts.values() for text in row], **options)["input_ids"]
    except Exception:  # a tokenizer's own, of no particular kind: one row must not stop the others
        if len(texts) == 1:
            yield from ((n, None) for n in texts)
        else:
            for n, row in texts.items():
                yield from _encoded_batch({n: row}, tokenizer, options)
        return
    encoded = iter(found)
    for n, row in texts.items():
        yield n, [next(encoded) for _ in row]


def _split_and_cut(
    prompt: list[int], *full: list[int], end: int | None, max_length: int
) -> _Tokens:
    """Split full sequences where the prompt's own tokens end, add the end token, cut to length."""
    # a tokenizer may merge the prompt's last letters into the response's first token: what all
    # share is the context, the rest is the response
    start = shared_start(prompt, *full)
    if start == 0:
        raise BadRecord("the prompt is empty, so the first response token has no context")
    ended = [row if end is None or row[-1] == end else [*row, end] for row in full]
    return _cut(start, *ended, max_length=max_length)


def _cut(start: int, *full: list[int], max_length: int) -> _Tokens:
    """Prompt and responses of full sequences, the responses cut to length."""
    responses = [row[start:max_length] for row in full]
    if not all(responses):
        raise BadRecord("nothing is left of a response after truncation")
    if responses[0] == responses[-1]:
        raise BadRecord("the responses are identical after truncation")
    return _Tokens(full[0][:start], responses, max(map(len, full)) > max_length)
