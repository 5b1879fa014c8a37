"""Checks of numbers and switches that callers pass, the same in Python as in a configuration.

A truth value or a text is no number, and a float is no count: 2.5 pairs, `"1"` and `True` are
mistakes, not values to convert. NumPy scalars are as good as Python's.
"""

import math
from typing import Any

LARGEST_COUNT = 2**31 - 1
"""Upper bound of counts, so that products of two still fit in int64."""

SEEDS = -(2**63), 2**63 - 1
"""Smallest and largest seed: those that fit in int64."""


def whole_number(value: Any, name: str, *, least: int = 1, most: int = LARGEST_COUNT) -> int:
    """Return a whole number as an int, or refuse it.

    Args:
        value: The argument.
        name: Name of call and argument, which begins the error message.
        least: Smallest value allowed.
        most: Largest value allowed.

    Raises:
        TypeError: If it is not a whole number; a bool, 2.0 and "2" are none.
        ValueError: If it is out of range.

    Example:
        >>> whole_number(0, "plan_run: epochs")
        Traceback (most recent call last):
        ...
        ValueError: plan_run: epochs must be at least 1, got 0
    """
    if not is_whole(number := scalar(value)):
        raise TypeError(f"{name} must be a whole number, got {shown(value)}")
    if number < least:
        raise ValueError(f"{name} must be at least {least}, got {shown(number)}")
    if number > most:
        raise ValueError(f"{name} must be at most {most}, got {shown(number)}")
    return int(number)


def seed_number(value: Any, name: str) -> int:
    """Return a seed as an int, or refuse it; see `SEEDS`."""
    return whole_number(value, name, least=SEEDS[0], most=SEEDS[1])


def finite(value: Any, name: str) -> float:
    """Return a finite number as a float, or refuse it."""
    number = _real(value, name)
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite, got {shown(value)}")
    return number


def positive(value: Any, name: str) -> float:
    """Return a positive finite number as a float, or refuse it.

    Example:
        >>> positive(float("nan"), "sage: beta")
        Traceback (most recent call last):
        ...
        ValueError: sage: beta must be positive and finite, got nan
    """
    number = _real(value, name)
    if not 0 < number < math.inf:  # NaN fails, too
        raise ValueError(f"{name} must be positive and finite, got {shown(value)}")
    return number


def not_negative(value: Any, name: str) -> float:
    """Return a finite number of at least 0 as a float, or refuse it."""
    number = _real(value, name)
    if not 0 <= number < math.inf:
        raise ValueError(f"{name} must be >= 0 and finite, got {shown(value)}")
    return number


def fraction(value: Any, name: str) -> float:
    """Return a number in [0, 1] as a float, or refuse it."""
    number = _real(value, name)
    if not 0 <= number <= 1:
        raise ValueError(f"{name} must lie in [0, 1], got {shown(value)}")
    return number


def switch(value: Any, name: str, *, optional: bool = False) -> bool | None:
    """Return True or False, or with `optional` None, or refuse the value."""
    flag = scalar(value)
    if isinstance(flag, bool) or (optional and flag is None):
        return flag
    choices = "True, False or None" if optional else "True or False"
    raise TypeError(f"{name} must be {choices}, got {shown(value)}")


def scalar(value: Any) -> Any:
    """Return a NumPy scalar or a tensor of one number as Python's own; anything else unchanged."""
    return value.item() if getattr(value, "ndim", None) == 0 else value


def is_whole(number: Any) -> bool:
    """Return whether a `scalar` is a whole number; True and 2.0 are none."""
    return isinstance(number, int) and not isinstance(number, bool)


def is_number(number: Any) -> bool:
    """Return whether a `scalar` is a number; True and "2" are none."""
    return isinstance(number, int | float) and not isinstance(number, bool)


def shown(value: Any, limit: int = 100) -> str:
    """Return the repr of a value for an error message, shortened in the middle if it is long.

    Example:
        >>> shown(10**200, limit=20)
        '1000000...0000000'
    """
    try:
        text = repr(value)
    except Exception as error:  # a huge integer, a deep nesting, or a class's own fault
        return f"a value of type {type(value).__name__} that cannot be shown ({error})"
    half = (limit - 3) // 2 - 1
    return text if len(text) <= limit else f"{text[:half]}...{text[-half:]}"


def _real(value: Any, name: str) -> float:
    if not is_number(number := scalar(value)):
        raise TypeError(f"{name} must be a number, got {shown(value)}")
    try:
        return float(number)
    except OverflowError:  # an integer beyond the largest float
        return math.inf if number > 0 else -math.inf
