"""Wrappers of a model: what leaves through them, and unsupported ones, which are refused."""

import socket

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from small_models import small_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from sage_select import Processes, Reader, Training, measure, update
from sage_select.models.wrappers import gradient_sync, unwrapped, whole
from sage_select.training.sharding import make_ready


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


PADDED = Reader(layout="padded")


def gradients(model: nn.Module) -> list[torch.Tensor]:
    return [whole(p.grad) for p in unwrapped(model).parameters() if p.grad is not None]


@pytest.mark.parametrize("name", ["llama", "gemma2, softcaps"])
def test_log_probs_leave_through_the_output_of_the_model(name, pairs):
    """Any wrapper that looks at the output of a forward pass sees what the loss depends on."""
    model, outputs = small_model(name), []
    model.register_forward_hook(lambda module, args, output: outputs.append(output))
    PADDED.pair_logps(model, pairs)  # the first time, the head is checked as well
    outputs.clear()
    policy = PADDED.pair_logps(model, pairs)
    (output,) = outputs
    assert torch.equal(output, torch.cat([policy.chosen, policy.rejected]))
    through, directly = (
        torch.autograd.grad(loss, model.lm_head.weight, retain_graph=True)[0]
        for loss in (output.sum(), policy.chosen.sum() + policy.rejected.sum())
    )
    assert torch.equal(through, directly)
    assert model(input_ids=torch.ones(1, 3, dtype=torch.int64)).logits.shape == (1, 3, 40)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_output_dtype_does_not_round_log_probs(dtype, pairs):
    bare, sharded = small_model("llama"), small_model("llama")
    fully_shard(sharded, mp_policy=MixedPrecisionPolicy(output_dtype=dtype))
    read = []
    for model in (bare, sharded):
        policy = PADDED.pair_logps(model, pairs)
        (policy.chosen.sum() - policy.rejected.sum()).backward()
        read.append((policy.chosen.detach(), *gradients(model)))
    assert read[0][0].dtype == torch.float64
    assert all(torch.equal(ours, expected) for ours, expected in zip(*read, strict=True))


def test_a_static_graph_is_recorded_in_a_synchronised_pass(pairs):
    replica = DistributedDataParallel(small_model("llama"), static_graph=True)
    with (
        replica.no_sync(),
        pytest.raises(RuntimeError, match=r"static_graph=True.*without no_sync\(\), or leave out"),
    ):
        PADDED.pair_logps(replica, pairs)
    synchronised = []
    for _ in range(2):
        with gradient_sync(replica, False):
            synchronised.append(replica.require_backward_grad_sync)
            PADDED.pair_logps(replica, pairs).chosen.sum().backward()
    assert synchronised == [True, False]


@pytest.mark.parametrize("spread", [False, True], ids=["bare", "replicated"])
@pytest.mark.parametrize("compile_in", ["place", "wrapper"])
def test_a_compiled_model_is_read_anew_for_every_batch(compile_in, spread, pairs):
    """A hook that was compiled with the first batch would answer for that batch again."""
    model = small_model("llama")
    if compile_in == "place":
        model.compile(backend="eager")
    else:
        model = torch.compile(model, backend="eager")
    model = DistributedDataParallel(model) if spread else model
    for rows in ([0, 1], [2, 3], [1]):
        policy = PADDED.pair_logps(model, pairs.take(rows))
        expected = PADDED.pair_logps(small_model("llama"), pairs.take(rows))
        assert torch.equal(policy.chosen, expected.chosen)
    assert type(unwrapped(model)) is type(small_model("llama"))


def test_the_body_of_an_adapted_model_is_compiled_without_its_head():
    model = get_peft_model(small_model("llama"), LoraConfig(r=2, target_modules=["lm_head"]))
    make_ready(model, Training(compile_model=True))
    compiled = [n for n, m in model.named_modules() if m._compiled_call_impl is not None]
    assert compiled == ["base_model.model.model"]


def test_an_update_of_copies_that_would_drift_apart_is_refused(pairs, monkeypatch):
    model = small_model("llama")
    reference = measure(model, pairs)
    monkeypatch.setattr(Processes, "size", property(lambda self: 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match=r"update: .* has 2 processes.*DistributedDataParallel"):
        update(model, optimizer, pairs, reference)
