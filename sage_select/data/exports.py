"""Export selected pairs to files that trainers can read directly.

Every file is read back before it takes its name: each record must give the pair that was scored, in
all that decides its tokens. So what a format or a file type cannot hold is refused, never lost.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from sage_select.arrays import Int64Array
from sage_select.data.messages import Message
from sage_select.data.reasons import BadRecord
from sage_select.data.records import Pair, checked_pair, pair_id, shared_start
from sage_select.data.sources import BATCH_ROWS, file_records, rename
from sage_select.system.files import user_path, written_whole

FORMATS = ("same", "trl", "llamafactory")
ENDINGS = (".jsonl", ".json", ".parquet")

SHAREGPT_ROLES = {
    "system": "system",
    "user": "human",
    "assistant": "gpt",
    "tool": "observation",
}


def as_trl(pair: Pair) -> dict[str, Any]:
    """Return a TRL record: prompt, chosen and rejected, as text or as messages.

    With `tools` and `chat_template_kwargs` if the pair has them. Of more than two responses, the
    best and the worst are written.

    Example:
        >>> as_trl(checked_pair({"chosen": "Sky? blue", "rejected": "Sky? red"}))
        {'prompt': 'Sky?', 'chosen': ' blue', 'rejected': ' red'}
    """
    options = {"tools": pair.tools, "chat_template_kwargs": pair.chat_template_kwargs}
    return {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected} | {
        name: value for name, value in options.items() if value is not None
    }


def as_llamafactory(pair: Pair) -> dict[str, Any]:
    """Return a record in a format of LLaMA-Factory for preferences.

    Messages are written in its ShareGPT format, with `tools` as JSON text; text in its Alpaca
    format, whose responses continue an instruction. Of more than two responses, the best and the
    worst are written.

    Raises:
        ValueError: If the format cannot hold the pair. It holds one message per response and
            nothing of a message but its role and text, and a prompt in which, after a system
            message, a user or tool message and an assistant message take turns.

    Example:
        >>> as_llamafactory(checked_pair({"chosen": "Sky? blue", "rejected": "Sky? red"}))
        {'instruction': 'Sky?', 'chosen': ' blue', 'rejected': ' red'}
    """
    if isinstance(pair.prompt, str):
        return {"instruction": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected}
    if pair.chat_template_kwargs is not None:
        raise _not_for_llamafactory("a record with chat_template_kwargs")
    if any(len(response) != 1 for response in (pair.chosen, pair.rejected)):
        raise _not_for_llamafactory(
            "a response of several messages", "has one message per response"
        )
    turns = [_turn(message) for message in pair.prompt]
    if turns[-1]["from"] not in ("human", "observation"):
        raise _not_for_llamafactory(f"a prompt that ends with {_NAMES[turns[-1]['from']]} message")
    dialogue = turns[1:] if turns[0]["from"] == "system" else turns
    # LLaMA-Factory skips records in another order, with a warning among thousands of lines
    kinds = [_KINDS[turn["from"]] for turn in dialogue]
    alternating = all(one != other for one, other in pairwise(kinds))
    if kinds[0] != "asks" or "system" in kinds or not alternating:
        roles = ", ".join(message["role"] for message in pair.prompt)
        raise _not_for_llamafactory(
            f"a prompt of the messages {roles}",
            "has at most one system message, first, and then takes turns of user (or tool) and "
            "assistant",
        )
    tools = {"tools": json.dumps(pair.tools, ensure_ascii=False)} if pair.tools else {}
    return {
        "conversations": turns,
        "chosen": _turn(pair.chosen[0]),
        "rejected": _turn(pair.rejected[0]),
        **tools,
    }


_KINDS = {"system": "system", "human": "asks", "observation": "asks", "gpt": "answers"}
_NAMES = {"system": "a system", "gpt": "an assistant"}


def _turn(message: Message) -> dict[str, str]:
    if "content" not in message or message.get("tool_calls"):
        # a function_call turn would be text to every reader but LLaMA-Factory, which rewrites it
        raise _not_for_llamafactory("a message without text (a tool call)")
    if more := message.keys() - {"role", "content"}:
        raise _not_for_llamafactory(
            f"a message with the field {', '.join(sorted(more))}", "has the role and text alone"
        )
    if message["role"] not in SHAREGPT_ROLES:
        raise _not_for_llamafactory(f"a message of the role {message['role']}")
    return {"from": SHAREGPT_ROLES[message["role"]], "value": message["content"]}


def _not_for_llamafactory(what: str, why: str = "has no place for it") -> ValueError:
    return ValueError(
        f"select: {what} cannot be written for LLaMA-Factory, whose format {why}; use "
        "--format trl or same"
    )


_CONVERTERS = {"trl": as_trl, "llamafactory": as_llamafactory}


def write_pairs(
    path: Path,
    records: Iterable[Any],
    source_rows: Int64Array,
    *,
    format: str = "same",
    columns: Mapping[str, str] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    ids: Sequence[str] | None = None,
) -> None:
    """Write selected records of a source in the given order and format.

    The file is read back: every record must give the pair that was scored, in all that decides its
    tokens. Its checksum is written beside it, and compared when the library reads the file.

    Args:
        path: A `.jsonl`, `.json` or `.parquet` file. For LLaMA-Factory, an entry for it is added to
            `dataset_info.json` in the same folder.
        records: All records of the source, as they were read.
        source_rows: Rows of the source to write, in the order to write them.
        format: "same" writes the records unchanged, so that `columns` and `chat_template_kwargs`
            are needed to read them back; or "trl", or "llamafactory", see `as_trl` and
            `as_llamafactory`.
        columns: Fields that have other names in the records, as for `PreferenceDataset.read`.
        chat_template_kwargs: Options of the chat template for all records, as for
            `PreferenceDataset.read`. For TRL they are written into each conversation, which is then
            another pair, with another id, of the same tokens.
        ids: Ids of the pairs in these rows, to find out whether the source has changed since it
            was read.

    Raises:
        ValueError: If the file ending or the format is unknown, the format or the file type cannot
            hold a pair, or a row does not have the given pair.

    Example:
        >>> write_pairs(Path("kept.jsonl"), records, kept.column("source_row").to_numpy(),
        ...             format="trl")  # doctest: +SKIP
    """
    path = user_path(path)
    if path.suffix not in ENDINGS:
        raise ValueError(
            f"select: cannot write {path.name}; known endings are {', '.join(ENDINGS)}"
        )
    if format not in FORMATS:
        raise ValueError(f"select: format must be one of {', '.join(FORMATS)}, got {format!r}")
    columns = columns or {}
    selected = _selected(records, source_rows, columns)
    pairs = _pairs(selected, source_rows, columns, ids)
    if format != "same":
        pairs = [_as_written(pair, chat_template_kwargs or {}) for pair in pairs]
        selected = [_CONVERTERS[format](pair) for pair in pairs]
        columns = {}
    if format == "trl":
        _complete_options(selected)
    path.parent.mkdir(parents=True, exist_ok=True)
    entries = _with_entry(path, selected) if format == "llamafactory" else None
    with written_whole(path, checked=True) as partial:
        _write_checked(partial, path.suffix, selected, pairs, format, columns)
    if entries is not None:
        with written_whole(_index(path)) as partial:
            partial.write_text(json.dumps(entries, ensure_ascii=False, indent=2), encoding="utf-8")


def _selected(
    records: Iterable[Any], source_rows: Int64Array, columns: Mapping[str, str]
) -> list[Any]:
    """Return the records of some rows, in their order."""
    wanted = set(source_rows.tolist())
    # one pass over the source, so that only the selected records are held in memory
    by_row = {row: record for row, record in enumerate(records) if row in wanted}
    if missing := wanted - by_row.keys():
        raise ValueError(f"select: the source has no row {min(missing)} any more; read it again")
    selected = [by_row[row] for row in source_rows.tolist()]
    if selected and isinstance(selected[0], dict):
        # the first record of a file must have all columns that are mapped
        missing_columns = [name for name in columns.values() if name not in selected[0]]
        selected[0] = {**selected[0], **dict.fromkeys(missing_columns)}
    return selected


def _pairs(
    selected: list[Any],
    source_rows: Int64Array,
    columns: Mapping[str, str],
    ids: Sequence[str] | None,
) -> list[Pair]:
    """Return the pairs of the selected records, which must be those that were scored."""
    pairs = []
    for number, record in enumerate(rename(selected, columns)):
        place = f"select: row {source_rows[number]} of the source"
        try:
            pair = checked_pair(record)
        except BadRecord as bad:
            raise ValueError(f"{place} cannot be used: {bad}") from None
        if ids is not None and pair_id(pair) != ids[number]:
            raise ValueError(
                f"{place} is not the pair that was scored; the source has changed since, so read "
                "and score it again"
            )
        pairs.append(pair)
    return pairs


def _as_written(pair: Pair, options: Mapping[str, Any]) -> Pair:
    """Return the pair as a trainer's format has it: of two responses, with all options its own."""
    pair = pair._replace(between=(), scores=None)
    if isinstance(pair.prompt, str):  # no template, so no options
        return pair
    if pair.tools is not None:  # options of all records yield to a record's own
        options = {name: value for name, value in options.items() if name != "tools"}
    return pair._replace(
        chat_template_kwargs={**options, **(pair.chat_template_kwargs or {})} or None
    )


