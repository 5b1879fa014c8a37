"""Tokens of preference rows, compared with DPOTrainer's on the chat templates that TRL ships.

    python examples/benchmarks/trl_tokens.py
    python examples/benchmarks/trl_tokens.py --templates qwen3 gemma3 --shapes "tool call" prefilled
    python examples/benchmarks/trl_tokens.py --templates qwen3 --shapes "several turns" --explain

Every template meets every shape of rows, once in DPOTrainer's own preparation of a dataset and
once in PreferenceDataset. The rows judge both: words of the responses begin with Good or Bad and
must be scored, all other words begin with Heard and must not be. The exit status is 1 if a
row is silently wrong here, or differs although TRL is right. Needs trl; nothing is downloaded.
"""

import argparse
import json
import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import datasets
import trl
from datasets import Dataset
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl.trainer import dpo_trainer

from sage_select import PreferenceDataset

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
MAX_LENGTH = 16_384
Row = dict[str, Any]

# marks of turns, tools and reasoning, as templates write them
MARKS = re.compile(r"<[|｜][^\s|｜>'\"]+[|｜]?>|</?[a-z_]+\|?>|\[/?[A-Z_]+\]")
ENDS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<turn|>", "<|END_OF_TURN_TOKEN|>",
        "<｜end▁of▁sentence｜>", "<|return|>", "<end_of_utterance>", "<|eot|>", "</s>")  # fmt: skip


def build_tokenizer(template: str) -> Any:
    """Build a tokenizer of one token per byte and per mark, so that every boundary is exact."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    end = next((mark for mark in ENDS if mark in template), "<|endoftext|>")
    inner = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    marks = sorted({end, "<bos>", *MARKS.findall(template)})
    inner.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in marks])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<bos>", eos_token=end, chat_template=template
    )


# Rows


def message(role: str, content: Any, **fields: Any) -> Row:
    return {"role": role, "content": content, **fields}


def user(content: Any = "Heardquestion?") -> Row:
    return message("user", content)


def call(city: str) -> Row:
    """Return an assistant message that calls a tool."""
    function = {"name": "get_weather", "arguments": {"city": city}}
    tool_calls = [{"id": "abcdef123", "type": "function", "function": function}]
    return message("assistant", "", tool_calls=tool_calls)


RESULT = message("tool", "Heardresult", name="get_weather", tool_call_id="abcdef123")
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Heardtool",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "Heardcity"}},
            "required": ["city"],
        },
    },
}
TOOLS = {"tools": [WEATHER]}


def pair(prompt: list[Row] | None, response: list[Row], **columns: Any) -> Row:
    """Return a row with this chosen response, and a rejected one that says Bad for Good."""
    opposite = json.loads(json.dumps(response).replace("Good", "Bad"))
    explicit = {} if prompt is None else {"prompt": prompt}
    return {**explicit, "chosen": response, "rejected": opposite, **columns}


def answer(content: Any = "Goodanswer.", **fields: Any) -> Row:
    return message("assistant", content, **fields)


def parts(text: str) -> list[Row]:
    return [{"type": "text", "text": text}]


SHAPES: dict[str, Row] = {
    "one turn": pair([user()], [answer()]),
    "implicit prompt": pair(None, [user(), answer()]),
    "system": pair([message("system", "Heardrule."), user()], [answer()]),
    "history": pair([user("Heardfirst?"), answer("Heardreply."), user()], [answer()]),
    "think": pair([user()], [answer("<think>\nGoodthought\n</think>\n\nGoodanswer.")]),
    "reasoning": pair([user()], [answer(reasoning_content="Goodthought")]),
    "tool call": pair([user()], [call("Goodtown")], **TOOLS),
    "tool result": pair([user(), call("Heardtown"), RESULT], [answer()], **TOOLS),
    "several turns": pair([user()], [answer("Goodfirst."), user("Heardmore?"), answer()]),
    "prefilled": pair([user(), answer("Heardstart:")], [answer()]),
    "options": pair([user()], [answer()], chat_template_kwargs={"enable_thinking": False}),
    "whitespace": pair([user("  Heardπ question?\n")], [answer(" Goodé 🙂 answer.\n")]),
    "tool in response": pair([user()], [call("Goodtown"), RESULT, answer()], **TOOLS),
    "rewritten": pair(
        [user(), {**call("Heardtown"), "reasoning_content": "Heardthought"}, RESULT],
        [answer("Goodfirst."), user("Heardmore?"), answer()],
        **TOOLS,
    ),
    "parts": pair([user(parts("Heardquestion?"))], [answer(parts("Goodanswer."))]),
}


# The two sides


class Scored(NamedTuple):
    """Tokens of a prompt with a response, and the positions whose log-probs count."""

    tokens: list[int]
    positions: list[int]


class Side(NamedTuple):
    """Chosen and rejected as one library reads them, or its refusal, and its warnings."""

    sequences: list[Scored]
    refusal: str
    warned: list[str]


def read_by_trl(row: Row, tokenizer: Any, config: Any) -> Side:
    """Tokenise a row in DPOTrainer's preparation of its dataset, which reads nothing of a model."""
    warned: list[str] = []
    trainer = SimpleNamespace(_tokenizer=tokenizer)
    # every row is a dataset of its own, but a logger warns only once in a process
    with mock.patch.object(dpo_trainer.logger, "warning_once", warned.append):
        try:
            (ids,) = dpo_trainer.DPOTrainer._prepare_dataset(
                trainer, Dataset.from_list([row]), tokenizer, config, "train"
            )
        except Exception as error:  # a template can raise errors of any type
            return Side([], f"{type(error).__name__}: {error}", warned)
    start = len(ids["prompt_ids"])
    sequences = [ids["prompt_ids"] + ids[name] for name in ("chosen_ids", "rejected_ids")]
    return Side([Scored(s, list(range(start, len(s)))) for s in sequences], "", warned)


