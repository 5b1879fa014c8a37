"""Wrappers of a model: compiled, replicated, sharded."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

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
    pass, since no process has memory for whole ones.
    """
    replica = uncompiled(model)
    if isinstance(replica, DistributedDataParallel) and not enabled:
        with replica.no_sync():
            yield
    else:
        yield


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
