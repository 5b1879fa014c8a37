"""Exports read back as the pairs that were scored, or are refused."""

import json
import random
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sage_select import PreferenceDataset
from sage_select.app.jobs import _write_table
from sage_select.data.exports import ENDINGS, FORMATS, write_pairs
from sage_select.data.records import checked_pair
from sage_select.data.sources import read_records
from sage_select.references.logp_tables import has_column, read_reference
from sage_select.system.files import SpoiledFile, checksum_path

END = "{{ '<|im_end|>\n' }}"
HEAD = "{% if tools %}<|im_start|>tools {{ tools | tojson }}" + END + "{% endif %}"
OPEN = (
    "{% if add_generation_prompt %}<|im_start|>assistant{{ '\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
    "{% endif %}"
)
TURN = (
    "<|im_start|>{{ m.role }}{% if m.name %} {{ m.name }}{% endif %}{{ '\n' }}"
    "{% if m.role == 'assistant' and enable_thinking is defined and not enable_thinking %}"
    "<think></think>{% endif %}"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content or '' }}{% for call in m.tool_calls or [] %}"
    "<call>{{ call.function.name }} {{ ARGUMENTS }}</call>{% endfor %}"
)
LOOP = "{% for m in messages %}" + TURN + END + "{% endfor %}"
TEMPLATE = HEAD + LOOP + OPEN


@pytest.fixture(scope="module")
def tokenizer():
    return build(TEMPLATE.replace("ARGUMENTS", "call.function.arguments | tojson"))


@pytest.fixture(scope="module")
def tokenizer_of_text_arguments():
    # adding a mapping to a text fails, as in the templates of DeepSeek
    return build(TEMPLATE.replace("ARGUMENTS", "'json ' + call.function.arguments"))


