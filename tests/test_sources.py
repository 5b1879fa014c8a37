"""Spoiled sources are named, paths are literal, and tables give the same records as lists."""

import gzip
import json
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import polars as pl
import pytest

from arithmetic import build_tokenizer
from sage_select import PreferenceDataset
from sage_select.data.sources import iterate_records, read_records

ROWS = [{"prompt": f"{i}?", "chosen": f"a{i}", "rejected": f"b{i}", "n": i} for i in range(5)]
LINES = "\n".join(map(json.dumps, ROWS))
CSV = pl.DataFrame(ROWS).write_csv()


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def in_gzip(text, damage):
    content = bytearray(gzip.compress(text.encode()))
    return bytes(damage(content))


def wrong_checksum(content):
    content[-6] ^= 1
    return content


def table(ending):
    """The content of a table of the rows, in the format of this ending."""
    file = BytesIO()
    frame = pl.DataFrame(ROWS)
    {"parquet": frame.write_parquet, "arrow": frame.write_ipc, "feather": frame.write_ipc_stream}[
        ending
    ](file)
    return file.getvalue()


SPOILED = {
    "wrong checksum.jsonl.gz": (in_gzip(LINES, wrong_checksum), "CRC check failed"),
    "wrong checksum.csv.gz": (in_gzip(CSV, wrong_checksum), "CRC check failed"),
    "cut off.jsonl.gz": (in_gzip(LINES, lambda c: c[:-12]), "ended before"),
    "cut off.csv.gz": (in_gzip(CSV, lambda c: c[:-12]), "ended before"),
    "not compressed.json.gz": (LINES, "Not a gzipped file"),
    "deep.jsonl": (LINES + '\n{"n":' + "[" * 10**5, "line 6 of .* is nested too deeply"),
    "rather deep.jsonl": (
        LINES + '\n{"n":' + '{"n":' * 200 + "1" + "}" * 201,
        "line 6 of .* is nested too deeply, more than 100",
    ),
    "deep.json": ("[" * 10**5, "is nested too deeply"),
    "huge.jsonl": (LINES + '\n{"n":' + "9" * 5000 + "}", "line 6 of .* 5000 digits"),
    "huge.json": ('[{"n":-' + "9" * 5000 + "}]", "5000 digits"),
    "zeros.jsonl": (LINES + "\n" + "\0" * 9, "line 6 of .* is not JSON"),
    "half a record.ndjson": (LINES[:-3], "line 5 of .* is not JSON"),
    "utf-16.jsonl": (LINES.encode("utf-16"), "it is UTF-16; save it as UTF-8"),
    "utf-16.tsv": (CSV.encode("utf-16"), "it is UTF-16; save it as UTF-8"),
    "utf-16 unmarked.jsonl": (LINES.encode("utf-16-le"), "line 1 of .* is not JSON"),
    "latin.jsonl": (LINES.encode() + b'\n{"prompt": "\xe9"}', "line 6 is not UTF-8"),
    "latin.csv": (CSV.encode() + b"\xe9,b,c,1\n", "line 7 is not UTF-8"),
    "quotes.csv": ('prompt,chosen,rejected\na,b,c\n"d,e,f\n', 'could not parse `"d,e,f'),
    "more quotes.csv": ('prompt,chosen,rejected\na,"b"b,c\n', 'could not parse `"b"b`'),
    "too many.csv": ("prompt,chosen,rejected\na,b,c,d\n", "more fields than defined"),
    "twice.csv": ("prompt,chosen,chosen\na,b,c\n", "more than one column 'chosen'"),
    "wide.csv": ("x" * 2 * 10**5 + ",b\n1,2\n", "field larger than field limit"),
    "empty.parquet": ("", "0 bytes"),
    "empty.arrow": ("", "cannot be read as arrow"),
    "cut off.parquet": (table("parquet")[:-5], "magic bytes not found"),
    "cut off.arrow": (table("arrow")[:-5], "Not an Arrow file"),
    "half.arrow": (table("arrow")[:400], "Not an Arrow file"),
    "half.feather": (table("feather")[:-200], "cannot be read as feather"),
    "text.parquet": (LINES, "magic bytes not found"),
}


