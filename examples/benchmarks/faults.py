"""Faults made on purpose, one at a time, and counts of what became of each.

    python examples/benchmarks/faults.py
    python examples/benchmarks/faults.py --kinds checkpoint log --rounds 20 --seed 7
    python examples/benchmarks/faults.py --kinds kill --trials 3

Each trial does one thing to a copy of a small real run (a bit of a file is flipped, the process is
killed, the disk is full, a server or a function of the user's lies) and then goes on as a user
would. It ends in one of four ways:

    recovered   the results are bit-identical to those of the unharmed run
    named       an error or a warning names the file, the call or the value; nothing wrong is used
    SILENT      other results, without a word about it
    CRASH       a signal, a hang, a panic, or an error that does not name what is wrong

A trial runs in a process of its own. It depends on the seed, its kind and its number alone, so
`--kinds KIND --trials NUMBER` repeats it. The exit status is 1 if any trial was SILENT or a CRASH.
Needs `os.fork`; not available on Windows.

Not among the faults: damage to what has no author but the user, such as the data file and the saved
models, and lies that no check can see, such as plausible log-probs of the right rows that are off.
"""

import argparse
import hashlib
import importlib
import json
import math
import os
import pickle
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from stand_in_server import Reply, serving
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from arithmetic import build_tokenizer
from sage_select import (
    Constant,
    PairLogps,
    PreferenceDataset,
    Reader,
    SageConfig,
    SelectionLog,
    Selector,
    ServerMeasure,
    ShuffledLoader,
    Training,
    fit,
    jobs,
    nca,
    sage,
)
from sage_select.data.token_cache import evict_tokens
from sage_select.references.eviction import evict, stored_references
from sage_select.system.files import checksum_path
from sage_select.system.ledger import read_costs
from sage_select.training import loop
from sage_select.training.run_folder import RunFolder
from sage_select.training.sharding import load_best

# What a run imports on its way, so that not every trial does it again
for module in ("transformers.models.llama.modeling_llama", "transformers.trainer_utils", "pandas",
               "pyarrow.compute", "peft"):  # fmt: skip
    with suppress(ImportError):
        importlib.import_module(module)

RECOVERED, NAMED, SILENT, CRASH = "recovered", "named", "SILENT", "CRASH"
KILLED_AFTER = 4  # updates, of the run that damaged checkpoints and run files are resumed from
SECONDS = 120  # after which a trial counts as hanging; a good one takes a second or two


class Outcome(NamedTuple):
    """The end of a trial: one of the four words, and what was said or found."""

    verdict: str
    detail: str = ""


Results = dict[str, Any]
"""Results of a run, or of a part of it, by name; equal if the bits are."""


# Processes


class Child:
    """A forked process that does some work; forking after the imports makes a trial cheap."""

    def __init__(self, work: Callable[[], Any], seconds: int = SECONDS) -> None:
        receiver, sender = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(receiver)
            signal.alarm(seconds)  # ends a process that hangs
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # native code writes of its panics
            try:
                answer: Any = work()
            except BaseException as error:
                lines = traceback.format_exception_only(error)
                place = traceback.extract_tb(error.__traceback__)[-1]
                answer = Outcome(CRASH, f"{lines[-1].strip()} [{place.filename}:{place.lineno}]")
            with suppress(OSError), os.fdopen(sender, "wb") as pipe:
                pickle.dump(answer, pipe)
            os._exit(0)  # not sys.exit: the child must not run the parent's cleanup
        os.close(sender)
        self._pipe = os.fdopen(receiver, "rb")

    def kill(self) -> None:
        """Kill the process; nothing is cleaned up."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def answer(self) -> Any:
        """Wait for the process, and return what its work returned, or the outcome CRASH."""
        with self._pipe as pipe:
            content = pipe.read()
        _, status = os.waitpid(self.pid, 0)
        if content:
            return pickle.loads(content)
        number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        return Outcome(CRASH, f"it hung for {SECONDS} s" if number == signal.SIGALRM
                       else f"it ended by signal {number}")  # fmt: skip


def judged(
    use: Callable[[], Results],
    expected: Results,
    names: list[str],
    *,
    may_lack: tuple[str, ...] = (),
) -> Outcome:
    """Do what a user would do, and judge what comes of it.

    Args:
        use: Returns the results.
        expected: Results of the unharmed run.
        names: A message must contain one of these, to name what is wrong.
        may_lack: Results that may be smaller, if a warning names the cause.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            results = use()
        except (ValueError, TypeError, OSError, FloatingPointError) as error:
            named = any(name in str(error) for name in names)
            return Outcome(NAMED if named else CRASH, f"{type(error).__name__}: {error}")
    said = [str(warning.message) for warning in caught]
    wrong = [name for name in expected if results.get(name) != expected[name]]
    if not wrong:
        return Outcome(RECOVERED, "; ".join(said))
    warned = any(name in message for name in names for message in said)
    if warned and all(name in may_lack and results[name] <= expected[name] for name in wrong):
        return Outcome(NAMED, "; ".join(said))
    return Outcome(SILENT, f"other {', '.join(wrong)}; said: {'; '.join(said) or 'nothing'}")


# A small run, and all that it gives


