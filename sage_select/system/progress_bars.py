"""Progress bars on a terminal or in a notebook, and occasional lines in a log file."""

import sys
from typing import Any, TextIO

from tqdm.auto import tqdm

LINE_EVERY = 60.0  # seconds between lines in a log file


class _Lines:
    """A stream that writes each redraw of a bar as a new line."""

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
    """Return a tqdm bar; in a file or pipe it writes a line per minute, and none for short work.

    Args:
        total: Amount of work; None if unknown.
        desc: Name of the work, such as "scoring".
        unit: Unit of the work, such as "pairs".
        initial: Work already done.
        scaled: If true, write thousands as k and millions as M.
        show: False for no bar.
    """
    options: dict[str, Any] = {"total": total, "desc": desc, "unit": unit, "initial": initial}
    options |= {"unit_scale": scaled}
    options["disable"] = show is False
    drawn = sys.stderr.isatty() or "notebook" in tqdm.__module__
    if not drawn:  # redrawing would fill the file with carriage returns
        options |= {
            "file": _Lines(sys.stderr),
            "mininterval": LINE_EVERY,
            "maxinterval": LINE_EVERY,
            "delay": LINE_EVERY,
            "ascii": True,
            "ncols": 100,
        }
    return tqdm(**options, leave=not drawn, dynamic_ncols=drawn)
