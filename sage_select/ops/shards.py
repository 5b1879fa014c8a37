"""A vocabulary whose rows are spread over processes."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


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


_groups: dict[str, ProcessGroup] = {}  # an operator of PyTorch takes no group, so it takes a name


def named(group: ProcessGroup | None) -> str:
    """The name by which `Processes.of` finds a group."""
    found = dist.group.WORLD if group is None else group
    if found is None:
        raise ValueError(
            "token_logps: a shard of the vocabulary needs its processes; call "
            "torch.distributed.init_process_group first"
        )
    name: str = found.group_name
    _groups[name] = found
    return name


class Processes(NamedTuple):
    """Those that share a vocabulary; just this one if there is no group."""

    group: ProcessGroup | None

    @classmethod
    def of(cls, name: str | None) -> "Processes":
        """Of a group's name."""
        return cls(None if name is None else _groups[name])

    def total(self, x: Tensor) -> Tensor:
        """The sum over processes."""
        if self.group is not None:
            dist.all_reduce(x, dist.ReduceOp.SUM, group=self.group)
        return x

    def largest(self, x: Tensor) -> Tensor:
        """The maximum over processes."""
        if self.group is None:
            return x
        x = x.clone()
        dist.all_reduce(x, dist.ReduceOp.MAX, group=self.group)
        return x

    def agree(self, facts: list[int], device: torch.device) -> list[list[int]]:
        """What every process says, by rank."""
        if self.group is None:
            return [facts]
        own = torch.tensor(facts, device=device)
        every = own.new_empty(self.group.size() * len(facts))
        dist.all_gather_into_tensor(every, own, group=self.group)
        said: list[list[int]] = every.view(-1, len(facts)).tolist()
        return said

    def gathered(self, x: Tensor, counts: list[int]) -> Tensor:
        """The rows of all processes, by rank."""
        longest = max(counts)
        padded = x.new_zeros(longest, *x.shape[1:])
        padded[: len(x)] = x
        every = x.new_empty(len(counts) * longest, *x.shape[1:])
        dist.all_gather_into_tensor(every, padded, group=self.group)
        return torch.cat([every[i * longest :][:n] for i, n in enumerate(counts)])

    def own_rows(self, x: Tensor, counts: list[int]) -> Tensor:
        """This process's rows of what `gathered` puts together."""
        assert self.group is not None
        return torch.split(x, counts)[self.group.rank()]

    def own_total(self, x: Tensor, counts: list[int]) -> Tensor:
        """This process's rows of the sum over processes."""
        assert self.group is not None
        longest = max(counts)
        padded = x.new_zeros(len(counts), longest, *x.shape[1:])
        for i, rows in enumerate(torch.split(x, counts)):
            padded[i, : len(rows)] = rows
        own = x.new_empty(longest, *x.shape[1:])
        dist.reduce_scatter_tensor(own, padded.flatten(0, 1), group=self.group)
        return own[: counts[self.group.rank()]]