def make_inputs() -> None:
    """Write a tiny model and some pairs into the current folder."""
    tokenizer, draw = build_tokenizer(), random.Random(0)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        attention_dropout=0.1,  # so that the random generators decide about the weights
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained("model")
    tokenizer.save_pretrained("model")
    digits = [str(digit) for digit in range(13)]
    rows = [
        {
            "prompt": f"{n % 13}+{n // 13}?",
            "chosen": ",".join(draw.choices(digits, k=draw.randint(1, 5))),
            "rejected": "=".join(draw.choices(digits, k=draw.randint(2, 6))),
            "note": f"row {n}",
            "origin": {"file": n % 3, "tags": [n, n + 1]},
        }
        for n in range(48)
    ]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def config(**places: str) -> SageConfig:
    """Return the configuration of the run, with its files in the current folder or elsewhere."""
    return SageConfig(
        model={"name": places.get("model", "model"), "dtype": "float32", "device": "cpu"},
        data={
            "path": places.get("data", "pairs.jsonl"),
            "max_length": 48,
            "held_out": 0.15,
        },
        reference={"store": places.get("store", "store")},
        strata={"by": "none"},
        selection={
            "mix_start": (1.0,),
            "mix_end": (1.0,),
            "keep_start": 0.8,
            "keep_end": 0.5,
            "refresh_steps": 3,
        },
        training={
            "epochs": 1,
            "batch_size": 4,
            "learning_rate": 0.01,
            "checkpoint_every": 2,
            "evaluate_every": 2,
        },
        folder=places.get("run", "run"),
    )


def trained(run: str = "run", **places: str) -> Results:
    """Train, from the start or from the newest checkpoint, and return the results."""
    jobs.train(config(run=run, **places), resume=True, show_progress=False)
    return results_of(Path(run))


def results_of(run: Path) -> Results:
    """Return the results in a run folder."""
    folder = RunFolder(run)
    files = {
        "weights": folder.model / "model.safetensors",
        "best weights": folder.best_model / "model.safetensors",
        "metrics": folder.metrics,
        "evaluations": folder.evaluations,
    }
    digests = {name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in files.items()}
    return {**digests, **decisions(run)}


def decisions(run: Path = Path("run")) -> Results:
    """Return the rows of the selection log."""
    return {"log": frozenset(SelectionLog(run / "selection").read().rows())}


def compared() -> Results:
    """Return the comparison of a run with a copy of it, for the intervals that could be read."""
    table = jobs.flips("run", "twin").select("interval", "kept", "flipped")
    return {"flips": frozenset(table.drop_nulls().rows())}  # null: could not be compared


def costs() -> Results:
    """Return the tokens of each phase, from the file of costs."""
    spent = read_costs(RunFolder("run").costs)
    return {"costs": Counter({name: work.tokens for name, work in spent.items()})}


def best() -> Results:
    """Return the best weights and their evaluation."""
    model = AutoModelForCausalLM.from_pretrained("model")
    evaluation = load_best(model, "run")
    return {"best": (evaluation, [p.detach().numpy().tobytes() for p in model.parameters()])}


def tokens(path: str = "pairs.jsonl", cache: str | None = None) -> Results:
    """Return tokens, ids and annotations of the pairs in a file."""
    pairs = PreferenceDataset.read(
        path,
        tokenizer=AutoTokenizer.from_pretrained("model"),
        max_length=48,
        cache=cache,
        show_progress=False,
    )
    sequences = [(s.tokens.tolist(), s.scored.tolist()) for s in pairs.sequences()]
    notes = [json.dumps(row, default=str) for row in pairs.annotations.to_dicts()]
    return {"tokens": sequences, "ids": pairs.ids.tolist(), "annotations": notes}


def scores() -> Results:
    """Return the log-probs of all pairs under policy and reference."""
    table = jobs.score(config(), show_progress=False).table
    return {name: table[name].to_list() for name in table.columns}


def described() -> Results:
    """Return what the store says of its references."""
    return {
        "descriptions": frozenset(
            item for r in stored_references("store") for item in sorted(r.description.items())
        ),
        "sequences": [r.sequences for r in stored_references("store")],
    }


def kept_by(table: str) -> Results:
    """Return the pairs that are kept by the log-probs of a table."""
    kept = jobs.select(config(), keep=0.4, policy_logps=table, show_progress=False)
    return {"kept": list(kept), "scores": kept.scores.tolist()}


class World(NamedTuple):
    """Folders with the state before, within and after a run; its results, and those of each use."""

    folder: Path
    expected: dict[str, Results]
    seconds: float

    def copy(self, state: str) -> None:
        """Copy a state into the current folder."""
        shutil.copytree(self.folder / state, ".", dirs_exist_ok=True)


