"""What a model may be wrapped in: compiled, replicated, sharded."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

FOREIGN = ("DataParallel", "DeepSpeedEngine")  # wrappers whose forward is not one pass of the model


def uncompiled(model: nn.Module) -> nn.Module:
    """The module inside `torch.compile(model)`, whose code does not see hooks."""
    return cast(nn.Module, getattr(model, "_orig_mod", model))


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside `torch.compile(model)` and DistributedDataParallel.

    Compiled code does not see hooks. Gradients of a replica are exchanged by its wrapper alone, so
    forward passes with gradients go through what `uncompiled` gives.

    Raises:
        TypeError: If it is in a wrapper whose forward is not the model's own.
    """
    inner: Any = uncompiled(model)
    while True:
        if isinstance(inner, FullyShardedDataParallel) or type(inner).__name__ in FOREIGN:
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
    """What `unwrapped` gives, once all its weights are known to be where the library looks.

    Raises:
        TypeError: If they are sharded in another way than by FSDP2.
    """
    model = unwrapped(model)
    _check_weights(model)
    return model


def is_spread(model: nn.Module) -> bool:
    """Whether processes keep this model the same in all of them: a replica's wrapper, or shards."""
    return is_sharded(model) or isinstance(uncompiled(model), DistributedDataParallel)


def is_sharded(model: nn.Module) -> bool:
    """Whether every process must take part in each forward pass."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def computes_in(model: nn.Module) -> torch.dtype:
    """The dtype of the model's weights where it computes: shards may be cast when gathered."""
    cast = None
    if isinstance(model, FSDPModule):
        cast = model._get_fsdp_state()._mp_policy.param_dtype
    return cast or next(model.parameters()).dtype


def whole(x: Tensor) -> Tensor:
    """All of a tensor that may be spread over processes."""
    return x.full_tensor() if isinstance(x, DTensor) else x


@contextmanager
def gradient_sync(model: nn.Module, enabled: bool) -> Iterator[None]:
    """Wrap forward and backward of a pass: replicas synchronise gradients now, or add them up.

    As `DistributedDataParallel.no_sync`. Sharded models reduce gradients in every pass, since no
    process has room for whole ones.
    """
    replica = uncompiled(model)
    if isinstance(replica, DistributedDataParallel) and not enabled:
        with replica.no_sync():
            yield
    else:
        yield


@contextmanager
def resharded(model: nn.Module) -> Iterator[None]:
    """Weights that were gathered inside are let go afterwards.

    The root of an FSDP2 model keeps its own, and would go on with them after the optimizer's step.
    """
    try:
        yield
    finally:
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def _check_weights(model: nn.Module) -> None:
    """Refuse what is sharded in another way than by FSDP2."""
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "ds_id"):
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
                f"measure: {name} is spread as {parameter.placements} over a mesh of "
                f"{parameter.device_mesh.ndim} dimensions; FSDP2 with or without replicas is "
                "supported, tensor parallelism is not"
            )
