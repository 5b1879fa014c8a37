"""Progress bars that behave: a bar on a terminal or in a notebook, now and then a line in a log."""

import sys
from typing import Any, TextIO

from tqdm.auto import tqdm

LINE_EVERY = 60.0  # seconds between the lines of a log


class _Lines:
    """A stream on which what would redraw a line becomes a line of its own."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        if text := text.strip():
            self._stream.write(text + "\n")

    def flush(self) -> None:
        self._stream.flush()


def progress_bar(
    total: int | None,
    desc: str,
    unit: str,
    *,
    initial: int = 0,
    scaled: bool = False,
    show: bool | None = None,
) -> Any:
    """A tqdm bar. Into a file or a pipe it writes a line a minute, and none for short work.

    Args:
        total: How much there is to do, where it is known.
        desc: What is being done.
        unit: What is counted.
        initial: How much of it was done before.
        scaled: Whether to write thousands as k and millions as M.
        show: False for no bar at all.
    """
    options: dict[str, Any] = {"total": total, "desc": desc, "unit": unit, "initial": initial}
    options |= {"unit_scale": scaled}
    options["disable"] = show is False
    drawn = sys.stderr.isatty() or "notebook" in tqdm.__module__
    if not drawn:
        options |= {
            "file": _Lines(sys.stderr),
            "mininterval": LINE_EVERY,
            "maxinterval": LINE_EVERY,
            "delay": LINE_EVERY,
            "ascii": True,
            "ncols": 100,
        }
    return tqdm(**options, leave=not drawn, dynamic_ncols=drawn)
