"""Unsupported ways to distribute a model, each refused before anything runs."""

import socket

import pytest
import torch
import torch.distributed as dist
from small_models import small_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from sage_select import measure
from sage_select.models.wrappers import unwrapped


@pytest.fixture(scope="module", autouse=True)
def process_group():
    """A process group of this process alone, which device meshes need."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    dist.init_process_group("gloo", init_method=address, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def tensor_parallel(model: nn.Module, mesh) -> nn.Module:
    for layer in model.model.layers:
        parallelize_module(layer.mlp, mesh, {"up_proj": ColwiseParallel()})
    return model


def tensor_parallel_and_fsdp2(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("data", "tensor"))
    fully_shard(tensor_parallel(model, mesh["tensor"]), mesh=mesh["data"])
    return model


def zero_stage_three(model: nn.Module) -> nn.Module:
    next(model.parameters()).ds_id = 0  # DeepSpeed sets this attribute on every sharded weight
    return model


def layers_without_root(model: nn.Module) -> nn.Module:
    for layer in model.model.layers:
        fully_shard(layer, mesh=init_device_mesh("cpu", (1,)))
    return model


DeepSpeedEngine = type("DeepSpeedEngine", (nn.Sequential,), {})
REFUSED = {
    "FSDP1": (
        lambda model: FullyShardedDataParallel(model, device_id=torch.device("cpu")),
        r"FullyShardedDataParallel is not supported; shard with .*fully_shard \(FSDP2\)",
    ),
    "DataParallel": (nn.DataParallel, "DataParallel is not supported"),
    "DeepSpeed": (DeepSpeedEngine, "DeepSpeedEngine is not supported"),
    "ZeRO 3": (zero_stage_three, "ZeRO stage 3 is not supported"),
    "tensor parallel": (
        lambda model: tensor_parallel(model, init_device_mesh("cpu", (1,))),
        "up_proj.weight is a DTensor, but .* tensor parallelism is not supported",
    ),
    "tensor parallel and FSDP2": (
        tensor_parallel_and_fsdp2,
        "up_proj.weight has the placements .*tensor parallelism is not",
    ),
    "layers without a root": (layers_without_root, r"Call fully_shard\(model\) on the root, too"),
}


@pytest.mark.parametrize(("distribute", "message"), REFUSED.values(), ids=REFUSED)
def test_unsupported_wrappers_and_sharding_are_refused(distribute, message, pairs):
    with pytest.raises(TypeError, match=message):
        measure(distribute(small_model("llama")), pairs)


def test_replicas_of_shards_are_accepted():
    mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("replicas", "shards"))
    model = small_model("llama")
    fully_shard(model, mesh=mesh)
    assert unwrapped(model) is model
