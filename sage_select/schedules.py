"""Schedules: frozen, comparable functions of a run's progress in [0, 1]."""

from dataclasses import dataclass
from typing import Any

from sage_select.arguments import finite, fraction, shown

Value = float | tuple[float, ...]
"""A keep ratio, or one share per stratum."""


@dataclass(frozen=True)
class Constant:
    """A constant value.

    Args:
        value: A finite number, or a tuple with one share per stratum.

    Example:
        >>> Constant(0.4)(0.7)
        0.4
    """

    value: Value

    def __post_init__(self) -> None:
        _freeze(self, "value")

    def __call__(self, progress: float) -> Value:
        _check_progress(self, progress)
        return self.value


@dataclass(frozen=True)
class Linear:
    """A straight line from `start` to `end`: `start + (end - start) * progress`  (Eq. 6).

    Both end values are returned exactly.

    Args:
        start: Value at progress 0, a finite number or a tuple with one share per stratum.
        end: Value at progress 1, of the same shape.

    Example:
        >>> Linear(1.0, 0.4)(0.5)
        0.7
        >>> Linear((0.9, 0.1, 0.0), (0.4, 0.4, 0.2))(1.0)
        (0.4, 0.4, 0.2)
    """

    start: Value
    end: Value

    def __post_init__(self) -> None:
        _freeze(self, "start", "end")
        if _length(self.start) != _length(self.end):
            raise ValueError(
                f"Linear: start and end must have the same shape, got {self.start} and {self.end}"
            )

    def __call__(self, progress: float) -> Value:
        _check_progress(self, progress)
        if isinstance(self.start, tuple) and isinstance(self.end, tuple):
            return tuple(
                _lerp(start, end, progress) for start, end in zip(self.start, self.end, strict=True)
            )
        assert not isinstance(self.start, tuple)
        assert not isinstance(self.end, tuple)
        return _lerp(self.start, self.end, progress)


def _freeze(schedule: object, *names: str) -> None:
    """Check values, and turn lists into tuples, since a list would make a schedule unhashable."""
    call = type(schedule).__name__
    for name in names:
        value: Any = getattr(schedule, name)
        if isinstance(value, list | tuple):
            for share in value:
                finite(share, f"{call}: a share of {name}")
            if not value:
                raise ValueError(f"{call}: {name} must have one share per stratum, got {value}")
        else:
            finite(value, f"{call}: {name}")
        # the dataclass is frozen, so its own __setattr__ would refuse
        object.__setattr__(schedule, name, tuple(value) if isinstance(value, list) else value)


def _lerp(start: float, end: float, progress: float) -> float:
    # exact at both ends, whereas start + (end - start) * progress can miss `end` by rounding
    return (1 - progress) * start + progress * end


def _length(value: Value) -> int | None:
    return len(value) if isinstance(value, tuple) else None


def _check_progress(schedule: object, progress: float) -> None:
    fraction(progress, f"{shown(schedule)}: progress")