@pytest.mark.parametrize("name", SPOILED)
def test_a_spoiled_source_is_named(name, tmp_path):
    content, message = SPOILED[name]
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message) as caught:
        list(read_records(path))
    assert str(path) in str(caught.value)


# In a process of its own: a fault in native code would end it
FLIPS = """
import random, sys
from pathlib import Path
from sage_select.data.sources import read_records
path, lots = Path(sys.argv[1]), random.Random(0)
good = path.read_bytes()
for _ in range(150):
    content, bit = bytearray(good), lots.randrange(8 * len(good))
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)
    try:
        list(read_records(path))
    except ValueError as error:
        assert str(path) in str(error), error
print("survived")
"""


@pytest.mark.parametrize("ending", ["parquet", "arrow", "feather"])
def test_no_flipped_bit_of_a_table_ends_the_process(ending, tmp_path):
    path = tmp_path / f"pairs.{ending}"
    path.write_bytes(table(ending))
    done = subprocess.run(
        [sys.executable, "-c", FLIPS, path], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "survived", done.stderr[-2000:]


NUMBERS = [{"prompt": f"{i}+1?", "chosen": f"{i + 1}", "rejected": "0"} for i in range(6)]

ODD_FIELDS = {
    "half a character": {"prompt": "\ud800?"},
    "half a character in a name": {"\udc00": 1},
    "half a character in an annotation": {"note": ["\udc00"]},
    "zero byte": {"note": "a\0b"},
    "not a number": {"note": float("nan"), "other": float("-inf")},
    "huge": {"note": 10**400, "other": [10**30]},
    "huge, in 128 bits": {"note": 2**127, "other": {"x": 2**100}},
    "deep": {"note": json.loads("[" * 90 + "]" * 90)},
    "deep records": {"note": json.loads('{"a":' * 90 + "1" + "}" * 90)},
}


@pytest.mark.parametrize("name", ODD_FIELDS)
def test_odd_fields_do_not_end_the_reading(name, tokenizer, tmp_path):
    path, cache = tmp_path / "pairs.jsonl", tmp_path / "cache"
    path.write_text("\n".join(map(json.dumps, [*NUMBERS[:5], NUMBERS[5] | ODD_FIELDS[name]])))
    for _ in range(2):  # tokenised, then from the cache
        pairs = PreferenceDataset.read(path, tokenizer=tokenizer, max_length=64, cache=cache)
        assert pairs.annotations.height == len(pairs)
        # only text that no tokenizer can encode makes a row unusable
        assert pairs.set_aside["source_row"].to_list() == [5] * (name == "half a character")


def test_a_row_nested_beyond_measure_is_named():
    deep = current = []
    for _ in range(5000):
        current.append([])
        current = current[0]
    with pytest.raises(ValueError, match="row 1 is nested too deeply"):
        list(iterate_records([{}, {"note": deep}]))


# Paths


@pytest.mark.parametrize("folder", ["a[1]*", "~", "ü b", "lr={1,2}?"])
@pytest.mark.parametrize("ending", ["jsonl", "csv", "csv.gz", "parquet", "arrow"])
def test_paths_are_literal(folder, ending, tmp_path):
    place = tmp_path / folder
    place.mkdir()
    (tmp_path / "a1x").mkdir()
    (tmp_path / "a1x" / f"x*.{ending}").write_text("of another folder")
    for stem in ("x*", "[a]", "s3:x", "~"):
        content = {"jsonl": LINES.encode(), "csv": CSV.encode()}
        content["csv.gz"] = gzip.compress(CSV.encode())
        path = place / f"{stem}.{ending}"
        path.write_bytes(content[ending] if ending in content else table(ending))
        assert list(read_records(path)) == ROWS
    assert len(list(read_records(place))) == 4 * len(ROWS)


def test_the_home_folder_is_expanded_once(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "~").mkdir()
    (tmp_path / "~" / "pairs.jsonl").write_text(LINES)
    assert list(read_records("~/~/pairs.jsonl")) == ROWS
    options = {"tokenizer": tokenizer, "max_length": 64, "cache": "~/cache"}
    (tmp_path / "numbers.jsonl").write_text("\n".join(map(json.dumps, NUMBERS)))
    PreferenceDataset.read("~/numbers.jsonl", **options)
    PreferenceDataset.from_records(NUMBERS, **options)
    # one chunk and the manifest of the file
    assert len([*(tmp_path / "cache").iterdir()]) == 2
    assert not Path("~").exists()


def test_a_dataset_saved_in_an_odd_folder(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "a[1]*"))
    assert list(read_records(tmp_path / "a[1]*")) == ROWS
    (tmp_path / "a[1]*" / "state.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read as saved by datasets"):
        list(read_records(tmp_path / "a[1]*"))


