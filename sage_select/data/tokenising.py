"""Tokenise a chunk of records into a table of tokens and annotations."""

import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import polars as pl
import pyarrow as pa
from jinja2 import TemplateError

from sage_select.data.annotations import annotation_series
from sage_select.data.records import (
    TOKEN_FIELDS,
    BadRecord,
    Pair,
    checked_pair,
    content_id,
    pair_id,
    shared_start,
)

ENCODE_BATCH_CHARS = 1 << 22  # characters of text passed to the tokenizer in one call

PAIR_COLUMNS = ("pair_id", "prompt_id", "source_row", "truncated")


def fields_of(table: pa.Table) -> list[str]:
    """Return the field names of a chunk's first record."""
    fields: list[str] = json.loads(table.schema.metadata[b"records"])["fields"]
    return fields


def set_aside_rows(table: pa.Table) -> tuple[int, list[tuple[int, str]]]:
    """Return the number of records in a chunk, and its set-aside rows with their reasons."""
    metadata = json.loads(table.schema.metadata[b"records"])
    return metadata["count"], [(row, reason) for row, reason in metadata["set_aside"]]


_LIST = pa.list_(pa.int32())


def make_table(rows: list[Any], tokenizer: Any, max_length: int) -> pa.Table:
    """Check, render and tokenise records into a table as described in `tokenised`."""
    reasons: dict[int, str] = {}
    pairs: dict[int, Pair] = {}
    for number, row in enumerate(rows):
        try:
            pairs[number] = checked_pair(row)
        except BadRecord as bad:
            reasons[number] = str(bad)
    tokens = _tokenise(pairs, tokenizer, max_length, reasons)
    names = {n: (pair_id(pairs[n]), content_id(pairs[n].prompt)) for n in tokens}
    return _token_table(rows, tokens, names, {n: pairs[n].scores for n in tokens}, reasons)


def table_of_tokens(rows: list[dict[str, Any]], max_length: int) -> pa.Table:
    """Make the same table from records that a trainer has tokenised into `TOKEN_FIELDS`.

    A pair's id is its field `pair_id`, or a hash of its text if the record still has it, or a hash
    of its tokens.
    """
    reasons: dict[int, str] = {}
    tokens: dict[int, _Tokens] = {}
    names: dict[int, tuple[str, str]] = {}
    for number, row in enumerate(rows):
        prompt, chosen, rejected = (list(row[name]) for name in TOKEN_FIELDS)
        sequences = [prompt + chosen, prompt + rejected]
        try:
            tokens[number] = _cut(len(prompt), *sequences, max_length=max_length)
        except BadRecord as bad:
            reasons[number] = str(bad)
            continue
        try:
            pair = checked_pair({name: row[name] for name in row if name not in TOKEN_FIELDS})
        except BadRecord:  # the text is gone or incomplete: tokens identify the pair
            pair = Pair(prompt, chosen, rejected)
        names[number] = (str(row.get("pair_id") or pair_id(pair)), content_id(pair.prompt))
    return _token_table(rows, tokens, names, dict.fromkeys(tokens), reasons)


def _token_table(
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
    for series in annotation_series([rows[number] for number in tokens]):
        columns[series.name] = series.to_arrow(compat_level=pl.CompatLevel.oldest())
    first = next((row for row in rows if isinstance(row, dict)), {})
    metadata = {
        "count": len(rows),
        "set_aside": sorted(reasons.items()),
        "fields": [str(name) for name in first],
    }
    return pa.table(columns).replace_schema_metadata({b"records": json.dumps(metadata).encode()})


class _Tokens(NamedTuple):
    prompt: list[int]
    responses: list[list[int]]
    truncated: bool  # True if a response was cut


def _tokenise(
    pairs: dict[int, Pair], tokenizer: Any, max_length: int, reasons: dict[int, str]
) -> dict[int, _Tokens]:
    """Return the tokens of each usable pair, and add the reasons of the others to `reasons`."""
    tokens: dict[int, _Tokens] = {}
    for conversational in (False, True):
        group = {n: p for n, p in pairs.items() if isinstance(p.prompt, list) is conversational}
        if not group:
            continue
        # a chat template writes special tokens and the end of a response itself
        end = None if conversational else _end_token(tokenizer)
        render = _rendered_conversation if conversational else _rendered_text
        texts: dict[int, list[str]] = {}
        for n, pair in group.items():
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
            "to the end token that the model was trained with"
        )
    return int(tokenizer.eos_token_id)


def _rendered_text(pair: Pair, tokenizer: Any) -> list[str]:
    """Return the text of the prompt, then of the prompt with each response."""
    del tokenizer  # plain text needs no rendering; both renderers have the same signature
    return [pair.prompt, *(pair.prompt + response for response in pair.responses)]


def _rendered_conversation(pair: Pair, tokenizer: Any) -> list[str]:
    """Return these texts for a conversation, rendered by the tokenizer's chat template."""
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
            text.encode()  # a lone surrogate raises here, not in the tokenizer
        return texts
    except (TemplateError, KeyError, TypeError, ValueError) as error:
        raise BadRecord("the chat template cannot render the messages") from error


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


def _split_and_cut(
    prompt: list[int], *sequences: list[int], end: int | None, max_length: int
) -> _Tokens:
    """Split sequences where the prompt's tokens end, add the end token, cut to length."""
    # a tokenizer may merge the prompt's last letters into the response's first token: the tokens
    # that all sequences share are the context, the rest is the response
    start = shared_start(prompt, *sequences)
    if start == 0:
        raise BadRecord("the prompt is empty, so the first response token has no context")
    ended = [row if end is None or row[-1] == end else [*row, end] for row in sequences]
    return _cut(start, *ended, max_length=max_length)


def _cut(start: int, *sequences: list[int], max_length: int) -> _Tokens:
    """Split sequences into prompt and responses, and cut these to length."""
    responses = [row[start:max_length] for row in sequences]
    if not all(responses):
        raise BadRecord("a response has no tokens left after truncation")
    if responses[0] == responses[-1]:
        raise BadRecord("the responses are identical after truncation")
    return _Tokens(sequences[0][:start], responses, max(map(len, sequences)) > max_length)
