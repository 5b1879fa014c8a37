"""The processes of a run, and what they say to each other: all of them, in the same order."""

import os
import time
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

# PyTorch 2.13 has new names for these, and warns of the old ones
gather: Any = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
scatter: Any = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)

T = TypeVar("T")


def join(device: str = "auto") -> torch.device:
    """Join the processes that a launcher such as torchrun has started; alone there are none.

    Args:
        device: "cuda", of which each process takes its own, "cpu", or "auto" for what there is.

    Returns:
        This process's device.

    Example:
        >>> join("cpu")
        device(type='cpu')
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    own = torch.device(device)
    if "WORLD_SIZE" not in os.environ:
        return own
    if own.type == "cuda":
        own = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(own)
    if not dist.is_initialized():
        # gloo beside nccl, for the small numbers that live on the CPU
        dist.init_process_group("cpu:gloo,cuda:nccl" if own.type == "cuda" else "gloo")
    return own


def leave() -> None:
    """Part from the other processes, as the last thing that a program does; alone there are none.

    Without it a process that has done all its work can still end in an abort, or not at all: a
    thread of gloo frees its last tensor while Python, which it needs for that, is on its way out
    (PyTorch's issue 190489).

    Example:
        >>> leave()
    """
    if dist.is_available() and dist.is_initialized():
        time.sleep(0.5)  # nothing says when those threads are done; this is long for them
        dist.destroy_process_group()


class Processes(NamedTuple):
    """Those that share some work; just this one if there is no group."""

    group: ProcessGroup | None = None

    @classmethod
    def all(cls) -> "Processes":
        """Every process that torch.distributed knows of."""
        known = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        return cls(dist.group.WORLD if known else None)

    @property
    def rank(self) -> int:
        """This one's place among them."""
        return 0 if self.group is None else self.group.rank()

    @property
    def size(self) -> int:
        """How many they are."""
        return 1 if self.group is None else self.group.size()

    @property
    def device(self) -> torch.device:
        """Where tensors must be for these processes to exchange them."""
        if self.group is None or "cpu:" in dist.get_backend_config(self.group):
            return torch.device("cpu")
        return torch.device("cuda", torch.cuda.current_device())

    def barrier(self) -> None:
        """Until all are here."""
        self.all_gather([0])

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over processes."""
        if self.group is not None:
            dist.all_reduce(x, dist.ReduceOp.SUM, group=self.group)
        return x

    def all_reduce_max(self, x: Tensor) -> Tensor:
        """The maximum over processes."""
        if self.group is None:
            return x
        x = x.clone()
        dist.all_reduce(x, dist.ReduceOp.MAX, group=self.group)
        return x

    def gather_rows(self, x: Tensor) -> Tensor:
        """The rows of all processes, by rank, of which each may have another number."""
        if self.group is None:
            return x
        counts = [count for (count,) in self.all_gather([len(x)])]
        return self.all_gather_rows(x.to(self.device), counts).to(x.device)

    def all_gather(self, facts: list[int], device: torch.device | None = None) -> list[list[int]]:
        """What every process says, by rank."""
        if self.group is None:
            return [facts]
        own = torch.tensor(facts, device=device or self.device)
        every = own.new_empty(self.size * len(facts))
        gather(every, own, group=self.group)
        said: list[list[int]] = every.view(-1, len(facts)).tolist()
        return said

    def all_gather_object(self, thing: T) -> list[T]:
        """What every process has of something, by rank."""
        if self.group is None:
            return [thing]
        every: list[Any] = [None] * self.size
        dist.all_gather_object(every, thing, group=self.group)
        return every

    def all_gather_rows(self, x: Tensor, counts: list[int]) -> Tensor:
        """The rows of all processes, by rank."""
        longest = max(counts)
        padded = x.new_zeros(longest, *x.shape[1:])
        padded[: len(x)] = x
        every = x.new_empty(len(counts) * longest, *x.shape[1:])
        gather(every, padded, group=self.group)
        return torch.cat([every[i * longest :][:n] for i, n in enumerate(counts)])

    def own_rows(self, x: Tensor, counts: list[int]) -> Tensor:
        """This process's rows of what `gathered` puts together."""
        return torch.split(x, counts)[self.rank]

    def reduce_scatter_rows(self, x: Tensor, counts: list[int]) -> Tensor:
        """This process's rows of the sum over processes."""
        longest = max(counts)
        padded = x.new_zeros(len(counts), longest, *x.shape[1:])
        for i, rows in enumerate(torch.split(x, counts)):
            padded[i, : len(rows)] = rows
        own = x.new_empty(longest, *x.shape[1:])
        scatter(own, padded.flatten(0, 1), group=self.group)
        return own[: counts[self.rank]]
