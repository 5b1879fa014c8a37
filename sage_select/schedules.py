"""Schedules: frozen, comparable functions of a run's progress in [0, 1]."""

from dataclasses import dataclass

Value = float | tuple[float, ...]
"""A keep ratio, or one share per stratum."""


@dataclass(frozen=True)
class Constant:
    """A constant value.

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
        start: Value at progress 0, a float or a tuple with one share per stratum.
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
    """Turn lists into tuples, since a list would make the schedule unhashable."""
    for name in names:
        value = getattr(schedule, name)
        # the dataclass is frozen, so its own __setattr__ would refuse
        object.__setattr__(schedule, name, tuple(value) if isinstance(value, list) else value)


def _lerp(start: float, end: float, progress: float) -> float:
    # exact at both ends, whereas start + (end - start) * progress can miss `end` by rounding
    return (1 - progress) * start + progress * end


def _length(value: Value) -> int | None:
    return len(value) if isinstance(value, tuple) else None


def _check_progress(schedule: object, progress: float) -> None:
    if not 0 <= progress <= 1:
        raise ValueError(f"{schedule}: progress must lie in [0, 1], got {progress}")
