"""Ctrl-C: ends the command with exit code 130, even where the code it interrupts swallows it.

Python raises `KeyboardInterrupt` wherever the main thread happens to be. In the first seconds this
is inside imports, of which some catch every exception and carry on, as do destructors and callbacks
from C; the interrupt is then lost. So each one is watched here: if its exception has disappeared
without having been handled, it is raised again.
"""

import signal
import sys
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

INTERRUPTED = 130  # exit code, as shells report SIGINT
CHECK_EVERY = 0.2  # seconds
MESSAGE = "interrupted; finished work is kept, run the same command to resume (train: --resume)"


class _Interrupt(KeyboardInterrupt):
    """A `KeyboardInterrupt` that can be referenced weakly, and so be seen to disappear."""

    def __init__(self, watch: "_Watch") -> None:
        super().__init__()
        # here and not in the handler, whose frame its traceback would keep, and so the exception
        watch.latest = weakref.ref(self)


class _Watch:
    """The interrupts of this process."""

    def __init__(self) -> None:
        self.latest: weakref.ref[_Interrupt] | None = None
        self.acknowledged = threading.Event()

    def on_signal(self, *_: object) -> None:
        """Raise the interrupt in the main thread, as a handler of SIGINT."""
        if self.latest is None:
            threading.Thread(target=self.repeat_if_lost, daemon=True).start()
        raise _Interrupt(self)

    def repeat_if_lost(self) -> None:
        """Send SIGINT again whenever its exception is gone and the command still runs."""
        while not self.acknowledged.wait(CHECK_EVERY):
            # while it propagates, and while `finally` blocks run, something refers to it
            if self.latest is not None and self.latest() is None:
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)


_watch = _Watch()


@contextmanager
def interruptible() -> Iterator[None]:
    """Exit with code 130 after Ctrl-C inside, at whatever moment it arrives."""
    # not if somebody else handles it, nor if it is ignored, as a shell does for background jobs
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler and hasattr(
        signal, "pthread_kill"
    ):
        signal.signal(signal.SIGINT, _watch.on_signal)
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(acknowledge())
    except SystemExit:
        if was_interrupted():  # outside a command's own code, where typer says nothing
            sys.exit(acknowledge())
        raise
    else:
        if was_interrupted():
            sys.exit(acknowledge())
    finally:
        _watch.acknowledged.set()


def was_interrupted() -> bool:
    """Return whether Ctrl-C was pressed, even if another exception has taken its place."""
    return _watch.latest is not None


def acknowledge() -> int:
    """Say once that the command was interrupted, and return its exit code."""
    if not _watch.acknowledged.is_set():
        _watch.acknowledged.set()
        sys.stderr.write(f"{MESSAGE}\n")
    return INTERRUPTED
