"""Signs of life: processes that measure or train together know where each of them is.

A process that dies or hangs leaves the others waiting for it, inside a collective call where they
can say nothing. So each has a thread that tells the others, once a second, what its process is
doing. Where one falls silent or nobody gets on, that thread says who, and where, and ends the run.
"""

import json
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch.distributed as dist

from sage_select.system.processes import Processes

EVERY = 1.0  # seconds between signs
STOP = 0  # no signal's number
GONE = (RuntimeError,)  # whoever kept the signs is: all that is known is what was


def timeout() -> float:
    """Seconds without a sign of life, or without progress of anybody, before a run is ended.

    From the environment variable `SAGE_SELECT_PATIENCE`; 600 without it.
    """
    return float(os.environ.get("SAGE_SELECT_PATIENCE", "600"))


@contextmanager
def during(what: str) -> Iterator[None]:
    """Say that what runs inside is part of this, such as "interval 3"."""
    token = _during.set((*_during.get(), what))
    try:
        yield
    finally:
        _during.reset(token)


def beat(place: str) -> None:
    """Say where this process is, to those that watch."""
    if (watch := _monitor.get()) is not None:
        watch.progress += 1
        watch.place = ", ".join((*_during.get(), place))
        watch.tell()


@contextmanager
def monitored(processes: Processes) -> Iterator[None]:
    """Around what processes do together: if one is lost inside, the others say which and where.

    With an error that is raised inside it is said where all processes were.

    Args:
        processes: Those that do it, all of them.
    """
    if processes.group is None or _monitor.get() is not None:
        yield
        return
    watch = _Monitor(processes)
    token = _monitor.set(watch)
    watch.start()
    try:
        yield
    except RuntimeError:
        # a lost connection, perhaps: said at once, for whoever has launched us may end us now
        sys.stderr.write(f"sage-select: {watch.account()}\n")
        sys.stderr.flush()
        raise
    except Exception as error:
        error.add_note(watch.account())
        raise
    finally:
        watch.stop()
        _monitor.reset(token)


_during: ContextVar[tuple[str, ...]] = ContextVar("during", default=())
_monitor: ContextVar["_Monitor | None"] = ContextVar("watch", default=None)


class _Heartbeat(NamedTuple):
    """What a process last said of itself."""

    signs: int = 0  # how many it gave; a process that stands still gives none
    progress: int = 0  # how often it got on
    place: str = "not there yet"


class _Monitor:
    """A thread that gives signs of this process and looks for those of the others."""

    def __init__(self, processes: Processes) -> None:
        assert processes.group is not None
        self.rank, self.size = processes.rank, processes.size
        self.place, self.progress = "beginning", 0
        c10d: Any = dist.distributed_c10d
        default = c10d._get_default_store()
        # a connection of its own: another thread may be waiting on the first one
        store = default.clone() if hasattr(default, "clone") else default
        self._store = c10d.PrefixStore(f"sage_select/{processes.group.group_name}", store)
        self._signs = 0
        self._heard = {rank: (time.monotonic(), _Heartbeat()) for rank in range(self.size)}
        self._got_on = time.monotonic()
        self._over, self._wake = os.pipe()
        self._thread = threading.Thread(target=self._look, name="sage-select watch", daemon=True)
        self._takes_signals = False

    def start(self) -> None:
        """Begin to watch."""
        os.set_blocking(self._wake, False)
        unhandled = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        if unhandled and threading.current_thread() is threading.main_thread():
            # a launcher ends those that are left when one has died, before they could say a word
            theirs = signal.set_wakeup_fd(self._wake, warn_on_full_buffer=False)
            if theirs != -1:  # an event loop waits for signals there
                signal.set_wakeup_fd(theirs)
            else:
                signal.signal(signal.SIGTERM, lambda *_: None)
                self._takes_signals = True
        self._thread.start()

    def stop(self) -> None:
        """Watch no more."""
        if self._takes_signals:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.write(self._wake, bytes([STOP]))
        self._thread.join()
        os.close(self._over)
        os.close(self._wake)

    def account(self) -> str:
        """Where every process was when it was last heard of."""
        self._exchange()
        now = time.monotonic()
        lines = [
            f"  process {rank}: {sign.place}"
            + ("" if rank == self.rank else f" (heard of {now - heard:.0f} s ago)")
            for rank, (heard, sign) in sorted(self._heard.items())
        ]
        return "\n".join(
            [
                f"this is process {self.rank} of {self.size}; where they were:",
                *lines,
                "  which of them ended first, and why, their launcher says; a run goes on from its "
                "newest checkpoint",
            ]
        )

    def _look(self) -> None:
        while True:
            woken, _, _ = select.select([self._over], [], [], EVERY)
            said = os.read(self._over, 1)[0] if woken else None
            if said == STOP:
                return
            if said == signal.SIGTERM:  # other signals are none of ours
                self._end("told to stop (SIGTERM), as when another process has died", 128 + said)
            self._exchange()
            if reason := self._lost():
                self._end(reason, 1)

    def tell(self) -> None:
        """Give a sign to the others."""
        self._signs += 1
        with suppress(*GONE):
            own = _Heartbeat(self._signs, self.progress, self.place)
            self._store.set(str(self.rank), json.dumps(own))

    def _exchange(self) -> None:
        """Give a sign, and take in those of the others."""
        self.tell()
        with suppress(*GONE):
            for rank in range(self.size):
                if not self._store.check([str(rank)]):
                    continue
                sign = _Heartbeat(*json.loads(self._store.get(str(rank))))
                _, before = self._heard[rank]
                if sign[1:] != before[1:]:
                    self._got_on = time.monotonic()
                if sign != before:
                    self._heard[rank] = time.monotonic(), sign

    def _lost(self) -> str:
        """Why there is nothing left to wait for, or nothing."""
        now = time.monotonic()
        for rank, (heard, sign) in self._heard.items():
            if rank != self.rank and now - heard > timeout():
                return (
                    f"process {rank} has given no sign of life for {now - heard:.0f} s; it was "
                    f"last heard of at: {sign.place}"
                )
        if now - self._got_on > timeout():
            rank, (_, sign) = min(self._heard.items(), key=lambda entry: entry[1][1].progress)
            return (
                f"no process has got on for {now - self._got_on:.0f} s; process {rank} is the "
                f"furthest behind, at: {sign.place}"
            )
        return ""

    def _end(self, reason: str, code: int) -> None:
        """End the process: its main thread waits for what will not come, and cannot be told."""
        sys.stderr.write(f"sage-select: {reason}\n{self.account()}\n")
        sys.stderr.flush()
        os._exit(code)
