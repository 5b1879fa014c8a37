"""Wrappers of a model: compiled, replicated, sharded."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from sage_select.system.processes import Processes

# by name, so that DeepSpeed need not be installed; their forward is not one pass of the model
UNSUPPORTED_WRAPPERS = ("DataParallel", "DeepSpeedEngine")


def uncompiled(model: nn.Module) -> nn.Module:
    """Return the module inside `torch.compile(model)`, or the model itself."""
    return cast(nn.Module, getattr(model, "_orig_mod", model))


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the module inside `torch.compile(model)` and DistributedDataParallel.

    Compiled code ignores hooks that are registered later. Only a replica's wrapper synchronises its
    gradients, so forward passes with gradients go through `uncompiled(model)`.

    Raises:
        TypeError: If the model is in a wrapper whose forward is not the model's own.
    """
    inner: Any = uncompiled(model)
    while True:
        unsupported = type(inner).__name__ in UNSUPPORTED_WRAPPERS
        if isinstance(inner, FullyShardedDataParallel) or unsupported:
            raise TypeError(
                f"measure: {type(inner).__name__} is not supported; shard with "
                "torch.distributed.fsdp.fully_shard (FSDP2), or replicate with "
                "DistributedDataParallel"
            )
        if not isinstance(inner, DistributedDataParallel):
            break
        inner = uncompiled(inner.module)
    module: nn.Module = inner
    return module


def checked(model: nn.Module) -> nn.Module:
    """Return the unwrapped model, after checking that this library supports its sharding.

    Raises:
        TypeError: If the model is in an unsupported wrapper, or sharded other than by FSDP2.
    """
    model = unwrapped(model)
    _check_weights(model)
    return model


def is_spread(model: nn.Module) -> bool:
    """Return whether processes keep this model in sync, by replication (DDP) or sharding."""
    return is_sharded(model) or isinstance(uncompiled(model), DistributedDataParallel)


def is_sharded(model: nn.Module) -> bool:
    """Return whether every process must take part in each forward pass."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def computes_in(model: nn.Module) -> torch.dtype:
    """Dtype of the model's weights in computations: FSDP2 may cast shards when it gathers them."""
    gathered_dtype = None
    if isinstance(model, FSDPModule):
        gathered_dtype = model._get_fsdp_state()._mp_policy.param_dtype
    return gathered_dtype or next(model.parameters()).dtype


def whole(x: Tensor) -> Tensor:
    """Return the full tensor, gathered if it is sharded."""
    return x.full_tensor() if isinstance(x, DTensor) else x


@contextmanager
def gradient_sync(model: nn.Module, enabled: bool) -> Iterator[None]:
    """Wrap forward and backward of a pass: replicas synchronise gradients now, or accumulate them.

    Disabled, it is `DistributedDataParallel.no_sync`. Sharded models reduce gradients in every
    pass, since no process has memory for whole ones. So do replicas with static_graph=True until
    their graph is recorded; gradients of earlier passes are equal on all ranks by then, so the mean
    over ranks leaves them as they are.
    """
    replica = uncompiled(model)
    if isinstance(replica, DistributedDataParallel) and not enabled and not _records(replica):
        with replica.no_sync():
            yield
    else:
        yield


def check_synchronises(model: nn.Module) -> None:
    """Refuse a pass with gradients whose gradients DistributedDataParallel would lose.

    Raises:
        RuntimeError: If its static graph would be recorded without synchronisation.
    """
    replica = uncompiled(model)
    if not isinstance(replica, DistributedDataParallel) or replica.require_backward_grad_sync:
        return
    if _records(replica):
        raise RuntimeError(
            "pair_logps: DistributedDataParallel(static_graph=True) records its graph in its first "
            "backward pass, which cannot be inside no_sync(); make the passes of the first update "
            "without no_sync(), or leave out static_graph"
        )


def check_spread(call: str, model: nn.Module) -> None:
    """Refuse a model whose copies in several processes would drift apart.

    Args:
        call: The call that the error message names.
        model: The model to train.

    Raises:
        TypeError: If there are several processes, but nothing keeps the model in sync.
    """
    size = Processes.all().size
    if size > 1 and not is_spread(model):
        raise TypeError(
            f"{call}: torch.distributed has {size} processes, but the model is neither "
            "replicated nor sharded, so its copies would drift apart; pass shard(model) or "
            "DistributedDataParallel(model)"
        )


@contextmanager
def called_as_written(through: nn.Module, head: nn.Module) -> Iterator[None]:
    """Call a model and the modules that contain its head uncompiled.

    Compiled code ignores hooks that are registered after it was compiled, or calls those of an
    earlier pass. Other modules, such as the body, stay compiled.

    Args:
        through: The model, or a wrapper of it; `uncompiled` already.
        head: The module on which hooks are registered.
    """
    compiled: list[Any] = [
        module
        for module in through.modules()
        if module._compiled_call_impl is not None and any(part is head for part in module.modules())
    ]
    calls = [module._compiled_call_impl for module in compiled]
    inner = through.module if isinstance(through, DistributedDataParallel) else None
    try:
        for module in compiled:
            module._compiled_call_impl = None
        if inner is not None:
            through.module = uncompiled(inner)
        yield
    finally:
        for module, compiled_call in zip(compiled, calls, strict=True):
            module._compiled_call_impl = compiled_call
        if inner is not None:
            through.module = inner


def _records(replica: DistributedDataParallel) -> bool:
    """Return whether the next backward pass records the graph of a replica (static_graph=True)."""
    return replica.static_graph and not replica._static_graph_delay_allreduce_enqueued


@contextmanager
def resharded(model: nn.Module) -> Iterator[None]:
    """Free weights that were gathered inside.

    The root of an FSDP2 model otherwise keeps its gathered weights, and would still use them after
    the optimizer's step.
    """
    try:
        yield
    finally:
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def _check_weights(model: nn.Module) -> None:
    """Refuse weights that are sharded other than by FSDP2."""
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "ds_id"):  # set by DeepSpeed's ZeRO stage 3
            raise TypeError(
                "measure: DeepSpeed's ZeRO stage 3 is not supported, since weights are gathered "
                "module by module; use FSDP2"
            )
        if not isinstance(parameter, DTensor):
            continue
        if not isinstance(model, FSDPModule):
            raise TypeError(
                f"measure: {name} is a DTensor, but {type(model).__name__} is not sharded by "
                "fully_shard at its root; tensor parallelism is not supported. Call "
                "fully_shard(model) on the root, too"
            )
        replicas = all(placement.is_replicate() for placement in parameter.placements[:-1])
        if parameter.device_mesh.ndim > 2 or not replicas:
            raise TypeError(
                f"measure: {name} has the placements {parameter.placements} on a mesh of "
                f"{parameter.device_mesh.ndim} dimensions; FSDP2 with or without replicas is "
                "supported, tensor parallelism is not"
            )
