"""Refusals: host settings and objects that are incompatible with selection, each with its fix."""

from collections.abc import Iterable
from typing import NamedTuple


class Refusal(NamedTuple):
    """One setting or object that is incompatible with selection.

    Attributes:
        what: The setting or object, and the reason.
        fix: What to type instead.
    """

    what: str
    fix: str


class Refused(ValueError, TypeError):
    """Error for a host whose settings or objects are incompatible with selection.

    Attributes:
        refusals: Everything that is incompatible.
    """

    def __init__(self, call: str, refusals: list[Refusal]) -> None:
        lines = [f"{what}; {fix}" for what, fix in refusals]
        if len(lines) == 1:
            super().__init__(f"{call}: {lines[0]}")
        else:
            listed = "".join(f"\n  {i}. {line}" for i, line in enumerate(lines, 1))
            super().__init__(f"{call}: {len(lines)} incompatible settings:{listed}")
        self.refusals = refusals


def refuse(call: str, refusals: Iterable[Refusal]) -> None:
    """Raise one error with all refusals, if there are any.

    Args:
        call: The call that the error message names.
        refusals: Everything that is incompatible.

    Raises:
        Refused: If there is a refusal.

    Example:
        >>> refuse("attach", [])
        >>> refuse("attach", [Refusal("max_steps is 7", "leave it out")])
        Traceback (most recent call last):
        ...
        sage_select.training.refusals.Refused: attach: max_steps is 7; leave it out
    """
    if listed := list(refusals):
        raise Refused(call, listed)
