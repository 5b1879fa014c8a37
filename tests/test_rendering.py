"""Chat templates: which tokens of a conversation are scored, and what is warned about."""

import json
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from sage_select import PreferenceDataset, Reader, measure
from sage_select.data.pair_table import TokenSequence
from sage_select.models.sequences import distinct_sequences


def byte_tokenizer(template: str | None = None, *, starts: bool = False) -> Any:
    """Build a tokenizer of one token per byte: nothing merges, so every boundary is exact."""
    marks = ["<end>", "<bos>", "<a>", "<u>", "<s>", "<t>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({t: i for i, t in enumerate([*marks, *letters])}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    if starts:
        inner.post_processor = processors.TemplateProcessing("<bos> $A", None, [("<bos>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        eos_token="<end>",
        bos_token="<bos>",
        additional_special_tokens=marks[2:],
        chat_template=template,
    )


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str | None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def tool(text: str) -> dict[str, Any]:
    return {"role": "tool", "content": text}


def call(name: str, arguments: Any, text: str | None = None) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return assistant(text, tool_calls=[{"type": "function", "function": function}])


def template(
    content: str = "{{ m.content or '' }}",
    *,
    calls: str = "{{ c.function.name }} {{ c.function.arguments | tojson }}",
    begin: str = "",
    after: str = "<end>",
    opening: str = "<a>",
) -> str:
    """Build a chat template with a mark for each role, an end of turn, and tool calls."""
    return (
        "{% if tools %}{{ tools | tojson }}{% endif %}"
        "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}"
        "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}" + begin + "{% for m in messages %}"
        "<{{ m.role[0] }}>"
        "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
        + content
        + "{% for c in m.tool_calls or [] %}<call>"
        + calls
        + "</call>{% endfor %}"
        + after
        + "{% endfor %}{% if add_generation_prompt %}"
        + opening
        + "{% endif %}"
    )


PLAIN = template()
NEWLINE = template(after="<end>\n")
PARTS = template("{% for p in m.content or [] %}{{ p.text }}{% endfor %}")
NO_THOUGHTS = template("{{ (m.content or '').split('</think>')[-1] }}")
LATEST_THOUGHTS = template(
    "{{ (m.content or '') if loop.index0 > ns.last else (m.content or '').split('</think>')[-1] }}"
)
EACH_ARGUMENT = template(
    calls="{{ c.function.name }}{% for k, v in c.function.arguments.items() %} {{ k }}={{ v }}"
    "{% endfor %}"
)
JOINED_ARGUMENTS = template(calls="{{ c.function.name + ' ' + c.function.arguments }}")
PRINTED_ARGUMENTS = template(calls="{{ c.function.name }} {{ c.function.arguments }}")
SWITCH = template(
    "{% if quiet and m.role == 'assistant' %}<think></think>{% endif %}{{ m.content }}",
    opening="<a>{% if quiet %}<think></think>{% endif %}",
)
NO_SYSTEM = template(
    "{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{{ m.content }}"
)
TRIMMED = template("{{ (m.content or '') | trim }}")


def read(rows: list[dict[str, Any]], tokenizer: Any, **options: Any) -> tuple[Any, list[str]]:
    """Return the dataset and the warnings given while it was made."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        options = {"max_length": 4096, "show_progress": False} | options
        dataset = PreferenceDataset.from_records(rows, tokenizer=tokenizer, **options)
    return dataset, [str(w.message) for w in caught]


def scored(sequence: TokenSequence, tokenizer: Any) -> list[str]:
    """Return the text before the first scored token, and each run of scored tokens as text."""
    positions = sequence.scored
    runs = np.split(positions, np.flatnonzero(np.diff(positions) > 1) + 1)
    context = tokenizer.decode(sequence.tokens[: positions[0]])
    return [context, *(tokenizer.decode(sequence.tokens[run]) for run in runs)]


TEXTS = {"chosen": "Yes", "rejected": "No"}
TURNS = {"chosen": [assistant("Yes")], "rejected": [assistant("No")]}
THOUGHT = "<think>two, two</think>4"

OWN_WORDS: dict[str, tuple[str | None, dict[str, Any], list[str]]] = {
    "one turn": (PLAIN, {"prompt": [user("Q?")], **TURNS}, ["<u>Q?<end><a>", "Yes<end>"]),
    "text after the end of the only turn": (
        NEWLINE,
        {"prompt": [user("Q?")], **TURNS},
        ["<u>Q?<end>\n<a>", "Yes<end>\n"],
    ),
    "several turns": (
        NEWLINE,
        {
            "chosen": [user("Q?"), assistant("Yes"), user("More?"), assistant("Red")],
            "rejected": [user("Q?"), assistant("No"), user("Oh!"), assistant("Nine")],
        },
        ["<u>Q?<end>\n<a>", "Yes<end>", "Red<end>"],
    ),
    "a turn that repeats a role's mark": (
        PLAIN,
        {
            "prompt": [user("a")],
            "chosen": [assistant("a"), user("a> a"), assistant("a")],
            "rejected": [assistant("u"), user("u"), assistant("u")],
        },
        ["<u>a<end><a>", "a<end>", "a<end>"],
    ),
    "a tool result in the response": (
        PLAIN,
        {
            "prompt": [user("Rain?")],
            "chosen": [call("rain", {"in": "Rome"}), tool("42"), assistant("Yes")],
            "rejected": [call("rain", {"in": "Oslo"}), tool("42"), assistant("No")],
        },
        ["<u>Rain?<end><a>", '<call>rain {"in": "Rome"}</call><end>', "Yes<end>"],
    ),
    "earlier turns that a later one rewrites": (
        LATEST_THOUGHTS,
        {
            "prompt": [user("Rain?"), assistant("<think>see</think>Look"), tool("TOOL 42")],
            "chosen": [assistant("Yes"), user("Thanks"), assistant("Bye")],
            "rejected": [assistant("No"), user("Hm"), assistant("Sorry")],
        },
        ["<u>Rain?<end><a>Look<end><t>TOOL 42<end><a>", "Yes<end>", "Bye<end>"],
    ),
    "the start of a response": (
        PLAIN,
        {"prompt": [user("Q?"), assistant("I say ")], **TURNS},
        ["<u>Q?<end><a>I say ", "Yes<end>"],
    ),
    "the first steps of a solution": (
        PLAIN,
        {"prompt": "Q?", "initial_reason_steps": "Step 1: add.\n", **TEXTS},
        ["<u>Q?<end><a>Step 1: add.\n", "Yes<end>"],
    ),
    "reasoning in a field that the template reads": (
        PLAIN,
        {
            "prompt": [user("Q?")],
            "chosen": [assistant("4", reasoning_content="two, two")],
            "rejected": [assistant("5", reasoning_content="hm")],
        },
        ["<u>Q?<end><a>", "<think>two, two</think>4<end>"],
    ),
    "reasoning in another field": (
        PLAIN,
        {
            "prompt": [user("Q?")],
            "chosen": [assistant("4", thinking="two, two")],
            "rejected": [assistant("5", thinking="hm")],
        },
        ["<u>Q?<end><a>", "<think>two, two</think>4<end>"],
    ),
    "a turn whose reasoning a later one hides": (
        LATEST_THOUGHTS,
        {
            "prompt": [user("Q?")],
            "chosen": [assistant("<think>a</think>B"), user("u"), assistant("<think>c</think>D")],
            "rejected": [assistant("No")],
        },
        ["<u>Q?<end><a>", "B<end>", "<think>c</think>D<end>"],
    ),
    "turns without a generation prompt": (
        template(opening=""),
        {
            "prompt": [user("Q?")],
            "chosen": [assistant("Yes"), user("u"), call("f", {"x": 1}), tool("T"), assistant("D")],
            "rejected": [assistant("No")],
        },
        ["<u>Q?<end>", "<a>Yes<end>", '<a><call>f {"x": 1}</call><end>', "<a>D<end>"],
    ),
    "a start that the responses repeat": (
        PLAIN,
        {
            "prompt": [user("Q?"), assistant("I say ")],
            "chosen": [assistant("I say Yes")],
            "rejected": [assistant("I say No")],
        },
        ["<u>Q?<end><a>I say ", "Yes<end>"],
    ),
    "a history that the prompt repeats": (
        PLAIN,
        {"history": [["Hi", "Ho"]], "prompt": [user("Hi"), assistant("Ho"), user("Q?")], **TURNS},
        ["<u>Hi<end><a>Ho<end><u>Q?<end><a>", "Yes<end>"],
    ),
    "a history of messages, and answers as text": (
        PLAIN,
        {"history": [user("Hi"), assistant("Ho")], "prompt": [user("Q?")], **TEXTS},
        ["<u>Hi<end><a>Ho<end><u>Q?<end><a>", "Yes<end>"],
    ),
    "a template that takes content parts alone": (
        PARTS,
        {"prompt": [user("Q?")], **TURNS},
        ["<u>Q?<end><a>", "Yes<end>"],
    ),
    "content parts for a template that takes text": (
        PLAIN,
        {
            "prompt": [{"role": "user", "content": [{"type": "text", "text": "Q?"}]}],
            "chosen": [assistant([{"type": "text", "text": t} for t in ("Y", "es")])],  # type: ignore[arg-type]
            "rejected": TURNS["rejected"],
        },
        ["<u>Q?<end><a>", "Yes<end>"],
    ),
    "arguments as JSON text, encoded by the template": (
        PLAIN,
        {
            "prompt": [user("Q?")],
            "chosen": [call("f", '{"in": "Rome"}')],
            "rejected": [call("f", '{"in": "Oslo"}')],
        },
        ["<u>Q?<end><a>", '<call>f {"in": "Rome"}</call><end>'],
    ),
    "arguments as JSON text, iterated by the template": (
        EACH_ARGUMENT,
        {
            "prompt": [user("Q?")],
            "chosen": [call("f", '{"in": "Rome"}')],
            "rejected": [call("f", '{"in": "Oslo"}')],
        },
        ["<u>Q?<end><a>", "<call>f in=Rome</call><end>"],
    ),
    "arguments as a mapping, joined as text by the template": (
        JOINED_ARGUMENTS,
        {
            "prompt": [user("Q?")],
            "chosen": [call("f", {"in": "Rome"})],
            "rejected": [call("f", {"in": "Oslo"})],
        },
        ["<u>Q?<end><a>", '<call>f {"in": "Rome"}</call><end>'],
    ),
    "arguments as a mapping, printed by the template": (
        PRINTED_ARGUMENTS,
        {
            "prompt": [user("Q?")],
            "chosen": [call("f", {"in": "Rome"})],
            "rejected": [call("f", {"in": "Oslo"})],
        },
        ["<u>Q?<end><a>", '<call>f {"in": "Rome"}</call><end>'],
    ),
    "an argument that is null": (
        PLAIN,
        {
            "prompt": [user("Q?")],
            "chosen": [call("f", {"in": None})],
            "rejected": [call("f", {})],
        },
        ["<u>Q?<end><a>", '<call>f {"in": null}</call><end>'],
    ),
    "options of one row": (
        SWITCH,
        {"prompt": [user("Q?")], **TURNS, "chat_template_kwargs": '{"quiet": true}'},
        ["<u>Q?<end><a><think></think>", "Yes<end>"],
    ),
    "system beside a text": (
        PLAIN,
        {"system": "Be brief.", "prompt": "Q?", **TEXTS},
        ["<s>Be brief.<end><u>Q?<end><a>", "Yes<end>"],
    ),
    "system beside messages": (
        PLAIN,
        {"system": "Be brief.", "prompt": [user("Q?")], **TURNS},
        ["<s>Be brief.<end><u>Q?<end><a>", "Yes<end>"],
    ),
    "system beside whole conversations": (
        PLAIN,
        {
            "system": "Be brief.",
            "chosen": [user("Q?"), assistant("Yes")],
            "rejected": [user("Q?"), assistant("No")],
        },
        ["<s>Be brief.<end><u>Q?<end><a>", "Yes<end>"],
    ),
    "history beside a text": (
        PLAIN,
        {"history": [["Hi", "Ho"]], "prompt": "Q?", **TEXTS},
        ["<u>Hi<end><a>Ho<end><u>Q?<end><a>", "Yes<end>"],
    ),
    "messages as JSON text": (
        PLAIN,
        {
            "prompt": json.dumps([user("Q?")], indent=1),
            **{name: json.dumps(messages) for name, messages in TURNS.items()},
        },
        ["<u>Q?<end><a>", "Yes<end>"],
    ),
    "roles in another case of letters": (
        PLAIN,
        {
            "chosen": [{"from": "Human", "value": "Q?"}, {"from": "Assistant", "value": "Yes"}],
            "rejected": [{"from": "Human", "value": "Q?"}, {"from": "Assistant", "value": "No"}],
        },
        ["<u>Q?<end><a>", "Yes<end>"],
    ),
    "white space that the template trims": (
        TRIMMED,
        {"prompt": [user(" Q?\n")], "chosen": [assistant("\nYes ")], "rejected": [assistant("No")]},
        ["<u>Q?<end><a>", "Yes<end>"],
    ),
    "text that repeats its prompt": (
        None,
        {"prompt": "Q: 1+1?\nA:", "chosen": "Q: 1+1?\nA: 2", "rejected": "Q: 1+1?\nA: 3"},
        ["Q: 1+1?\nA:", " 2<end>"],
    ),
    "text with an end token and a newline": (
        None,
        {"prompt": "Q?", "chosen": "Yes<end>\n", "rejected": "No<end>\n"},
        ["Q?", "Yes<end>\n"],
    ),
}


@pytest.mark.parametrize("name", OWN_WORDS)
def test_only_the_models_own_words_are_scored(name):
    chat_template, row, expected = OWN_WORDS[name]
    tokenizer = byte_tokenizer(chat_template)
    dataset, _ = read([row], tokenizer)
    chosen, rejected = dataset.sequences()
    assert scored(chosen, tokenizer) == expected
    assert scored(rejected, tokenizer)[0] == expected[0]
    assert dataset.chosen_tokens[0] == len(chosen.scored) == chosen.scored.size


def test_options_of_all_rows_and_of_one():
    tokenizer = byte_tokenizer(SWITCH)
    row = {"prompt": [user("Q?")], **TURNS}
    rows = [row, row | {"chat_template_kwargs": {"quiet": False}}]
    dataset, _ = read(rows, tokenizer, chat_template_kwargs={"quiet": True})
    first, second = (dataset.take([i]).sequences()[0] for i in range(2))
    opening = scored(first, tokenizer)[0], scored(second, tokenizer)[0]
    assert opening == ("<u>Q?<end><a><think></think>", "<u>Q?<end><a>")


@pytest.mark.parametrize("rendered", ["<bos><u>Q?<end><a>", "<bos>"])
def test_a_text_gets_one_start_token(rendered):
    tokenizer = byte_tokenizer(starts=True)
    dataset, _ = read([{"prompt": rendered, **TEXTS}], tokenizer)
    assert scored(dataset.sequences()[0], tokenizer) == [rendered, "Yes<end>"]


OTHER_CONTEXTS = {
    "system": [{"prompt": "Q?", **TEXTS, "system": s} for s in ("Be brief.", "Be long.")],
    "history": [{"prompt": "Q?", **TEXTS, "history": [["Hi", s]]} for s in ("Ho", "Hu")],
    "first steps": [{"prompt": "Q?", **TEXTS, "initial_reason_steps": s} for s in ("One", "Two")],
    "tools": [
        {"prompt": [user("Q?")], **TURNS, "tools": [{"function": {"name": s}}]} for s in "fg"
    ],
    "options": [
        {"prompt": [user("Q?")], **TURNS, "chat_template_kwargs": {"quiet": s}}
        for s in (True, False)
    ],
}


@pytest.mark.parametrize("name", OTHER_CONTEXTS)
def test_pairs_in_other_contexts_are_no_duplicates(name):
    dataset, _ = read(OTHER_CONTEXTS[name], byte_tokenizer(SWITCH))
    assert len(set(dataset.ids.tolist())) == 2


WARNINGS: dict[str, tuple[str | None, dict[str, Any], str]] = {
    "reasoning in the content": (
        NO_THOUGHTS,
        {"prompt": [user("Q?")], "chosen": [assistant(THOUGHT)], "rejected": [assistant("5")]},
        "the chat template leaves out reasoning of responses",
    ),
    "reasoning in a field": (
        "{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}<end>{% endfor %}"
        "{% if add_generation_prompt %}<a>{% endif %}",
        {
            "prompt": [user("Q?")],
            "chosen": [assistant("4", reasoning_content="two")],
            "rejected": [assistant("5")],
        },
        "leaves out reasoning of responses",
    ),
    "an option that keeps reasoning": (
        "{# preserve_thinking #}" + NO_THOUGHTS,
        {"prompt": [user("Q?")], "chosen": [assistant(THOUGHT)], "rejected": [assistant("5")]},
        "pass chat_template_kwargs={'preserve_thinking': True}",
    ),
    "text beside a tool call": (
        template("{{ m.content if not m.tool_calls }}"),
        {
            "prompt": [user("Q?")],
            "chosen": [call("f", {}, "Let me see")],
            "rejected": [call("g", {}, "Hm")],
        },
        "leaves out text of responses",
    ),
    "tool calls": (
        "{% for m in messages %}<{{ m.role[0] }}>{{ m.content or '' }}<end>{% endfor %}"
        "{% if add_generation_prompt %}<a>{% endif %}",
        {
            "prompt": [user("Q?")],
            "chosen": [call("f", {"x": "one"}, "Yes")],
            "rejected": [call("f", {"x": "two"}, "No")],
        },
        "leaves out tool calls of responses",
    ),
    "system messages": (
        template("{{ m.content if m.role != 'system' }}"),
        {"prompt": "Q?", "system": "Be brief.", **TEXTS},
        "leaves out text of system messages in prompts",
    ),
    "tools": (
        PLAIN.replace("{{ tools | tojson }}", ""),
        {"prompt": [user("Q?")], **TURNS, "tools": [{"function": {"name": "f"}}]},
        "leaves out the tools of prompts",
    ),
    "another opening": (
        template(opening="<a><think>\n"),
        {"prompt": [user("Q?")], **TURNS},
        "the chat template's generation prompt is not how it begins a response",
    ),
    "a rewritten prompt": (
        OWN_WORDS["earlier turns that a later one rewrites"][0],
        OWN_WORDS["earlier turns that a later one rewrites"][1],
        "writes prompts differently when a response follows",
    ),
    "no end": (
        template(after=""),
        {"prompt": [user("Q?")], **TURNS},
        "writes nothing after a response",
    ),
    "a list of arguments as Python writes it": (
        PRINTED_ARGUMENTS.replace("c.function.arguments }}", "c.function.arguments.x }}"),
        {
            "prompt": [user("Q?")],
            "chosen": [call("f", {"x": ["a", None]})],
            "rejected": [call("f", {"x": ["b", None]})],
        },
        "writes arguments of tool calls as Python's repr",
    ),
    "an option with a misspelt name": (
        SWITCH,
        {"prompt": [user("Q?")], **TURNS, "chat_template_kwargs": {"quite": True}},
        "has an option that the chat template does not read",
    ),
    "a special token in a message": (
        PLAIN,
        {"prompt": [user("Q?<end><a>Say yes")], **TURNS},
        "a message contains a special token",
    ),
    "a prompt with the place of an image": (
        None,
        {"prompt": "<image> What is it?", **TEXTS},
        "has the place of an image",
    ),
    "a system prompt that is not text": (
        None,
        {"prompt": "Q?", "system": ["Be brief."], **TEXTS},
        "the field 'system' is not used, because it is not text",
    ),
    "a prompt that is not in the conversations": (
        PLAIN,
        {
            "prompt": "What now?",
            "chosen": [user("Q?"), assistant("Yes")],
            "rejected": [user("Q?"), assistant("No")],
        },
        "the field 'prompt' is not used",
    ),
    "conversations beside a prompt": (
        None,
        {"prompt": "Q?", "conversations": [{"from": "human", "value": "Hi"}], **TEXTS},
        "the field 'conversations' is not used",
    ),
    "a question that one response repeats": (
        None,
        {"prompt": "What is it?", "chosen": "Human: What is it? A cat", "rejected": "A dog"},
        "responses begin with their prompt",
    ),
    "input beside a prompt": (
        None,
        {"prompt": "Add", "input": "1+1", **TEXTS},
        "the field 'input' is not used",
    ),
    "a system prompt under another name": (
        None,
        {"prompt": "Q?", "system_prompt": "Be brief.", **TEXTS},
        "columns={'system': 'system_prompt'}",
    ),
    "the start of a solution under another name": (
        None,
        {"prompt": "Q?", "partial_solution": "One", **TEXTS},
        "columns={'initial_reason_steps': 'partial_solution'}",
    ),
    "a second system prompt": (
        PLAIN,
        {"system": "Be long.", "prompt": [{"role": "system", "content": "Be brief."}], **TURNS},
        "the field 'system' is not used",
    ),
    "tools beside texts": (
        None,
        {"prompt": "Q?", "tools": [{"function": {"name": "f"}}], **TEXTS},
        "the field 'tools' is not used",
    ),
    "a short text that is repeated": (
        None,
        {"prompt": "Hello", "chosen": "Hello there", "rejected": "Hello you"},
        "responses begin with their prompt",
    ),
}


@pytest.mark.parametrize("name", WARNINGS)
def test_what_is_lost_or_unused_is_warned_about_once(name, tmp_path):
    chat_template, row, words = WARNINGS[name]
    extra = "prompt" if isinstance(row.get("prompt"), str) else "tag"
    rows = [row, {**row, extra: f"{row.get(extra, '')} ", "tag": 1}]
    tokenizer = byte_tokenizer(chat_template)
    for _ in range(2):  # from the cache, too
        _, told = read(rows, tokenizer, cache=tmp_path)
        assert sum(words in warning for warning in told) == 1
        assert all("PreferenceDataset: in " in warning for warning in told), told
        assert all("The first is row 0" in warning for warning in told), told


@pytest.mark.parametrize("name", [name for name in OWN_WORDS if name not in WARNINGS])
def test_what_is_right_is_not_warned_about(name):
    chat_template, row, _ = OWN_WORDS[name]
    if chat_template is LATEST_THOUGHTS:
        pytest.skip("the template hides earlier reasoning")
    _, told = read([row], byte_tokenizer(chat_template))
    assert told == []


REFUSALS: dict[str, tuple[str | None, dict[str, Any], str, str]] = {
    "the template's own words": (
        NO_SYSTEM,
        {"system": "Be brief.", "prompt": "Q?", **TEXTS},
        "System role not supported",
        "columns=",
    ),
    "a division by zero in the template": (
        template("{{ m.content }}{{ 1 // 0 }}"),
        {"prompt": [user("Q?")], **TURNS},
        "the chat template cannot render the messages: integer division",
        "columns=",
    ),
    "endless recursion in the template": (
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        {"prompt": [user("Q?")], **TURNS},
        "cannot render the messages: maximum recursion depth",
        "max_length",
    ),
    "an unknown role": (
        PLAIN,
        {"prompt": [{"role": "narrator", "content": "Q?"}], **TURNS},
        "unknown role 'narrator'",
        "columns=",
    ),
    "answers that the template makes equal": (
        NO_THOUGHTS,
        {
            "prompt": [user("Q?")],
            "chosen": [assistant("<think>so</think>4")],
            "rejected": [assistant("<think>luck</think>4")],
        },
        "identical after the chat template",
        "max_length",
    ),
    "images": (None, {"images": ["a.png"], "prompt": "Q?", **TEXTS}, "images", "columns="),
    "sound": (None, {"audio": {"path": "a.wav"}, "prompt": "Q?", **TEXTS}, "audio", "columns="),
    "a part that is an image": (
        PLAIN,
        {"prompt": [{"role": "user", "content": [{"type": "image_url"}]}], **TURNS},
        "image_url",
        "columns=",
    ),
    "options that the library sets": (
        PLAIN,
        {"prompt": [user("Q?")], **TURNS, "chat_template_kwargs": {"tokenize": True}},
        "chat_template_kwargs sets tokenize",
        "max_length",
    ),
    "missing fields": (None, {"question": "Q?", "best": "Yes"}, "chosen is missing", "max_length"),
    "too long a prompt": (None, {"prompt": "Q" * 5000, **TEXTS}, "raise max_length", "columns="),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals_name_the_cause_and_fitting_advice(name):
    chat_template, row, words, misleading = REFUSALS[name]
    with pytest.raises(ValueError, match="the first is row 0") as error:
        read([row], byte_tokenizer(chat_template))
    assert words in str(error.value)
    assert misleading not in str(error.value)


def test_the_form_that_loses_least_is_taken_for_every_row():
    options = {"chat_template_kwargs": {"unknown": 1}}  # a loss in every form
    rows = [{"prompt": [user(text)], **TURNS, **options} for text in ("Q?", "R?")]
    tokenizer = byte_tokenizer(PARTS)
    dataset, _ = read(rows, tokenizer)
    texts = [scored(s, tokenizer) for s in dataset.sequences()[:2]]
    assert texts == [[f"<u>{text}<end><a>", "Yes<end>"] for text in ("Q?", "R?")]


NO_IMAGES = [None, [], [None], {"bytes": None, "path": None}, "[]", float("nan")]


@pytest.mark.parametrize("value", NO_IMAGES)
def test_a_record_without_images_may_have_their_field(value):
    dataset, told = read([{"images": value, "prompt": "Q?", **TEXTS}], byte_tokenizer())
    assert len(dataset) == 1
    assert told == []


def test_duplicates_that_differ_in_an_unknown_field_are_warned_about():
    rows = [{"prompt": "Q?", **TEXTS, "situation": s, "source_id": s} for s in ("at sea", "ashore")]
    _, told = read(rows, byte_tokenizer())
    assert len(told) == 1
    assert "differ from an earlier one in the field 'situation'" in told[0]


def test_special_tokens_in_texts_can_be_refused():
    rows = [{"prompt": [user(text)], **TURNS} for text in ("Q?", "Q?<end><a>Say yes")]
    tokenizer = byte_tokenizer(PLAIN)
    assert len(read(rows, tokenizer)[0]) == 2
    dataset, _ = read(rows, tokenizer, special_tokens="set_aside")
    assert dataset.set_aside.rows() == [(1, "a text contains the special token <end>")]


def test_a_response_of_several_turns_is_cut_in_whole_runs():
    tokenizer = byte_tokenizer(PLAIN)
    row = OWN_WORDS["several turns"][1]
    whole = read([row], tokenizer)[0].sequences()[0]
    for length in range(whole.response_start + 1, len(whole.tokens) + 1):
        sequence = read([row], tokenizer, max_length=length)[0].sequences()[0]
        assert sequence.scored.tolist() == [p for p in whole.scored.tolist() if p < length]
        assert sequence.tokens.tolist() == whole.tokens[: sequence.scored[-1] + 1].tolist()


HOSTILE = {
    "one-token prompt": TokenSequence(np.arange(9, 20, dtype=np.int32), 1),
    "one-token response": TokenSequence(np.arange(9, 30, dtype=np.int32), 20),
    "shortest": TokenSequence(np.array([7, 8], np.int32), 1),
    "several turns": TokenSequence(np.arange(50, 90, dtype=np.int32), 5, ((9, 12), (20, 33))),
    "its own prompt": TokenSequence(np.arange(50, 90, dtype=np.int32), 5),
    "a prompt that another one begins with": TokenSequence(np.arange(50, 60, dtype=np.int32), 3),
}


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    built = Qwen2ForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in built.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    return built


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_no_log_prob_depends_on_its_neighbours(model, layout):
    reader = Reader(layout=layout)
    with torch.no_grad():
        together = reader.response_logps(model, list(HOSTILE.values()))
        for logp, sequence in zip(together, HOSTILE.values(), strict=True):
            ids = torch.tensor(sequence.tokens.astype(np.int64))
            logps = model(ids[None]).logits[0].double().log_softmax(-1)
            positions = torch.from_numpy(sequence.scored)
            expected = logps[positions - 1].gather(-1, ids[positions, None]).sum()
            assert logp.item() == pytest.approx(expected.item(), abs=1e-3)


@pytest.mark.parametrize("start", [0, -1, 4])
def test_a_sequence_without_prompt_or_response_is_refused(model, start):
    sequence = TokenSequence(np.array([5, 6, 7, 8], np.int32), start)
    with pytest.raises(ValueError, match="must each have at least one token"):
        Reader(layout="padded").response_logps(model, [sequence])


BAD_TOKENS = {
    "the prompt is empty": {"prompt_ids": []},
    "a response is empty": {"chosen_ids": []},
    "prompt_ids is not a list of token ids": {"prompt_ids": [5, -1]},
    "chosen_ids is not a list of token ids": {"chosen_ids": [5.5]},
    "rejected_ids is not a list of token ids": {"rejected_ids": None},
    "the responses are identical as tokens": {"chosen_ids": [9, 0]},
}


@pytest.mark.parametrize("reason", BAD_TOKENS)
def test_tokens_of_trainers_are_checked_like_texts(reason):
    good = {"prompt_ids": [5, 6], "chosen_ids": [7, 0], "rejected_ids": [9, 0]}
    dataset = PreferenceDataset.from_tokens([good | BAD_TOKENS[reason], good], max_length=8)
    assert len(dataset) == 1
    assert dataset.set_aside["reason"][0].startswith(reason)


def test_equal_tokens_of_which_others_are_scored_are_other_sequences(model):
    tokenizer = byte_tokenizer(PLAIN)
    several = OWN_WORDS["several turns"][1]
    # the same tokens, but the first turns are the prompt
    prompt = several["chosen"][:3]
    last = {"prompt": prompt, "chosen": several["chosen"][3:], "rejected": [assistant("Nine")]}
    dataset, _ = read([several, last], tokenizer)
    assert dataset.sequences()[0].tokens.tolist() == dataset.sequences()[1].tokens.tolist()
    assert len(distinct_sequences(dataset)) == 4
    logps = measure(model, dataset, show_progress=False)
    assert logps.chosen[0] < logps.chosen[1] < 0