def make_world(folder: Path) -> World:
    """Train the unharmed run, and once more until it is killed."""

    def finish() -> tuple[dict[str, Results], float]:
        start = time.perf_counter()
        trained()
        seconds = time.perf_counter() - start
        shutil.copytree("run", "twin")
        for ending in (".parquet", ".csv"):
            jobs.score(config(), policy="run/model", out=f"scores{ending}", show_progress=False)
        for ending in (".jsonl", ".json", ".parquet"):
            jobs.select(config(), keep=0.5, out=f"kept{ending}", policy_logps="scores.parquet",
                        show_progress=False)  # fmt: skip
        expected = {"run": results_of(Path("run"))}
        for kind, rows in DAMAGED.items():
            for place, row in enumerate(rows):
                of_run = row.use is trained
                expected[f"{kind} {place}"] = expected["run"] if of_run else row.use()
        return expected, seconds

    def interrupt() -> None:
        real = loop.save_checkpoint

        def save(folder: Any, step: int, *state: Any) -> None:
            real(folder, step, *state)
            if step == KILLED_AFTER:
                os.kill(os.getpid(), signal.SIGKILL)

        with patch.object(loop, "save_checkpoint", save):
            trained()

    def within(state: str, work: Callable[[], Any]) -> Any:
        os.chdir(folder / state)
        return work()

    (folder / "inputs").mkdir(parents=True)
    answers = [Child(partial(within, "inputs", make_inputs)).answer()]
    for state, work in (("killed", interrupt), ("finished", finish)):
        shutil.copytree(folder / "inputs", folder / state)
        answers.append(Child(partial(within, state, work)).answer())
    made, _, finished = answers
    if made is not None or isinstance(finished, Outcome):
        raise SystemExit(f"the unharmed run failed: {made or finished}")
    return World(folder, *finished)


# Damaged files


def flip(content: bytearray, draw: random.Random) -> bytearray:
    """Flip a bit."""
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    return content


def cut(content: bytearray, draw: random.Random) -> bytearray:
    """Cut the file somewhere."""
    return content[: draw.randrange(len(content))]


def zero(content: bytearray, draw: random.Random) -> bytearray:
    """Fill a block with zeros, as a file system does with a block that was never written."""
    size = draw.choice([16, 512, 4096])
    start = draw.randrange(len(content)) // size * size
    block = content[start : start + size]
    return content[:start] + bytes(len(block)) + content[start + size :]


def overwrite(content: bytearray, draw: random.Random) -> bytearray:
    """Replace some bytes by random ones."""
    start, size = draw.randrange(len(content)), draw.randint(1, 64)
    return content[:start] + draw.randbytes(size) + content[start + size :]


def repeat(content: bytearray, draw: random.Random) -> bytearray:
    """Write a part of the file a second time behind it."""
    return content + content[draw.randrange(len(content)) :]


DAMAGES = [flip, flip, flip, cut, zero, overwrite, repeat]  # a bit most often


def damage(path: Path, draw: random.Random) -> str:
    """Damage a file, and return how."""
    if draw.random() < 0.1:
        others = [file for file in path.parent.iterdir() if file.is_file() and file != path]
        if others and (other := draw.choice(sorted(others))).read_bytes() != path.read_bytes():
            shutil.copyfile(other, path)
            return f"{path} has the content of {other.name}"
    before = path.read_bytes()
    while True:
        how = draw.choice(DAMAGES)
        if (content := bytes(how(bytearray(before), draw))) != before:
            path.write_bytes(content)
            return f"{how.__name__} of {path}"


@dataclass(frozen=True)
class Damaged:
    """Files of one kind, and what a user does with them.

    Attributes:
        state: The state of the run in which a file is damaged.
        files: Pattern of the files.
        use: What is done then.
        may_lack: Results that may be smaller, if a warning names the file.
    """

    state: str
    files: str
    use: Callable[[], Results]
    may_lack: tuple[str, ...] = ()


CHECKPOINT = f"run/checkpoint-{KILLED_AFTER:08d}"

DAMAGED = {
    "token cache": [
        Damaged("finished", "cache/tokens/*.arrow", tokens),
        Damaged("finished", "cache/tokens/*.json", tokens),
        Damaged("killed", "cache/tokens/*", trained),
    ],
    "store": [
        Damaged("finished", "store/*/part-*.arrow", scores),
        Damaged("killed", "store/*/*", trained),
        Damaged("finished", "store/*/reference.json*", described, ("descriptions",)),
    ],
    "checkpoint": [
        Damaged("killed", f"{CHECKPOINT}/{name}", trained)
        for name in (".metadata", "__0_0.distcp", "run.pt", "rng-0.pt", "checksums.txt")
    ],
    "run files": [
        Damaged("killed", "run/config.yaml*", trained),
        Damaged("killed", "run/metrics.jsonl", trained),
        Damaged("killed", "run/evaluations.jsonl", trained),
        Damaged("killed", "run/costs.jsonl", trained),
        Damaged("finished", "run/costs.jsonl", costs, ("costs",)),
        Damaged("killed", "run/best.pt*", trained),
        Damaged("finished", "run/best.pt*", best),
    ],
    "log": [
        Damaged("finished", "run/selection/*.parquet", decisions, ("log",)),
        Damaged("finished", "run/selection/*.crc32", decisions, ("log",)),
        Damaged("finished", "run/selection/*.parquet", compared, ("flips",)),
        Damaged("killed", "run/selection/interval-*", trained, ("log",)),
    ],
    "exports": [
        *(
            Damaged("finished", f"kept{ending}", partial(tokens, f"kept{ending}", "new-cache"))
            for ending in (".jsonl", ".json", ".parquet")
        ),
        *(
            Damaged("finished", f"scores{ending}", partial(kept_by, f"scores{ending}"))
            for ending in (".parquet", ".csv")
        ),
    ],
}


