"""Heartbeats: the ranks of a run tell each other where they are.

A rank that dies or hangs leaves the others waiting in a collective call, where they cannot report
anything. So each rank has a thread that sends a heartbeat with its current position once a second.
If a rank stops sending heartbeats, or no rank makes progress, the thread reports which rank and
where, and exits.
"""

import json
import math
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

HEARTBEAT_INTERVAL = 1.0  # seconds
STOP_BYTE = 0  # tells the thread to stop; signals are numbered from 1
STORE_ERRORS = (RuntimeError,)  # the rank that hosts the store has exited; old heartbeats remain


def timeout() -> float:
    """Return the seconds without a heartbeat, or without progress on any rank, that end a run.

    From the environment variable `SAGE_SELECT_PATIENCE`; 600 by default.

    Raises:
        ValueError: If it is not a positive number.
    """
    text = os.environ.get("SAGE_SELECT_PATIENCE", "600")
    with suppress(ValueError):
        if 0 < (seconds := float(text)) < math.inf:
            return seconds
    raise ValueError(f"SAGE_SELECT_PATIENCE must be a number of seconds, such as 600, got {text!r}")


@contextmanager
def during(what: str) -> Iterator[None]:
    """Add a label such as "interval 3" to the position in all heartbeats sent inside."""
    token = _during.set((*_during.get(), what))
    try:
        yield
    finally:
        _during.reset(token)


def beat(place: str) -> None:
    """Send a heartbeat with a new position of this rank, if it is monitored."""
    if (monitor := _monitor.get()) is not None:
        monitor.progress += 1
        monitor.place = ", ".join((*_during.get(), place))
        monitor.send()


@contextmanager
def monitored(processes: Processes) -> Iterator[None]:
    """Monitor ranks that work together: if one is lost, the others report which and where.

    An error raised inside comes with the last known position of every rank. Without a process
    group, or inside another `monitored`, it does nothing.

    Args:
        processes: All ranks that do this work.
    """
    if processes.group is None or _monitor.get() is not None:
        yield
        return
    timeout()  # refuse a wrong value here, and not in the thread
    monitor = _Monitor(processes)
    token = _monitor.set(monitor)
    monitor.start()
    try:
        yield
    except RuntimeError:
        # perhaps a lost connection: report now, since the launcher may soon terminate this process
        sys.stderr.write(f"sage-select: {monitor.report()}\n")
        sys.stderr.flush()
        raise
    except Exception as error:
        error.add_note(monitor.report())
        raise
    finally:
        monitor.stop()
        _monitor.reset(token)


_during: ContextVar[tuple[str, ...]] = ContextVar("during", default=())
_monitor: ContextVar["_Monitor | None"] = ContextVar("monitor", default=None)


class _Heartbeat(NamedTuple):
    """The latest heartbeat of a rank."""

    sent: int = 0  # heartbeats so far; a stopped process sends none
    progress: int = 0  # calls of `beat` so far
    place: str = "no heartbeat yet"