# Nulls of tables


def call(name, **arguments):
    function = {"name": name, "arguments": arguments}
    return {"role": "assistant", "content": "", "tool_calls": [{"function": function}]}


# Rows whose nested records have different fields: in a table each gets those of all
NESTED = [
    {
        "prompt": [{"role": "user", "content": "weather?"}],
        "chosen": [call("weather", city="Bonn")],
        "rejected": [call("clock", zone={"name": "CET"})],
        "tools": [{"name": "weather", "parameters": {"city": {"type": "string"}}}],
        "chat_template_kwargs": {"thinking": False},
        "judge": {"grade": 1, "comment": None},
    },
    {
        "prompt": [{"role": "user", "content": "time?", "name": "Ann"}],
        "chosen": [call("clock", zone={"offset": 1})],
        "rejected": [{"role": "assistant", "content": "no"}],
        "tools": [{"name": "clock", "parameters": {"zone": {"enum": ["CET"]}}}],
        "chat_template_kwargs": {"effort": "low"},
        "judge": {"grade": 2, "comment": "good"},
    },
]
USED = ("prompt", "chosen", "rejected", "tools", "chat_template_kwargs")


def tables(rows, folder):
    """The same rows as every kind of source."""
    datasets = pytest.importorskip("datasets")
    frame = pl.DataFrame(rows)
    frame.write_parquet(folder / "rows.parquet")
    frame.write_ipc(folder / "rows.arrow")
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    yield "list", iterate_records(rows)
    for ending in ("jsonl", "parquet", "arrow"):
        yield ending, read_records(folder / f"rows.{ending}")
    yield "polars", iterate_records(frame)
    yield "lazy", iterate_records(frame.lazy())
    yield "arrow table", iterate_records(frame.to_arrow())
    yield "pandas", iterate_records(frame.to_pandas())
    stored = datasets.Dataset.from_parquet(
        str(folder / "rows.parquet"), cache_dir=str(folder / "cache")
    )
    yield "datasets", iterate_records(stored)
    yield "stream", iterate_records(stored.to_iterable_dataset())


def test_tables_give_the_records_of_lists(tmp_path):
    for name, records in tables(NESTED, tmp_path):
        for record, expected in zip(records, NESTED, strict=True):
            for field in USED:
                assert record[field] == expected[field], (name, field)
            assert record["judge"] == expected["judge"], name  # an annotation keeps its nulls


def test_a_mapped_column_gets_no_nulls_either():
    frame = pl.DataFrame([{"question": NESTED[0]["prompt"]}, {"question": NESTED[1]["prompt"]}])
    kept = list(iterate_records(frame))
    mapped = list(iterate_records(frame, frozenset(["question"])))
    assert kept[0]["question"][0]["name"] is None
    assert [row["question"] for row in mapped] == [row["prompt"] for row in NESTED]


def test_nulls_of_lists_and_json_text_are_kept():
    rows = [{"tools": [{"default": None}], "prompt": '{"a": null}', "scores": [1.0, None]}]
    assert list(iterate_records(rows)) == rows
    frame = pl.DataFrame([{"tools": '[{"default": null}]', "scores": [1.0, None]}])
    assert list(iterate_records(frame)) == frame.to_dicts()


def test_nulls_of_the_type_json_of_datasets_are_kept():
    datasets = pytest.importorskip("datasets")
    if not hasattr(datasets, "Json"):
        pytest.skip("this version of datasets has no type Json")
    features = datasets.Features({"tools": datasets.List({"name": datasets.Value("string"),
                                                          "call": datasets.Json()})})  # fmt: skip
    rows = [{"tools": [{"name": "a", "call": {"x": None}}, {"name": None, "call": {"y": 1}}]}]
    stored = datasets.Dataset.from_list(rows, features=features)
    expected = [{"name": "a", "call": {"x": None}}, {"call": {"y": 1}}]
    assert [row["tools"] for row in iterate_records(stored)] == [expected]
