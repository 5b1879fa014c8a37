"""Fills a reference store, and dies by SIGKILL at a given write: before, in or after it."""

import os
import signal
import sys
from pathlib import Path

from worlds import arithmetic_world

from sage_select import Reader, ReferenceStore
from sage_select.references import parts

NEVER = -1


def fill(folder: Path, fatal_write: int, moment: str) -> None:
    """Fill the store in small parts; at the fatal write, die."""
    parts.WRITE_EVERY = 0.0
    write, writes = parts.replace_durably, 0

    def replace_durably(partial: Path, path: Path) -> None:
        nonlocal writes
        if path.suffix != ".arrow":
            write(partial, path)
            return
        writes += 1
        if writes == fatal_write and moment == "in":
            partial.write_bytes(partial.read_bytes()[:100])
        if writes != fatal_write or moment == "after":
            write(partial, path)
        if writes == fatal_write:
            os.kill(os.getpid(), signal.SIGKILL)

    parts.replace_durably = replace_durably
    world = arithmetic_world()
    ReferenceStore(
        world.model, world.dataset, folder=folder, reader=Reader(max_batch_tokens=256)
    ).fill()


if __name__ == "__main__":
    fill(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
