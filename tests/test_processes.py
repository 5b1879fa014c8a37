"""Ranks that measure and update together: real processes, under torchrun with gloo."""

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


def test_processes_that_call_leave_exit_cleanly():
    # without leave() about a third of them abort
    command = [sys.executable, WORKER.with_name("leaving_worker.py"), "8"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=True)
    assert done.stdout.split() == ["0"], done.stderr


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Reports of all ranks for a world size, each of which runs only once."""

    @cache
    def of(world: int) -> list[dict]:
        folder = tmp_path_factory.mktemp(f"world{world}")
        launched(WORKER, folder, processes=world)
        return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]

    return of


@pytest.fixture(scope="module")
def alone():
    """The same results from a single process without a process group, by strategy."""

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
def test_equal_bits_for_any_world_size(run, alone, world, strategy):
    expected = alone(strategy)
    for report in run(world):
        results = report[strategy]
        for name in ("logps", "store"):
            assert all(map(torch.equal, results[name], expected["logps"]))
        assert np.array_equal(results["kept"], expected["kept"])
        assert results["digest"] == expected["digest"]
        # the second time everything comes from the store
        assert results["measured"][0] > 0 == results["measured"][1]


@processes
@strategies
def test_gradients_equal_those_of_a_single_process(run, alone, world, strategy):
    expected = alone(strategy)["gradients"]
    for report in run(world):
        gradients = report[strategy]["gradients"]
        assert gradients.keys() == expected.keys()
        for name, gradient in expected.items():
            assert torch.allclose(gradients[name], gradient, rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("other pools", "process 1 came with 3 pairs of .* process 0 with 2 of"),
        ("other budgets", r"need the same pool, budget.* pass processes=Processes\(\)"),
        ("not finite", r"pair .* \(row 0\) has log-probs nan and nan; the model's weights"),
        ("alone", "nothing"),
        # the dtype that shards are cast to decides both: packing without a warning, and the noise
        # floor, below which rounding is no signal
        ("cast shards", r"torch.bfloat16 hash \['Selector: at step 0 the log-ratios of al'\]"),
        ("training", r"[24] processes, .* would drift apart; pass shard\(model\)"),
    ],
)
def test_errors_are_raised_on_every_rank(run, world, case, words):
    for report in run(world):
        assert re.search(words, report["refusals"][case])
