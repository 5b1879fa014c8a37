"""One contract, every host: the same small run of SAGE, alone, replicated and sharded, killed and
resumed on other numbers of processes. What passed stands in docs/hosts.md, made by this run."""

import json
import os
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

from sage_select.audit import SelectionLog

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
WORLDS = {"single": 1, "ddp": 2, "fsdp2": 2}


@dataclass(frozen=True)
class Attempts:
    """A run, and the processes it is trained by: (strategy, processes, updates before the kill)."""

    name: str
    attempts: tuple[tuple[str, int, int | None], ...]

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


@runs
def test_it_ends_as_it_should(outcome, host, name):
    run = outcome(host, name)
    said = "\n".join(p.read_text()[-2000:] for p in run.folder.glob("output-*.txt"))
    for (_, world, dies), codes in zip(run.run.attempts, run.codes, strict=True):
        assert codes == ([0] if dies is None else [-9]) * world, said


@runs
def test_pools_are_measured_after_exactly_the_steps_before(outcome, host, name):
    measured = outcome(host, name).events("measure")
    assert [event["interval"] for event in measured] == list(range(len(FIRST_STEPS)))
    assert tuple(event["step"] for event in measured) == FIRST_STEPS


@runs
def test_measuring_leaves_the_model_as_it_was(outcome, host, name):
    for event in outcome(host, name).events("measure"):
        assert event["training"]
        assert event["trainable"]
        assert not event["gradients"]


@runs
def test_each_kept_pair_is_trained_exactly_once_across_processes(outcome, host, name):
    run = outcome(host, name)
    trained = Counter(i for event in run.events("train", rank=None) for i in event["ids"])
    assert trained == Counter(i for ids in run.kept.values() for i in ids)
    assert tuple(len(run.kept[k]) for k in range(len(KEPT))) == KEPT


@runs
def test_totals_and_learning_rates_are_exact(outcome, host, name):
    updates = outcome(host, name).events("update")
    assert [event["step"] for event in updates] == list(range(STEPS))
    assert [event["learning_rate"] for event in updates] == pytest.approx(learning_rates())


@runs
def test_a_killed_run_ends_with_the_same_bits(outcome, host, name):
    run = outcome(host, name)
    strategies = {attempt[:2] for attempt in run.run.attempts}
    if len(run.run.attempts) == 1 or len(strategies) > 1:
        pytest.skip("it was not killed, or resumed on other processes")
    undisturbed = outcome(host, run.run.attempts[0][0])
    assert run.kept == undisturbed.kept
    for key, weight in undisturbed.weights.items():
        assert torch.equal(weight, run.weights[key]), key


@runs
def test_kept_sets_and_curves_are_those_of_one_plain_process(outcome, host, name):
    """From the same weights every host keeps the same; over a run rounding adds up."""
    if (host, name) == ("trl", "fsdp2"):
        pytest.skip("transformers shards no tied head, so this policy has one of its own")
    run, alone = outcome(host, name), outcome("plain", "single")
    assert run.kept == alone.kept
    assert np.abs(run.losses() - alone.losses()).max() < 1e-3
    for key, weight in alone.weights.items():
        assert torch.allclose(run.weights[key], weight, atol=2e-3), key
