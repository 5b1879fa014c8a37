"""Compiles the kernels as the library launches them, for a GPU that need not be there.

Reads cases from standard input and prints what became of their kernels, both as JSON.

The tensors are on "meta": they have no data, but types, strides and alignment, which is all that
Triton compiles for. What it would ask a driver is answered here, and nothing is launched. This is a
script of its own, since a process that has made the kernels for the interpreter compiles none.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from sage_select.ops.fused import FusedLogits
from sage_select.ops.tilings import Tiling

TOKENS, HIDDEN, VOCABULARY = 8192, 1536, 151_936
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
launched: dict[str, Any] = {}
run = JITFunction.run


def compile_only(self: JITFunction, *args: object, **options: Any) -> None:
    anchored = options.get("ANCHORED", True)
    name = self.__name__.removesuffix("_kernel") + ("" if anchored else "_around_maximum")
    launched[name] = run(self, *args, **options | {"warmup": True})


JITFunction.run = compile_only


def compile_case(
    arch: int, tiling: list[Any], dtype: str, extras: bool, overflows: bool
) -> dict[str, Any]:
    """The kernels of a case, by name."""
    driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: GPUTarget("cuda", arch, 32),
            get_current_device=lambda: arch,
            get_current_stream=lambda device: 0,
        )
    )
    launched.clear()
    with torch.device("meta"):
        hidden_NH, weight_VH = (
            torch.empty(n, HIDDEN, dtype=getattr(torch, dtype)) for n in (TOKENS, VOCABULARY)
        )
        bias_V = torch.empty(VOCABULARY, dtype=weight_VH.dtype) if extras else None
        target_N, anchor_N = torch.empty(TOKENS, dtype=torch.int64), torch.empty(TOKENS)
    softcap = 30.0 if extras else None
    logits = FusedLogits(hidden_NH, weight_VH, bias_V, softcap, 0.7, Tiling(*tiling))
    logits.of_targets(target_N)
    logits.sum_exp(anchor_N, target_N)
    logits.slopes(next(logits.blocks()), target_N, anchor_N, anchor_N)
    if overflows:
        logits.around_maximum()
    return dict(launched)


def described(kernel: Any, folder: Path) -> dict[str, object]:
    """What a kernel needs, and its instructions in their order."""
    binary = folder / "kernel.cubin"
    binary.write_bytes(kernel.asm["cubin"])
    printed = subprocess.run(
        [TOOLS / "cuobjdump", "-res-usage", "-sass", binary],
        env=os.environ | {"PATH": f"{TOOLS}{os.pathsep}{os.environ['PATH']}"},  # for nvdisasm
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", printed).groups()
    return {
        "threads": 32 * kernel.metadata.num_warps,
        "registers": int(registers),
        "stack": int(stack),
        "shared": kernel.metadata.shared,
        "instructions": re.findall(
            r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P[0-9T]\s+)?([A-Z][\w.]*)", printed
        ),
    }


if __name__ == "__main__":
    with TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        known: dict[int, dict[str, object]] = {}  # cases share kernels
        found = []
        for case in json.load(sys.stdin):
            kernels = compile_case(*case)
            for kernel in kernels.values():
                if id(kernel) not in known:
                    known[id(kernel)] = described(kernel, Path(folder))
            found.append({name: known[id(kernel)] for name, kernel in kernels.items()})
        print(json.dumps(found))
