"""The cost of scoring and training: FLOPs needed and FLOPs executed, tokens, time.

A ledger records the passes that run inside it, each under the phase it runs in:

    >>> ledger = Ledger()
    >>> with ledger, phase("scoring"):
    ...     book(Work(tokens=300))
    >>> ledger["scoring"].tokens
    300
"""

import json
import math
import os
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from warnings import warn

import torch

from sage_select.system.files import named_on_failure


@dataclass(frozen=True)
class Work:
    """The cost of forward and backward passes; additive, except for peak memory.

    Attributes:
        needed: FLOPs for each distinct token in its context once, with the head at response tokens
            only.
        executed: FLOPs executed, including padding, repeated prompts and recomputation.
        tokens: Distinct tokens in their contexts.
        executed_tokens: Tokens that went through the model, including padding.
        seconds: Wall-clock time.
        peak_bytes: Peak device memory while they ran; 0 if the device does not count it.
    """

    needed: float = 0.0
    executed: float = 0.0
    tokens: int = 0
    executed_tokens: int = 0
    seconds: float = 0.0
    peak_bytes: int = 0

    def __mul__(self, passes: float) -> "Work":
        """Return the FLOPs of this many forward passes over the same tokens."""
        return replace(self, needed=passes * self.needed, executed=passes * self.executed)

    def repeated(self, times: float) -> "Work":
        """Return the FLOPs and tokens of this many repetitions."""
        return replace(self * times, tokens=round(times * self.tokens))

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.needed + other.needed,
            self.executed + other.executed,
            self.tokens + other.tokens,
            self.executed_tokens + other.executed_tokens,
            self.seconds + other.seconds,
            max(self.peak_bytes, other.peak_bytes),
        )


class Ledger(dict[str, Work]):
    """Work by phase: "reference", "scoring", "training", "evaluation"; outside them, "other"."""

    def __enter__(self) -> "Ledger":
        _ledgers.set((*_ledgers.get(), self))
        return self

    def __exit__(self, *error: object) -> None:
        _ledgers.set(_ledgers.get()[:-1])

    def add(self, name: str, work: Work) -> None:
        """Add work to a phase."""
        self[name] = self.get(name, Work()) + work


def side_by_side(ledgers: list[Ledger]) -> Ledger:
    """Combine the work of processes that ran at the same time: the sum, in the longest time.

    Example:
        >>> one, other = Ledger(scoring=Work(needed=2.0, seconds=3.0)), Ledger()
        >>> side_by_side([one, one, other])["scoring"].needed
        4.0
    """
    combined = Ledger()
    for name in dict.fromkeys(name for ledger in ledgers for name in ledger):
        works = [ledger[name] for ledger in ledgers if name in ledger]
        longest = max(work.seconds for work in works)
        combined[name] = replace(sum(works, Work()), seconds=longest)
    return combined


def append_costs(path: Path, ledger: Ledger, interval: int | None = None) -> None:
    """Append a line for each phase to a file of costs; an interval may have several.

    Raises:
        OSError: If the line cannot be written, such as for a full disk.
    """
    lines = [{"interval": interval, "phase": name, **asdict(work)} for name, work in ledger.items()]
    with named_on_failure(path), path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read() != b"\n":  # the run was killed while writing the last line
                file.write(b"\n")
        for line in lines:
            file.write(json.dumps(line | {"crc32": _checksum(line)}).encode() + b"\n")


def read_costs(path: Path) -> Ledger:
    """Sum a file of costs; steps repeated after a resume count again, as they cost again.

    A line that a killed run left incomplete, or that was damaged or copied, is not counted; a
    warning says how many there are. Lines of older versions have no checksum and are counted as
    they are.
    """
    ledger, bad, seen = Ledger(), 0, set[bytes]()
    for line in path.read_bytes().splitlines() if path.exists() else ():
        try:
            record = json.loads(line.decode())
            checksum = record.pop("crc32", None)
            if checksum not in (None, _checksum(record)):
                raise ValueError("the checksum differs")
            if checksum is not None and line in seen:  # no phase takes the same time twice
                raise ValueError("the line is a copy")
            seen.add(line)
            del record["interval"]
            ledger.add(record.pop("phase"), Work(**record))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            bad += line != b""
    if bad:
        warn(
            f"train: {bad} damaged or incomplete lines of {path} (a kill can leave one) are not "
            "counted",
            stacklevel=2,
        )
    return ledger


def _checksum(line: dict[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(line).encode()):08x}"


_ledgers: ContextVar[tuple[Ledger, ...]] = ContextVar("ledgers", default=())
_phases: ContextVar[tuple["_Clock", ...]] = ContextVar("phases", default=())


def recording() -> bool:
    """Return whether a ledger is open."""
    return bool(_ledgers.get())


def book(work: Work) -> None:
    """Add work to all open ledgers, under the innermost phase."""
    phases = _phases.get()
    for ledger in _ledgers.get():
        ledger.add(phases[-1].name if phases else "other", work)


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Record the work and time inside under this name; an inner phase pauses the outer clock.

    It does nothing without an open ledger.
    """
    if not _ledgers.get():  # no clock, and so no device synchronisation
        yield
        return
    if outer := _phases.get():
        outer[-1].stop()
    clock = _Clock(name)
    token = _phases.set((*outer, clock))
    try:
        yield
    finally:
        clock.stop()
        _phases.reset(token)
        if outer:
            outer[-1].start()


class _Clock:
    """Wall-clock time and peak device memory of a phase."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.start()

    def start(self) -> None:
        # kernels run asynchronously: wait for those of the previous phase before timing this one
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        self._since = time.perf_counter()

    def stop(self) -> None:
        peak = 0
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated()
        work = Work(seconds=time.perf_counter() - self._since, peak_bytes=peak)
        for ledger in _ledgers.get():
            ledger.add(self.name, work)


def break_even(scoring: float, training: float) -> float:
    """Return the keep ratio below which selection costs less than training on all pairs.

    Scoring the pools and training on a share k costs s + k t; training on all of them costs t. So
    k = 1 - s / t, or 1 - 1 / c if training costs c times as much as scoring.

    Args:
        scoring: Cost of scoring the pools, in any unit.
        training: Cost of training on all pairs, in the same unit.

    Returns:
        At most 1; if it is not positive, no keep ratio saves anything. NaN if training costs 0.

    Example:
        >>> round(break_even(scoring=1, training=3), 3)  # a forward pass; forward and backward
        0.667
    """
    return 1 - scoring / training if training else math.nan