def _complete_options(records: list[dict[str, Any]]) -> None:
    """Give all records `chat_template_kwargs` if one has them: TRL cannot take null for none."""
    if any("chat_template_kwargs" in record for record in records):
        for record in records:
            record.setdefault("chat_template_kwargs", {})


# Writing, and reading back


def _write_checked(
    path: Path,
    ending: str,
    records: list[dict[str, Any]],
    pairs: list[Pair],
    format: str,
    columns: Mapping[str, str],
) -> None:
    """Write records so that they give these pairs when they are read back.

    A column of a Parquet file has one type, which may not hold the values of all records. Tools and
    template options are then written as JSON text, which TRL reads for tools alone.
    """
    reason = ""
    attempts: list[tuple[str, ...]] = [()]
    if ending == ".parquet":
        attempts += [("tools",) if format == "trl" else ("tools", "chat_template_kwargs")]
    for as_text in attempts:
        names = {columns.get(name, name) for name in as_text}
        written = [_with_json_text(record, names) for record in records] if names else records
        try:
            _write(path, ending, written)
        except (UnicodeEncodeError, TypeError, OverflowError, pa.ArrowException) as error:
            reason = str(error).splitlines()[0]
            continue
        readers = [file_records(path, frozenset(columns.values()), ending)]
        if ending == ".parquet" and format != "same":
            readers.append(_as_trainers_read(path))
        differences = (_first_difference(rename(reader, columns), pairs) for reader in readers)
        reason = next((difference for difference in differences if difference), "")
        if not reason:
            return
    raise ValueError(
        f"select: these records cannot be written as {ending}: {reason}; write "
        + (
            ".jsonl, which can hold any record"
            if ending == ".parquet"
            else "them in another format (--format same or trl)"
        )
    )