def damaged_file(kind: str, world: World, number: int, draw: random.Random) -> Outcome:
    """Damage one file, and use it."""
    place = number % len(DAMAGED[kind])
    damaged = DAMAGED[kind][place]
    world.copy(damaged.state)
    victim = draw.choice(sorted(Path().glob(damaged.files)))
    how = damage(victim, draw)
    names = [victim.name.removesuffix(".crc32"), Path(CHECKPOINT).name]
    expected = world.expected[f"{kind} {place}"]
    verdict, detail = judged(damaged.use, expected, names, may_lack=damaged.may_lack)
    return Outcome(verdict, f"{how}: {detail}")


# Kills, full disks, processes side by side


def killed(world: World, number: int, draw: random.Random) -> Outcome:
    """Kill a run at random moments, and resume it."""
    world.copy("inputs")
    moments = [draw.uniform(0, world.seconds) for _ in range(draw.randint(1, 3))]
    for moment in moments:
        child = Child(trained)
        time.sleep(moment)
        child.kill()
        child.answer()
    verdict, detail = judged(trained, world.expected["run"], [])
    return Outcome(verdict, f"killed after {', '.join(f'{m:.3f} s' for m in moments)}: {detail}")


def full_disk(world: World, number: int, draw: random.Random) -> Outcome:
    """Let no file grow beyond a size, as on a full disk; then resume with more room."""
    world.copy(draw.choice(["inputs", "killed"]))
    size = int(2 ** draw.uniform(3, 17))

    def without_room() -> Outcome:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        return judged(trained, world.expected["run"], ["cannot be written"])

    first = Child(without_room).answer()
    if first.verdict in (SILENT, CRASH):
        return Outcome(first.verdict, f"files of {size} bytes at most: {first.detail}")
    verdict, detail = judged(trained, world.expected["run"], [])
    if verdict == RECOVERED:
        return first
    return Outcome(verdict, f"resumed, after files of {size} bytes at most: {detail}")


def side_by_side(world: World, number: int, draw: random.Random) -> Outcome:
    """Let two processes work in the same run folder, or with the same cache and store."""
    kind = ("run folder", "store and cache", "evicted")[number % 3]
    world.copy("killed" if kind == "run folder" and draw.random() < 0.5 else "inputs")
    names = {
        "run folder": ["another process is training in"],
        "evicted": ["another process evicts references"],
    }.get(kind, [])

    def evicting() -> Outcome:
        end = time.monotonic() + 2 * world.seconds
        while time.monotonic() < end:
            with suppress(OSError):
                evict_tokens(0)
                evict("store", max_size=0)
            time.sleep(draw.uniform(0, 0.05))
        return Outcome(RECOVERED)

    def training(run: str) -> Outcome:
        return judged(partial(trained, run), world.expected["run"], names)

    runs = ("run", "run") if kind == "run folder" else ("run", "other")
    works = [partial(training, run) for run in runs]
    if kind == "evicted":
        works[1] = evicting  # type: ignore[assignment]
    children = []
    for work in works:
        children.append(Child(work))
        time.sleep(draw.uniform(0, world.seconds / 2))
    outcomes = [child.answer() for child in children]
    worst = max(outcomes, key=lambda o: [RECOVERED, NAMED, SILENT, CRASH].index(o.verdict))
    if all(outcome.verdict == NAMED for outcome in outcomes):
        worst = Outcome(CRASH, "both were refused")
    return Outcome(worst.verdict, f"the same {kind}: {worst.detail}")


# Odd paths

NAMES = [
    "lr=[1e-4]", "run*", "a?b", "{x,y}", "$HOME", "${HOME}", "two words", " blank ", "a#1", "%20",
    "%s %d", "line\nbreak", "tab\there", "日本-ñ", "e\u0301", "-x", "--help", "[!a]", "back\\slash",
    "'quoted\"", "a~", "~", "~root", "file:x", "s3:x", "hf:x", "a&b;c", "null", "1e-4", ".hidden",
    "..x", "@", "!tag", "- item", "key: value", "x" * 150, "name.", "a,b", "a=b", "😀",
]  # fmt: skip
DECOYS = ["run1", "axb", "x", "1", "e", "HOME"]  # what a pattern would find


def names_in(folder: str | Path) -> set[str]:
    """Return the names in a folder."""
    return {path.name for path in Path(folder).iterdir()}


