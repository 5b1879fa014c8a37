"""A vocabulary whose rows are spread over processes."""

from typing import NamedTuple

import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import _resolve_process_group  # type: ignore[attr-defined]

from sage_select.system.processes import Processes


class Shard(NamedTuple):
    """This process's rows of an output head that several processes share.

    Attributes:
        start: Token id of the first of them.
        group: The processes that have the others; all processes if None.
        own_tokens: Whether each process brings tokens of its own, as under FSDP. Otherwise all
            bring the same ones, as in tensor parallelism.
    """

    start: int
    group: ProcessGroup | None = None
    own_tokens: bool = False


def named(group: ProcessGroup | None) -> str:
    """The name by which an operator finds a group, since it takes none itself."""
    found = dist.group.WORLD if group is None else group
    if not isinstance(found, ProcessGroup):
        raise ValueError(
            "token_logps: a shard of the vocabulary needs its processes; call "
            "torch.distributed.init_process_group first, and give a group that has this process"
        )
    name: str = found.group_name
    return name


def named_processes(name: str | None) -> Processes:
    """The processes of a group's name; this one alone if there is none."""
    # as PyTorch's own operators of collectives do
    return Processes(None if name is None else _resolve_process_group(name))  # type: ignore[arg-type]
