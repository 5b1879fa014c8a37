"""One rank of a sharded vocabulary; it saves its results to a folder."""

import os
import sys
from pathlib import Path

os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton decorates the kernels

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor import Shard as Rows

from sage_select import leave, token_logps
from sage_select.ops.shards import Shard

VOCABULARY, HIDDEN, TOKENS = 301, 24, 13


def problem():
    """Tokens of all ranks; one is ignored, one overflows, one has zero weight in the loss."""
    random = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, HIDDEN, generator=random) / 2 for n in (TOKENS, VOCABULARY))
    targets = torch.randint(VOCABULARY, (TOKENS,), generator=random)
    targets[:3] = torch.tensor([0, VOCABULARY - 1, -100])
    targets[3:5] = torch.tensor(bounds(VOCABULARY, 4)[1:3])  # the first tokens of a shard
    hidden[5] *= 100
    targets[5] = (hidden[5] @ weight.T).argmin()
    upstream = torch.linspace(-1, 1, TOKENS)
    upstream[7] = 0
    bias = torch.linspace(-1, 1, VOCABULARY)
    return hidden, weight, targets, bias, upstream


OPTIONS = {"softcap": 90.0, "temperature": 0.7}


def bounds(total: int, parts: int) -> list[int]:
    """Boundaries of uneven parts; the last of four is empty."""
    inner = {1: [], 2: [2 * total // 5], 4: [total // 5, total // 2, total]}
    return [0, *inner[parts], total]


def results(impl: str, rank: int, world: int) -> dict[str, tuple[torch.Tensor, ...]]:
    """Log-probs and gradients of hidden, weight and bias on this rank, by case."""
    hidden, weight, targets, bias, upstream = problem()
    rows = slice(*bounds(VOCABULARY, world)[rank : rank + 2])
    rank_tokens = slice(*bounds(TOKENS, world)[rank : rank + 2])
    by_case = {}

    def record(name, logps, upstream, *leaves):
        gradients = torch.autograd.grad(logps, leaves, upstream)
        by_case[name] = (
            logps.detach(),
            *(x.to_local() if isinstance(x, DTensor) else x for x in gradients),
        )

    def leaves(*tensors):
        return [x.clone().requires_grad_() for x in tensors]

    h, w, b = leaves(hidden, weight[rows], bias[rows])
    shard = Shard(rows.start)
    logps = token_logps(h, w, targets, bias=b, impl=impl, shard=shard, **OPTIONS)
    record("same tokens", logps, upstream, h, w, b)

    h, w, b = leaves(hidden[rank_tokens], weight[rows], bias[rows])
    shard = Shard(rows.start, dist.group.WORLD, own_tokens=True)
    logps = token_logps(h, w, targets[rank_tokens], bias=b, impl=impl, shard=shard, **OPTIONS)
    record("own tokens", logps, upstream[rank_tokens], h, w, b)

    # the last rank of four has no tokens, so autograd does not ask it for their gradient
    h, w, b = leaves(hidden[rank_tokens], weight[rows], bias[rows])
    h = h if len(h) else h.detach()
    logps = token_logps(h, w, targets[rank_tokens], bias=b, impl=impl, shard=shard, **OPTIONS)
    logps.backward(upstream[rank_tokens])
    zeros = torch.zeros_like(hidden[rank_tokens])
    by_case["own tokens, some without a gradient"] = (
        logps.detach(),
        zeros if h.grad is None else h.grad,
        w.grad,
        b.grad,
    )

    mesh = init_device_mesh("cpu", (world,))
    head = nn.Linear(HIDDEN, VOCABULARY)
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.copy_(bias)
    fully_shard(head, mesh=mesh)
    assert isinstance(head.weight, DTensor)
    (h,) = leaves(hidden)
    logps = token_logps(h, head.weight, targets, bias=head.bias, impl=impl, **OPTIONS)
    record("DTensor, same tokens", logps, upstream, h, head.weight, head.bias)
    whole = DTensor.from_local(h, mesh, [Replicate()])
    logps = token_logps(whole, head.weight, targets, bias=head.bias, impl=impl, **OPTIONS)
    record("DTensor, replicated tokens", logps, upstream, h, head.weight, head.bias)
    (h,) = leaves(hidden[rank_tokens])
    part = DTensor.from_local(h, mesh, [Rows(0)], shape=hidden.shape, stride=hidden.stride())
    logps = token_logps(
        part, head.weight, targets[rank_tokens], bias=head.bias, impl=impl, **OPTIONS
    )
    record("DTensor, own tokens", logps, upstream[rank_tokens], h, head.weight, head.bias)
    return by_case


def compiled_first() -> torch.Tensor:
    """Log-probs from a compiled graph, which is the first to use the process group."""
    hidden, weight, targets, bias, _ = problem()
    rank, world = dist.get_rank(), dist.get_world_size()
    rows = slice(*bounds(VOCABULARY, world)[rank : rank + 2])
    compiled = torch.compile(token_logps, backend="aot_eager", fullgraph=True)
    shard = Shard(rows.start, dist.group.WORLD)
    return compiled(hidden, weight[rows], targets, bias=bias[rows], shard=shard, **OPTIONS)


def refusals(rank: int, world: int) -> dict[str, str]:
    """Messages on this rank for inputs that do not fit; no rank may hang."""
    hidden, weight, targets, *_ = problem()
    rows = slice(*bounds(VOCABULARY, world)[rank : rank + 2])

    def message(hidden, weight, targets, shard, temperature=1.0):
        try:
            token_logps(hidden, weight, targets, shard=shard, temperature=temperature)
        except ValueError as error:
            return str(error)
        return "no error"

    wrong = targets.clone()
    wrong[4 + rank] = VOCABULARY if rank == world - 1 else wrong[4 + rank]
    return {
        "different targets": message(hidden, weight[rows], targets.roll(rank), Shard(rows.start)),
        "fewer tokens": message(hidden[rank:], weight[rows], targets[rank:], Shard(rows.start)),
        "a gap": message(hidden, weight[rows], targets, Shard(rows.start + rank)),
        "different options": message(hidden, weight[rows], targets, Shard(rows.start), 1.0 + rank),
        "no such token": message(hidden, weight[rows], wrong, Shard(rows.start, own_tokens=True)),
    }


if __name__ == "__main__":
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    report = {"compiled": compiled_first()}
    report |= {impl: results(impl, rank, world) for impl in ("chunked", "fused")}
    if world > 1:
        report["refusals"] = refusals(rank, world)
    torch.save(report, Path(sys.argv[1]) / f"{rank}.pt")
    leave()