def odd_paths(world: World, number: int, draw: random.Random) -> Outcome:
    """Give every file and folder of a run an odd name, and look where everything is."""
    world.copy("inputs")
    home = Path("home")
    home.mkdir()
    os.environ["HOME"] = str(home.absolute())
    places: dict[str, str] = {}
    for kind in ("run", "store", "cache", "data", "model", "table", "export"):
        ending = {"data": ".jsonl", "table": draw.choice([".csv", ".parquet"]),
                  "export": draw.choice([".jsonl", ".json", ".parquet"])}.get(kind, "")  # fmt: skip
        parent = Path(f"{kind}s")
        parent.mkdir()
        for decoy in DECOYS:
            (parent / f"{decoy}{ending}").write_text("a decoy")
        path = parent / f"{NAMES[(number + draw.randrange(len(NAMES))) % len(NAMES)]}{ending}"
        places[kind] = str(path.absolute() if draw.random() < 0.5 else path)
    Path("model").rename(places["model"])
    Path("pairs.jsonl").rename(places["data"])
    os.environ["SAGE_SELECT_CACHE"] = places["cache"]
    before = names_in(".")

    def use() -> Results:
        given = {name: places[name] for name in ("run", "store", "data", "model")}
        file = Path("odd.yaml")
        file.write_text(config(**given).to_yaml(), encoding="utf-8")
        read = SageConfig.read(file, environment={})
        file.unlink()
        run, model = RunFolder(places["run"]), Path("model")
        jobs.train(read, resume=True, show_progress=False)
        jobs.score(read, policy=str(run.model), out=places["table"], show_progress=False)
        jobs.select(read, keep=0.5, policy_logps=places["table"], out=places["export"],
                    show_progress=False)  # fmt: skip
        model.symlink_to(Path(places["model"]).absolute())
        exported = tokens(places["export"])["tokens"]
        model.unlink()
        flipped = jobs.flips(run.path, world.folder / "finished" / "run")["flipped"].sum()
        astray = (names_in(".") - before) | names_in("home")
        for place in map(Path, places.values()):
            ending = place.suffix if place.is_file() else ""
            own = {place.name, jobs.decisions_path(place).name} | {d + ending for d in DECOYS}
            own |= {checksum_path(place.with_name(name)).name for name in own}
            astray |= names_in(place.parent) - own
            astray |= {place.name} - names_in(place.parent)
        results = results_of(run.path)
        return {**results, "export": exported, "flipped": flipped, "astray": astray}

    expected = {**world.expected["run"], "flipped": 0, "astray": set(),
                "export": world.expected["exports 0"]["tokens"]}  # fmt: skip
    verdict, detail = judged(use, expected, [])
    return Outcome(verdict, f"{places}: {detail}")


# Servers


def entries(reply: Reply, change: Callable[[Any], Any], draw: random.Random) -> Reply:
    """Change the log-prob of a token of an answer, in each place that has it."""
    body = json.loads(json.dumps(reply.body))
    choice = body["choices"][0]
    place = len(choice["logprobs"]["token_logprobs"]) - 2  # the last token that was sent
    logps = choice["logprobs"]["token_logprobs"]
    logps[place] = change(logps[place])
    if choice.get("prompt_logprobs"):
        for entry in choice["prompt_logprobs"][place].values():
            entry["logprob"] = change(entry["logprob"])
    return reply._replace(body=body)


def choice_with(reply: Reply, **fields: Any) -> Reply:
    """Change fields of an answer's choice."""
    body = json.loads(json.dumps(reply.body))
    body["choices"][0] |= fields
    return reply._replace(body=body)


def drops(reply: Reply) -> Iterator[bytes]:
    """Send an answer byte by byte, slower than anybody waits."""
    for byte in json.dumps(reply.body).encode():
        yield bytes([byte])
        time.sleep(0.05)


def bomb() -> bytes:
    """Return a few bytes that unpack to 400 MB."""
    packer = zlib.compressobj(9, wbits=31)
    block = bytes(1 << 20)
    return b"".join(packer.compress(block) for _ in range(400)) + packer.flush()


