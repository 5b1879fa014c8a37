"""Worker of test_processes.py: one of several processes; writes its results to a folder."""

import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import torch
import torch.distributed as dist
from small_models import few_pairs, small_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from sage_select import (
    Constant,
    Processes,
    Reader,
    ReferenceStore,
    Selector,
    leave,
    measure,
    nca,
    pair_logps,
    sage,
)
from sage_select.adapters.plain import Training, train
from sage_select.models.fingerprints import model_digest
from sage_select.models.forward import precision_of

BUDGET = 40  # tokens: more batches than processes, and not a multiple of their number


def replicated(name: str) -> nn.Module:
    return DistributedDataParallel(small_model(name))


def sharded(name: str, *, head_apart: bool = False, replicas: bool = False, **options) -> nn.Module:
    model = small_model(name)
    world = dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    if replicas and world > 1:
        names = ("replicas", "shards")
        mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=names)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, **options)
    if head_apart:
        fully_shard(model.lm_head, mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, **options)
    return model


STRATEGIES = {
    "DDP": lambda: replicated("llama"),
    "FSDP2": lambda: sharded("llama"),
    "FSDP2, tied": lambda: sharded("qwen2"),
    "FSDP2, two replicas": lambda: sharded("llama", replicas=True),
    "FSDP2, head apart": lambda: sharded("llama", head_apart=True),
}


def full_tensor(x: torch.Tensor) -> torch.Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    return dict(getattr(model, "module", model).named_parameters())


def results(strategy: str, folder: Path) -> dict[str, object]:
    """Return log-probs, a selection, the store's log-probs and gradients under a strategy."""
    pairs = few_pairs()
    model = STRATEGIES[strategy]()
    if strategy != "DDP":
        assert all(isinstance(x, DTensor) for x in model.parameters())
    logps = measure(model, pairs, max_batch_tokens=BUDGET)
    if strategy != "DDP":  # gathered weights were freed
        assert all(isinstance(x, DTensor) for x in model.parameters())
    inner = getattr(model, "module", model)
    reader = Reader(max_batch_tokens=BUDGET)
    store = ReferenceStore(inner, pairs, folder=folder / strategy, reader=reader)
    measured = store.fill(), store.fill()
    reference = logps._replace(chosen=logps.chosen - torch.arange(len(pairs)))
    selector = Selector(sage, Constant(0.5), reference, lambda step: 0.0, skip_full=False)
    kept = selector.select(model, pairs, step=0).indices

    model.train()
    processes = Processes.all()
    own_pairs = pairs.take(pairs.index[processes.rank :: processes.size])
    with Reader().updating(model, pairs):
        losses = nca(pair_logps(model, own_pairs), reference.take(own_pairs.index))
        # DDP and FSDP2 average gradients over ranks; this scale makes them those of the mean loss
        (losses.sum() * processes.size / len(pairs)).backward()
    return {
        "logps": tuple(logps),
        "store": tuple(store.take(pairs.index)),
        "measured": measured,
        "digest": model_digest(inner),
        "kept": kept,
        "gradients": {name: full_tensor(x.grad) for name, x in parameters(model).items()},
    }


def refusals() -> dict[str, str]:
    """Return this rank's error messages and warnings, by case."""
    pairs, rank = few_pairs(), dist.get_rank()

    def error_message(model: nn.Module, pool, **options) -> str:
        try:
            measure(model, pool, **options)
        except (ValueError, TypeError) as error:
            return str(error)
        return "nothing"

    bf16 = sharded("llama", mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        reference = measure(bf16, pairs)
        selector = Selector(sage, Constant(0.5), reference, lambda step: 0.0)
        rule = selector.select(bf16, pairs, step=0).rule
    broken = small_model("llama")
    with torch.no_grad():
        broken.model.embed_tokens.weight[pairs.take([2]).sequences()[1].tokens[-2]] = torch.nan
    model = small_model("llama")
    try:
        train(model, [], pairs, None, Training())
    except TypeError as error:
        training_message = str(error)
    return {
        "training": training_message,
        "cast shards": f"{precision_of(bf16)} {rule} {[str(w.message)[:40] for w in caught]}",
        "other pools": error_message(model, pairs.take([0, 1, 2] if rank else [0, 1])),
        "other budgets": error_message(model, pairs, max_batch_tokens=BUDGET + rank),
        "not finite": error_message(broken, pairs, max_batch_tokens=BUDGET),
        "alone": error_message(model, pairs.take([rank]), processes=Processes()),
    }


if __name__ == "__main__":
    dist.init_process_group("gloo")
    folder = Path(sys.argv[1])
    report = {strategy: results(strategy, folder) for strategy in STRATEGIES}
    if dist.get_world_size() > 1:
        report["refusals"] = refusals()
    torch.save(report, folder / f"{dist.get_rank()}.pt")
    leave()
