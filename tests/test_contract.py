"""The contract of all hosts: one small run of SAGE on one process, replicated and sharded, killed
and resumed on another number of processes. The tests generate docs/contract.md from what passed."""

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
    """A run and its attempts: (strategy, processes, updates before the kill or None)."""

    name: str
    attempts: tuple[tuple[str, int, int | None], ...]

    @property
    def described(self) -> str:
        """The run's processes, as the documentation describes them."""
        words = [f"{s} {w}" if s != "single" else "one" for s, w, _ in self.attempts]
        return ", then ".join(dict.fromkeys(words)) + (", killed" if len(self.attempts) > 1 else "")

    @property
    def as_options(self) -> list[dict]:
        names = ("strategy", "world", "die_after")
        return [dict(zip(names, attempt, strict=True)) for attempt in self.attempts]


def whole(strategy: str) -> Attempts:
    return Attempts(strategy, ((strategy, WORLDS[strategy], None),))


def killed(strategy: str) -> Attempts:
    """Return a run that is killed within an interval, and again at a boundary between intervals."""
    world = WORLDS[strategy]
    kills = tuple((strategy, world, after) for after in (4, 5))
    return Attempts(f"{strategy}, killed", (*kills, (strategy, world, None)))


def elastic(begun: str, strategy: str, world: int) -> Attempts:
    """Return a run that is killed within an interval and resumed on other processes."""
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
    "trl": (  # transformers cannot resume a model that it has sharded
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
    """The files that a run wrote, and the exit codes of its processes."""

    def __init__(self, folder: Path, run: Attempts, codes: list[list[int]]) -> None:
        self.folder = folder
        self.run = run
        self.codes = codes

    def events(self, kind: str, rank: int | None = 0) -> list[dict]:
        """Return the events of one rank, or of all, that the final weights depend on.

        Events that a later attempt repeated after a kill are left out.
        """
        events: list[dict] = []
        for n, (_, world, _) in enumerate(self.run.attempts):
            ranks = range(world) if rank is None else [rank]
            new = [event for r in ranks for event in trace(self.folder, n, r)]
            start = min((e["step"] for e in new if e["event"] == "update"), default=0)
            events = [e for e in events if e["step"] < start]
            events += [e for e in new if e["step"] >= start]
        return [event for event in events if event["event"] == kind]

    @property
    def kept(self) -> dict[int, list[str]]:
        log = SelectionLog(self.folder / "selection").read().filter("kept")
        return {k: sorted(ids) for k, ids in log.group_by("interval").agg("pair_id").iter_rows()}

    @property
    def output(self) -> str:
        """The end of the output of each process."""
        return "\n".join(p.read_text()[-2000:] for p in sorted(self.folder.glob("output-*.txt")))

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        return torch.load(self.folder / "weights.pt")

    def losses(self) -> np.ndarray:
        """Return each update's mean loss over its pairs."""
        of_step: dict[int, list[float]] = {}
        for event in self.events("train", rank=None):
            of_step.setdefault(event["step"], []).extend(event["losses"])
        return np.array([np.mean(of_step[step]) for step in sorted(of_step)])


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """Return a host's run by name; all runs of a host share one process that has imported it."""
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


# The laws. Each takes an outcome and a function that returns other outcomes, by default of the
# same host. Their names become the sentences of docs/contract.md.


def every_process_exits_as_expected(run, of):
    for (_, world, dies), codes in zip(run.run.attempts, run.codes, strict=True):
        assert codes == ([0] if dies is None else [-9]) * world, run.output


def pools_are_scored_after_exactly_the_planned_updates(run, of):
    measured = run.events("measure")
    assert [event["interval"] for event in measured] == list(range(len(FIRST_STEPS)))
    assert tuple(event["step"] for event in measured) == FIRST_STEPS


def scoring_changes_neither_modes_nor_gradients_nor_generators(run, of):
    for event in run.events("measure", rank=None):
        assert event["training"]
        assert event["trainable"]
        assert not event["gradients"]
        assert not event["generators_moved"]


def each_kept_pair_is_trained_exactly_once_across_processes(run, of):
    trained = Counter(i for event in run.events("train", rank=None) for i in event["ids"])
    assert trained == Counter(i for ids in run.kept.values() for i in ids)
    assert tuple(len(run.kept[k]) for k in range(len(KEPT))) == KEPT


def step_counts_and_learning_rates_are_exact(run, of):
    updates = run.events("update")
    assert [event["step"] for event in updates] == list(range(STEPS))
    assert [event["learning_rate"] for event in updates] == pytest.approx(learning_rates())


def a_killed_and_resumed_run_ends_with_the_same_bits(run, of):
    if len(run.run.attempts) == 1 or len({attempt[:2] for attempt in run.run.attempts}) > 1:
        pytest.skip("the run was not killed, or was resumed on other processes")
    uninterrupted = of(run.run.attempts[0][0])
    assert run.kept == uninterrupted.kept
    for key, weight in uninterrupted.weights.items():
        assert torch.equal(weight, run.weights[key]), key


def selection_and_training_match_one_plain_process(run, of):
    """Compare kept pairs exactly, and losses and weights up to accumulated rounding."""
    plain = of("single", host="plain")
    if "an untied head" in run.output:
        pytest.skip("transformers cannot shard a tied head, so this policy has an untied one")
    assert run.kept == plain.kept
    assert np.abs(run.losses() - plain.losses()).max() < 1e-4
    for key, weight in plain.weights.items():
        assert torch.allclose(run.weights[key], weight, atol=1e-3), key


LAWS = (
    every_process_exits_as_expected,
    pools_are_scored_after_exactly_the_planned_updates,
    each_kept_pair_is_trained_exactly_once_across_processes,
    step_counts_and_learning_rates_are_exact,
    scoring_changes_neither_modes_nor_gradients_nor_generators,
    a_killed_and_resumed_run_ends_with_the_same_bits,
    selection_and_training_match_one_plain_process,
)


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
@runs
def test_the_contract(outcome, host, name, law):
    law(outcome(host, name), lambda other, host=host: outcome(host, other))


PAGE = """# The contract

{numbers} laws hold on every host for a small run of SAGE: {steps} updates in four intervals. The
tests train it in real processes (gloo, on a CPU) and generate this page; every run of the tests
compares the page with what passed.

{laws}

| host | processes | {columns} |
|---|---|{rule}
{rows}

A dash means that the law does not apply. Killed runs die by SIGKILL in the middle of an interval;
those that resume with the same number of processes die a second time, at a boundary between
intervals. Transformers cannot resume a model that it has sharded itself, and cannot shard a tied
head, so the policy of the run on TRL with FSDP2 has an untied head.

Matching one plain process (7) means the same kept pairs, losses within 1e-4 and weights within
1e-3.
"""


def page(outcome) -> str:
    """Return the text of docs/contract.md, from what passes now."""
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
    sentences = [law.__name__.replace("_", " ").capitalize() for law in LAWS]
    return PAGE.format(
        numbers={7: "Seven"}[len(LAWS)],
        steps=STEPS,
        laws="\n".join(f"{n}. {law}." for n, law in enumerate(sentences, 1)),
        columns=" | ".join(map(str, range(1, len(LAWS) + 1))),
        rule="---|" * len(LAWS),
        rows="\n".join(rows),
    )


def test_the_page_in_the_docs_is_up_to_date(outcome):
    """Compare the page; to write it, run this file's tests with SAGE_SELECT_WRITE_DOCS=1."""
    path, expected = ROOT / "docs" / "contract.md", page(outcome)
    if os.environ.get("SAGE_SELECT_WRITE_DOCS"):
        path.write_text(expected)
    assert path.read_text() == expected


def test_the_laws_can_fail(outcome, tmp_path):
    """Each law must fail on a run whose record was falsified."""
    run = outcome("plain", "single, killed")
    shutil.copytree(run.folder, tmp_path / "run")
    falsified = Outcome(tmp_path / "run", run.run, [[0]] * 3)
    for path in falsified.folder.glob("trace-*.jsonl"):
        events = [json.loads(line) for line in path.read_text().splitlines()]
        for event in events:
            event["step"] += event["event"] == "measure"
            event["ids"] = event.get("ids", [])[1:]
            event["learning_rate"] = 0.5
            event["gradients"] = True
        path.write_text("".join(json.dumps(event) + "\n" for event in events))
    weights = {name: weight + 0.1 for name, weight in run.weights.items()}
    torch.save(weights, falsified.folder / "weights.pt")
    for law in LAWS:
        with pytest.raises(AssertionError):
            law(falsified, lambda other, host="plain": outcome(host, other))