def replies() -> Mapping[str, Callable[[Reply, random.Random], Reply]]:
    """Return hostile replies by name: functions of the honest one."""
    numbers = {
        "false for 0": lambda p: False,
        "true for 1": lambda p: True,
        "text for a number": str,
        "NaN": lambda p: float("nan"),
        "infinity": lambda p: float("-inf"),
        "above 0": lambda p: -p + 1,
        "no number": lambda p: None,
        "a list": lambda p: [p],
        "a huge number": lambda p: -(10**400),
        "-9999": lambda p: -9999.0,
    }
    ids = {
        "short ids": lambda ids: ids[:-1],
        "other ids": lambda ids: [*ids[:-1], ids[-1] + 1],
        "ids as text": lambda ids: list(map(str, ids)),
        "ids as numbers with a point": lambda ids: list(map(float, ids)),
        "no ids": lambda ids: [],
        "true for id 1": lambda ids: [i == 1 or i for i in ids],
        "ids as a mapping": lambda ids: dict.fromkeys(map(str, ids)),
    }
    bodies: dict[str, Callable[[Any], Any]] = {
        "nothing": lambda body: b"",
        "half": lambda body: json.dumps(body)[: len(json.dumps(body)) // 2],
        "not UTF-8": lambda body: json.dumps(body).encode("utf-16"),
        "HTML": lambda body: "<html><body>Bad gateway</body></html>",
        "null": lambda body: None,
        "a list": lambda body: [body],
        "a text": lambda body: '"ok"',
        "deep nesting": lambda body: '{"choices": ' + "[" * 100_000 + "]" * 100_000 + "}",
        "deep nesting, cut": lambda body: "[" * 100_000,
        "choices twice": lambda body: '{"choices": [], ' + json.dumps(body)[1:],
        "no choice": lambda body: body | {"choices": []},
        "two choices": lambda body: body | {"choices": body["choices"] * 2},
        "another model": lambda body: body | {"model": "other"},
        "another number of tokens": lambda body: body | {"usage": {"prompt_tokens": 1}},
        "usage as a list": lambda body: body | {"usage": [1]},
        "a number of 10,000 digits": lambda body: '{"choices": ' + "9" * 10_000 + "}",
        "a number of 10,000 digits, later": lambda body: json.dumps(body)[:-1] + ', "x": '
        + "9" * 10_000 + "}",
    }  # fmt: skip
    table: dict[str, Callable[[Reply, random.Random], Reply]] = {
        "dripping": lambda reply, draw: reply._replace(body=drops(reply)),
        "endless": lambda reply, draw: reply._replace(body=iter([b" " * (1 << 20)] * 400)),
        "gzip bomb": lambda reply, draw: Reply(bomb(), 200, {"Content-Encoding": "gzip"}),
        "unasked gzip": lambda reply, draw: Reply(
            zlib.compress(json.dumps(reply.body).encode(), wbits=31), 200,
            {"Content-Encoding": "gzip"}),
        "choice of another request": lambda reply, draw: choice_with(reply, index=3),
        "no log-probs": lambda reply, draw: choice_with(
            reply, logprobs=None, prompt_logprobs=None),
        "endless error": lambda reply, draw: Reply(iter([b"no " * (1 << 18)] * 400), 500),
        "redirected": lambda reply, draw: Reply("", 302, {"Location": "http://127.0.0.1:1/"}),
        "busy for ever": lambda reply, draw: Reply("", 503, {"Retry-After": "1e300"}),
        "busy for NaN": lambda reply, draw: Reply("", 429, {"Retry-After": "nan"}),
    }  # fmt: skip
    for name, number in numbers.items():
        table[f"log-prob: {name}"] = lambda reply, draw, change=number: entries(reply, change, draw)  # type: ignore[misc]
    for name, ids_of in ids.items():
        table[name] = lambda reply, draw, change=ids_of: choice_with(  # type: ignore[misc]
            reply, prompt_token_ids=change(reply.body["choices"][0]["prompt_token_ids"])
        )
    for name, body in bodies.items():
        table[f"body: {name}"] = lambda reply, draw, change=body: reply._replace(  # type: ignore[misc]
            body=change(json.loads(json.dumps(reply.body)))
        )
    return table


REPLIES = replies()
SERVERS = [*REPLIES, "answers of another request", "other weights"]


def hostile_server(world: World, number: int, draw: random.Random) -> Outcome:
    """Score a pool on a server one of whose answers, or each of them, is hostile."""
    world.copy("inputs")
    name = SERVERS[number % len(SERVERS)]
    model = AutoModelForCausalLM.from_pretrained("model").eval()
    pool = dataset().take(sorted(draw.sample(range(40), 8)))
    attacked, earlier = draw.randint(2, 8), []
    served = AutoModelForCausalLM.from_pretrained("model").eval()
    if name == "other weights":
        with torch.no_grad():
            for parameter in served.parameters():
                parameter += torch.randn_like(parameter) * 0.3

    def alter(path: str, request: dict[str, Any], reply: Reply) -> Reply:
        if not request:
            return reply
        earlier.append(reply)
        if len(earlier) < attacked:
            return reply
        if name == "answers of another request":
            return earlier[-2]
        return REPLIES[name](reply, draw) if name in REPLIES else reply

    def use() -> Results:
        measure = ServerMeasure(
            url, "policy", check_responses=8 if name == "other weights" else 0, concurrency=1,
            timeout=1.0, retries=0, show_progress=False,
        )  # fmt: skip
        return {"log-probs": [field.tolist() for field in measure(model, pool)]}

    shape = draw.choice(["vllm", "sglang"])
    with serving(model, "policy", shape=shape) as url:
        expected = use() if name != "other weights" else {"log-probs": []}
    memory, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with serving(served, "policy", shape=shape, alter=alter) as url:
        verdict, detail = judged(use, expected, ["ServerMeasure: "])
        seconds = time.monotonic() - start
    growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) / 1024
    if growth > 200 or seconds > 10:
        verdict = CRASH
        detail = f"it took {growth:.0f} MB and {seconds:.0f} s; {detail}"
    return Outcome(verdict, f"{name} ({shape}): {detail}")


def dataset() -> PreferenceDataset:
    """Read the pairs."""
    tokenizer = AutoTokenizer.from_pretrained("model")
    return PreferenceDataset.read(
        "pairs.jsonl", tokenizer=tokenizer, max_length=48, show_progress=False
    )


# Functions of the user's own


def one(values: torch.Tensor, place: int, value: Any) -> torch.Tensor:
    """Return a copy of a tensor with another value at one place."""
    copy = values.clone()
    copy[place] = value
    return copy


def rolled(logps: PairLogps, *names: str) -> PairLogps:
    """Return log-probs in which some fields belong to the neighbour."""
    return logps._replace(**{name: getattr(logps, name).roll(1) for name in names})


Lie = Callable[[Any, random.Random], Any]

