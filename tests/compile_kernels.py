"""Compile the kernels as the library launches them, for a GPU that need not be present.

Reads cases from standard input and prints the properties of their compiled kernels, both as JSON.

The tensors are on "meta": they have no data, only dtypes, strides and alignment, which is all that
Triton specialises on. A stub replaces the GPU driver, and nothing is launched. This is a separate
script, because a process that has decorated the kernels for the interpreter cannot compile them.
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

os.environ.pop("TRITON_INTERPRET", None)  # before Triton decorates the kernels

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
    """Compile a kernel instead of launching it, and record it by name."""
    anchored = options.get("ANCHORED", True)
    name = self.__name__.removesuffix("_kernel") + ("" if anchored else "_around_maximum")
    launched[name] = run(self, *args, **options | {"warmup": True})


JITFunction.run = compile_only


def compile_case(
    arch: int, tiling: list[Any], dtype: str, extras: bool, overflows: bool
) -> dict[str, Any]:
    """Compile the kernels of a case, and return them by name."""
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


def properties(kernel: Any, folder: Path) -> dict[str, object]:
    """Return a kernel's resources, and its instructions in order."""
    binary = folder / "kernel.cubin"
    binary.write_bytes(kernel.asm["cubin"])
    disassembly = subprocess.run(
        [TOOLS / "cuobjdump", "-res-usage", "-sass", binary],
        # cuobjdump calls nvdisasm, which is in the same folder
        env=os.environ | {"PATH": f"{TOOLS}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", disassembly).groups()
    return {
        "threads": 32 * kernel.metadata.num_warps,
        "registers": int(registers),
        "stack": int(stack),
        "shared": kernel.metadata.shared,
        "instructions": re.findall(
            r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P[0-9T]\s+)?([A-Z][\w.]*)", disassembly
        ),
    }


if __name__ == "__main__":
    with TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        # Triton caches compiled kernels, which cases share; disassembling each once saves time
        by_id: dict[int, dict[str, object]] = {}
        results = []
        for case in json.load(sys.stdin):
            kernels = compile_case(*case)
            for kernel in kernels.values():
                if id(kernel) not in by_id:
                    by_id[id(kernel)] = properties(kernel, Path(folder))
            results.append({name: by_id[id(kernel)] for name, kernel in kernels.items()})
        print(json.dumps(results))