def build(template):
    """Build a tokenizer of one token per byte, so that every difference in text is one."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken("<|im_start|>"), AddedToken("<|im_end|>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|im_end|>", chat_template=template
    )


def user(text, **more):
    return {"role": "user", "content": text, **more}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def system(text):
    return {"role": "system", "content": text}


def call(arguments, **more):
    function = {"name": "weather", "arguments": arguments}
    return {"role": "assistant", "tool_calls": [{"type": "function", "function": function}], **more}


def tool(text, **more):
    return {"role": "tool", "content": text, **more}


def pair(prompt, chosen="Blue.", rejected="Red.", **more):
    sides = [[assistant(r)] if isinstance(r, str) else r for r in (chosen, rejected)]
    return {"prompt": prompt, "chosen": sides[0], "rejected": sides[1], **more}


WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CLOCK = {"type": "function", "function": {"name": "clock", "parameters": {"default": None}}}

# records of each shape, and the reason why LLaMA-Factory's format cannot hold them
SHAPES = {
    "text": ([{"prompt": "Sky?", "chosen": " blue", "rejected": " red"}], None),
    "text, implicit prompt": ([{"chosen": "Sky? blue", "rejected": "Sky? red"}], None),
    "text, repeated prompt": (
        [{"prompt": "How is it?", "chosen": "How is it? A", "rejected": "How is it? B"}],
        None,
    ),
    "alpaca with input": (
        [{"instruction": "Sky", "input": "now?", "chosen": "blue", "rejected": "red"}],
        None,
    ),
    "alpaca with system and history": (
        [
            {
                "instruction": "Now?",
                "system": "Be brief.",
                "history": [["Sky?", "Up."]],
                "chosen": "blue",
                "rejected": "red",
            }
        ],
        None,
    ),
    "messages": ([pair([user("Sky?")])], None),
    "a text prompt beside messages": ([pair("Sky?")], None),
    "whole conversations": (
        [{"chosen": [user("Sky?"), assistant("A")], "rejected": [user("Sky?"), assistant("B")]}],
        None,
    ),
    "messages as JSON text": (
        [{name: json.dumps(value) for name, value in pair([user("Sky?")]).items()}],
        None,
    ),
    "content parts": ([pair([user([{"type": "text", "text": "Sky?"}])])], None),
    "sharegpt with system": (
        [
            {
                "system": "Be brief.",
                "conversations": [{"from": "human", "value": "Sky?"}],
                "chosen": {"from": "gpt", "value": "blue"},
                "rejected": {"from": "gpt", "value": "red"},
            }
        ],
        None,
    ),
    "an empty system message": ([pair([system(""), user("Sky?")])], None),
    "thinking in the text": (
        [pair([user("2+2?")], "<think>two</think>4", "<think>?</think>5")],
        None,
    ),
    "tools": (
        [pair([user("Rain?")], tools=[WEATHER]), pair([user("Snow?")], tools=[WEATHER, WEATHER])],
        None,
    ),
    "tools as JSON text": ([pair([user("Rain?")], tools=json.dumps([WEATHER]))], None),
    "tools of other fields": (
        [
            pair([user("Rain?")], tools=[WEATHER]),
            pair([user("Late?")], tools=[CLOCK]),
            pair([user("Sky now?")]),
        ],
        None,
    ),
    "tools in another order of names": (
        [
            pair([user("Rain?")], tools=[WEATHER]),
            pair([user("Snow?")], tools=[dict(reversed(WEATHER.items()))]),
        ],
        None,
    ),
    "a tool call as the response": (
        [pair([user("Rain?")], [call({"city": "Rome"})], "No idea.", tools=[WEATHER])],
        "a message without text",
    ),
    "tool calls with arguments as JSON text": (
        [pair([user("Rain?"), call('{"city":  "Rome"}'), tool("dry")])],
        "a message without text",
    ),
    "tool calls with other arguments": (
        [
            pair([user("Rain?"), call({"city": "Rome"}, content=None), tool("dry")]),
            pair([user("Rain?"), call({"lat": 41.9, "near": ["a", "b"]}), tool("dry")]),
            pair([user("Rain?"), call({}), tool("dry")]),
        ],
        "a message without text",
    ),
    "fields of messages": (
        [
            pair([user("Rain?", name="Ann")]),
            pair([user("Rain?", name="Bob"), assistant("?"), user("!")]),
        ],
        "a message with the field name",
    ),
    "reasoning": (
        [
            pair([user("2+2?")], [assistant("4", reasoning_content="two, two")], "5"),
            pair([user("3?")], [assistant("3", reasoning_content="hm")], "4"),
        ],
        "a message with the field reasoning_content",
    ),
    "several turns": (
        [
            pair(
                [user("Sky?")],
                [assistant("Blue."), user("Sure?"), assistant("Yes.")],
                [assistant("Red."), user("Sure?"), assistant("No.")],
            )
        ],
        "a response of several messages",
    ),
    "a prefilled start": ([pair([user("Sky?"), assistant("It is")])], "ends with an assistant"),
    "initial_reason_steps": (
        [{"prompt": "2+2?", "initial_reason_steps": "Two and", "chosen": "4", "rejected": "5"}],
        "ends with an assistant",
    ),
    "template options": (
        [pair([user("Sky?")], chat_template_kwargs={"enable_thinking": False}), pair([user("2?")])],
        "a record with chat_template_kwargs",
    ),
    "several template options": (
        [
            pair([user("1?")], chat_template_kwargs={"enable_thinking": False}),
            pair([user("2?")], chat_template_kwargs={"level": 2, "enable_thinking": True}),
            pair([user("3?")], chat_template_kwargs=json.dumps({"tone": "dry", "level": 1})),
        ],
        "a record with chat_template_kwargs",
    ),
    "a developer message": (
        [pair([{"role": "developer", "content": "Be brief."}, user("Sky?")])],
        "of the role developer",
    ),
    "a system message in between": (
        [pair([user("Sky?"), assistant("?"), system("Be brief."), user("Now?")])],
        "a prompt of the messages user, assistant, system, user",
    ),
    "two questions in a row": (
        [pair([user("Sky?"), user("Now?")])],
        "a prompt of the messages user, user",
    ),
    "more than two responses": (
        [{"prompt": "Sky?", "responses": ["red", "blue", "grey"], "scores": [1, 5, 3.5]}],
        None,
    ),
}  # fmt: skip


# in a table every call has the arguments of all, and DPOTrainer would render the nulls
OF_MANY_FIELDS = (
    "tool calls with other arguments",
    "template options",
    "several template options",
)


def read(path, tokenizer, **options):
    """Read a file of which every row must be usable."""
    options = {"on_bad": "error", "max_length": 4096, "show_progress": False} | options
    return PreferenceDataset.read(path, tokenizer=tokenizer, **options)


def tokens(dataset):
    return [(s.tokens.tolist(), s.scored.tolist()) for s in dataset.sequences()]


def exported(rows, path, format, **options):
    """Write all of some rows, the last first."""
    write_pairs(path, rows, np.arange(len(rows))[::-1], format=format, **options)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.filterwarnings("ignore:PreferenceDataset")  # short prompts, and the like
def test_round_trip(shape, format, tokenizer, tmp_path):
    """The same ids, tokens and scored positions, or a refusal with the reason."""
    check_round_trip(shape, format, tokenizer, tmp_path)


@pytest.mark.parametrize("format", ["same", "trl"])
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if "tool call" in shape])
def test_round_trip_of_text_arguments(shape, format, tokenizer_of_text_arguments, tmp_path):
    check_round_trip(shape, format, tokenizer_of_text_arguments, tmp_path)


def check_round_trip(shape, format, tokenizer, tmp_path):
    rows, refused = SHAPES[shape]
    source = tmp_path / "source.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows[::-1]))
    scored = read(source, tokenizer)
    for ending in ENDINGS:
        path = tmp_path / f"kept{ending}"
        if format == "llamafactory" and refused:
            with pytest.raises(ValueError, match=f"{refused}.*use --format trl or same"):
                exported(rows, path, format)
            assert not path.exists()
            continue
        if (format, ending) == ("trl", ".parquet") and shape in OF_MANY_FIELDS:
            with pytest.raises(ValueError, match=r"read back with another .*write \.jsonl"):
                exported(rows, path, format)
            continue
        exported(rows, path, format)
        again = read(path, tokenizer)
        assert tokens(again) == tokens(scored)
        if format == "same" or shape != "more than two responses":  # two of them are another pair
            assert again.ids.tolist() == scored.ids.tolist()


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("format", ["same", "trl"])
def test_rows_of_many_shapes_in_one_file(format, ending, tokenizer, tmp_path):
    """A table gives all rows the fields of all, null where a row has none."""
    left_out = OF_MANY_FIELDS if (format, ending) == ("trl", ".parquet") else ()
    rows = [
        row
        for shape, (rows, refused) in SHAPES.items()
        for row in rows
        if (refused or shape in ("messages", "tools of other fields"))
        and shape not in left_out
        # text beside messages, and JSON text beside values, have no common type in a table
        and not any(isinstance(row.get(name), str) for name in ("prompt", "chat_template_kwargs"))
        and "JSON text" not in shape
    ]
    exported(rows[::-1], tmp_path / f"kept{ending}", format)
    again = read(tmp_path / f"kept{ending}", tokenizer)
    scored = PreferenceDataset.from_records(rows, tokenizer=tokenizer, max_length=4096)
    assert len(again) == len(rows) > 10
    assert again.ids.tolist() == scored.ids.tolist()
    assert tokens(again) == tokens(scored)


# What one type per column cannot hold
NOT_FOR_PARQUET = {
    "an argument that is null": [pair([user("?"), call({"city": None, "day": 1}), tool("dry")])],
    "an option that is null": [pair([user("?")], chat_template_kwargs={"a": None})],
    "arguments of two types": [
        pair([user("?"), call({"city": value}), tool("dry")]) for value in (1, "one")
    ],
    "whole and other numbers": [
        pair([user("?"), call({"city": value}), tool("dry")]) for value in (1, 1.5)
    ],
    "arguments in another order": [
        pair([user("?"), call(arguments), tool("dry")])
        for arguments in ({"a": 1, "b": 2}, {"b": 2, "a": 1})
    ],
    "yes and one": [
        pair([user("?"), call({"city": value}), tool("dry")]) for value in (True, 1)
    ],
    "a list of two types": [pair([user("?"), call({"city": [1, "one"]}), tool("dry")])],
    "text beside messages": [
        pair([user("Sky?")]), {"prompt": "Sky?", "chosen": " a", "rejected": " b"}
    ],
    "prompts that are absent in some rows": [
        {"prompt": "Sky?", "chosen": " blue", "rejected": " red"},
        {"chosen": "Sky? blue", "rejected": "Sky? red"},
    ],
}  # fmt: skip


@pytest.mark.parametrize("reason", NOT_FOR_PARQUET)
def test_what_a_table_would_change_is_refused(reason, tmp_path):
    rows = NOT_FOR_PARQUET[reason]
    if reason == "an option that is null":  # written as JSON text, which TRL would not parse
        exported(rows, tmp_path / "kept.parquet", "same")
        assert checked_pair(next(read_records(tmp_path / "kept.parquet"))) == checked_pair(rows[0])
    format = "trl" if reason == "an option that is null" else "same"
    with pytest.raises(ValueError, match=r"as \.parquet: .*; write \.jsonl"):
        exported(rows, tmp_path / "refused.parquet", format)
    assert not (tmp_path / "refused.parquet").exists()
    exported(rows, tmp_path / "kept.jsonl", "same")
    records = [json.loads(line) for line in (tmp_path / "kept.jsonl").read_text().splitlines()]
    assert records == rows[::-1]


@pytest.mark.parametrize("format", ["trl", "llamafactory"])
def test_what_would_not_be_read_as_the_same_pair_is_refused(format, tmp_path):
    row = {
        "prompt": "Say it twice: ",
        "chosen": "Say it twice: Say it twice: a",
        "rejected": "Say it twice: Say it twice: b",
    }
    with pytest.raises(ValueError, match="record 0 would be read back with another chosen"):
        exported([row], tmp_path / "kept.jsonl", format)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("format", ["same", "trl"])
def test_mapped_columns(format, ending, tokenizer, tmp_path):
    """The same mapping reads unchanged records back, also if the first one lacks a column."""
    rows = [
        {"question": [user(f"{i}?")], "good": [assistant("yes")], "bad": [assistant("no")]} | extra
        for i, extra in enumerate([{"persona": "Be brief.", "prompt": 7}, {}])
    ]
    columns = {"prompt": "question", "chosen": "good", "rejected": "bad", "system": "persona"}
    path = tmp_path / f"kept{ending}"
    exported(rows, path, format, columns=columns)
    again = read(path, tokenizer, **({"columns": columns} if format == "same" else {}))
    scored = PreferenceDataset.from_records(
        rows, columns=columns, tokenizer=tokenizer, max_length=4096
    )
    rows_of = {s: n for n, s in enumerate(again.ids.tolist())}
    assert tokens(again.take([rows_of[s] for s in scored.ids.tolist()])) == tokens(scored)


@pytest.mark.parametrize("ending", [".jsonl", ".json"])
def test_options_of_all_records_are_written_for_trl(ending, tokenizer, tmp_path):
    options = {"enable_thinking": False, "tools": [WEATHER]}
    rows = [
        pair([user("1?")]),
        pair([user("2?")], tools=[CLOCK], chat_template_kwargs={"enable_thinking": True}),
        pair([user("3?")], tools=[CLOCK]),
    ]
    scored = PreferenceDataset.from_records(
        rows[::-1], tokenizer=tokenizer, max_length=4096, chat_template_kwargs=options
    )
    path = tmp_path / f"kept{ending}"
    exported(rows, path, "same", chat_template_kwargs=options)
    assert tokens(read(path, tokenizer, chat_template_kwargs=options)) == tokens(scored)
    exported(rows, path, "trl", chat_template_kwargs=options)
    assert tokens(read(path, tokenizer)) == tokens(scored)
    with pytest.raises(ValueError, match="a record with chat_template_kwargs"):
        exported(rows, path, "llamafactory", chat_template_kwargs=options)


def test_trl_records_all_have_options_if_one_has(tmp_path):
    """DPOTrainer unpacks the options of every row, and fails if they are null."""
    rows, _ = SHAPES["template options"]
    exported(rows, tmp_path / "kept.json", "trl")
    records = json.loads((tmp_path / "kept.json").read_text())
    assert [r["chat_template_kwargs"] for r in records] == [{}, {"enable_thinking": False}]


@pytest.mark.parametrize("ending", ENDINGS)
def test_llamafactory_is_told_the_columns(ending, tmp_path):
    """The columns are those of the file, since LLaMA-Factory reads every one that is named."""
    for shape, columns in {
        "text": {"prompt": "instruction"},
        "messages": {"messages": "conversations"},
        "tools of other fields": {"messages": "conversations", "tools": "tools"},
    }.items():
        name = f"{shape.partition(' ')[0]}{ending}"
        exported(SHAPES[shape][0], tmp_path / name, "llamafactory")
        entries = json.loads((tmp_path / "dataset_info.json").read_text())
        entry = entries[name.removesuffix(ending)]
        assert entry.pop("columns") == columns | {"chosen": "chosen", "rejected": "rejected"}
        sharegpt = {} if shape == "text" else {"formatting": "sharegpt"}
        assert entry == {"file_name": name, "ranking": True} | sharegpt
    assert len(entries) == 3
    mixed = SHAPES["text"][0] + SHAPES["messages"][0]
    with pytest.raises(ValueError, match="text and messages cannot be written into one file"):
        exported(mixed, tmp_path / "mixed.jsonl", "llamafactory")


@pytest.mark.parametrize("folder", ["a[1]*", "größe ?", "~"])
@pytest.mark.parametrize("format", FORMATS)
def test_paths_are_literal(folder, format, tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows, _ = SHAPES["tools"]
    for ending in ENDINGS:
        path = tmp_path / folder / f"kept[0]{ending}"
        exported(rows, path, format)
        assert len(read(path, tokenizer)) == len(rows)
    written = {path.name for path in (tmp_path / folder).iterdir()}
    files = {f"kept[0]{ending}" for ending in ENDINGS}
    checksums = {checksum_path(Path(file)).name for file in files}
    assert written - {"dataset_info.json"} == files | checksums
    assert [path.name for path in tmp_path.iterdir()] == [folder]


def test_a_source_that_has_changed_is_refused(tokenizer, tmp_path):
    rows = [pair([user(f"{i}?")]) for i in range(3)]
    ids = PreferenceDataset.from_records(rows, tokenizer=tokenizer, max_length=4096).ids.tolist()
    path = tmp_path / "kept.jsonl"
    write_pairs(path, rows, np.array([2, 0]), ids=[ids[2], ids[0]])
    before = path.read_bytes()
    for changed, message in {
        "row 2 of the source is not the pair that was scored": rows[::-1],
        "row 0 of the source cannot be used: rejected is missing": [
            {**rows[0], "rejected": None}, *rows[1:]
        ],
        "the source has no row 2 any more": rows[:2],
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=changed):
            write_pairs(path, message, np.array([2, 0]), ids=[ids[2], ids[0]])
    assert path.read_bytes() == before


def flip(path: Path, seed: int) -> None:
    """Flip a bit of a file."""
    content, draw = bytearray(path.read_bytes()), random.Random(seed)
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("ending", ENDINGS)
def test_an_export_that_has_changed_is_not_read(ending, seed, tokenizer, tmp_path):
    rows, _ = SHAPES["text"]
    path = tmp_path / f"kept{ending}"
    exported(rows, path, "same")
    content = path.read_bytes()
    flip(path, seed)
    with pytest.raises(SpoiledFile, match=rf"kept\{ending} is spoiled.*delete .*\.crc32"):
        read(path, tokenizer)
    path.write_bytes(content)
    assert len(read(path, tokenizer)) == len(rows)
    path.write_bytes(content + b"\n" * (ending == ".jsonl"))
    checksum_path(path).unlink()  # changed on purpose
    assert len(read(path, tokenizer)) == len(rows)


@pytest.mark.parametrize("ending", [".parquet", ".csv"])
def test_a_table_of_log_probs_that_has_changed_is_not_read(ending, tokenizer, tmp_path):
    rows = [{"prompt": f"{i}", "chosen": "a", "rejected": "b"} for i in range(30)]
    pairs = PreferenceDataset.from_records(rows, tokenizer=tokenizer, max_length=20)
    logps = -np.arange(1.0, 31.0) / 7
    table = pl.DataFrame({"pair_id": pairs.ids, "ref_chosen_logps": logps,
                          "ref_rejected_logps": logps * 2})  # fmt: skip
    path = tmp_path / f"scores{ending}"
    _write_table(table, path)
    assert read_reference(path, pairs).chosen.tolist() == logps.tolist()
    content = path.read_bytes()
    for seed in range(20):
        flip(path, seed)
        for use in (lambda: read_reference(path, pairs), lambda: has_column(path, "pair_id")):
            with pytest.raises(SpoiledFile, match=r"read_reference: .*scores.* is spoiled"):
                use()
        checksum_path(path).rename(tmp_path / "aside")  # a table of another program has none
        reason = path.name
        try:  # what can be parsed cannot be told from a good table
            has_column(path, "pair_id")
            read_reference(path, pairs)
        except ValueError as error:
            reason = str(error)
        assert path.name in reason
        (tmp_path / "aside").rename(checksum_path(path))
        path.write_bytes(content)
