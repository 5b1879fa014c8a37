"""The timeline of a run: the number of pairs that each interval keeps, and its first step."""

from bisect import bisect_right
from dataclasses import dataclass, field
from functools import cached_property
from math import floor

import numpy as np

from sage_select.arguments import LARGEST_COUNT, fraction, shown, whole_number
from sage_select.pairs import Schedule
from sage_select.plan import Plan


def kept_count(ratio: float, size: int, multiple: int = 1) -> int:
    """Number of candidates that a keep ratio retains of `size`: floor(ratio * size)  (Eq. 9).

    It is rounded down to a multiple of `multiple`, but is at least `multiple` and at most `size`.

    Raises:
        TypeError: If the ratio is not a number, or a count is not a whole number.
        ValueError: If the ratio is not in [0, 1], or `multiple` is not positive.

    Example:
        >>> kept_count(0.7, 10), kept_count(0.7, 10, multiple=4), kept_count(0.0, 10)
        (7, 4, 1)
    """
    ratio = fraction(ratio, "kept_count: a keep ratio")
    size = whole_number(size, "kept_count: size", least=0)
    multiple = whole_number(multiple, "kept_count: multiple")
    count = floor(ratio * size + 1e-9)  # 0.7 * 10 is 7, despite binary rounding
    return min(size, max(count - count % multiple, multiple))


@dataclass(frozen=True)
class Timeline:
    """Every step of a run, computed in advance from a plan, a keep schedule and a batch size.

    Kept pairs are trained in full batches. The remainder of an interval is carried to the front of
    the next; only the last batch of the run may be short. No pair is lost, so `total_steps` is the
    total number of kept pairs divided by the batch size, rounded up.

    Args:
        plan: The pools.
        keep: Schedule of keep ratios.
        batch_size: Pairs per optimizer step, over all processes and accumulation steps.
        multiple: Kept counts are rounded down to a multiple of this, as in `Selector`.

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
        if not isinstance(self.plan, Plan):
            raise TypeError(
                f"Timeline: plan must be a Plan, as plan_run returns it, got {shown(self.plan)}"
            )
        if not callable(self.keep):
            raise TypeError(
                "Timeline: keep must be a schedule, such as Constant(0.4) or Linear(1.0, 0.4), got "
                f"{shown(self.keep)}"
            )
        # the dataclass is frozen, so its own __setattr__ would refuse
        for name in ("batch_size", "multiple"):
            number = whole_number(getattr(self, name), f"Timeline: {name}")
            object.__setattr__(self, name, number)
        counts = tuple(
            kept_count(self.keep(t), len(pool), self.multiple)
            for t, pool in zip(self.plan.progress, self.plan.pools, strict=True)
        )
        object.__setattr__(self, "kept_count", counts)

    @cached_property
    def first_step(self) -> tuple[int, ...]:
        """Optimizer steps taken before each interval's pool is scored.

        If an interval keeps less than a batch, the next one starts at the same step. `progress`
        then returns the later one's value; pass an earlier one's to `Selector.select`.
        """
        kept_before = np.cumsum((0, *self.kept_count[:-1]))
        return tuple((kept_before // self.batch_size).tolist())

    @property
    def total_steps(self) -> int:
        """Number of optimizer steps of the run."""
        return -(-self.total_kept // self.batch_size)

    @property
    def total_kept(self) -> int:
        """Number of kept pairs of the run; a pair kept in two intervals counts twice."""
        return sum(self.kept_count)

    def interval_at(self, step: int) -> int:
        """Return the number, from 0, of the active interval after `step` optimizer steps."""
        name = "Timeline.interval_at: step"
        if not 0 <= whole_number(step, name, least=-LARGEST_COUNT) <= self.total_steps:
            raise ValueError(f"{name} must lie in [0, {self.total_steps}], got {step}")
        return bisect_right(self.first_step, step) - 1

    def progress(self, step: int) -> float:
        """Return the progress in [0, 1] of the active interval, as in `Plan.progress`."""
        return self.plan.progress[self.interval_at(step)]
