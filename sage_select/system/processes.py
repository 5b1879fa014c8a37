"""The processes of a run, and their collectives, which all of them call in the same order."""

import os
import time
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

# PyTorch 2.13 renames these, and warns about the old names
gather: Any = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
scatter: Any = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)

T = TypeVar("T")


def join(device: str = "auto") -> torch.device:
    """Join the processes that a launcher such as torchrun has started, if there is a launcher.

    Args:
        device: "cuda" for one GPU per process, "cpu", or "auto" for a GPU if there is one.

    Returns:
        This process's device.

    Example:
        >>> join("cpu")
        device(type='cpu')
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    local_device = torch.device(device)
    if "WORLD_SIZE" not in os.environ:
        return local_device
    if local_device.type == "cuda":
        local_device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(local_device)
    if not dist.is_initialized():
        # gloo in addition to nccl, for small tensors on the CPU
        dist.init_process_group("cpu:gloo,cuda:nccl" if local_device.type == "cuda" else "gloo")
    return local_device


def leave() -> None:
    """Leave the process group, as the last call of a program; without one it does nothing.

    Otherwise a process that has finished its work can still abort or hang at exit: a gloo thread
    frees its last tensor, for which it needs Python, while Python is shutting down (PyTorch issue
    190489).

    Example:
        >>> leave()
    """
    if dist.is_available() and dist.is_initialized():
        time.sleep(0.5)  # nothing reports when those threads are done; this is enough
        dist.destroy_process_group()


class Processes(NamedTuple):
    """The ranks that share some work; only this process if there is no group."""

    group: ProcessGroup | None = None

    @classmethod
    def all(cls) -> "Processes":
        """Return all ranks of torch.distributed."""
        distributed = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        return cls(dist.group.WORLD if distributed else None)

    @property
    def rank(self) -> int:
        """Rank of this process, from 0."""
        return 0 if self.group is None else self.group.rank()

    @property
    def size(self) -> int:
        """World size: the number of ranks."""
        return 1 if self.group is None else self.group.size()

    @property
    def device(self) -> torch.device:
        """Device on which these ranks exchange tensors."""
        if self.group is None or "cpu:" in dist.get_backend_config(self.group):
            return torch.device("cpu")
        return torch.device("cuda", torch.cuda.current_device())

    def barrier(self) -> None:
        """Wait until all ranks have made this call."""
        self.all_gather([0])

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum a tensor over ranks, in place."""
        if self.group is not None:
            dist.all_reduce(x, dist.ReduceOp.SUM, group=self.group)
        return x

    def all_reduce_max(self, x: Tensor) -> Tensor:
        """Return the maximum over ranks; the input does not change."""
        if self.group is None:
            return x
        x = x.clone()
        dist.all_reduce(x, dist.ReduceOp.MAX, group=self.group)
        return x

    def gather_rows(self, x: Tensor) -> Tensor:
        """Concatenate the rows of all ranks, in rank order; ranks may have different numbers."""
        if self.group is None:
            return x
        counts = [count for (count,) in self.all_gather([len(x)])]
        return self.all_gather_rows(x.to(self.device), counts).to(x.device)

    def all_gather(self, values: list[int], device: torch.device | None = None) -> list[list[int]]:
        """Return the integers of every rank, in rank order; all ranks pass equally many."""
        if self.group is None:
            return [values]
        local = torch.tensor(values, device=device or self.device)
        gathered = local.new_empty(self.size * len(values))
        gather(gathered, local, group=self.group)
        by_rank: list[list[int]] = gathered.view(-1, len(values)).tolist()
        return by_rank

    def all_gather_object(self, value: T) -> list[T]:
        """Return the objects of all ranks, in rank order."""
        if self.group is None:
            return [value]
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, value, group=self.group)
        return gathered

    def all_gather_rows(self, x: Tensor, counts: list[int]) -> Tensor:
        """Concatenate the rows of all ranks, in rank order; `counts` has each rank's number."""
        longest = max(counts)
        # the collective needs equal shapes: pad to the longest, and cut the padding afterwards
        padded = x.new_zeros(longest, *x.shape[1:])
        padded[: len(x)] = x
        gathered = x.new_empty(len(counts) * longest, *x.shape[1:])
        gather(gathered, padded, group=self.group)
        return torch.cat([gathered[i * longest :][:n] for i, n in enumerate(counts)])

    def own_rows(self, x: Tensor, counts: list[int]) -> Tensor:
        """Return this rank's part of the rows that `all_gather_rows` concatenates."""
        return torch.split(x, counts)[self.rank]

    def reduce_scatter_rows(self, x: Tensor, counts: list[int]) -> Tensor:
        """Sum `x`, which has the rows of all ranks, over ranks; return this rank's rows."""
        longest = max(counts)
        padded = x.new_zeros(len(counts), longest, *x.shape[1:])
        for i, rows in enumerate(torch.split(x, counts)):
            padded[i, : len(rows)] = rows
        reduced = x.new_empty(longest, *x.shape[1:])
        scatter(reduced, padded.flatten(0, 1), group=self.group)
        return reduced[: counts[self.rank]]
