import json

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from sage_select import PreferenceDataset
from sage_select.records import BadRecord, checked_pair, shared_start

CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def user(text):
    return [{"role": "user", "content": text}]


def assistant(text):
    return [{"role": "assistant", "content": text}]


# One pair in every accepted shape, and its (prompt, chosen, rejected)
SHAPES = {
    "standard, explicit prompt": (
        {"prompt": "Sky?", "chosen": " blue", "rejected": " red"},
        ("Sky?", " blue", " red"),
    ),
    "standard, implicit prompt": (
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
    "a prompt of messages that the responses repeat": (
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
    assert tuple(checked_pair(record)) == pair


GOOD = {"prompt": "p", "chosen": "a", "rejected": "b"}
BAD_RECORDS = {
    "chosen is missing": {"prompt": "p", "rejected": "b"},
    "rejected is missing": GOOD | {"rejected": None},
    "chosen is not text": GOOD | {"chosen": 7},
    "rejected is empty": GOOD | {"rejected": " \n"},
    "prompt is not text": GOOD | {"prompt": 7},
    "chosen and rejected are identical": GOOD | {"rejected": "a"},
    "chosen and rejected are of different kinds": GOOD | {"chosen": assistant("a")},
    "chosen and rejected share no prompt": {"chosen": "x", "rejected": "y"},
    "one response is the beginning of the other": {"chosen": "xy", "rejected": "xyz"},
    "chosen has a message without a role": GOOD | {"chosen": [{"content": "a"}]},
    "chosen has a message without text": GOOD | {"chosen": [{"role": "assistant"}]},
    "chosen does not end with an assistant message": GOOD | {"chosen": user("a")},
    "prompt is a list of messages but the responses are text": GOOD | {"prompt": user("p")},
    "not a record": None,
    "chosen is not valid Unicode": GOOD | {"chosen": "cut \ud83d"},
    "a response repeats a part of the prompt": {
        "prompt": user("p") + assistant("q") + user("r"),
        "chosen": user("p") + assistant("a"),
        "rejected": assistant("b"),
    },
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


# With the demo's tokenizer: one token per number or symbol, no token before the text


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


def test_truncation_counts_what_is_left(tokenizer):
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
        (5, "nothing is left of a response after truncation"),
        (6, "the responses are identical after truncation"),
    ]
    assert len(pairs) == 2
    assert pairs.column("source_row").to_list() == [0, 1]
    assert pairs.waterfall().splitlines()[0].strip() == "7 rows read"
    with pytest.raises(
        ValueError, match="5 of 7 rows cannot be used, the first is row 2: duplicate"
    ):
        dataset(tokenizer, rows, max_length=12, on_bad="error")


def test_ids_belong_to_the_content(tokenizer):
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


@pytest.mark.parametrize("kind", ["list", "polars", "datasets", "jsonl", "parquet"])
def test_every_kind_of_source_gives_the_same_pairs(kind, tokenizer, tmp_path):
    rows, expected = records(), dataset(tokenizer)
    if kind == "list":
        found = dataset(tokenizer, rows)
    elif kind == "polars":
        found = dataset(tokenizer, pl.DataFrame(rows))
    elif kind == "datasets":
        datasets = pytest.importorskip("datasets")
        found = dataset(tokenizer, datasets.Dataset.from_list(rows))
    else:
        path = tmp_path / f"pairs.{kind}"
        if kind == "jsonl":
            path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
        else:
            pl.DataFrame(rows).write_parquet(path)
        found = PreferenceDataset.read(path, tokenizer=tokenizer, max_length=64)
    assert found.ids.tolist() == expected.ids.tolist()
    assert found.annotations.equals(expected.annotations)
    assert [s.tokens.tolist() for s in found.sequences()] == [
        s.tokens.tolist() for s in expected.sequences()
    ]


def test_annotations_of_mixed_kinds_lose_nothing(tokenizer):
    mixed = [{"k": 1}, [1, "x"], 2.5, None, "text"]
    pairs = dataset(tokenizer, [r | {"mixed": m} for r, m in zip(records(), mixed, strict=True)])
    assert [m and json.loads(m) for m in pairs.column("mixed")] == mixed
    numbers = [row | {"number": n} for row, n in zip(records(), [1, 2.5, None, 3, 4], strict=True)]
    assert dataset(tokenizer, numbers).column("number").to_list() == [1.0, 2.5, None, 3.0, 4.0]


def test_one_odd_line_does_not_spoil_a_file(tokenizer, tmp_path):
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


def test_columns_of_the_input_never_hide_ours(tokenizer):
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
    else:  # the template's own end, and no end token after it
        assert text == chosen[0]["content"] + "</s>"


def test_a_prompt_that_melts_into_the_response(qwen):
    # "x " + "blue" is tokenised as "x", " blue": the space belongs to the response then
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


def test_real_pairs(data, stories):
    _, tokenizer = stories
    table = pl.read_parquet(data / "pairs" / "gsm8k_verified.parquet").head(200)
    pairs = PreferenceDataset.from_records(table, tokenizer=tokenizer, max_length=512)
    assert len(pairs) + pairs.set_aside.height == 200
    assert np.array([len(s.tokens) for s in pairs.sequences()]).max() <= 512
    chosen = pairs.sequences()[0]
    assert chosen.tokens[0] == tokenizer.bos_token_id
    assert tokenizer.decode(chosen.tokens[1 : chosen.response_start]) == table["prompt"][0]
