"""A vocabulary sharded over ranks: real processes, started by torchrun, with gloo."""

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
    "own tokens, some without a gradient",
    "DTensor, same tokens",
    "DTensor, replicated tokens",
    "DTensor, own tokens",
]
world_sizes = pytest.mark.parametrize(
    "world", [1, pytest.param(2, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)]
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return the reports of all ranks of a world size, each of which is run once."""

    @cache
    def reports(world: int) -> list[dict]:
        folder = tmp_path_factory.mktemp(f"world{world}")
        launched(WORKER, folder, processes=world)
        return [torch.load(folder / f"{rank}.pt") for rank in range(world)]

    return reports


@pytest.fixture(scope="module")
def expected():
    """Log-probs and gradients of the whole vocabulary, in float64."""
    hidden, weight, targets, bias, upstream = problem()
    leaves = [x.double().requires_grad_() for x in (hidden, weight, bias)]
    logps = token_logps(*leaves[:2], targets, bias=leaves[2], impl="reference", **OPTIONS)
    return [logps.detach(), *torch.autograd.grad(logps, leaves, upstream.double())]


def close(result, expected):
    return torch.allclose(result.double(), expected, rtol=1e-5, atol=2e-5)


@world_sizes
@pytest.mark.parametrize("impl", ["chunked", "fused"])
@pytest.mark.parametrize("case", CASES)
def test_results_equal_those_of_the_whole_vocabulary(run, expected, world, impl, case):
    reports = [report[impl][case] for report in run(world)]
    logps, hidden, weight, bias = (list(parts) for parts in zip(*reports, strict=True))
    # each rank has the gradient of its rows of the weight
    assert close(torch.cat(weight), expected[2])
    assert close(torch.cat(bias), expected[3])
    if "own tokens" in case:
        logps, hidden = [torch.cat(logps)], [torch.cat(hidden)]
    for rank_logps in logps:
        assert close(rank_logps, expected[0])
        assert torch.equal(rank_logps, logps[0])
    assert all(close(gradient, expected[1]) for gradient in hidden)


@world_sizes
def test_a_compiled_graph_can_use_the_group_first(run, expected, world):
    for report in run(world):
        assert close(report["compiled"], expected[0])


@world_sizes
def test_the_shards_of_these_tests_are_uneven(world):
    assert bounds(TOKENS, world)[0] == 0
    sizes = torch.tensor(bounds(TOKENS, world)).diff().tolist()
    assert sum(sizes) == TOKENS
    assert len(sizes) == world
    assert len(set(sizes)) == len(sizes)
    assert (sizes[-1] == 0) == (world == 4)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("different targets", "got different targets.*own_tokens=True"),
        ("fewer tokens", "got different targets.*own_tokens=True"),
        ("different options", "impl.*temperature.* differs between rank 1 and rank 0"),
        ("a gap", "rank 1 has rows .* but the ranks before it end at .* consecutive shards"),
    ],
)
def test_inputs_that_do_not_fit_are_refused_on_all_ranks(run, world, case, message):
    for report in run(world):
        assert re.search(message, report["refusals"][case])


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_a_wrong_target_on_one_rank_is_reported_on_all_ranks(run, world):
    messages = [report["refusals"]["no such token"] for report in run(world)]
    position = 4 + world - 1
    assert f"target 301 at position {position} is outside the vocabulary of 301" in messages[-1]
    for message in messages[:-1]:
        assert f"position {position} of rank {world - 1} is outside the vocabulary" in message


def test_a_shard_needs_a_process_group():
    hidden, weight, targets, *_ = problem()
    with pytest.raises(ValueError, match=r"call torch\.distributed.init_process_group first"):
        token_logps(hidden, weight, targets, shard=Shard(0))


def test_the_reference_refuses_shards():
    hidden, weight, targets, *_ = problem()
    with pytest.raises(ValueError, match=r'needs the whole vocabulary.*use impl="chunked"'):
        token_logps(hidden, weight, targets, shard=Shard(0), impl="reference")
