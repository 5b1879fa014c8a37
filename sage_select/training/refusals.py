"""Refusals: what a host does that does not go with selection, and what to do instead."""

from collections.abc import Iterable
from typing import NamedTuple


class Refusal(NamedTuple):
    """One thing that does not go with selection."""

    what: str
    fix: str


class Refused(ValueError, TypeError):
    """A host that cannot train on what is selected: a setting or an object does not fit.

    Attributes:
        refusals: Everything that does not fit.
    """

    def __init__(self, call: str, refusals: list[Refusal]) -> None:
        lines = [f"{what}; {fix}" for what, fix in refusals]
        if len(lines) == 1:
            super().__init__(f"{call}: {lines[0]}")
        else:
            listed = "".join(f"\n  {i}. {line}" for i, line in enumerate(lines, 1))
            super().__init__(f"{call}: {len(lines)} things to change:{listed}")
        self.refusals = refusals


def refuse(call: str, refusals: Iterable[Refusal]) -> None:
    """Raise if there is anything to refuse, with all of it at once.

    Args:
        call: What the error names.
        refusals: Everything that does not fit; nothing happens if there is none.

    Raises:
        Refused: If there is a refusal.

    Example:
        >>> refuse("attach", [])
        >>> refuse("attach", [Refusal("max_steps is 7", "leave it out")])
        Traceback (most recent call last):
        ...
        sage_select.training.refusals.Refused: attach: max_steps is 7; leave it out
    """
    if found := list(refusals):
        raise Refused(call, found)
