"""One process of several that share a vocabulary: leaves what it found in a folder."""

import os
import sys
from pathlib import Path

os.environ.setdefault("TRITON_INTERPRET", "1")

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
    """Tokens of all processes; one is ignored, one overflows, one weighs nothing in the loss."""
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
    """Uneven parts, and nothing for the last process of four."""
    ends = {1: [], 2: [2 * total // 5], 4: [total // 5, total // 2, total]}
    return [0, *ends[parts], total]


def results(impl: str, rank: int, world: int) -> dict[str, tuple[torch.Tensor, ...]]:
    """Log-probs and gradients of hidden, weight and bias, as this process sees them."""
    hidden, weight, targets, bias, upstream = problem()
    rows = slice(*bounds(VOCABULARY, world)[rank : rank + 2])
    own = slice(*bounds(TOKENS, world)[rank : rank + 2])
    found = {}

    def finished(name, logps, upstream, *leaves):
        gradients = torch.autograd.grad(logps, leaves, upstream)
        found[name] = (
            logps.detach(),
            *(x.to_local() if isinstance(x, DTensor) else x for x in gradients),
        )

    def leaves(*tensors):
        return [x.clone().requires_grad_() for x in tensors]

    h, w, b = leaves(hidden, weight[rows], bias[rows])
    shard = Shard(rows.start)
    logps = token_logps(h, w, targets, bias=b, impl=impl, shard=shard, **OPTIONS)
    finished("same tokens", logps, upstream, h, w, b)

    h, w, b = leaves(hidden[own], weight[rows], bias[rows])
    shard = Shard(rows.start, dist.group.WORLD, own_tokens=True)
    logps = token_logps(h, w, targets[own], bias=b, impl=impl, shard=shard, **OPTIONS)
    finished("own tokens", logps, upstream[own], h, w, b)

    # the last process of four has no tokens, so nobody asks it for their gradient
    h, w, b = leaves(hidden[own], weight[rows], bias[rows])
    h = h if len(h) else h.detach()
    logps = token_logps(h, w, targets[own], bias=b, impl=impl, shard=shard, **OPTIONS)
    logps.backward(upstream[own])
    none = torch.zeros_like(hidden[own])
    found["own tokens, of which some want no gradient"] = (
        logps.detach(),
        none if h.grad is None else h.grad,
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
    finished("DTensor, same tokens", logps, upstream, h, head.weight, head.bias)
    whole = DTensor.from_local(h, mesh, [Replicate()])
    logps = token_logps(whole, head.weight, targets, bias=head.bias, impl=impl, **OPTIONS)
    finished("DTensor, replicated tokens", logps, upstream, h, head.weight, head.bias)
    (h,) = leaves(hidden[own])
    part = DTensor.from_local(h, mesh, [Rows(0)], shape=hidden.shape, stride=hidden.stride())
    logps = token_logps(part, head.weight, targets[own], bias=head.bias, impl=impl, **OPTIONS)
    finished("DTensor, own tokens", logps, upstream[own], h, head.weight, head.bias)
    return found


def compiled_first() -> torch.Tensor:
    """From a graph, before anything else was asked of the processes."""
    hidden, weight, targets, bias, _ = problem()
    rank, world = dist.get_rank(), dist.get_world_size()
    rows = slice(*bounds(VOCABULARY, world)[rank : rank + 2])
    compiled = torch.compile(token_logps, backend="aot_eager", fullgraph=True)
    shard = Shard(rows.start, dist.group.WORLD)
    return compiled(hidden, weight[rows], targets, bias=bias[rows], shard=shard, **OPTIONS)


def refusals(rank: int, world: int) -> dict[str, str]:
    """What each process is told when they do not fit; none is left waiting."""
    hidden, weight, targets, *_ = problem()
    rows = slice(*bounds(VOCABULARY, world)[rank : rank + 2])

    def told(hidden, weight, targets, shard, temperature=1.0):
        try:
            token_logps(hidden, weight, targets, shard=shard, temperature=temperature)
        except ValueError as error:
            return str(error)
        return "nothing"

    wrong = targets.clone()
    wrong[4 + rank] = VOCABULARY if rank == world - 1 else wrong[4 + rank]
    return {
        "other targets": told(hidden, weight[rows], targets.roll(rank), Shard(rows.start)),
        "fewer tokens": told(hidden[rank:], weight[rows], targets[rank:], Shard(rows.start)),
        "a gap": told(hidden, weight[rows], targets, Shard(rows.start + rank)),
        "other options": told(hidden, weight[rows], targets, Shard(rows.start), 1.0 + rank),
        "no such token": told(hidden, weight[rows], wrong, Shard(rows.start, own_tokens=True)),
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
