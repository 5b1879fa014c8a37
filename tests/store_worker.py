"""Fill a reference store, and die by SIGKILL before, in or after a given write."""

import os
import signal
import sys
from pathlib import Path

from worlds import arithmetic_world

from sage_select import Reader, ReferenceStore
from sage_select.references import parts

NEVER = -1  # as the fatal write: no write has this number


def fill(folder: Path, fatal_write: int, moment: str) -> None:
    """Fill the store, one part per batch, and kill this process at the fatal write."""
    parts.WRITE_EVERY = 0.0
    write, writes = parts.replace_durably, 0

    def replace_durably(partial: Path, path: Path) -> None:
        nonlocal writes
        if path.suffix != ".arrow":  # reference.json is not counted
            write(partial, path)
            return
        writes += 1
        if writes == fatal_write and moment == "in":
            partial.write_bytes(partial.read_bytes()[:100])  # a write that was cut short
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
