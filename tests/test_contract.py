"""One contract, every host: the same small run of SAGE, alone, replicated and sharded, killed and
resumed on other numbers of processes. What passed stands in docs/hosts.md, made by this run."""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from contract import FIRST_STEPS, KEPT, STEPS, learning_rates, records, trace

from sage_select import SelectionLog

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
WORLDS = {"single": 1, "ddp": 2, "fsdp2": 2}


@dataclass(frozen=True)
class Attempts:
    """A run, and the processes it is trained by: (strategy, processes, updates before the kill)."""

    name: str
    attempts: tuple[tuple[str, int, int | None], ...]

    @property
    def described(self) -> str:
        """In words, for people."""
        words = [f"{s} {w}" if s != "single" else "one" for s, w, _ in self.attempts]
        return ", then ".join(dict.fromkeys(words)) + (", killed" if len(self.attempts) > 1 else "")

    @property
    def as_options(self) -> list[dict]:
        names = ("strategy", "world", "die_after")
        return [dict(zip(names, attempt, strict=True)) for attempt in self.attempts]


def whole(strategy: str) -> Attempts:
    return Attempts(strategy, ((strategy, WORLDS[strategy], None),))


def killed(strategy: str) -> Attempts:
    """In the middle of an interval, and at a boundary between two."""
    world = WORLDS[strategy]
    kills = tuple((strategy, world, after) for after in (4, 5))
    return Attempts(f"{strategy}, killed", (*kills, (strategy, world, None)))


def elastic(begun: str, strategy: str, world: int) -> Attempts:
    """Killed in the middle of an interval, and resumed on another number of processes."""
    name = f"{begun} {WORLDS[begun]}, then {strategy} {world}"
    return Attempts(name, ((begun, WORLDS[begun], 4), (strategy, world, None)))


EVERY = (
    *(run(strategy) for run in (whole, killed) for strategy in WORLDS),
    elastic("fsdp2", "single", 1),
    elastic("fsdp2", "fsdp2", 4),
)
HOSTS = {
    "plain": EVERY,
    "lightning": EVERY,
    "trl": (  # transformers itself resumes no model that it has sharded
        *map(whole, WORLDS),
        killed("single"),
        killed("ddp"),
        elastic("ddp", "single", 1),
        elastic("ddp", "ddp", 4),
    ),
}
RUNS = [(host, run.name) for host, runs in HOSTS.items() for run in runs]
runs = pytest.mark.parametrize(("host", "name"), RUNS)


class Outcome:
    """What a run left behind."""

    def __init__(self, folder: Path, run: Attempts, codes: list[list[int]]) -> None:
        self.folder = folder
        self.run = run
        self.codes = codes

    def events(self, kind: str, rank: int | None = 0) -> list[dict]:
        """Those that the final weights came from: without what was done again after a kill."""
        found: list[dict] = []
        for n, (_, world, _) in enumerate(self.run.attempts):
            ranks = range(world) if rank is None else [rank]
            new = [event for r in ranks for event in trace(self.folder, n, r)]
            begun = min((e["step"] for e in new if e["event"] == "update"), default=0)
            found = [e for e in found if e["step"] < begun] + [e for e in new if e["step"] >= begun]
        return [event for event in found if event["event"] == kind]

    @property
    def kept(self) -> dict[int, list[str]]:
        log = SelectionLog(self.folder / "selection").read().filter("kept")
        return {k: sorted(ids) for k, ids in log.group_by("interval").agg("pair_id").iter_rows()}

    @property
    def said(self) -> str:
        """What its processes printed."""
        return "\n".join(p.read_text()[-2000:] for p in sorted(self.folder.glob("output-*.txt")))

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        return torch.load(self.folder / "weights.pt")

    def losses(self) -> np.ndarray:
        """Of each update, the mean over its pairs."""
        of_step: dict[int, list[float]] = {}
        for event in self.events("train", rank=None):
            of_step.setdefault(event["step"], []).extend(event["losses"])
        return np.array([np.mean(of_step[step]) for step in sorted(of_step)])


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """Of a host's run by name; a host is imported once, and makes all its runs."""
    pairs = tmp_path_factory.mktemp("contract") / "records.json"

    @cache
    def of_host(host: str) -> dict[str, Outcome]:
        if not pairs.exists():
            pairs.write_text(json.dumps(records()))
        folder = tmp_path_factory.mktemp(host)
        wanted = [{"name": run.name, "attempts": run.as_options} for run in HOSTS[host]]
        worker = [sys.executable, ROOT / "tests" / "contract_worker.py", f"{host}_host"]
        done = subprocess.run(
            [*worker, folder, json.dumps(wanted)],
            env=os.environ
            | {
                "CONTRACT_RECORDS": str(pairs),
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), str(ROOT / "examples")]),
            },
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        codes = json.loads((folder / "report.json").read_text())
        return {run.name: Outcome(folder / run.name, run, codes[run.name]) for run in HOSTS[host]}

    return lambda host, name: of_host(host)[name]


# The laws. Each takes a run and how to get at others of the same host, or of the plain loop.


def it_ends_as_it_should(run, of):
    for (_, world, dies), codes in zip(run.run.attempts, run.codes, strict=True):
        assert codes == ([0] if dies is None else [-9]) * world, run.said


