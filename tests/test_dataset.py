import gzip
import json
from copy import deepcopy
from datetime import date

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from arithmetic import build_tokenizer
from sage_select import PreferenceDataset, Reader, nca_responses
from sage_select.data import cache_files, chunks
from sage_select.data import dataset as dataset_module
from sage_select.data.chunks import CHUNK_ROWS
from sage_select.data.reasons import BadRecord
from sage_select.data.records import checked_pair, shared_start
from sage_select.losses import response_weights

CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def user(text):
    return [{"role": "user", "content": text}]


def assistant(text):
    return [{"role": "assistant", "content": text}]


# One pair in each accepted shape, with its (prompt, chosen, rejected)
SHAPES = {
    "text, explicit prompt": (
        {"prompt": "Sky?", "chosen": " blue", "rejected": " red"},
        ("Sky?", " blue", " red"),
    ),
    "text, implicit prompt": (
        {"chosen": "Sky? blue", "rejected": "Sky? red"},
        ("Sky?", " blue", " red"),
    ),
    "conversational, explicit prompt": (
        {"prompt": user("Sky?"), "chosen": assistant("blue"), "rejected": assistant("red")},
        (user("Sky?"), assistant("blue"), assistant("red")),
    ),
    "conversational, implicit prompt": (
        {
            "chosen": user("Sky?") + assistant("blue"),
            "rejected": user("Sky?") + assistant("red"),
        },
        (user("Sky?"), assistant("blue"), assistant("red")),
    ),
    "a prompt as text beside assistant messages": (
        {"prompt": "Sky?", "chosen": assistant("blue"), "rejected": assistant("red")},
        (user("Sky?"), assistant("blue"), assistant("red")),
    ),
    "messages, prompt repeated in the responses": (
        {
            "prompt": user("Sky?"),
            "chosen": user("Sky?") + assistant("blue"),
            "rejected": user("Sky?") + assistant("red"),
        },
        (user("Sky?"), assistant("blue"), assistant("red")),
    ),
    "messages with absent fields": (
        {
            "prompt": [{"role": "user", "content": "Sky?", "name": None}],
            "chosen": [{"role": "assistant", "content": "blue", "tool_calls": None}],
            "rejected": assistant("red"),
        },
        (user("Sky?"), assistant("blue"), assistant("red")),
    ),
    "sharegpt, a message for each response": (
        {
            "conversations": [{"from": "human", "value": "Sky?"}],
            "chosen": {"from": "gpt", "value": "blue"},
            "rejected": {"from": "gpt", "value": "red"},
        },
        (user("Sky?"), assistant("blue"), assistant("red")),
    ),
    "sharegpt, text for each response, and a system prompt": (
        {
            "system": "Be brief.",
            "conversations": [{"from": "human", "value": "Sky?"}],
            "chosen": "blue",
            "rejected": "red",
        },
        (
            [{"role": "system", "content": "Be brief."}, *user("Sky?")],
            assistant("blue"),
            assistant("red"),
        ),
    ),
    "whole conversations of typed parts": (
        {
            f"{side}_messages": [
                {"role": "user", "content": [{"type": "text", "text": "Sky?"}]},
                {"role": "assistant", "content": [{"type": "text", "value": text}]},
            ]
            for side, text in (("chosen", "blue"), ("rejected", "red"))
        },
        (user("Sky?"), assistant("blue"), assistant("red")),
    ),
    "alpaca": (
        {"instruction": "Sky", "input": "now?", "chosen": "blue", "rejected": "red"},
        ("Sky\nnow?", "blue", "red"),
    ),
    "alpaca with a system prompt and a history": (
        {
            "instruction": "Now?",
            "system": "Be brief.",
            "history": [["Sky?", "Up."]],
            "chosen": "blue",
            "rejected": "red",
        },
        (
            [
                {"role": "system", "content": "Be brief."},
                *user("Sky?"),
                *assistant("Up."),
                *user("Now?"),
            ],
            assistant("blue"),
            assistant("red"),
        ),
    ),
    "a complete record with fields of other shapes": (
        {
            "prompt": "Sky?",
            "chosen": " blue",
            "rejected": " red",
            "completions": ["x"],
            "conversations": [{"from": "gpt", "value": "x"}],
        },
        ("Sky?", " blue", " red"),
    ),
    "alpaca, both responses in one list": (
        {"instruction": "Sky?", "input": "", "output": ["blue", "red"]},
        ("Sky?", "blue", "red"),
    ),
    "responses, the best first": (
        {"prompt": "Sky?", "responses": ["blue", "grey", "red"]},
        ("Sky?", "blue", "red"),
    ),
    "responses with scores": (
        {"prompt": "Sky?", "responses": ["red", "blue", "grey"], "scores": [1, 5, 3.5]},
        ("Sky?", "blue", "red"),
    ),
    "responses with ranks": (
        {"prompt": "Sky?", "responses": ["red", "blue", "grey"], "ranks": [3, 1, 2]},
        ("Sky?", "blue", "red"),
    ),
    "ultrafeedback": (
        {
            "instruction": "Sky?",
            "completions": [
                {"response": "red", "overall_score": 2.0},
                {"response": "blue", "overall_score": 8.5},
            ],
        },
        ("Sky?", "blue", "red"),
    ),
    "responses as messages": (
        {"prompt": user("Sky?"), "responses": [assistant("blue"), assistant("red")]},
        (user("Sky?"), assistant("blue"), assistant("red")),
    ),
    "conversations beside a prompt as text": (
        {
            "prompt": "Sky?",
            "chosen": user("Sky?") + assistant("blue"),
            "rejected": user("Sky?") + assistant("red"),
        },
        (user("Sky?"), assistant("blue"), assistant("red")),
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name):
    record, pair = SHAPES[name]
    assert checked_pair(record)[:3] == pair


GOOD = {"prompt": "p", "chosen": "a", "rejected": "b"}
BAD_RECORDS = {
    "chosen is missing": {"prompt": "p", "rejected": "b"},
    "rejected is missing": GOOD | {"rejected": None},
    "chosen is not text": GOOD | {"chosen": 7},
    "rejected is empty": GOOD | {"rejected": " \n"},
    "prompt is not text": GOOD | {"prompt": 7},
    "chosen and rejected are identical": GOOD | {"rejected": "a"},
    "chosen and rejected are not both text or both messages": GOOD | {"chosen": assistant("a")},
    "chosen and rejected do not start with the same prompt": {"chosen": "x", "rejected": "y"},
    "one response is a prefix of another": {"chosen": "xy", "rejected": "xyz"},
    "chosen has a message without a role": GOOD | {"chosen": [{"content": "a"}]},
    "chosen has a message without text": GOOD | {"chosen": [{"role": "assistant"}]},
    "chosen does not end with an assistant message": GOOD | {"chosen": user("a")},
    "not a record": None,
    "chosen is not valid Unicode": GOOD | {"chosen": "cut \ud83d"},
    r"prompt is missing; another field may contain it \(see columns\)": {
        "question": "Sky?",
        "chosen": "The blue",
        "rejected": "The red",
    },
    "prompt is missing": GOOD | {"prompt": None},
    "tools is not valid JSON": {
        "prompt": user("p"),
        "chosen": assistant("a"),
        "rejected": assistant("b"),
        "tools": "{",
    },
    "history is not a list of question-answer pairs": {
        "instruction": "p",
        "history": ["q"],
        "chosen": "a",
        "rejected": "b",
    },
    "a response does not start with an assistant message": {
        "prompt": user("p") + assistant("q") + user("r"),
        "chosen": user("p") + assistant("a"),
        "rejected": assistant("b"),
    },
    "chosen has a message with the unknown role 'bot'": GOOD
    | {"chosen": {"role": "bot", "content": "a"}},
    "chosen has a part of type image, but only text can be measured": GOOD
    | {"chosen": [{"role": "assistant", "content": [{"type": "image", "text": "x"}]}]},
    "chosen has a message whose content is not text": GOOD
    | {"chosen": [{"role": "assistant", "content": [{"type": "text", "text": 7}]}]},
    "chosen is a list of messages saved as text that is not valid JSON": GOOD
    | {"chosen": str(assistant("a"))},
    "conversations ends with an assistant message": {
        "conversations": [{"from": "human", "value": "p"}, {"from": "gpt", "value": "q"}],
        "chosen": "a",
        "rejected": "b",
    },
    "one labelled response, not a pair": {"messages": user("p") + assistant("a"), "label": True},
    "one conversation, not a pair": {"messages": user("p") + assistant("a")},
    "responses is not a list of two or more": {"prompt": "p", "responses": ["a"]},
    "scores does not have one number per response": {
        "prompt": "p",
        "responses": ["a", "b"],
        "scores": [1, None],
    },
    "ranks does not have one number per response": {
        "prompt": "p",
        "responses": ["a", "b"],
        "ranks": [1],
    },
    "all responses have the same score or rank": {
        "prompt": "p",
        "responses": ["a", "b"],
        "scores": [3, 3],
    },
    "response 2 is empty": {"prompt": "p", "responses": ["a", "", "b"]},
    "completions is not a list of records": {"prompt": "p", "completions": ["a", "b"]},
    "prompt is empty": {"prompt": [], "chosen": assistant("a"), "rejected": assistant("b")},
}


@pytest.mark.parametrize("reason", BAD_RECORDS)
def test_reasons(reason):
    with pytest.raises(BadRecord, match=f"^{reason}$"):
        checked_pair(BAD_RECORDS[reason])


@given(st.lists(st.integers(0, 2)), st.lists(st.integers(0, 2)))
def test_shared_start(left, right):
    shared = shared_start(left, right)
    assert left[:shared] == right[:shared]
    assert left[shared : shared + 1] != right[shared : shared + 1] or shared == len(left) == len(
        right
    )


# With the demo's tokenizer: one token per number or symbol, and no start token


@pytest.fixture(scope="module")
def tokenizer():
    from arithmetic import build_tokenizer

    return build_tokenizer()


def records(count=5):
    return [
        {"prompt": f"{i}+1?", "chosen": f"{i}+1={i + 1}", "rejected": f"{i}+1=0", "note": i}
        for i in range(count)
    ]


def dataset(tokenizer, rows=None, max_length=64, **options) -> PreferenceDataset:
    return PreferenceDataset.from_records(
        records() if rows is None else rows, tokenizer=tokenizer, max_length=max_length, **options
    )


def test_tokens(tokenizer):
    pairs = dataset(tokenizer)
    chosen = pairs.sequences()[1]
    assert tokenizer.decode(chosen.tokens) == "1+1?1+1=2<eos>"
    assert tokenizer.decode(chosen.tokens[chosen.response_start :]) == "1+1=2<eos>"
    assert pairs.chosen_tokens.tolist() == [6] * 5  # the end token counts
    assert pairs.num_tokens.tolist() == [20] * 5


def test_truncation_counts_the_remaining_tokens(tokenizer):
    pairs = dataset(tokenizer, max_length=9)
    assert pairs.chosen_tokens.tolist() == [5] * 5
    assert tokenizer.decode(pairs.sequences()[1].tokens) == "1+1?1+1=2"
    assert len(dataset(tokenizer, max_length=64).sequences()[0].tokens) == 10


def test_rows_are_set_aside_and_counted(tokenizer):
    rows = [
        *records(2),
        records(2)[0],
        {"prompt": "1?", "chosen": "", "rejected": "2"},
        {"prompt": "", "chosen": "1", "rejected": "2"},
        {"prompt": "1+2+3+4+5+6?", "chosen": "1", "rejected": "2"},
        {"prompt": "1+2+3?", "chosen": "1+1+1+1=1", "rejected": "1+1+1+1=2"},
    ]
    pairs = dataset(tokenizer, rows, max_length=12)
    assert pairs.set_aside.rows() == [
        (2, "duplicate pair"),
        (3, "chosen is empty"),
        (4, "the prompt is empty, so the first response token has no context"),
        (5, "a response has no tokens left after truncation"),
        (6, "the responses are identical after truncation"),
    ]
    assert len(pairs) == 2
    assert pairs.column("source_row").to_list() == [0, 1]
    assert pairs.waterfall().splitlines()[0].strip() == "7 rows read"
    with pytest.raises(
        ValueError, match="5 of 7 rows cannot be used, the first is row 2: duplicate"
    ):
        dataset(tokenizer, rows, max_length=12, on_bad="error")


def test_ids_depend_on_content_alone(tokenizer):
    forward, backward = dataset(tokenizer), dataset(tokenizer, records()[::-1])
    assert forward.ids.tolist() == backward.ids[::-1].tolist()
    assert len(set(forward.ids)) == 5
    annotated = [row | {"note": "changed"} for row in records()]
    assert dataset(tokenizer, annotated).ids.tolist() == forward.ids.tolist()


def test_views_keep_row_numbers(tokenizer):
    pairs = dataset(tokenizer)
    view = pairs.take([4, 1])
    assert view.index.tolist() == [4, 1]
    assert view.ids.tolist() == pairs.ids[[4, 1]].tolist()
    assert view.column("note").to_list() == [4, 1]
    assert view.take([1]).index.tolist() == [1]
    with pytest.raises(IndexError, match="no row 5 among 5"):
        pairs.take([5])


def test_split_keeps_pairs_of_a_prompt_together(tokenizer):
    rows = [row | {"rejected": f"{row['chosen']}{i}"} for row in records(10) for i in range(3)]
    pairs = dataset(tokenizer, rows)
    train, held_out = pairs.split(0.3, seed=1)
    assert sorted([*train, *held_out]) == list(range(30))
    assert len(held_out) == 9
    prompts = [set(pairs.take(side).column("prompt_id")) for side in (train, held_out)]
    assert not prompts[0] & prompts[1]


def write(ending, rows, path):
    """Write records to a file in the format of this ending."""
    lines = "\n".join(map(json.dumps, rows)) + "\n\n"
    match ending:
        case ".jsonl":
            path.write_text(lines)
        case ".jsonl.gz":
            path.write_bytes(gzip.compress(lines.encode()))
        case ".json":
            path.write_text(json.dumps(rows, indent=1))
        case ".csv" | ".tsv":
            pl.DataFrame(rows).write_csv(path, separator="," if ending == ".csv" else "\t")
        case ".parquet":
            pl.DataFrame(rows).write_parquet(path)
        case ".arrow":
            pl.DataFrame(rows).write_ipc(path)
        case ".feather":
            pl.DataFrame(rows).write_ipc_stream(path)


ENDINGS = [".jsonl", ".jsonl.gz", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".feather"]


def check_same(actual, expected):
    assert actual.ids.tolist() == expected.ids.tolist()
    assert actual.annotations.equals(expected.annotations)
    assert [s.tokens.tolist() for s in actual.sequences()] == [
        s.tokens.tolist() for s in expected.sequences()
    ]


@pytest.mark.parametrize("ending", ENDINGS)
def test_every_file_format_gives_the_same_pairs(ending, tokenizer, tmp_path):
    write(ending, records(), tmp_path / f"pairs{ending}")
    for path in (tmp_path / f"pairs{ending}", tmp_path):  # the file, then its folder
        check_same(
            PreferenceDataset.read(path, tokenizer=tokenizer, max_length=64), dataset(tokenizer)
        )


@pytest.mark.parametrize(
    "table_type", ["list", "polars", "lazy", "pandas", "arrow", "datasets", "stream"]
)
def test_every_table_type_gives_the_same_pairs(table_type, tokenizer):
    table = pl.DataFrame(records())
    if table_type in ("datasets", "stream"):
        datasets = pytest.importorskip("datasets")
    makers = {
        "list": records,
        "polars": lambda: table,
        "lazy": table.lazy,
        "pandas": table.to_pandas,
        "arrow": table.to_arrow,
        "datasets": lambda: datasets.Dataset.from_list(records()),
        "stream": lambda: datasets.Dataset.from_list(records()).to_iterable_dataset(),
    }
    check_same(dataset(tokenizer, makers[table_type]()), dataset(tokenizer))


def test_a_dataset_saved_by_datasets(tokenizer, tmp_path):
    datasets = pytest.importorskip("datasets")
    saved = datasets.DatasetDict({"train": datasets.Dataset.from_list(records())})
    saved.save_to_disk(tmp_path / "set")
    check_same(
        PreferenceDataset.read(tmp_path / "set", tokenizer=tokenizer, max_length=64),
        dataset(tokenizer),
    )
    with pytest.raises(ValueError, match="has no split 'test'; it has train"):
        PreferenceDataset.read(tmp_path / "set", tokenizer=tokenizer, max_length=64, split="test")


def test_a_hub_name_is_passed_to_datasets(tokenizer, monkeypatch):
    """`datasets.load_dataset` is replaced, so that the test needs no network."""
    datasets = pytest.importorskip("datasets")
    calls = []

    def load_dataset(*names, **options):
        calls.append((names, options))
        return datasets.Dataset.from_list(records())

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    pairs = PreferenceDataset.read(
        "org/set", tokenizer=tokenizer, max_length=64, split="test", subset="en", revision="v1"
    )
    check_same(pairs, dataset(tokenizer))
    assert calls == [(("org/set", "en"), {"split": "test", "revision": "v1"})]


def test_columns_rename_fields(tokenizer):
    rows = [{"q": r["prompt"], "good": r["chosen"], "rejected": r["rejected"]} for r in records()]
    pairs = dataset(tokenizer, rows, columns={"prompt": "q", "chosen": "good"})
    assert pairs.ids.tolist() == dataset(tokenizer).ids.tolist()


# Tokens on disk


def long_records():
    """Rows for three chunks, with a duplicate across chunks and columns that change type."""
    rows = [
        {"prompt": f"{i}+1?", "chosen": f"{i}+1={i + 1}", "rejected": "0", "kind": i}
        for i in range(2 * CHUNK_ROWS + 10)
    ]
    rows[5]["rejected"] = ""
    rows[CHUNK_ROWS + 1] = rows[0] | {"kind": 0.5}
    rows[-1] |= {"kind": "text", "late": 1}
    return rows


def test_tokens_on_disk_equal_tokens_in_memory(tokenizer, tmp_path):
    rows = long_records()
    in_memory = dataset(tokenizer, rows)
    on_disk = dataset(tokenizer, rows, cache=tmp_path)
    check_same(on_disk, in_memory)
    assert len(list(tmp_path.glob("*.arrow"))) == 3
    assert on_disk.set_aside.rows() == [
        (5, "rejected is empty"),
        (CHUNK_ROWS + 1, "duplicate pair"),
    ]
    assert on_disk.column("source_row").to_list() == [
        i for i in range(len(rows)) if i not in (5, CHUNK_ROWS + 1)
    ]
    assert on_disk.column("kind")[[0, -1]].to_list() == ["0", '"text"']  # as JSON text
    assert on_disk.column("late")[[0, -1]].to_list() == [None, 1]
    row = on_disk.take([CHUNK_ROWS + 5])
    assert tokenizer.decode(row.sequences()[0].tokens).startswith(f"{CHUNK_ROWS + 7}+1?")


@pytest.fixture
def counted(monkeypatch):
    """Sizes of the chunks that were tokenised rather than read from the cache."""
    sizes, make_table = [], chunks.make_table

    def counting(rows, *args):
        sizes.append(len(rows))
        return make_table(rows, *args)

    monkeypatch.setattr(chunks, "make_table", counting)
    return sizes


def test_unchanged_chunks_are_not_tokenised_again(counted, tokenizer, tmp_path):
    path, options = tmp_path / "pairs.jsonl", {"cache": tmp_path / "cache"}
    rows = long_records()

    def read(max_length=64):
        write(".jsonl", rows, path)
        counted.clear()
        PreferenceDataset.read(path, tokenizer=tokenizer, max_length=max_length, **options)
        return list(counted)

    assert read() == [CHUNK_ROWS, CHUNK_ROWS, 10]
    assert read() == []
    rows.append({"prompt": "9?", "chosen": "1", "rejected": "2"})
    assert read() == [11]  # only the last chunk
    before = {*(tmp_path / "cache").glob("*.arrow")}
    assert read(max_length=63) == [CHUNK_ROWS, CHUNK_ROWS, 11]
    written = {*(tmp_path / "cache").glob("*.arrow")} - before
    min(written, key=lambda file: file.stat().st_size).write_bytes(b"damaged")
    with pytest.warns(UserWarning, match="is spoiled and is made again"):
        assert read(max_length=63) == [11]


def test_a_changed_template_or_vocabulary_tokenises_again(counted, data, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(data / "tokenizers" / "minimind_6400")
    record, _ = SHAPES["conversational, explicit prompt"]
    options = {"tokenizer": tokenizer, "max_length": 64, "cache": tmp_path}

    def read():
        counted.clear()
        PreferenceDataset.from_records([record], **options)
        return len(counted)

    assert (read(), read()) == (1, 0)
    tokenizer("a call that pads", padding="max_length", max_length=8, truncation=True)
    assert read() == 0
    tokenizer.chat_template = "!" + tokenizer.chat_template
    assert (read(), read()) == (1, 0)
    tokenizer.add_tokens("blue")
    assert (read(), read()) == (1, 0)
    tokenizer.split_special_tokens = True
    assert read() == 1


@pytest.mark.slow
def test_worker_processes_give_the_same_tokens(data, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(data / "tokenizers" / "minimind_6400")
    path = data / "pairs" / "gsm8k_delta.parquet"
    options = {"tokenizer": tokenizer, "max_length": 256}
    here = PreferenceDataset.read(path, cache=tmp_path / "one", **options)
    there = PreferenceDataset.read(path, cache=tmp_path / "two", num_workers=2, **options)
    check_same(there, here)
    in_memory = PreferenceDataset.from_records(pl.read_parquet(path), num_workers=2, **options)
    check_same(in_memory, here)


# More than two responses


def test_more_than_two_responses(tokenizer):
    rows = [
        {"prompt": f"{i}+1?", "responses": ["0", f"{i + 1}", "1", "2"], "scores": [0.5, 9, 3, 0]}
        for i in range(4, 7)
    ]
    ranked = dataset(tokenizer, rows)
    assert ranked.num_responses.tolist() == [4, 4, 4]
    assert ranked.response_scores.tolist() == [[9, 3, 0.5, 0]] * 3
    texts = [tokenizer.decode(s.tokens[s.response_start :]) for s in ranked.responses()[:4]]
    assert texts == ["5<eos>", "1<eos>", "0<eos>", "2<eos>"]
    assert [s.tokens.tolist() for s in ranked.sequences()[::3]] == [
        ranked.responses()[i].tokens.tolist() for i in (0, 3)
    ]
    mixed = dataset(tokenizer, [*rows, *records()])
    assert mixed.take([2, 0]).response_scores.shape == (2, 4)
    with pytest.raises(
        ValueError, match="rows have 2 to 4 responses; take rows with the same number"
    ):
        mixed.responses()
    with pytest.raises(ValueError, match="have no scores"):
        _ = mixed.take([3]).response_scores


def test_k_responses_train(tokenizer):
    """Training on the K-response NCA loss lowers it and raises the best response's reward."""
    from arithmetic import load_base

    model, _ = load_base()
    rows = [
        {"prompt": f"{i}+{i}?", "responses": [f"{i}+{i}={2 * i}", "1", "7"], "scores": [3, 1, 2]}
        for i in range(2, 6)
    ]
    ranked = dataset(tokenizer, rows)
    weights = response_weights(torch.from_numpy(ranked.response_scores))

    def logps():
        return Reader().response_logps(model, ranked.responses()).reshape(len(ranked), -1)

    reference_logps = logps().detach()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    losses = []
    for _ in range(5):
        loss = nca_responses(logps(), reference_logps, weights).mean()
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses == sorted(losses, reverse=True)
    rewards = logps() - reference_logps
    assert (rewards[:, 0] > rewards[:, 1:].amax(dim=1)).all()


def test_annotations_of_mixed_types_lose_nothing(tokenizer):
    mixed = [{"k": 1}, [1, "x"], 2.5, None, "text"]
    pairs = dataset(tokenizer, [r | {"mixed": m} for r, m in zip(records(), mixed, strict=True)])
    assert [m and json.loads(m) for m in pairs.column("mixed")] == mixed
    numbers = [row | {"number": n} for row, n in zip(records(), [1, 2.5, None, 3, 4], strict=True)]
    assert dataset(tokenizer, numbers).column("number").to_list() == [1.0, 2.5, None, 3.0, 4.0]


MIXED = {  # the value in all rows but the last, the value in the last row, both as stored
    "integers and fractions": (1, 2.5, [1.0, 2.5]),
    "integers that a float cannot represent": (2**60 + 1, 0.5, [str(2**60 + 1), "0.5"]),
    "integers of different sizes": (2**62 + 1, 2**63 + 1, [2**62 + 1, 2**63 + 1]),
    "an integer larger than any integer type": (1, 2**70, ["1", str(2**70)]),
    "lists of different types": ([1], [1.5], ["[1]", "[1.5]"]),
    "empty lists first": ([], [1], ["[]", "[1]"]),
    "lists in one chunk and text in the other": ([1], "x", ["[1]", '"x"']),
}


@pytest.mark.parametrize("name", MIXED)
def test_annotations_that_differ_between_chunks_lose_nothing(name, tokenizer):
    first, last, expected = MIXED[name]
    rows = [row | {"kind": first} for row in long_records()]
    rows[-1]["kind"] = last
    column = dataset(tokenizer, rows).column("kind")
    assert column[[0, -1]].to_list() == expected


def test_nested_annotations_lose_nothing(tokenizer):
    rows = records(200)
    for i, row in enumerate(rows):
        row["list"] = [1] if i < 150 else [1.7]
        row["record"] = {"a": 1} if i < 150 else {"a": 1, "b": 2}
    pairs = dataset(tokenizer, rows)
    assert [json.loads(text) for text in pairs.column("list")] == [row["list"] for row in rows]
    assert json.loads(pairs.column("record")[199]) == {"a": 1, "b": 2}


def test_annotations_with_any_name(tokenizer):
    names = ["json.x", "input.x", "x", "pair_id", "input_pair_id", "row", "scores", "truncated"]
    rows = [row | {name: f"{name} {i}" for name in names} for i, row in enumerate(records(2))]
    pairs = dataset(tokenizer, rows)
    values = {tuple(pairs.column(name)) for name in pairs.columns if "note" not in name}
    assert {(f"{name} 0", f"{name} 1") for name in names} <= values


def test_arrays_and_tuples_are_lists(tokenizer):
    import pandas

    rows = [{"prompt": "1?", "responses": ("1", "2", "3"), "scores": np.array([1, 3, 2])}]
    lists = [{"prompt": "1?", "responses": ["1", "2", "3"], "scores": [1, 3, 2]}]
    for source in (rows, pandas.DataFrame(rows), lists):
        assert dataset(tokenizer, source).ids.tolist() == dataset(tokenizer, lists).ids.tolist()
    table = pandas.DataFrame([*records(2), {"prompt": None, "chosen": "a", "rejected": "b"}])
    assert dataset(tokenizer, table).set_aside["reason"].to_list() == ["prompt is missing"]


def test_rows_that_a_tokenizer_cannot_encode_are_set_aside(tokenizer):
    rows = [*records(3), {"prompt": "How many?", "chosen": "1", "rejected": "2"}]
    pairs = dataset(tokenizer, rows)
    assert pairs.set_aside.rows() == [(3, "the tokenizer cannot encode the text")]
    assert pairs.ids.tolist() == dataset(tokenizer, records(3)).ids.tolist()


def test_rows_that_a_template_cannot_render_are_set_aside(qwen):
    rows = [
        {"prompt": user("p"), "chosen": assistant("a"), "rejected": assistant("b")},
        {"prompt": user("\ud800"), "chosen": assistant("a"), "rejected": assistant("b")},
        {
            "prompt": [{"role": "user", "content": "q", "at": date(2026, 1, 1)}],
            "chosen": assistant("a"),
            "rejected": assistant("b"),
        },
        {
            "prompt": [*user("p"), {"role": "assistant", "content": "", "tool_calls": [{}]}],
            "chosen": assistant("a"),
            "rejected": assistant("b"),
        },
    ]
    pairs = PreferenceDataset.from_records(rows, tokenizer=qwen, max_length=64)
    assert len(pairs) + pairs.set_aside.height == 4
    assert 1 in pairs.set_aside["source_row"]


def test_a_template_that_writes_the_date_warns(qwen):
    qwen = deepcopy(qwen)
    qwen.chat_template = "{{ strftime_now('%d %b %Y') }}" + CHAT
    record, _ = SHAPES["conversational, explicit prompt"]
    with pytest.warns(UserWarning, match="writes today's date into every"):
        PreferenceDataset.from_records([record], tokenizer=qwen, max_length=64)


def test_tools_are_passed_to_the_template(qwen):
    qwen = deepcopy(qwen)
    qwen.chat_template = "{{ tools | tojson if tools else '' }}" + CHAT
    row = {"prompt": user("p"), "chosen": assistant("a"), "rejected": assistant("b")}
    tools = [{"name": "search"}]
    rows = [row, row | {"tools": tools}, row | {"tools": json.dumps(tools)}]
    pairs = PreferenceDataset.from_records(rows, tokenizer=qwen, max_length=64)
    assert len(pairs) == 2  # the last two rows are the same pair
    texts = [qwen.decode(sequence.tokens) for sequence in pairs.sequences()[:2]]
    assert ["search" in text for text in texts] == [False, True]


def test_a_folder_of_exports_reads_back(tokenizer, tmp_path):
    write(".jsonl", records(), tmp_path / "kept.jsonl")
    (tmp_path / "dataset_info.json").write_text("{}")
    write(".parquet", [{"row": 1}], tmp_path / "kept.selection.parquet")
    check_same(PreferenceDataset.read(tmp_path, tokenizer=tokenizer, max_length=64),
               dataset(tokenizer))  # fmt: skip


def test_tokens_stay_in_memory_if_the_cache_is_not_writable(tokenizer, tmp_path, monkeypatch):
    write(".jsonl", records(), tmp_path / "pairs.jsonl")
    monkeypatch.setattr(cache_files, "replace_durably", refuse)
    with pytest.warns(UserWarning, match="tokens stay in memory"):
        pairs = PreferenceDataset.read(
            tmp_path / "pairs.jsonl", tokenizer=tokenizer, max_length=64, cache=tmp_path / "cache"
        )
    check_same(pairs, dataset(tokenizer))
    assert list((tmp_path / "cache").glob("*.arrow")) == []


def refuse(*args):
    raise PermissionError("read-only")


def test_a_file_that_changes_during_reading_gets_no_manifest(tokenizer, tmp_path, monkeypatch):
    path, cache = tmp_path / "pairs.jsonl", tmp_path / "cache"
    write(".jsonl", records(3), path)
    read_records = dataset_module.read_records

    def change_during_reading(*args, **options):
        rows = list(read_records(*args, **options))
        write(".jsonl", records(5), path)
        yield from rows

    monkeypatch.setattr(dataset_module, "read_records", change_during_reading)
    PreferenceDataset.read(path, tokenizer=tokenizer, max_length=64, cache=cache)
    assert list(cache.glob("*.json")) == []


def test_one_bad_line_does_not_spoil_a_file(tokenizer, tmp_path):
    path = tmp_path / "pairs.jsonl"
    lines = [json.dumps(row) for row in records()]
    path.write_text("\ufeff" + "\n".join([*lines, "null", "[1, 2]"]), encoding="utf-8")
    pairs = PreferenceDataset.read(path, tokenizer=tokenizer, max_length=64)
    assert len(pairs) == 5
    assert pairs.set_aside["reason"].to_list() == ["not a record"] * 2


def test_truncation_is_reported(tokenizer):
    pairs = dataset(tokenizer, max_length=9)
    assert pairs.column("truncated").all()
    assert "5 of them cut at 9 tokens" in pairs.waterfall()
    assert not dataset(tokenizer).column("truncated").any()


def test_input_columns_never_hide_built_in_columns(tokenizer):
    pairs = dataset(tokenizer, [row | {"pair_id": "mine"} for row in records()])
    assert pairs.column("input_pair_id").to_list() == ["mine"] * 5
    assert pairs.ids[0] == dataset(tokenizer).ids[0]


# With a real tokenizer


@pytest.fixture(scope="module")
def qwen(data):
    tokenizer = AutoTokenizer.from_pretrained(data / "tokenizers" / "qwen2")
    tokenizer.chat_template = CHAT
    tokenizer.eos_token = "<|endoftext|>"
    return tokenizer


@pytest.mark.parametrize("name", SHAPES)
def test_responses_read_back(name, qwen):
    record, (_, chosen, _) = SHAPES[name]
    pairs = PreferenceDataset.from_records([record], tokenizer=qwen, max_length=64)
    sequence = pairs.sequences()[0]
    text = qwen.decode(sequence.tokens[sequence.response_start :])
    if isinstance(chosen, str):
        assert text == chosen + qwen.eos_token
    else:  # ends as the template ends it, without a further end token
        assert text == chosen[0]["content"] + "</s>"


def test_a_prompt_end_merged_into_the_response(qwen):
    # "is " + "blue" is tokenised as "is", " blue": the space becomes part of the response
    rows = [{"prompt": "the sky is ", "chosen": "blue", "rejected": "red"}]
    pairs = PreferenceDataset.from_records(rows, tokenizer=qwen, max_length=64)
    chosen, rejected = pairs.sequences()
    assert qwen.decode(chosen.tokens[: chosen.response_start]) == "the sky is"
    assert qwen.decode(chosen.tokens) == "the sky is blue" + qwen.eos_token
    assert chosen.response_start == rejected.response_start


def test_conversations_need_a_chat_template(tokenizer):
    record, _ = SHAPES["conversational, explicit prompt"]
    with pytest.raises(ValueError, match="the tokenizer has no chat template"):
        dataset(tokenizer, [record])


def test_plain_text_needs_an_end_token(data):
    tokenizer = AutoTokenizer.from_pretrained(data / "tokenizers" / "qwen2")
    with pytest.raises(ValueError, match=r"set tokenizer\.eos_token"):
        dataset(tokenizer)


WATERFALL = {  # rows read, set aside, pairs
    "formats/dpo_en_demo.json.gz": (300, 19, 281),
    "formats/dpo_zh_demo.json.gz": (300, 12, 288),
    "formats/v1_dpo_demo.jsonl.gz": (10, 0, 10),
    "pairs/gsm8k_delta.parquet": (4590, 8, 4582),
    "pairs/gsm8k_verified.parquet": (3978, 6, 3972),
    "pairs/judgebench.parquet": (547, 0, 547),
    "pairs/llamafactory_demo.parquet": (600, 30, 570),
    "pairs/llmbar.parquet": (610, 2, 608),
    "pairs/math_rm.parquet": (200, 8, 192),
    "pairs/mr_gsm8k.parquet": (405, 0, 405),
    "pairs/nemo_math.parquet": (42, 0, 42),
    "pairs/pandalm.parquet": (999, 158, 841),
    "pairs/prometheus.parquet": (324, 0, 324),
}


@pytest.mark.parametrize("name", WATERFALL)
def test_real_files(name, data):
    tokenizer = AutoTokenizer.from_pretrained(data / "tokenizers" / "minimind_6400")
    pairs = PreferenceDataset.read(data / name, tokenizer=tokenizer, max_length=2048)
    counts = (len(pairs) + pairs.set_aside.height, pairs.set_aside.height, len(pairs))
    assert counts == WATERFALL[name]
    lines = pairs.waterfall().splitlines()
    numbers = [int(line.split()[0].replace(",", "")) for line in lines]
    assert sum(numbers[:-1]) == numbers[-1] == len(pairs)
    assert sorted([*pairs.column("source_row"), *pairs.set_aside["source_row"]]) == list(
        range(counts[0])
    )


def test_a_real_file_without_pairs(data):
    tokenizer = AutoTokenizer.from_pretrained(data / "tokenizers" / "minimind_6400")
    with pytest.raises(ValueError, match="'one labelled response, not a pair': 300"):
        PreferenceDataset.read(
            data / "formats" / "kto_en_demo.json.gz", tokenizer=tokenizer, max_length=2048
        )


def test_real_pairs(data, stories):
    _, tokenizer = stories
    table = pl.read_parquet(data / "pairs" / "gsm8k_verified.parquet").head(200)
    pairs = PreferenceDataset.from_records(table, tokenizer=tokenizer, max_length=512)
    assert len(pairs) + pairs.set_aside.height == 200
    assert np.array([len(s.tokens) for s in pairs.sequences()]).max() <= 512
    chosen = pairs.sequences()[0]
    assert chosen.tokens[0] == tokenizer.bos_token_id
    assert tokenizer.decode(chosen.tokens[1 : chosen.response_start]) == table["prompt"][0]


def test_pairs_tokenised_by_a_trainer_are_the_same_pairs():
    rows = [
        {"prompt": "7+3?", "chosen": "7+3=10", "rejected": "9", "clarity": "high"},
        {"prompt": "7+3?", "chosen": "7+3=10", "rejected": "4", "clarity": "low"},
        {"prompt": "7+3?", "chosen": "7+3=10", "rejected": "4", "clarity": "low"},
        {"prompt": "7+3?", "chosen": "1", "rejected": "7+3=4", "clarity": "low"},
    ]
    from_text = PreferenceDataset.from_records(rows, tokenizer=build_tokenizer(), max_length=9)
    sequences = [(s.tokens.tolist(), s.response_start) for s in from_text.sequences()]
    tokenised_rows = [
        {
            **rows[source],
            "prompt_ids": c[:start],
            "chosen_ids": c[start:],
            "rejected_ids": r[start:],
        }
        for source, (c, start), (r, _) in zip(
            from_text.column("source_row"), sequences[:3], sequences[3:], strict=True
        )
    ]
    from_tokens = PreferenceDataset.from_tokens(tokenised_rows, max_length=9)
    assert from_tokens.ids.tolist() == from_text.ids.tolist()
    assert from_tokens.column("prompt_id").to_list() == from_text.column("prompt_id").to_list()
    assert from_tokens.column("clarity").to_list() == ["high", "low", "low"]
    for expected, actual in zip(from_text.sequences(), from_tokens.sequences(), strict=True):
        assert actual.response_start == expected.response_start
        assert actual.tokens.tolist() == expected.tokens.tolist()


def test_pairs_tokenised_by_a_trainer_are_cut_named_and_set_aside():
    rows = [
        {"prompt_ids": [5, 6], "chosen_ids": [7, 8, 1], "rejected_ids": [9, 1], "pair_id": "a"},
        {"prompt_ids": [5, 6], "chosen_ids": [7, 8, 1], "rejected_ids": [7, 8, 9], "pair_id": "b"},
        {"prompt_ids": [5] * 4, "chosen_ids": [7], "rejected_ids": [8], "pair_id": "c"},
        {"prompt_ids": [5, 6], "chosen_ids": [7], "rejected_ids": [8], "pair_id": "a"},
    ]
    dataset = PreferenceDataset.from_tokens(rows, max_length=4)
    assert dataset.ids.tolist() == ["a"]
    assert [s.tokens.tolist() for s in dataset.sequences()] == [[5, 6, 7, 8], [5, 6, 9, 1]]
    assert dataset.set_aside["source_row"].to_list() == [1, 2, 3]
    with pytest.raises(ValueError, match="the records have no prompt_ids"):
        PreferenceDataset.from_tokens([{"prompt": "?"}], max_length=4)
