"""Time and memory of planning and ranking many pairs.

    python examples/benchmarks/plan_and_rank.py --pairs 10000000

Times are in multiples of one `numpy.argsort` of as many float64, measured in the same run. Memory
is the peak of resident memory beyond the inputs.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from sage_select import Constant, Linear, PairLogps, Selector, plan_pools, sage

Result = TypeVar("Result")


def timed(call: Callable[[], Result]) -> tuple[float, Result]:
    """Return the seconds and the result of one call."""
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


class Memory:
    """Peak of resident memory beyond what was resident on entry, in bytes; Linux only."""

    def __enter__(self) -> "Memory":
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the peak
        self.before = self._bytes("VmRSS")
        return self

    def __exit__(self, *exception: object) -> None:
        self.peak = self._bytes("VmHWM") - self.before

    @staticmethod
    def _bytes(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=10_000_000)
    parser.add_argument("--pool", type=int, default=10_000, help="candidates per pool")
    parser.add_argument("--copies", type=int, default=1, help="traversals of the dataset")
    args = parser.parse_args()
    size = args.pairs
    random = np.random.default_rng(0)

    values = random.normal(size=size)
    sort = min(timed(lambda: np.argsort(values))[0] for _ in range(3))  # the unit of all times
    print(f"{size:,} pairs; one argsort of float64 takes {sort:.2f} s")

    strata = random.choice(3, size, p=(0.65, 0.25, 0.10))
    ids = random.integers(0, 2**62, size)
    with Memory() as memory:
        seconds, plan = timed(
            lambda: plan_pools(
                strata,
                Linear((0.9, 0.1, 0.0), (0.4, 0.4, 0.2)),
                num_pools=max(args.copies, size * args.copies // args.pool),
                copies=args.copies,
                ids=ids,
            )
        )
    print(plan)
    print(
        f"planning: {seconds / sort:6.1f} sorts, {seconds / sort / args.copies:.1f} per traversal"
    )
    print(f"          {memory.peak / size:6.0f} bytes per pair at the peak")

    tokens = torch.from_numpy(random.integers(10, 2000, size))
    index = torch.arange(size)
    logps = [torch.from_numpy(random.normal(-500, 50, size)) for _ in range(4)]
    policy = PairLogps(index, logps[0], logps[1], tokens, tokens)
    reference = PairLogps(index, logps[2], logps[3], tokens, tokens)
    selector = Selector(sage, Constant(0.4), reference, lambda step: 0.0)
    scoring, _ = timed(lambda: sage(policy, reference))
    with Memory() as memory:
        seconds, selection = timed(lambda: selector.rank(policy, reference, 0.0, ids=ids))
    print(selection)
    print(f"ranking:  {seconds / sort:6.1f} sorts, including {scoring / sort:.1f} for Eq. 8")
    print(f"          {memory.peak / size:6.0f} bytes per pair at the peak")


if __name__ == "__main__":
    main()