LOGPS: dict[str, Lie] = {
    "positions as rows": lambda x, _: x._replace(index=torch.arange(len(x.index))),
    "rows shifted": lambda x, _: x._replace(index=x.index + 1),
    "rows of a neighbour": lambda x, _: rolled(x, "chosen", "rejected", "chosen_tokens",
                                               "rejected_tokens"),
    "another order": lambda x, d: x.take(d.sample(x.index.tolist(), len(x.index))),
    "a row twice": lambda x, _: x._replace(index=one(x.index, 1, x.index[0])),
    "a row missing": lambda x, _: x.take(x.index[1:]),
    "a row too many": lambda x, _: PairLogps.concatenate([x, x.take(x.index[:1])]),
    "no rows": lambda x, _: x.take([]),
    "losses": lambda x, _: x._replace(chosen=-x.chosen, rejected=-x.rejected),
    "one above 0": lambda x, d: x._replace(rejected=one(x.rejected, d.randrange(8), 0.5)),
    "NaN": lambda x, d: x._replace(chosen=one(x.chosen, d.randrange(8), torch.nan)),
    "-inf": lambda x, d: x._replace(rejected=one(x.rejected, d.randrange(8), -torch.inf)),
    "chosen and rejected exchanged": lambda x, _: x._replace(
        chosen=x.rejected, rejected=x.chosen, chosen_tokens=x.rejected_tokens,
        rejected_tokens=x.chosen_tokens),
    "other token counts": lambda x, d: x._replace(
        chosen_tokens=one(x.chosen_tokens, d.randrange(8), d.randint(30, 99))),
    "no token counts": lambda x, _: x._replace(chosen_tokens=x.chosen_tokens * 0),
    "whole numbers": lambda x, _: x._replace(chosen=x.chosen.long()),
    "columns": lambda x, _: PairLogps(*(field[:, None] for field in x)),
    "a sum": lambda x, _: x._replace(chosen=x.chosen.sum()),
    "arrays": lambda x, _: PairLogps(*(field.numpy() for field in x)),
    "complex": lambda x, _: x._replace(chosen=x.chosen + 1j),
    "a tuple": lambda x, _: tuple(x),
    "a tensor": lambda x, _: x.chosen,
    "nothing": lambda x, _: None,
}  # fmt: skip
VALUES: dict[str, Lie] = {
    "NaN": lambda x, d: one(x, d.randrange(len(x)), torch.nan),
    "a mean": lambda x, _: x.mean(),
    "a column": lambda x, _: x[:, None],
    "too few": lambda x, _: x[1:],
    "too many": lambda x, _: torch.cat([x, x[:1]]),
    "a square": lambda x, _: x[:, None] - x,
    "complex": lambda x, _: x + 1j,
    "texts": lambda x, _: [str(value) for value in x.tolist()],
    "nothing": lambda x, _: None,
}
NUMBERS: dict[str, Lie] = {
    "above 1": lambda x, d: 1 + d.uniform(0.001, 9),
    "below 0": lambda x, d: -d.uniform(0.001, 9),
    "NaN": lambda x, _: float("nan"),
    "infinity": lambda x, _: float("inf"),
    "a text": lambda x, _: str(x),
    "a tuple": lambda x, _: (x,),
    "true": lambda x, _: True,
    "nothing": lambda x, _: None,
}
LOSSES: dict[str, Lie] = {
    **VALUES,
    "infinity": lambda x, d: one(x, d.randrange(len(x)), torch.inf),
    "whole numbers": lambda x, _: x.long(),
    "no gradient": lambda x, _: x.detach(),
    "a number": lambda x, _: x.sum().item(),
}
PARTS = {
    "measure": LOGPS, "reference": LOGPS, "score": VALUES, "keep": NUMBERS, "progress": NUMBERS,
    "loss in training": LOSSES, "loss of held-out pairs": LOSSES,
    "reference in training": LOGPS, "reference of held-out pairs": LOGPS,
}  # fmt: skip
LIES = [(part, name) for part, lies in PARTS.items() for name in lies]


class Lying:
    """A reference that changes what it looks up."""

    def __init__(self, logps: PairLogps, change: Callable[[PairLogps], Any]) -> None:
        self.logps, self.change = logps, change

    def take(self, rows: Any) -> Any:
        """Return the log-probs of some rows, changed."""
        return self.change(self.logps.take(rows))


def lying_function(world: World, number: int, draw: random.Random) -> Outcome:
    """Select or train with a function that lies."""
    world.copy("inputs")
    part, name = LIES[number % len(LIES)]
    pairs, reader = dataset(), Reader(show_progress=False)
    model = AutoModelForCausalLM.from_pretrained("model").eval()
    reference = reader(model, pairs)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)

    def changed(value: Any) -> Any:
        return PARTS[part][name](value, draw)

    function, _, about = part.partition(" ")
    names = ["measure", "policy"] if function == "measure" else [function]
    if about:
        honest = partial(trained_with, deepcopy(model), pairs, reference)
        use = partial(trained_with, model, pairs, reference, **{
            {"loss": "loss", "reference": "reference_changed"}[function]: changed,
            "held_out": about == "of held-out pairs",
        })  # fmt: skip
    else:
        pool = pairs.take(draw.sample(range(1, 48), 8))
        selector = Selector(sage, Constant(0.5), reference, lambda step: 0.5, measure=reader)
        lying = replace(selector, **{
            "measure": {"measure": lambda model, pool: changed(reader(model, pool))},
            "reference": {"reference": Lying(reference, changed)},
            "score": {"score": lambda policy, reference: changed(sage(policy, reference))},
            "keep": {"keep": lambda progress: changed(0.5)},
            "progress": {"progress": lambda step: changed(0.5)},
        }[function])  # fmt: skip
        honest, use = partial(decided, selector, model, pool), partial(decided, lying, model, pool)
    verdict, detail = judged(use, honest(), names, may_lack=("evaluations",))
    return Outcome(verdict, f"{part} returns {name}: {detail}")


