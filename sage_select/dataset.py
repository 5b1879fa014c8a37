"""Preference pairs on disk and in memory: read, checked, tokenised once, known by content."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl
from jinja2 import TemplateError
from tqdm.auto import tqdm

from sage_select.hashing import Int64Array, hash_order
from sage_select.records import BadRecord, Pair, checked_pair, content_id, shared_start
from sage_select.rows import checked_rows

TOKENISE_AT_ONCE = 1024  # pairs handed to the tokenizer in one call

Int32Array = npt.NDArray[np.int32]


class TokenSequence(NamedTuple):
    """One response in its context: prompt and response tokens, and where the response starts."""

    tokens: Int32Array
    response_start: int


class _Ragged(NamedTuple):
    """Rows of different lengths, flat: row i is `values[offsets[i] : offsets[i + 1]]`."""

    values: Int32Array
    offsets: Int64Array

    def row(self, i: int) -> Int32Array:
        return self.values[self.offsets[i] : self.offsets[i + 1]]

    @property
    def lengths(self) -> Int64Array:
        return np.diff(self.offsets)

    @classmethod
    def pack(cls, rows: Sequence[Sequence[int]]) -> "_Ragged":
        lengths = np.array([len(row) for row in rows], dtype=np.int64)
        values = np.fromiter((token for row in rows for token in row), np.int32, lengths.sum())
        return cls(values, np.concatenate([[0], np.cumsum(lengths)]))


@dataclass(frozen=True, eq=False)
class PreferenceDataset:
    """Usable preference pairs, tokenised, with their annotations; or some rows of such a set.

    A pair's row number is its position among the usable pairs, and stays the same in every view
    that `take` returns. Its `pair_id` is a hash of its text, the same in any file and any order.

    Attributes:
        index: int64 [P], the dataset rows in this view.
        annotations: One row per pair of the whole set: `pair_id`, `prompt_id`, `source_row` (its
            row in what was read), `truncated` (whether a response was cut) and every column of the
            input but prompt, chosen and rejected.
        set_aside: Rows that cannot be used: `source_row` and `reason`.
        max_length: Tokens of prompt and response together; longer ones were cut at the end.

    Example:
        >>> from transformers import AutoTokenizer  # doctest: +SKIP
        >>> tokenizer = AutoTokenizer.from_pretrained("Qwen/Qwen2.5-0.5B")  # doctest: +SKIP
        >>> dataset = PreferenceDataset.read(
        ...     "pairs.parquet", tokenizer=tokenizer, max_length=4096
        ... )  # doctest: +SKIP
    """

    index: Int64Array
    annotations: pl.DataFrame
    set_aside: pl.DataFrame
    max_length: int
    _prompts: _Ragged
    _chosen: _Ragged
    _rejected: _Ragged

    @classmethod
    def read(
        cls,
        path: str | Path,
        *,
        tokenizer: Any,
        max_length: int,
        on_bad: Literal["set_aside", "error"] = "set_aside",
    ) -> "PreferenceDataset":
        """Read a JSON Lines (`.jsonl`, `.ndjson`) or Parquet file of pairs.

        Args:
            path: The file.
            tokenizer: The model's own tokenizer, with its chat template for conversational pairs.
            max_length: Tokens of prompt and response together, at least 2.
            on_bad: "set_aside" keeps unusable rows apart, with their reasons; "error" refuses them.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If its ending is unknown, or no pair in it can be used.
        """
        path = Path(path)
        if not path.exists():
            raise FileNotFoundError(
                f"PreferenceDataset.read: no file {path}; for a dataset on a hub, load it with "
                "datasets.load_dataset and pass it to PreferenceDataset.from_records"
            )
        readers = {".jsonl": pl.read_ndjson, ".ndjson": pl.read_ndjson, ".parquet": pl.read_parquet}
        if path.suffix not in readers:
            raise ValueError(
                f"PreferenceDataset.read: cannot read {path.name}; known endings are "
                f"{', '.join(readers)}; for others, pass a list of dicts to from_records"
            )
        if path.suffix == ".parquet":
            records: Any = pl.read_parquet(path)
        else:  # line by line: one odd row must not decide the types of all others
            with path.open(encoding="utf-8-sig") as lines:
                records = [_parse(line, path, n) for n, line in enumerate(lines) if line.strip()]
        return cls.from_records(records, tokenizer=tokenizer, max_length=max_length, on_bad=on_bad)

    @classmethod
    def from_records(
        cls,
        records: Any,
        *,
        tokenizer: Any,
        max_length: int,
        on_bad: Literal["set_aside", "error"] = "set_aside",
    ) -> "PreferenceDataset":
        """Take pairs from a list of dicts, a polars table or a `datasets.Dataset`.

        Each record has `chosen` and `rejected`, and `prompt` or not: where it is missing, the
        prompt is what both responses start with. All three are strings, or lists of messages
        `{"role", "content"}`, to which the tokenizer's chat template is applied. Other fields
        become annotations.

        Tokens: prompt and response are tokenised together and split where the prompt's own tokens
        end. A plain response ends with the tokenizer's end token; a conversational one ends as its
        template ends it. Sequences longer than `max_length` are cut at the end. Response tokens are
        counted after that, and this one count serves log-probs and L (Eq. 8) alike.

        Args:
            records: The pairs.
            tokenizer: The model's own tokenizer.
            max_length: Tokens of prompt and response together, at least 2.
            on_bad: "set_aside" keeps unusable rows apart, with their reasons; "error" refuses them.

        Raises:
            TypeError: If the records are of no known kind.
            ValueError: If no pair can be used, or, with `on_bad="error"`, if one cannot.
        """
        if max_length < 2:
            raise ValueError(f"PreferenceDataset: max_length must be at least 2, got {max_length}")
        if on_bad not in ("set_aside", "error"):
            raise ValueError(
                f"PreferenceDataset: on_bad must be set_aside or error, got {on_bad!r}"
            )
        rows = _as_dicts(records)
        reasons: dict[int, str] = {}
        pairs: dict[int, Pair] = {}
        seen: set[str] = set()
        for number, row in enumerate(rows):
            try:
                pair = checked_pair(row)
                if (pair_id := content_id(pair)) in seen:
                    raise BadRecord("duplicate pair")
                seen.add(pair_id)
                pairs[number] = pair
            except BadRecord as bad:
                reasons[number] = str(bad)
        tokens = _tokenise(pairs, tokenizer, max_length, reasons)
        if reasons and on_bad == "error":
            number = min(reasons)
            raise ValueError(
                f"PreferenceDataset: {len(reasons)} of {len(rows)} rows cannot be used, the first "
                f"is row {number}: {reasons[number]}; mend them, or pass on_bad='set_aside'"
            )
        if not tokens:
            raise ValueError(
                f"PreferenceDataset: none of the {len(rows)} rows can be used: "
                f"{dict(Counter(reasons.values()))}"
            )
        return cls(
            index=np.arange(len(tokens)),
            annotations=_annotations(rows, pairs, tokens),
            set_aside=pl.DataFrame(
                sorted(reasons.items()),
                schema={"source_row": pl.Int64, "reason": pl.String},
                orient="row",
            ),
            max_length=max_length,
            _prompts=_Ragged.pack([prompt for prompt, *_ in tokens.values()]),
            _chosen=_Ragged.pack([chosen for _, chosen, _, _ in tokens.values()]),
            _rejected=_Ragged.pack([rejected for _, _, rejected, _ in tokens.values()]),
        )

    def __len__(self) -> int:
        return len(self.index)

    def __repr__(self) -> str:
        return (
            f"PreferenceDataset({len(self)} of {self.annotations.height} pairs, "
            f"{self.set_aside.height} rows set aside, max_length {self.max_length})"
        )

    @property
    def ids(self) -> npt.NDArray[np.str_]:
        """[P], the stable id of each pair in this view."""
        return self.column("pair_id").to_numpy().astype(np.str_)

    @property
    def chosen_tokens(self) -> Int64Array:
        """int64 [P], response tokens of the chosen side, after truncation, end token counted."""
        return self._chosen.lengths[self.index]

    @property
    def rejected_tokens(self) -> Int64Array:
        """int64 [P], the same of the rejected side."""
        return self._rejected.lengths[self.index]

    @property
    def num_tokens(self) -> Int64Array:
        """int64 [P], tokens of both sequences of a pair: what a forward pass has to read."""
        return 2 * self._prompts.lengths[self.index] + self.chosen_tokens + self.rejected_tokens

    def column(self, name: str) -> pl.Series:
        """[P], an annotation of each pair in this view."""
        if name not in self.annotations.columns:
            raise KeyError(
                f"PreferenceDataset: no column {name!r}; there are {self.annotations.columns}"
            )
        return self.annotations[name][self.index]

    def take(self, rows: npt.ArrayLike) -> "PreferenceDataset":
        """A view of these dataset rows, in this order; row numbers keep their meaning."""
        index = checked_rows(rows, "PreferenceDataset.take")
        total = self.annotations.height
        for row in index[(index < 0) | (index >= total)][:1]:
            raise IndexError(f"PreferenceDataset.take: no row {row} among {total}")
        return replace(self, index=index)

    def split(self, fraction: float, *, seed: int = 0) -> tuple[Int64Array, Int64Array]:
        """Rows to train on and rows to hold out, this fraction of the pairs, dealt by their ids.

        Pairs with the same prompt stay on the same side, so that the held-out ones are unseen.

        Raises:
            ValueError: If the fraction is not between 0 and 1, or leaves a side without pairs.
        """
        if not 0 < fraction < 1:
            raise ValueError(
                f"PreferenceDataset.split: fraction must lie in (0, 1), got {fraction}"
            )
        prompts, prompt_of = np.unique(
            self.column("prompt_id").to_numpy().astype(np.str_), return_inverse=True
        )
        count = max(1, round(fraction * len(prompts)))
        held_out = np.isin(prompt_of, hash_order(prompts, "split", seed)[:count])
        if held_out.all():
            raise ValueError(
                f"PreferenceDataset.split: cannot hold out {count} of {len(prompts)} prompts and "
                "keep some to train on; pass a smaller fraction"
            )
        return self.index[~held_out], self.index[held_out]

    def sequences(self) -> list[TokenSequence]:
        """The 2P sequences of this view: all chosen, then all rejected."""
        return [
            TokenSequence(
                np.concatenate([self._prompts.row(i), side.row(i)]), len(self._prompts.row(i))
            )
            for side in (self._chosen, self._rejected)
            for i in self.index.tolist()
        ]

    def waterfall(self) -> str:
        """Rows in, rows set aside by reason, rows out, as text."""
        reasons = Counter(self.set_aside["reason"].to_list())
        total = self.annotations.height
        lines = [f"{total + self.set_aside.height:>9,} rows read"]
        lines += [f"{-count:>9,} {reason}" for reason, count in reasons.most_common()]
        cut = int(self.annotations["truncated"].sum())
        if cut:
            lines += [f"{total:>9,} pairs, {cut:,} of them cut at {self.max_length} tokens"]
        else:
            lines += [f"{total:>9,} pairs"]
        return "\n".join(lines)


def _as_dicts(records: Any) -> list[Any]:
    if isinstance(records, pl.DataFrame):
        return records.to_dicts()
    if hasattr(records, "to_list"):  # a datasets.Dataset, without importing its library
        records = records.to_list()
    if isinstance(records, Iterable) and not isinstance(records, str | bytes | dict):
        rows = list(records)
        if not rows or any(isinstance(row, dict) for row in rows):
            return rows
    raise TypeError(
        "PreferenceDataset.from_records: records must be a list of dicts, a polars DataFrame or a "
        f"datasets.Dataset, got {type(records).__name__}"
    )


def _parse(line: str, path: Path, number: int) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"PreferenceDataset.read: line {number + 1} of {path} is not JSON: {error}"
        ) from error


def _annotations(
    rows: list[dict[str, Any]], pairs: dict[int, Pair], tokens: dict[int, "_Tokens"]
) -> pl.DataFrame:
    columns: dict[str, list[Any]] = {
        "pair_id": [content_id(pairs[number]) for number in tokens],
        "prompt_id": [content_id(pairs[number].prompt) for number in tokens],
        "source_row": list(tokens),
        "truncated": [truncated for *_, truncated in tokens.values()],
    }
    names = dict.fromkeys(name for number in tokens for name in rows[number])
    series = [_series(name, values) for name, values in columns.items()]
    for name in names:
        if name not in Pair._fields:
            values = [rows[number].get(name) for number in tokens]
            series.append(_series(name if name not in columns else f"input_{name}", values))
    return pl.DataFrame(series)


def _series(name: str, values: list[Any]) -> pl.Series:
    """A column of annotations; values that have no common type are kept as JSON text."""
    kinds = {type(value) for value in values if value is not None}
    if kinds == {int, float}:
        return pl.Series(name, values, dtype=pl.Float64)
    try:
        return pl.Series(name, values, strict=True)
    except (TypeError, OverflowError, UnicodeError, pl.exceptions.PolarsError):
        texts = [None if v is None else json.dumps(v, default=str) for v in values]
        return pl.Series(name, texts, dtype=pl.String)


_Tokens = tuple[list[int], list[int], list[int], bool]  # ..., whether a response was cut


def _tokenise(
    pairs: dict[int, Pair], tokenizer: Any, max_length: int, reasons: dict[int, str]
) -> dict[int, _Tokens]:
    """Prompt, chosen and rejected tokens of each usable pair; the others' reasons are added."""
    tokens: dict[int, _Tokens] = {}
    numbers = list(pairs)
    with tqdm(total=len(numbers), desc="tokenising", unit="pairs", disable=None) as bar:
        for start in range(0, len(numbers), TOKENISE_AT_ONCE):
            some = numbers[start : start + TOKENISE_AT_ONCE]
            for conversational in (False, True):
                kind = [n for n in some if isinstance(pairs[n].prompt, list) is conversational]
                texts = _rendered({n: pairs[n] for n in kind}, tokenizer, conversational, reasons)
                encoded = _encode(
                    [text for pair in texts.values() for text in pair],
                    tokenizer,
                    add_special_tokens=not conversational,
                )
                end = None if conversational else tokenizer.eos_token_id
                for n, three in zip(texts, _in_threes(encoded), strict=True):
                    try:
                        tokens[n] = _split_and_cut(*three, end, max_length)
                    except BadRecord as bad:
                        reasons[n] = str(bad)
            bar.update(len(some))
    return dict(sorted(tokens.items()))


