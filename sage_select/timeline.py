"""The timeline of a run: how many pairs each interval keeps, and at which step it begins."""

import operator
from bisect import bisect_right
from dataclasses import dataclass, field
from functools import cached_property
from math import floor

import numpy as np

from sage_select.pairs import Schedule
from sage_select.plan import Plan


def kept_count(ratio: float, size: int, multiple: int = 1) -> int:
    """How many of `size` candidates a keep ratio retains: floor(ratio * size)  (Eq. 9).

    Rounded down to a multiple where one is asked for; never less than one pair or one multiple, nor
    more than there are.

    Example:
        >>> kept_count(0.7, 10), kept_count(0.7, 10, multiple=4), kept_count(0.0, 10)
        (7, 4, 1)
    """
    if not 0 <= ratio <= 1:
        raise ValueError(f"kept_count: a keep ratio must lie in [0, 1], got {ratio}")
    if multiple < 1:
        raise ValueError(f"kept_count: multiple must be at least 1, got {multiple}")
    count = floor(ratio * size + 1e-9)  # 0.7 * 10 is 7, whatever binary fractions say
    return min(size, max(count - count % multiple, multiple))


@dataclass(frozen=True)
class Timeline:
    """A plan, a keep schedule and a batch size: every step of the run, known before the first.

    Kept pairs are trained in whole batches. What is left over of an interval is carried to the
    front of the next; only the run's very last batch may be short. No pair is lost, so
    `total_steps` is the total of kept pairs over the batch size, rounded up.

    Args:
        plan: The pools.
        keep: Schedule of keep ratios.
        batch_size: Pairs per optimizer step, over all processes and accumulation steps.
        multiple: Kept counts are rounded down to a multiple of this, as by the `Selector`.

    Example:
        >>> from sage_select import Constant, Linear, plan_pools
        >>> plan = plan_pools([0] * 30, Constant((1.0,)), num_pools=3)
        >>> timeline = Timeline(plan, Linear(1.0, 0.5), batch_size=4)
        >>> timeline.kept_count, timeline.first_step, timeline.total_steps
        ((10, 7, 5), (0, 2, 4), 6)
    """

    plan: Plan
    keep: Schedule
    batch_size: int
    multiple: int = 1
    kept_count: tuple[int, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if operator.index(self.batch_size) < 1:
            raise ValueError(f"Timeline: batch_size must be at least 1, got {self.batch_size}")
        counts = tuple(
            kept_count(self.keep(t), len(pool), self.multiple)
            for t, pool in zip(self.plan.progress, self.plan.pools, strict=True)
        )
        object.__setattr__(self, "kept_count", counts)

    @cached_property
    def first_step(self) -> tuple[int, ...]:
        """For each interval, the optimizer steps taken before its pool is scored.

        Where an interval keeps less than a batch, the next begins at the same step; `progress` then
        gives the later one's, and `Selector.select` takes an interval's own as an argument.
        """
        before = np.cumsum((0, *self.kept_count[:-1]))
        return tuple((before // self.batch_size).tolist())

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run."""
        return -(-self.total_kept // self.batch_size)

    @property
    def total_kept(self) -> int:
        """Kept pairs of the run; a pair kept in two intervals counts twice."""
        return sum(self.kept_count)

    def interval_at(self, step: int) -> int:
        """The interval under way after `step` optimizer steps, from 0."""
        if not 0 <= step <= self.total_steps:
            raise ValueError(
                f"Timeline.interval_at: step must lie in [0, {self.total_steps}], got {step}"
            )
        return bisect_right(self.first_step, step) - 1

    def progress(self, step: int) -> float:
        """Progress in [0, 1] of the interval under way; 0 throughout a run of one interval."""
        return self.plan.progress[self.interval_at(step)]