def _with_json_text(record: dict[str, Any], names: set[str]) -> dict[str, Any]:
    return {
        name: json.dumps(value, ensure_ascii=False)
        if name in names and isinstance(value, list | dict)
        else value
        for name, value in record.items()
    }


def _write(path: Path, ending: str, records: list[Any]) -> None:
    if ending == ".parquet":
        names = dict.fromkeys(name for record in records for name in record)
        # by Arrow, since polars turns numbers into text if their column has both
        table = pa.table({n: pa.array([record.get(n) for record in records]) for n in names})
        with path.open("wb") as file:  # opened here, since a path could be taken for an address
            pyarrow.parquet.write_table(table, file, write_page_checksum=True)
    elif ending == ".json":
        text = json.dumps(records, ensure_ascii=False, indent=1, default=str)
        path.write_text(text, encoding="utf-8")
    else:
        lines = (json.dumps(record, ensure_ascii=False, default=str) for record in records)
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _as_trainers_read(path: Path) -> Iterator[Any]:
    """Yield the records of a Parquet file as `datasets` gives them to trainers.

    A table gives every record the fields of all, null where it has none, and only the library's own
    reader leaves them out: a template would write them into tool calls.
    """
    with path.open("rb") as opened, pyarrow.parquet.ParquetFile(opened) as file:
        for batch in file.iter_batches(BATCH_ROWS):
            yield from batch.to_pylist()


