"""Exports: kept pairs as files that trainers read as they are."""

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
    """A record of TRL's: prompt, chosen and rejected, as text or as messages."""
    return {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected}


def as_llamafactory(pair: Pair) -> dict[str, Any]:
    """A record of LLaMA-Factory's sharegpt format for preferences.

    Raises:
        ValueError: If a response is more than one message, or a message is no text: the format
            cannot say it.
    """
    prompt, responses = pair.prompt, [pair.chosen, pair.rejected]
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
        responses = [[{"role": "assistant", "content": text}] for text in responses]
    if any(len(response) != 1 for response in responses):
        raise ValueError(
            "select: a response of several messages cannot be written for LLaMA-Factory, whose "
            "format has one message for each; use --format trl or same"
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


_WRITERS: dict[str, Callable[[Pair], dict[str, Any]]] = {
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
    """Write some records of a source, in a given order and format.

    Args:
        path: A `.jsonl`, `.json` or `.parquet` file. Beside one for LLaMA-Factory its entry is put
            into `dataset_info.json`.
        records: All records of the source, as they were read.
        source_rows: The rows wanted.
        format: "same" writes the records as they are; or "trl", or "llamafactory".
        columns: Where fields have other names, as for `PreferenceDataset.read`.

    Raises:
        ValueError: If the ending is unknown, or a pair cannot be said in the format.
    """
    if path.suffix not in ENDINGS:
        raise ValueError(
            f"select: cannot write {path.name}; known endings are {', '.join(ENDINGS)}"
        )
    wanted = set(source_rows.tolist())
    if format != "same" and columns:
        records = rename(records, columns)
    found = {row: record for row, record in enumerate(records) if row in wanted}
    chosen = [found[row] for row in source_rows.tolist()]
    if format != "same":
        chosen = [_WRITERS[format](checked_pair(record)) for record in chosen]
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(path)
    try:
        _write(partial, path.suffix, chosen)
    except (UnicodeEncodeError, TypeError, pl.exceptions.PolarsError) as error:
        partial.unlink(missing_ok=True)
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"select: these records cannot be written as {path.suffix}: {reason}; .jsonl takes "
            "records of any shape"
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
    """The datasets that LLaMA-Factory's index beside a file knows.

    Raises:
        ValueError: If the index is not what it should be.
    """
    index = path.with_name("dataset_info.json")
    try:
        entries = json.loads(index.read_text(encoding="utf-8")) if index.exists() else {}
    except ValueError as error:
        raise ValueError(f"select: {index} is not JSON: {error}; mend or move it") from None
    if not isinstance(entries, dict):
        raise ValueError(f"select: {index} is not a mapping of datasets; mend or move it")
    return entries


def _describe_for_llamafactory(path: Path) -> None:
    """A file's entry in LLaMA-Factory's index."""
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
