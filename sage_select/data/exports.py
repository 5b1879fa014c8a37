"""Export selected pairs to files that trainers can read directly."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import polars as pl

from sage_select.arrays import Int64Array
from sage_select.data.records import Message, Pair, checked_pair
from sage_select.data.sources import rename
from sage_select.system.files import partial_path, replace_durably

FORMATS = ("same", "trl", "llamafactory")
ENDINGS = (".jsonl", ".json", ".parquet")

SHAREGPT_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "human",
    "assistant": "gpt",
    "tool": "observation",
}


def as_trl(pair: Pair) -> dict[str, Any]:
    """Return a TRL record: prompt, chosen and rejected, as text or as messages."""
    return {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected}


def as_llamafactory(pair: Pair) -> dict[str, Any]:
    """Return a record in LLaMA-Factory's ShareGPT format for preferences.

    Raises:
        ValueError: If the format cannot hold the pair: a response has several messages, a message
            has no text, or the prompt ends with an assistant message.
    """
    prompt, responses = pair.prompt, [pair.chosen, pair.rejected]
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
        responses = [[{"role": "assistant", "content": text}] for text in responses]
    if any(len(response) != 1 for response in responses):
        raise ValueError(
            "select: a response of several messages cannot be written for LLaMA-Factory, whose "
            "format has one message per response; use --format trl or same"
        )
    turns = [_turn(message) for message in prompt]
    if turns[-1]["from"] not in ("human", "observation"):
        raise ValueError(
            "select: a prompt that ends with an assistant message cannot be written for "
            "LLaMA-Factory; use --format trl or same"
        )
    return {
        "conversations": turns,
        "chosen": _turn(responses[0][0]),
        "rejected": _turn(responses[1][0]),
    }


def _turn(message: Message) -> dict[str, str]:
    if "content" not in message or message.get("tool_calls"):
        raise ValueError(
            "select: a message without text (a tool call) cannot be written for LLaMA-Factory; use "
            "--format trl or same"
        )
    return {"from": SHAREGPT_ROLES[message["role"]], "value": message["content"]}


_CONVERTERS: dict[str, Callable[[Pair], dict[str, Any]]] = {
    "trl": as_trl,
    "llamafactory": as_llamafactory,
}


def write_pairs(
    path: Path,
    records: Iterable[Any],
    source_rows: Int64Array,
    *,
    format: str = "same",
    columns: Mapping[str, str] | None = None,
) -> None:
    """Write selected records of a source in the given order and format.

    Args:
        path: A `.jsonl`, `.json` or `.parquet` file. For LLaMA-Factory, an entry for it is added to
            `dataset_info.json` in the same folder.
        records: All records of the source, as they were read.
        source_rows: Rows of the source to write, in the order to write them.
        format: "same" writes the records unchanged; or "trl", or "llamafactory".
        columns: Fields that have other names in the records, as for `PreferenceDataset.read`.

    Raises:
        ValueError: If the file ending is unknown, or the format cannot hold a pair.
    """
    if path.suffix not in ENDINGS:
        raise ValueError(
            f"select: cannot write {path.name}; known endings are {', '.join(ENDINGS)}"
        )
    wanted = set(source_rows.tolist())
    if format != "same" and columns:
        records = rename(records, columns)
    # one pass over the source, so that only the selected records are held in memory
    by_row = {row: record for row, record in enumerate(records) if row in wanted}
    selected = [by_row[row] for row in source_rows.tolist()]
    if format != "same":
        selected = [_CONVERTERS[format](checked_pair(record)) for record in selected]
    path.parent.mkdir(parents=True, exist_ok=True)
    # under a partial name first: a failed export leaves no half-written file
    partial = partial_path(path)
    try:
        _write(partial, path.suffix, selected)
    except (UnicodeEncodeError, TypeError, pl.exceptions.PolarsError) as error:
        partial.unlink(missing_ok=True)
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"select: these records cannot be written as {path.suffix}: {reason}; write "
            ".jsonl, which can hold any record"
        ) from error
    replace_durably(partial, path)
    if format == "llamafactory":
        _describe_for_llamafactory(path)


def _write(path: Path, ending: str, records: list[Any]) -> None:
    if ending == ".parquet":
        pl.DataFrame(records, infer_schema_length=None).write_parquet(path)
    elif ending == ".json":
        text = json.dumps(records, ensure_ascii=False, indent=1, default=str)
        path.write_text(text, encoding="utf-8")
    else:
        lines = (json.dumps(record, ensure_ascii=False, default=str) for record in records)
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def llamafactory_entries(path: Path) -> dict[str, Any]:
    """Return the entries of `dataset_info.json`, LLaMA-Factory's index, beside a file.

    Raises:
        ValueError: If the index is not JSON, or not a mapping.
    """
    index = path.with_name("dataset_info.json")
    try:
        entries = json.loads(index.read_text(encoding="utf-8")) if index.exists() else {}
    except ValueError as error:
        raise ValueError(f"select: {index} is not JSON: {error}; fix or move it") from None
    if not isinstance(entries, dict):
        raise ValueError(f"select: {index} is not a mapping of datasets; fix or move it")
    return entries


def _describe_for_llamafactory(path: Path) -> None:
    """Add a file's entry to LLaMA-Factory's index."""
    index = path.with_name("dataset_info.json")
    entries = llamafactory_entries(path)
    entries[path.stem] = {
        "file_name": path.name,
        "formatting": "sharegpt",
        "ranking": True,
        "columns": {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"},
    }
    partial = partial_path(index)
    partial.write_text(json.dumps(entries, ensure_ascii=False, indent=2), encoding="utf-8")
    replace_durably(partial, index)
