"""An output head whose rows, the vocabulary, are sharded over ranks."""

from typing import NamedTuple

import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import _resolve_process_group  # type: ignore[attr-defined]

from sage_select.system.processes import Processes


class Shard(NamedTuple):
    """The rows of an output head that this rank holds.

    Attributes:
        start: Token id of this rank's first row.
        group: The process group over which the head is sharded; the default group if None.
        own_tokens: True if each rank passes different tokens, as under FSDP; False if all ranks
            pass the same tokens, as in tensor parallelism.
    """

    start: int
    group: ProcessGroup | None = None
    own_tokens: bool = False


def named(group: ProcessGroup | None) -> str:
    """Return a group's name; custom operators take strings, but no process groups."""
    resolved_group = dist.group.WORLD if group is None else group
    # not a ProcessGroup before init_process_group, and on ranks outside the group
    if not isinstance(resolved_group, ProcessGroup):
        raise ValueError(
            "token_logps: a shard of the vocabulary needs a process group; call "
            "torch.distributed.init_process_group first, and pass a group that includes this rank"
        )
    name: str = resolved_group.group_name
    return name


def named_processes(name: str | None) -> Processes:
    """Return the processes of the group with this name; only the current process if None."""
    # a private function, but the one that PyTorch's functional collectives use for names
    return Processes(None if name is None else _resolve_process_group(name))  # type: ignore[arg-type]