class _Monitor:
    """A thread that sends this rank's heartbeats and checks those of the others."""

    def __init__(self, processes: Processes) -> None:
        assert processes.group is not None
        self.rank, self.size = processes.rank, processes.size
        self.place, self.progress = "starting", 0
        c10d: Any = dist.distributed_c10d
        default = c10d._get_default_store()
        # a separate connection, since another thread may be blocked on the default one
        store = default.clone() if hasattr(default, "clone") else default
        self._store = c10d.PrefixStore(f"sage_select/{processes.group.group_name}", store)
        self._sent = 0
        # per rank: when its latest heartbeat arrived, on this rank's clock, and that heartbeat
        self._latest = {rank: (time.monotonic(), _Heartbeat()) for rank in range(self.size)}
        self._last_progress = time.monotonic()  # of any rank
        self._wakeup_read, self._wakeup_write = os.pipe()
        self._thread = threading.Thread(
            target=self._run, name="sage-select heartbeats", daemon=True
        )
        self._handles_sigterm = False

    def start(self) -> None:
        """Start the thread, which also handles SIGTERM if nothing else does."""
        os.set_blocking(self._wakeup_write, False)
        unhandled = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        # When one process dies, its launcher terminates the others, before they can report
        # anything. Their main threads are blocked in a collective, where no Python handler runs,
        # so a wakeup file descriptor brings the signal to this thread.
        if unhandled and threading.current_thread() is threading.main_thread():
            previous = signal.set_wakeup_fd(self._wakeup_write, warn_on_full_buffer=False)
            if previous != -1:  # an event loop waits for signals there
                signal.set_wakeup_fd(previous)
            else:
                # a handler that does nothing, since the default one would end the process
                signal.signal(signal.SIGTERM, lambda *_: None)
                self._handles_sigterm = True
        self._thread.start()

    def stop(self) -> None:
        """Stop the thread, and restore the default handling of SIGTERM."""
        if self._handles_sigterm:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.write(self._wakeup_write, bytes([STOP_BYTE]))
        self._thread.join()
        os.close(self._wakeup_read)
        os.close(self._wakeup_write)

    def report(self) -> str:
        """Describe the last known position of every rank."""
        self._exchange()
        now = time.monotonic()
        lines = [
            f"  rank {rank}: {heartbeat.place}"
            + ("" if rank == self.rank else f" (last heartbeat {now - received:.0f} s ago)")
            for rank, (received, heartbeat) in sorted(self._latest.items())
        ]
        return "\n".join(
            [
                f"this is rank {self.rank} of {self.size}; last known positions:",
                *lines,
                "  the launcher's output shows which process ended first, and why; resume the run "
                "from its newest checkpoint",
            ]
        )

    def _run(self) -> None:
        while True:
            woken, _, _ = select.select([self._wakeup_read], [], [], HEARTBEAT_INTERVAL)
            wakeup = os.read(self._wakeup_read, 1)[0] if woken else None
            if wakeup == STOP_BYTE:
                return
            if wakeup == signal.SIGTERM:  # other signals have handlers elsewhere
                self._exit("received SIGTERM, as when another process has died", 128 + wakeup)
            self._exchange()
            if reason := self._failure():
                self._exit(reason, 1)

    def send(self) -> None:
        """Send a heartbeat to the other ranks."""
        self._sent += 1
        with suppress(*STORE_ERRORS):
            heartbeat = _Heartbeat(self._sent, self.progress, self.place)
            self._store.set(str(self.rank), json.dumps(heartbeat))

    def _exchange(self) -> None:
        """Send a heartbeat, and receive those of all ranks."""
        self.send()
        with suppress(*STORE_ERRORS):
            for rank in range(self.size):
                # get() blocks until a key exists, so check first
                if not self._store.check([str(rank)]):
                    continue
                heartbeat = _Heartbeat(*json.loads(self._store.get(str(rank))))
                _, previous = self._latest[rank]
                if heartbeat[1:] != previous[1:]:  # not only a further heartbeat, but progress
                    self._last_progress = time.monotonic()
                if heartbeat != previous:
                    self._latest[rank] = time.monotonic(), heartbeat

    def _failure(self) -> str:
        """Reason to stop waiting for the other ranks; empty if there is none."""
        now = time.monotonic()
        for rank, (received, heartbeat) in self._latest.items():
            if rank != self.rank and now - received > timeout():
                return (
                    f"rank {rank} has sent no heartbeat for {now - received:.0f} s; its last "
                    f"known position: {heartbeat.place}"
                )
        if now - self._last_progress > timeout():
            rank, (_, heartbeat) = min(self._latest.items(), key=lambda entry: entry[1][1].progress)
            return (
                f"no rank has made progress for {now - self._last_progress:.0f} s; rank {rank} is "
                f"the furthest behind, at: {heartbeat.place}"
            )
        return ""

    def _exit(self, reason: str, code: int) -> None:
        """Report, and exit at once: the main thread is blocked, and cannot raise an error."""
        sys.stderr.write(f"sage-select: {reason}\n{self.report()}\n")
        sys.stderr.flush()
        os._exit(code)
