"""Tokenise a chunk of records into a table of tokens and annotations."""

import json
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import polars as pl
import pyarrow as pa

from sage_select.data.annotations import annotation_series
from sage_select.data.left_out import Range
from sage_select.data.reasons import BadRecord, Note
from sage_select.data.records import (
    TOKEN_FIELDS,
    Pair,
    checked_pair,
    content_id,
    pair_id,
    shared_start,
)
from sage_select.data.rendering import Rendered, Renderer, rendered_text

ENCODE_BATCH_CHARS = 1 << 22  # characters of text passed to the tokenizer in one call

SpecialTokens = Literal["allow", "set_aside"]

EXAMPLE_CHARS = 120  # of the text that shows what a note is about

PAIR_COLUMNS = ("pair_id", "prompt_id", "source_row", "truncated")


def fields_of(table: pa.Table) -> list[str]:
    """Return the field names of a chunk's first record."""
    fields: list[str] = json.loads(table.schema.metadata[b"records"])["fields"]
    return fields


def set_aside_rows(table: pa.Table) -> tuple[int, list[tuple[int, str]]]:
    """Return the number of records in a chunk, and its set-aside rows with their reasons."""
    metadata = json.loads(table.schema.metadata[b"records"])
    return metadata["count"], [(row, reason) for row, reason in metadata["set_aside"]]


class Remark(NamedTuple):
    """A note on records, with the number of rows that it is about, and the first of them."""

    note: Note
    num_rows: int
    row: int


def remarks(table: pa.Table) -> list[Remark]:
    """Return the notes on a chunk's records."""
    metadata = json.loads(table.schema.metadata[b"records"])
    return [Remark(Note(*note), count, row) for note, count, row in metadata.get("notes", ())]


_LIST = pa.list_(pa.int32())


class Tokenising(NamedTuple):
    """Everything that decides how records become tokens.

    Attributes:
        tokenizer: The model's tokenizer.
        max_length: Maximum number of tokens in prompt and response together.
        chat_template_kwargs: Options of the chat template for all records, or None.
        special_tokens: "set_aside" refuses texts that contain special tokens of the tokenizer.
    """

    tokenizer: Any
    max_length: int
    chat_template_kwargs: Mapping[str, Any] | None = None
    special_tokens: SpecialTokens = "allow"


def make_table(rows: list[Any], tokenising: Tokenising) -> pa.Table:
    """Check, render and tokenise records into a table as described in `tokenised`."""
    reasons: dict[int, str] = {}
    pairs: dict[int, Pair] = {}
    notes: dict[int, list[Note]] = {}
    special = [token for token in tokenising.tokenizer.all_special_tokens if token.strip()]
    for number, row in enumerate(rows):
        try:
            pair = checked_pair(row)
            notes[number] = [*pair.notes, *_special_tokens(pair, special, tokenising)]
            pairs[number] = pair
        except BadRecord as bad:
            reasons[number] = str(bad)
    tokens = _tokenise(pairs, tokenising, reasons, notes)
    names = {n: (pair_id(pairs[n]), content_id(pairs[n].prompt)) for n in tokens}
    scores = {n: pairs[n].scores for n in tokens}
    return _token_table(rows, tokens, names, scores, reasons, notes)


def _special_tokens(pair: Pair, special: list[str], tokenising: Tokenising) -> list[Note]:
    """Return a note if a text becomes a control token, as if the template had written it.

    Raises:
        BadRecord: If such texts are refused.
    """
    refused = tokenising.special_tokens == "set_aside"
    if isinstance(pair.prompt, str) and not refused:
        return []  # a text may have been rendered before
    texts = [
        part if isinstance(part, str) else str(part) for part in (pair.prompt, *pair.responses)
    ]
    for token in special:
        if any(token in text for text in texts):
            if refused:
                raise BadRecord(f"a text contains the special token {token}")
            return [_SPECIAL_TOKEN._replace(example=token)]
    return []


_SPECIAL_TOKEN = Note(
    "a message contains a special token, which becomes that token as if the chat template had "
    "written it; pass special_tokens='set_aside' (data.special_tokens in a configuration) to leave "
    "such rows out"
)


def table_of_tokens(rows: list[dict[str, Any]], max_length: int) -> pa.Table:
    """Make the same table from records that a trainer has tokenised into `TOKEN_FIELDS`.

    A pair's id is its field `pair_id`, or a hash of its text if the record still has it, or a hash
    of its tokens.
    """
    reasons: dict[int, str] = {}
    tokens: dict[int, _Tokens] = {}
    names: dict[int, tuple[str, str]] = {}
    for number, row in enumerate(rows):
        try:
            if not isinstance(row, dict):
                raise BadRecord("not a record")
            prompt, chosen, rejected = (_checked_tokens(name, row) for name in TOKEN_FIELDS)
            sequences = [prompt + chosen, prompt + rejected]
            tokens[number] = _cut(len(prompt), sequences, max_length=max_length)
        except BadRecord as bad:
            reasons[number] = str(bad)
            continue
        try:
            pair = checked_pair({name: row[name] for name in row if name not in TOKEN_FIELDS})
        except BadRecord:  # the text is gone or incomplete: tokens identify the pair
            pair = Pair(prompt, chosen, rejected)
        names[number] = (str(row.get("pair_id") or pair_id(pair)), content_id(pair.prompt))
    return _token_table(rows, tokens, names, dict.fromkeys(tokens), reasons, {})