def _rendered(
    pairs: dict[int, Pair], tokenizer: Any, conversational: bool, reasons: dict[int, str]
) -> dict[int, tuple[str, str, str]]:
    """The prompt's text, and prompt and response's text for both responses."""
    if not conversational:
        if pairs and tokenizer.eos_token_id is None:
            raise ValueError(
                "PreferenceDataset: the tokenizer has no end token, so the model would not learn "
                "where a response ends; set tokenizer.eos_token to the one it was trained with"
            )
        return {n: (p, p + chosen, p + rejected) for n, (p, chosen, rejected) in pairs.items()}
    if pairs and tokenizer.chat_template is None:
        raise ValueError(
            "PreferenceDataset: the pairs are conversations, but the tokenizer has no chat "
            "template; use the instruction-tuned model's tokenizer, or set "
            "tokenizer.chat_template"
        )
    texts = {}
    for n, (prompt, chosen, rejected) in pairs.items():
        open_ended = prompt[-1]["role"] == "assistant"  # the response continues this message
        try:
            texts[n] = (
                tokenizer.apply_chat_template(
                    prompt,
                    tokenize=False,
                    add_generation_prompt=not open_ended,
                    continue_final_message=open_ended,
                ),
                tokenizer.apply_chat_template(prompt + chosen, tokenize=False),
                tokenizer.apply_chat_template(prompt + rejected, tokenize=False),
            )
        except TemplateError:
            reasons[n] = "the chat template refuses the messages"
    return texts


