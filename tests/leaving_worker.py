"""Run two processes that exchange tensors and exit at once, many times.

Print how often one of them aborted.
"""

import os
import socket
import sys

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from sage_select import leave


def exchange(rank: int, port: int) -> None:
    # in seconds; makes gloo's threads wait for Python as long as on a busy machine
    sys.setswitchinterval(10)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    model = DistributedDataParallel(torch.nn.Linear(4, 4))
    model.itself = model  # a cycle: the group is freed only by garbage collection
    for _ in range(50):
        gathered = [torch.empty(100_000) for _ in range(2)]
        dist.all_gather(gathered, torch.ones(100_000), async_op=True).wait()
    leave()


def main(trials: int) -> None:
    aborted = 0
    for _ in range(trials):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        children = []
        for rank in range(2):
            if (pid := os.fork()) == 0:
                return exchange(rank, port)  # and exit through Python's normal shutdown
            children.append(pid)
        aborted += max(os.waitpid(pid, 0)[1] for pid in children) != 0
    print(aborted)


if __name__ == "__main__":
    main(int(sys.argv[1]))