def pools_are_measured_after_exactly_the_steps_before(run, of):
    measured = run.events("measure")
    assert [event["interval"] for event in measured] == list(range(len(FIRST_STEPS)))
    assert tuple(event["step"] for event in measured) == FIRST_STEPS


def mode_and_gradients_and_generators_are_left_alone(run, of):
    for event in run.events("measure", rank=None):
        assert event["training"]
        assert event["trainable"]
        assert not event["gradients"]
        assert not event["generators_moved"]


def each_kept_pair_is_trained_once_across_processes(run, of):
    trained = Counter(i for event in run.events("train", rank=None) for i in event["ids"])
    assert trained == Counter(i for ids in run.kept.values() for i in ids)
    assert tuple(len(run.kept[k]) for k in range(len(KEPT))) == KEPT


def totals_and_learning_rates_are_exact(run, of):
    updates = run.events("update")
    assert [event["step"] for event in updates] == list(range(STEPS))
    assert [event["learning_rate"] for event in updates] == pytest.approx(learning_rates())


def killed_and_resumed_it_ends_with_the_same_bits(run, of):
    if len(run.run.attempts) == 1 or len({attempt[:2] for attempt in run.run.attempts}) > 1:
        pytest.skip("it was not killed, or resumed on other processes")
    eval_mode = of(run.run.attempts[0][0])
    assert run.kept == eval_mode.kept
    for key, weight in eval_mode.weights.items():
        assert torch.equal(weight, run.weights[key]), key


def it_keeps_and_learns_what_one_plain_process_does(run, of):
    """From the same weights every host keeps the same; over a run rounding adds up."""
    alone = of("single", host="plain")
    if "an untied head" in run.said:
        pytest.skip("transformers shards no tied head, so this policy has one of its own")
    assert run.kept == alone.kept
    assert np.abs(run.losses() - alone.losses()).max() < 1e-4
    for key, weight in alone.weights.items():
        assert torch.allclose(run.weights[key], weight, atol=1e-3), key


LAWS = (
    it_ends_as_it_should,
    pools_are_measured_after_exactly_the_steps_before,
    each_kept_pair_is_trained_once_across_processes,
    totals_and_learning_rates_are_exact,
    mode_and_gradients_and_generators_are_left_alone,
    killed_and_resumed_it_ends_with_the_same_bits,
    it_keeps_and_learns_what_one_plain_process_does,
)


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
@runs
def test_the_contract(outcome, host, name, law):
    law(outcome(host, name), lambda other, host=host: outcome(host, other))


PAGE = """# The contract

{numbers} laws hold for a small run of SAGE, {steps} updates in four intervals, on every host. The
tests train it in real processes (gloo, on a CPU), and this page is what they write: it is compared
with every run of them.

{laws}

| host | processes | {columns} |
|---|---|{rule}
{rows}

A dash: the law says nothing here. Runs that are killed die by SIGKILL in the middle of an interval,
and those that go on with as many processes a second time, at a boundary. Transformers resumes no
model that it has sharded itself, and shards no tied head, so that the policy of that run has one of
its own.

What one plain process does (7) is the same kept pairs, losses within 1e-4 and weights within 1e-3.
"""


def page(outcome) -> str:
    """The page of the documentation, from what passes now."""
    rows = []
    for host, name in RUNS:
        cells = [host, outcome(host, name).run.described]
        for law in LAWS:
            try:
                law(outcome(host, name), lambda other, host=host: outcome(host, other))
                cells.append("yes")
            except pytest.skip.Exception:
                cells.append("-")
            except AssertionError:
                cells.append("**no**")
        rows.append(f"| {' | '.join(cells)} |")
    said = [law.__name__.replace("_", " ").capitalize() for law in LAWS]
    return PAGE.format(
        numbers={7: "Seven"}[len(LAWS)],
        steps=STEPS,
        laws="\n".join(f"{n}. {law}." for n, law in enumerate(said, 1)),
        columns=" | ".join(map(str, range(1, len(LAWS) + 1))),
        rule="---|" * len(LAWS),
        rows="\n".join(rows),
    )


def test_the_table_in_the_docs_is_what_passed(outcome):
    """To write it anew: SAGE_SELECT_WRITE_DOCS=1, and this file's tests."""
    path, made = ROOT / "docs" / "contract.md", page(outcome)
    if os.environ.get("SAGE_SELECT_WRITE_DOCS"):
        path.write_text(made)
    assert path.read_text() == made


def test_the_laws_can_fail(outcome, tmp_path):
    """A run that is told otherwise than it was breaks each of them."""
    run = outcome("plain", "single, killed")
    shutil.copytree(run.folder, tmp_path / "run")
    spoiled = Outcome(tmp_path / "run", run.run, [[0]] * 3)
    for path in spoiled.folder.glob("trace-*.jsonl"):
        events = [json.loads(line) for line in path.read_text().splitlines()]
        for event in events:
            event["step"] += event["event"] == "measure"
            event["ids"] = event.get("ids", [])[1:]
            event["learning_rate"] = 0.5
            event["gradients"] = True
        path.write_text("".join(json.dumps(event) + "\n" for event in events))
    weights = {name: weight + 0.1 for name, weight in run.weights.items()}
    torch.save(weights, spoiled.folder / "weights.pt")
    for law in LAWS:
        with pytest.raises(AssertionError):
            law(spoiled, lambda other, host="plain": outcome(host, other))