def _encode(texts: list[str], tokenizer: Any, *, add_special_tokens: bool) -> list[list[int]]:
    if not texts:
        return []
    encoded: list[list[int]] = tokenizer(
        texts, add_special_tokens=add_special_tokens, return_attention_mask=False, verbose=False
    )["input_ids"]
    return encoded


def _in_threes(items: list[list[int]]) -> Iterator[tuple[list[int], list[int], list[int]]]:
    return zip(items[0::3], items[1::3], items[2::3], strict=True)


def _split_and_cut(
    prompt: list[int], chosen: list[int], rejected: list[int], end: int | None, max_length: int
) -> _Tokens:
    """Split full sequences where the prompt's own tokens end, add the end token, cut to length."""
    # a tokenizer may merge the prompt's last letters into the response's first token: what all
    # three share is the context, the rest is the response
    start = shared_start(prompt, chosen, rejected)
    if start == 0:
        raise BadRecord("the prompt is empty, so the first response token has no context")
    ended = [
        full if end is None or full[-1] == end else [*full, end] for full in (chosen, rejected)
    ]
    responses = [full[start:max_length] for full in ended]
    if not all(responses):
        raise BadRecord("nothing is left of a response after truncation")
    if responses[0] == responses[1]:
        raise BadRecord("the responses are identical after truncation")
    truncated = max(map(len, ended)) > max_length
    return prompt[:start], responses[0], responses[1], truncated