def _checked_tokens(name: str, row: Mapping[str, Any]) -> list[int]:
    """Return a field's tokens, or refuse what is not a list of token ids."""
    tokens = row.get(name)
    if not isinstance(tokens, list | tuple) or not all(
        isinstance(token, int) and not isinstance(token, bool) and 0 <= token < 1 << 31
        for token in tokens
    ):
        raise BadRecord(f"{name} is not a list of token ids")
    return list(tokens)


def _token_table(
    rows: list[Any],
    tokens: "dict[int, _Tokens]",
    names: dict[int, tuple[str, str]],
    scores: Mapping[int, tuple[float, ...] | None],
    reasons: dict[int, str],
    notes: Mapping[int, list[Note]],
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
        "skipped": pa.array([t.skipped for t in tokens.values()], pa.list_(_LIST)),
        "scores": pa.array([scores[n] for n in tokens], pa.list_(pa.float64())),
    }
    for series in annotation_series([rows[number] for number in tokens]):
        columns[series.name] = series.to_arrow(compat_level=pl.CompatLevel.oldest())
    first = next((row for row in rows if isinstance(row, dict)), {})
    metadata = {
        "count": len(rows),
        "set_aside": sorted(reasons.items()),
        "notes": _counted({n: notes[n] for n in tokens if n in notes}),
        "fields": [str(name) for name in first],
    }
    return pa.table(columns).replace_schema_metadata({b"records": json.dumps(metadata).encode()})


def _counted(notes: Mapping[int, list[Note]]) -> list[Remark]:
    """Return each note once, with its first example."""
    counts = Counter(text for row in notes.values() for text in {note.text for note in row})
    first: dict[str, Remark] = {}
    for number, row in notes.items():
        for note in row:
            short = note._replace(example=note.example[:EXAMPLE_CHARS])
            first.setdefault(note.text, Remark(short, counts[note.text], number))
    return list(first.values())


class _Tokens(NamedTuple):
    prompt: list[int]
    responses: list[list[int]]
    skipped: list[list[int]]  # of each response, see `PairTable`
    truncated: bool  # True if a response was cut


def _tokenise(
    pairs: dict[int, Pair],
    tokenising: Tokenising,
    reasons: dict[int, str],
    notes: dict[int, list[Note]],
) -> dict[int, _Tokens]:
    """Return the tokens of each usable pair; add reasons of the others, and notes."""
    tokenizer = tokenising.tokenizer
    tokens: dict[int, _Tokens] = {}
    for conversational in (False, True):
        group = {n: p for n, p in pairs.items() if isinstance(p.prompt, list) is conversational}
        if not group:
            continue
        # a chat template writes special tokens and the end of a response itself
        end = None if conversational else _end_token(tokenizer)
        renderer = Renderer(tokenizer, tokenising.chat_template_kwargs)
        render = renderer.rendered if conversational else rendered_text
        rendered: dict[int, Rendered] = {}
        for n, pair in group.items():
            try:
                rendered[n] = render(pair)
            except BadRecord as bad:
                reasons[n] = str(bad)
        texts = {n: _texts_to_encode(r, tokenizer) for n, r in rendered.items()}
        for n, encoded in _encoded(texts, tokenizer, add_special_tokens=not conversational):
            try:
                if encoded is None:
                    raise BadRecord("the tokenizer cannot encode the text")
                if not conversational:
                    prompt, *sequences = (_with_one_start(ids, tokenizer) for ids in encoded)
                    ended = zip(sequences, rendered[n].sequences, strict=True)
                    encoded = [prompt, *(_ended(ids, text, end, tokenizer) for ids, text in ended)]
                tokens[n] = _split_and_cut(rendered[n], encoded, tokenising)
                notes[n] += rendered[n].notes
            except BadRecord as bad:
                reasons[n] = str(bad)
    return dict(sorted(tokens.items()))


def _end_token(tokenizer: Any) -> int:
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "PreferenceDataset: the tokenizer has no end token, so the model would not learn "
            "where a response ends; set tokenizer.eos_token (model.eos_token in a configuration) "
            "to the end token that the model was trained with"
        )
    return int(tokenizer.eos_token_id)


def _texts_to_encode(rendered: Rendered, tokenizer: Any) -> list[str]:
    """Return the prompt, the sequences, and unless the tokenizer tells where each token ends, each
    sequence up to each bound of the model's turns."""
    texts = [rendered.prompt, *rendered.sequences]
    if not tokenizer.is_fast:
        for text, turns in zip(rendered.sequences, rendered.turns, strict=True):
            texts += [text[:bound] for bound in _bounds(turns)]
    return texts


def _bounds(turns: list[Range] | None) -> list[int]:
    return [bound for turn in turns or () for bound in turn]