def read_here(row: Row, tokenizer: Any) -> Side:
    """Tokenise a row in PreferenceDataset."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            dataset = PreferenceDataset.from_records(
                [row], tokenizer=tokenizer, max_length=MAX_LENGTH, show_progress=False
            )
        except ValueError as error:
            return Side([], str(error), [])
    said = [str(w.message) for w in caught if str(w.message).startswith("PreferenceDataset")]
    warned = [text for text in said if "today's date" not in text]  # true of every row alike
    return Side([_scored(sequence) for sequence in dataset.sequences()], "", warned)


def _scored(sequence: Any) -> Scored:
    everything = range(sequence.response_start, len(sequence.tokens))
    positions = getattr(sequence, "scored", everything)
    return Scored(sequence.tokens.tolist(), [int(position) for position in positions])


# The verdict


def faults(row: Row, side: Side, tokenizer: Any) -> list[str]:
    """List what is wrong with a row as read, judged by the words that are scored."""
    found = []
    for name, (tokens, positions) in zip(("chosen", "rejected"), side.sequences, strict=False):
        scored = tokenizer.decode([tokens[position] for position in positions])
        found += [f"{w} is not scored" for w in words(OWN, row[name]) if w not in scored]
        found += [f"{w} is scored" for w in words(HEARD, scored)]
        around = re.split(OWN, scored)
        if OPENING.search(around[0].replace(tokenizer.eos_token, "assistant")):
            found.append(f"the start of {name}'s turn is scored")
        if not MARKS.search(around[-1]):
            found.append(f"no end of {name} is scored")
        if re.search(r"[\"']type[\"']: ", scored):
            found.append(f"{name}'s content is written as data")
        if continues(row) and not re.search(f"Heardstart:{OWN}", tokenizer.decode(tokens)):
            found.append(f"{name} does not continue the prompt's last message")
    return found


def continues(row: Row) -> bool:
    """Return whether the response continues a message of the prompt."""
    return bool(row.get("prompt")) and row["prompt"][-1]["role"] == "assistant"


def lost(row: Row, side: Side, tokenizer: Any) -> list[str]:
    """List the words of the context that the template does not write."""
    context = [row.get("prompt"), row.get("tools")]
    return [
        f"{word} is lost"
        for tokens, _ in side.sequences[:1]
        for word in words(HEARD, context)
        if word not in tokenizer.decode(tokens)
    ]


OWN, HEARD = r"(?:Good|Bad)\w+", r"Heard\w+"
OPENING = re.compile(r"assistant|Assistant|CHATBOT|model\n|\[/INST\]")  # of the model's turn


def words(pattern: str, value: Any) -> list[str]:
    return sorted(set(re.findall(pattern, json.dumps(value, ensure_ascii=False))))


LEGEND = {
    "=": "equal, and right",
    "w": "equal, and we warn",
    "l": "equal, and the template leaves out a part of the context, silently",
    "b": "equal, and both warn",
    "t": "equal and right, and TRL warns of a new turn where the response continues one",
    "+": "differs: right here, not in TRL, or TRL warns or raises",
    "W": "differs, and we warn",
    "s": "set aside here, with a reason, where TRL is wrong or warns",
    "x": "refused by both",
    "E": "EQUAL AND WRONG, and we are silent",
    "S": "SET ASIDE although TRL is right",
    "T": "EQUAL, TRL warns that the prompt is no prefix, and we are silent",
    "D": "DIFFERS although TRL is right, or is wrong here, and we are silent",
}
BAD = "ESTD"


def verdict(row: Row, trl_side: Side, here: Side, tokenizer: Any) -> str:
    """Return a letter of `LEGEND`."""
    trl_right = not (trl_side.refusal or trl_side.warned or faults(row, trl_side, tokenizer))
    right = not here.refusal and not faults(row, here, tokenizer)
    if here.refusal:
        return "x" if trl_side.refusal else "S" if trl_right else "s"
    if here.sequences == trl_side.sequences:
        if here.warned:
            return "b" if trl_side.warned else "w"
        if not right:
            return "E"
        if trl_side.warned:  # of a new turn's start, which a continued message does not have
            return "t" if continues(row) else "T"
        return "l" if lost(row, here, tokenizer) else "="
    return "W" if here.warned else "+" if right and not trl_right else "D"


# The table


def show(row: Row, template: str, shape: str, sides: dict[str, Side], tokenizer: Any) -> None:
    """Print how each side reads a row, with the scored parts in double brackets."""
    for name, side in sides.items():
        print(f"\n{template} x {shape}, {name}: {side.refusal}")
        for tokens, positions in side.sequences:
            print("  ", repr(_marked(tokens, set(positions), tokenizer)))
        notes = faults(row, side, tokenizer) + lost(row, side, tokenizer)
        for line in [*notes, *(f"warns: {w}" for w in side.warned)]:
            print("  ", line)


def _marked(tokens: list[int], positions: set[int], tokenizer: Any) -> str:
    text, run = "", 0
    for end in range(1, len(tokens) + 1):
        if end == len(tokens) or (end in positions) != (run in positions):
            part = tokenizer.decode(tokens[run:end])
            text += f"⟦{part}⟧" if run in positions else part
            run = end
    return text


def compare(templates: Iterable[str], shapes: list[str], explain: bool) -> dict[str, list[str]]:
    """Return a letter per shape for each template."""
    config = trl.DPOConfig(max_length=MAX_LENGTH, report_to="none", use_cpu=True, bf16=False)
    table = {}
    for template in templates:
        tokenizer = build_tokenizer((TEMPLATES / f"{template}.jinja").read_text(encoding="utf-8"))
        table[template] = []
        for shape in shapes:
            row = SHAPES[shape]
            theirs, here = read_by_trl(row, tokenizer, config), read_here(row, tokenizer)
            letter = verdict(row, theirs, here, tokenizer)
            table[template].append(letter)
            if explain:
                show(row, template, shape, {"TRL": theirs, f"here [{letter}]": here}, tokenizer)
    return table


def main() -> int:
    names = sorted(path.stem for path in TEMPLATES.glob("*.jinja"))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--templates", nargs="+", choices=names, default=names, metavar="NAME")
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--explain", action="store_true", help="print both sides of every row")
    args = parser.parse_args()
    datasets.disable_progress_bars()
    table = compare(args.templates, args.shapes, args.explain)
    width = max(map(len, table))
    print()
    for number, shape in enumerate(args.shapes):
        print(" " * (width + 2) + "│ " * number + "┌ " + shape)
    for template, letters in table.items():
        print(f"{template:{width}}  {' '.join(letters)}")
    counts = Counter(letter for letters in table.values() for letter in letters)
    print(f"\n{len(table)} templates x {len(args.shapes)} shapes, TRL {trl.__version__}")
    for letter, meaning in LEGEND.items():
        print(f"{counts[letter]:6}  {letter}  {meaning}")
    return int(any(counts[letter] for letter in BAD))


if __name__ == "__main__":
    sys.exit(main())
