"""Tile sizes of the fused kernels, by device and dtype.

A tiling determines the order in which a row's terms are added, and so the last bits of the result.
A tiling is therefore taken from a table, or from a file written by an explicit call of `tune`,
never from timings during a run and never from the number of tokens.
"""

import json
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from sage_select.system.files import cache_folder, partial_path, replace_durably


class Tiling(NamedTuple):
    """The work of one program, and the order of programs.

    Attributes:
        rows: Tokens per program.
        columns: Vocabulary entries per tile.
        depth: Hidden dimensions per load.
        warps: Warps per program.
        stages: Loads in flight.
        part: Vocabulary entries per program, processed tile by tile.
        group: Blocks of rows that run at the same time on the same part of the vocabulary.
        descriptors: True to load through the tensor memory accelerator if the operands allow it.
        library: True to compute logits with the matrix library and sum them in a separate kernel.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    part: int = 4096
    group: int = 16
    descriptors: bool = False
    library: bool = False


INTERPRETER = Tiling(rows=16, columns=32, depth=32, warps=1, stages=1, part=128, group=2)
FLOAT32 = Tiling(rows=64, columns=64, depth=32, warps=4, stages=2)
AMPERE = Tiling(rows=128, columns=128, depth=32, warps=4, stages=4)
HOPPER = Tiling(rows=128, columns=256, depth=64, warps=8, stages=4, descriptors=True)


def default_tiling(device: torch.device, dtype: torch.dtype) -> Tiling:
    """Return the table's tiling for a device and dtype."""
    if device.type == "cpu":
        return INTERPRETER
    if dtype == torch.float32:
        return FLOAT32  # tensor cores would round the factors to TF32
    major, _ = torch.cuda.get_device_capability(device)
    return HOPPER if major in (9, 10) else AMPERE


def tiling_of(weight_VH: Tensor) -> Tiling:
    """Return the tiling that `tune` stored for this device and head, or the table's."""
    if weight_VH.is_cuda and (tuned := tuned_tilings().get(key_of(weight_VH))) is not None:
        return tuned
    return default_tiling(weight_VH.device, weight_VH.dtype)


def key_of(weight_VH: Tensor) -> str:
    """Key of a tuned tiling: device, Triton version, dtype and shape of the head."""
    vocabulary, hidden = weight_VH.shape
    device = torch.cuda.get_device_name(weight_VH.device)
    dtype = str(weight_VH.dtype).removeprefix("torch.")
    return f"{device}, Triton {triton.__version__}, {dtype}, {vocabulary} x {hidden}"


@cache  # read once, so that tuning in another process cannot change results during this process
def tuned_tilings() -> dict[str, Tiling]:
    """Tilings that `tune` has stored, by key."""
    path = tilings_path()
    if not path.exists():
        return {}
    try:
        return {key: Tiling(**tiling) for key, tiling in json.loads(path.read_text()).items()}
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"tilings: {path} is not a valid file of tuned tilings: {error}; delete it, and call "
            "`tune` again if you need it"
        ) from error


def keep_tiling(key: str, tiling: Tiling) -> None:
    """Store a tiling, to be used from now on by this process and later ones."""
    tuned_tilings.cache_clear()  # read the file again: another process may have written it
    path = tilings_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    tilings = tuned_tilings() | {key: tiling}
    partial = partial_path(path)
    partial.write_text(
        json.dumps({name: kept._asdict() for name, kept in tilings.items()}, indent=2) + "\n"
    )
    replace_durably(partial, path)
    tuned_tilings.cache_clear()


def tilings_path() -> Path:
    """Path of the file of tuned tilings; its keys name the device, so machines can share it."""
    return cache_folder() / "tilings.json"
