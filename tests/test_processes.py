"""Processes that measure and update together: real ones, under torchrun with gloo."""

import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import launched
from measure_worker import BUDGET, STRATEGIES
from small_models import few_pairs, small_model

from sage_select import Constant, Selector, measure, nca, pair_logps, sage
from sage_select.models.fingerprints import model_digest

WORKER = Path(__file__).with_name("measure_worker.py")
pytestmark = pytest.mark.slow
processes = pytest.mark.parametrize("world", [1, 2, 4])
strategies = pytest.mark.parametrize("strategy", STRATEGIES)


def test_processes_that_leave_end_well():
    # without leave() about a third of them are aborted
    command = [sys.executable, WORKER.with_name("leaving_worker.py"), "8"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=True)
    assert done.stdout.split() == ["0"], done.stderr


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The reports of all processes of a world, which runs once."""

    @cache
    def of(world: int) -> list[dict]:
        folder = tmp_path_factory.mktemp(f"world{world}")
        launched(WORKER, folder, processes=world)
        return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]

    return of


@pytest.fixture(scope="module")
def alone():
    """The same of one process that knows of no others, by the model's name."""

    @cache
    def of(strategy: str) -> dict:
        model, pairs = small_model("qwen2" if "tied" in strategy else "llama"), few_pairs()
        logps = measure(model, pairs, max_batch_tokens=BUDGET)
        moved = logps._replace(chosen=logps.chosen - torch.arange(len(pairs)))
        selector = Selector(sage, Constant(0.5), moved, lambda step: 0.0, skip_full=False)
        kept = selector.select(model, pairs, step=0).indices
        nca(pair_logps(model.train(), pairs), moved).mean().backward()
        return {
            "logps": tuple(logps),
            "digest": model_digest(model),
            "kept": kept,
            "gradients": {name: x.grad for name, x in model.named_parameters()},
        }

    return of


@processes
@strategies
def test_the_same_bits_for_any_number_of_processes(run, alone, world, strategy):
    expected = alone(strategy)
    for report in run(world):
        found = report[strategy]
        for name in ("logps", "store"):
            assert all(map(torch.equal, found[name], expected["logps"]))
        assert np.array_equal(found["kept"], expected["kept"])
        assert found["digest"] == expected["digest"]
        assert found["measured"][0] > 0 == found["measured"][1]


@processes
@strategies
def test_gradients_are_those_of_one_process(run, alone, world, strategy):
    expected = alone(strategy)["gradients"]
    for report in run(world):
        found = report[strategy]["gradients"]
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            assert torch.allclose(found[name], gradient, rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("other pools", "process 1 came with 3 pairs of .* process 0 with 2 of"),
        ("other budgets", r"need the same pool, budget.* pass processes=Processes\(\)"),
        ("not finite", r"pair .* \(row 0\) has log-probs nan and nan; the model's weights"),
        ("alone", "nothing"),
        # packed without a warning, and rounding is no signal: both go by what shards are cast to
        ("cast shards", r"torch.bfloat16 hash \['Selector: at step 0 the log-ratios of al'\]"),
        (
            "training",
            r"knows of [24] processes, .* would drift apart; pass shard\(model\)",
        ),
    ],
)
def test_what_goes_wrong_is_said_by_all(run, world, case, words):
    for report in run(world):
        assert re.search(words, report["refusals"][case])
