"""How the fused kernels cut their work, by device and dtype.

A tiling decides the order in which a row's terms are added, so its last bits: tilings come from a
table or from a file that somebody had written by `tune`, and never from a clock of the run itself,
nor from how many tokens there are.
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
    """The work of one program, and how programs follow each other.

    Attributes:
        rows: Tokens of a program.
        columns: Vocabulary entries that are multiplied at once.
        depth: Hidden dimensions that are loaded at once.
        warps: Warps of a program.
        stages: Loads under way.
        part: Vocabulary entries of a program, one tile of columns after the other.
        group: Blocks of rows that run at the same time on the same part.
        descriptors: Whether loads go through the tensor memory accelerator, where they can.
        library: Whether logits are products of the matrix library, folded by a kernel of their own.
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
    """That of the table."""
    if device.type == "cpu":
        return INTERPRETER
    if dtype == torch.float32:
        return FLOAT32  # products in true fp32, which no tensor core makes
    major, _ = torch.cuda.get_device_capability(device)
    return HOPPER if major in (9, 10) else AMPERE


def tiling_of(weight_VH: Tensor) -> Tiling:
    """The tiling for a weight: the one that `tune` kept for such a device, else the table's."""
    if weight_VH.is_cuda and (tuned := tuned_tilings().get(key_of(weight_VH))) is not None:
        return tuned
    return default_tiling(weight_VH.device, weight_VH.dtype)


def key_of(weight_VH: Tensor) -> str:
    """What a tuned tiling holds for."""
    vocabulary, hidden = weight_VH.shape
    device = torch.cuda.get_device_name(weight_VH.device)
    dtype = str(weight_VH.dtype).removeprefix("torch.")
    return f"{device}, Triton {triton.__version__}, {dtype}, {vocabulary} x {hidden}"


@cache  # a process keeps to the tilings that it began with
def tuned_tilings() -> dict[str, Tiling]:
    """What `tune` has kept."""
    path = tilings_path()
    if not path.exists():
        return {}
    try:
        return {key: Tiling(**tiling) for key, tiling in json.loads(path.read_text()).items()}
    except (ValueError, TypeError) as error:
        raise ValueError(f"tilings: {path} cannot be read: {error}; delete it") from error


def keep_tiling(key: str, tiling: Tiling) -> None:
    """Use a tiling from now on, in this process and later ones."""
    tuned_tilings.cache_clear()  # others may have tuned in the meantime
    path = tilings_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    every = {known: kept._asdict() for known, kept in tuned_tilings().items()}
    partial = partial_path(path)
    partial.write_text(json.dumps(every | {key: tiling._asdict()}, indent=2) + "\n")
    replace_durably(partial, path)
    tuned_tilings.cache_clear()


def tilings_path() -> Path:
    """The file of tuned tilings, which several machines may share."""
    return cache_folder() / "tilings.json"
