"""A vocabulary that is spread over processes: real ones, under torchrun with gloo."""

import re
from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import launched
from shard_worker import OPTIONS, TOKENS, bounds, problem

from sage_select import token_logps
from sage_select.ops.shards import Shard

WORKER = Path(__file__).with_name("shard_worker.py")
CASES = [
    "same tokens",
    "own tokens",
    "own tokens, of which some want no gradient",
    "DTensor, same tokens",
    "DTensor, replicated tokens",
    "DTensor, own tokens",
]
processes = pytest.mark.parametrize(
    "world", [1, pytest.param(2, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)]
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The reports of all processes of a world, which runs once."""

    @cache
    def of(world: int) -> list[dict]:
        folder = tmp_path_factory.mktemp(f"world{world}")
        launched(WORKER, folder, processes=world)
        return [torch.load(folder / f"{rank}.pt") for rank in range(world)]

    return of


@pytest.fixture(scope="module")
def expected():
    """Log-probs and gradients of an undivided vocabulary, in float64."""
    hidden, weight, targets, bias, upstream = problem()
    leaves = [x.double().requires_grad_() for x in (hidden, weight, bias)]
    logps = token_logps(*leaves[:2], targets, bias=leaves[2], impl="reference", **OPTIONS)
    return [logps.detach(), *torch.autograd.grad(logps, leaves, upstream.double())]


def close(found, right):
    return torch.allclose(found.double(), right, rtol=1e-5, atol=2e-5)


@processes
@pytest.mark.parametrize("impl", ["chunked", "fused"])
@pytest.mark.parametrize("case", CASES)
def test_the_same_as_undivided(run, expected, world, impl, case):
    reports = [report[impl][case] for report in run(world)]
    logps, hidden, weight, bias = (list(parts) for parts in zip(*reports, strict=True))
    # each process has its own rows of the weight's gradient, and together they are the whole
    assert close(torch.cat(weight), expected[2])
    assert close(torch.cat(bias), expected[3])
    if "own tokens" in case:
        logps, hidden = [torch.cat(logps)], [torch.cat(hidden)]
    for found in logps:
        assert close(found, expected[0])
        assert torch.equal(found, logps[0])
    assert all(close(found, expected[1]) for found in hidden)


@processes
def test_a_graph_may_be_the_first_to_ask(run, expected, world):
    for report in run(world):
        assert close(report["compiled"], expected[0])


@processes
def test_the_uneven_parts_are_uneven(world):
    assert bounds(TOKENS, world)[0] == 0
    sizes = torch.tensor(bounds(TOKENS, world)).diff().tolist()
    assert sum(sizes) == TOKENS
    assert len(sizes) == world
    assert len(set(sizes)) == len(sizes)
    assert (sizes[-1] == 0) == (world == 4)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("other targets", "have other targets than each other.*own_tokens=True"),
        ("fewer tokens", "have other targets than each other.*own_tokens=True"),
        ("other options", "process 1 came with another impl.*temperature"),
        ("a gap", "process 1 has rows .* but those before it end at .*; shards follow"),
    ],
)
def test_what_does_not_fit_is_refused_by_all(run, world, case, words):
    for report in run(world):
        assert re.search(words, report["refusals"][case])


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_a_wrong_target_of_one_process_is_named_by_all(run, world):
    told = [report["refusals"]["no such token"] for report in run(world)]
    position = 4 + world - 1
    assert f"target 301 at position {position} is outside the vocabulary of 301" in told[-1]
    for words in told[:-1]:
        assert f"position {position} of process {world - 1} is outside the vocabulary" in words


def test_a_shard_needs_processes():
    hidden, weight, targets, *_ = problem()
    with pytest.raises(ValueError, match=r"call torch\.distributed.init_process_group first"):
        token_logps(hidden, weight, targets, shard=Shard(0))


def test_the_specification_knows_no_shards():
    hidden, weight, targets, *_ = problem()
    with pytest.raises(ValueError, match='needs the whole vocabulary; use impl="chunked"'):
        token_logps(hidden, weight, targets, shard=Shard(0), impl="reference")