def _first_difference(records: Iterator[Any], pairs: list[Pair]) -> str | None:
    """Return what is wrong with the first record that would not be read as its pair."""
    for number, (record, pair) in enumerate(zip(records, pairs, strict=True)):
        try:
            again = checked_pair(record)
        except BadRecord as bad:
            return f"record {number} would be set aside when it is read back ({bad})"
        for name in Pair._fields[: Pair._fields.index("notes")]:
            scored, read = (_comparable(name, getattr(p, name)) for p in (pair, again))
            if scored != read:
                start = max(0, shared_start(scored, read) - 20)
                return (
                    f"record {number} would be read back with another {name}: "
                    f"...{read[start : start + 60]} instead of ...{scored[start : start + 60]}"
                )
    return None


def _comparable(name: str, value: Any) -> str:
    """Return a field as text that differs if its tokens may differ.

    The order of names counts, since templates write tools and arguments in their order; but not the
    order of the fields of a message and of the options, which templates look up.
    """
    if name == "chat_template_kwargs" and value is not None:
        value = dict(sorted(value.items()))
    elif name in ("prompt", "chosen", "rejected", "between"):
        parts = value if name == "between" else [value]
        value = [
            part if isinstance(part, str) else [dict(sorted(m.items())) for m in part]
            for part in parts
        ]
    return json.dumps(value, ensure_ascii=False, default=str)


# LLaMA-Factory's index of datasets


def _index(path: Path) -> Path:
    return path.with_name("dataset_info.json")


def llamafactory_entries(path: Path) -> dict[str, Any]:
    """Return the entries of `dataset_info.json`, LLaMA-Factory's index, beside a file.

    Raises:
        ValueError: If the index is not JSON, or not a mapping.
    """
    index = _index(path)
    try:
        entries = json.loads(index.read_text(encoding="utf-8")) if index.exists() else {}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"select: {index} is not JSON: {error}; fix or move it") from None
    if not isinstance(entries, dict):
        raise ValueError(f"select: {index} is not a mapping of datasets; fix or move it")
    return entries


def _with_entry(path: Path, records: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the entries of LLaMA-Factory's index, with one for a file of these records."""
    kinds = {"instruction" if "instruction" in record else "conversations" for record in records}
    if len(kinds) > 1:
        raise ValueError(
            "select: text and messages cannot be written into one file for LLaMA-Factory; select "
            "from a file of one of them, or use --format trl or same"
        )
    columns = {"chosen": "chosen", "rejected": "rejected"}
    if kinds == {"instruction"}:
        entry: dict[str, Any] = {"columns": {"prompt": "instruction", **columns}}
    else:
        entry = {"formatting": "sharegpt", "columns": {"messages": "conversations", **columns}}
    # a column that is named here must be in the file
    if any("tools" in record for record in records):
        entry["columns"]["tools"] = "tools"
    return llamafactory_entries(path) | {
        path.stem: {"file_name": path.name, "ranking": True, **entry}
    }