def decided(selector: Any, model: Any, pool: PreferenceDataset) -> Results:
    """Return the kept rows and the evidence of a decision."""
    selection = selector.select(model, pool, 3)
    return {
        "kept": list(selection),
        "scores": selection.scores.tolist(),
        "rows": selection.policy.index.tolist(),
    }


def trained_with(
    model: Any,
    pairs: PreferenceDataset,
    reference: PairLogps,
    *,
    loss: Callable[[Any], Any] | None = None,
    reference_changed: Callable[[Any], Any] | None = None,
    held_out: bool = False,
) -> Results:
    """Train with a loss or a reference that is changed, for the held-out pairs or for the others.

    Returns:
        Digest of the weights, metrics of the steps, and finite metrics of the evaluations.
    """

    def is_meant(rows: Any) -> bool:
        return bool((torch.as_tensor(rows).min() >= 40) == held_out)

    def lying_loss(policy: PairLogps, reference: PairLogps, *, beta: float) -> Any:
        honest = nca(policy, reference, beta=beta)
        return loss(honest) if loss is not None and is_meant(policy.index) else honest

    def change(logps: PairLogps) -> Any:
        meant = reference_changed is not None and is_meant(logps.index)
        return reference_changed(logps) if meant else logps  # type: ignore[misc]

    torch.manual_seed(0)  # for dropout
    history = fit(
        model,
        ShuffledLoader(pairs.take(range(40)), batch_size=8),
        pairs,
        Lying(reference, change),
        Training(loss=lying_loss, learning_rate=1e-3, reader=Reader(show_progress=False)),
        held_out=pairs.take(range(40, 48)),
        show_progress=False,
    )
    finite = [e for e in history.evaluations if all(map(math.isfinite, e.values()))]
    return {
        "weights": [parameter.tolist() for parameter in model.parameters()],
        "metrics": history.steps,
        "evaluations": frozenset(tuple(sorted(evaluation.items())) for evaluation in finite),
    }


# The campaign


@dataclass(frozen=True)
class Kind:
    """A kind of fault.

    Attributes:
        act: Does one trial in the current folder, which is empty.
        size: Trials of a round.
    """

    act: Callable[[World, int, random.Random], Outcome]
    size: int


KINDS = {
    **{kind: Kind(partial(damaged_file, kind), len(rows)) for kind, rows in DAMAGED.items()},
    "kill": Kind(killed, 1),
    "full disk": Kind(full_disk, 1),
    "side by side": Kind(side_by_side, 3),
    "odd paths": Kind(odd_paths, 1),
    "server": Kind(hostile_server, len(SERVERS)),
    "functions": Kind(lying_function, len(LIES)),
}


def trial(world: World, kind: str, number: int, seed: int, folder: Path) -> Outcome:
    """Do one trial in a process and a folder of its own."""

    def act() -> Outcome:
        os.chdir(folder)
        os.environ["SAGE_SELECT_CACHE"] = "cache"
        torch.manual_seed(0)
        return KINDS[kind].act(world, number, random.Random(f"{seed} {kind} {number}"))

    folder.mkdir()
    try:
        outcome: Outcome = Child(act).answer()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return outcome


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n\n")[0], formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=10, help="trials of each fault (10)")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--trials", nargs="+", type=int, help="do only these trials of the kinds")
    parser.add_argument("--verbose", action="store_true", help="print every trial")
    args = parser.parse_args()
    if not hasattr(os, "fork"):
        print("faults.py needs os.fork, which this system does not have")
        return 0
    torch.set_num_threads(1)  # a process with several threads must not fork
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1",
                   "SAGE_SELECT_CACHE": "cache"}  # fmt: skip
    start, failures, counts = time.monotonic(), [], {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary).resolve()
        world = make_world(folder / "world")
        print(f"{'':14}{'trials':>8}{RECOVERED:>11}{NAMED:>7}{SILENT:>8}{CRASH:>7}", flush=True)
        for kind in args.kinds:
            count: Counter[str] = Counter()
            for number in args.trials or range(args.rounds * KINDS[kind].size):
                outcome = trial(world, kind, number, args.seed, folder / "trial")
                count[outcome.verdict] += 1
                line = f"{outcome.verdict} --kinds '{kind}' --trials {number} --seed {args.seed}: "
                line += " ".join(outcome.detail.replace(str(folder), "").split())
                if outcome.verdict in (SILENT, CRASH):
                    failures.append(line)
                if args.verbose:
                    print(line[:600], flush=True)
            counts[kind] = count
            print(row(kind, count), flush=True)
    print(row("all", sum(counts.values(), Counter())))
    print(f"{time.monotonic() - start:.0f} s")
    for line in failures:
        print(line[:1500])
    return 1 if failures else 0


def row(kind: str, count: Counter[str]) -> str:
    """Return a row of the table."""
    return (
        f"{kind:14}{count.total():8}{count[RECOVERED]:11}{count[NAMED]:7}{count[SILENT]:8}"
        f"{count[CRASH]:7}"
    )


if __name__ == "__main__":
    sys.exit(main())