def _token_bounds(
    text: str,
    turns: list[Range] | None,
    tokens: list[int],
    starts: Iterator[list[int]],
    tokenizer: Any,
) -> list[int]:
    """Return the bounds of the model's turns in tokens: of one across a bound, the place before."""
    bounds = _bounds(turns)
    if not bounds:
        return []
    if not tokenizer.is_fast:
        return [shared_start(next(starts), tokens) for _ in bounds]
    encoded = tokenizer(
        text,
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        verbose=False,
    )
    ends = [end for _, end in encoded["offset_mapping"]]
    return [bisect_right(ends, bound) for bound in bounds]


def _encoded(
    texts: dict[int, list[str]], tokenizer: Any, *, add_special_tokens: bool
) -> Iterator[tuple[int, list[list[int]] | None]]:
    """Yield the tokens of each row's texts, or None if the tokenizer cannot encode them.

    Texts are encoded a few megabytes at a time: fast tokenizers run a batch in parallel.
    """
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
        if size >= ENCODE_BATCH_CHARS or position == len(texts) - 1:
            yield from _encoded_batch({m: texts[m] for m in batch}, tokenizer, options)
            batch, size = [], 0


def _encoded_batch(
    texts: dict[int, list[str]], tokenizer: Any, options: dict[str, bool]
) -> Iterator[tuple[int, list[list[int]] | None]]:
    try:
        ids = tokenizer([text for row in texts.values() for text in row], **options)["input_ids"]
    except Exception:  # tokenizers raise errors of any type; one bad row must not stop the others
        if len(texts) == 1:
            yield from ((n, None) for n in texts)
        else:
            for n, row in texts.items():
                yield from _encoded_batch({n: row}, tokenizer, options)
        return
    encoded = iter(ids)
    for n, row in texts.items():
        yield n, [next(encoded) for _ in row]


def _with_one_start(tokens: list[int], tokenizer: Any) -> list[int]:
    """Return the tokens of a text with one start token, if text and tokenizer both write one."""
    start = getattr(tokenizer, "bos_token_id", None)
    return tokens[1:] if start is not None and tokens[:2] == [start, start] else tokens


def _ended(tokens: list[int], text: str, end: int | None, tokenizer: Any) -> list[int]:
    """Return the tokens of a text with the end token, unless its last word is the end token."""
    if end is None or tokens[-1:] == [end] or text.rstrip().endswith(tokenizer.eos_token):
        return tokens
    return [*tokens, end]


def _split_and_cut(rendered: Rendered, encoded: list[list[int]], tokenising: Tokenising) -> _Tokens:
    """Split sequences where the prompt's tokens end, find the model's turns, cut to length."""
    count = len(rendered.sequences)
    prompt, sequences, starts = encoded[0], encoded[1 : count + 1], iter(encoded[count + 1 :])
    # a tokenizer may merge the prompt's last letters into the response's first token: the tokens
    # that all sequences share are the context, the rest is the response
    start = shared_start(prompt, *sequences)
    if start == 0 and prompt and not any(rendered.turns):
        raise BadRecord("the prompt's tokens merge with the responses', so no token is the context")
    skipped = []
    for text, turns, sequence in zip(rendered.sequences, rendered.turns, sequences, strict=True):
        places = _token_bounds(text, turns, sequence, starts, tokenising.tokenizer)
        # between the turns, and before the first one
        skipped.append([start, *places[:-1]] if places else [])
        if places:  # what follows the last turn is neither scored nor the context of anything
            del sequence[places[-1] :]
    if sequences[0] == sequences[-1] and rendered.notes:
        raise BadRecord(
            "the responses are identical after the chat template, which leaves out a part of them"
        )
    return _cut(start, sequences, skipped, max_length=tokenising.max_length)


def _cut(
    start: int,
    sequences: list[list[int]],
    skipped: list[list[int]] | None = None,
    *,
    max_length: int,
) -> _Tokens:
    """Split sequences into prompt and responses, and cut these to length."""
    if start == 0:
        raise BadRecord("the prompt is empty, so the first response token has no context")
    responses, cut_ranges = [], []
    for sequence, ranges in zip(sequences, skipped or [[]] * len(sequences), strict=True):
        bounds = [min(bound, max_length) for bound in ranges]
        # without the empty ranges, and without one at the end, where nothing follows
        pairs = [(a, b) for a, b in zip(bounds[::2], bounds[1::2], strict=True) if a < b]
        end = min(len(sequence), max_length)
        if pairs and pairs[-1][1] == end:
            end = pairs.pop()[0]
        responses.append(sequence[start:end])
        cut_ranges.append([bound for pair in pairs for bound in pair])
    truncated = max(map(len, sequences)) > max_length
    if not all(responses):
        raise BadRecord(
            "a response has no tokens left after truncation" if truncated else "a response is empty"
        )
    if responses[0] == responses[-1] and cut_ranges[0] == cut_ranges[-1]:
        when = "after truncation" if truncated else "as tokens"
        raise BadRecord(f"the responses are identical {when}")
    return _Tokens(sequences[0][:start], responses, cut_ranges, truncated)
