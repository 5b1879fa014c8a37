"""The compiled kernels, without a GPU: registers, shared memory and instructions."""

import importlib
import json
import os
import re
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from conftest import ROOT
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton", reason="Triton is not installed, so there are no kernels to compile")
from sage_select.ops.fused import FusedLogits
from sage_select.ops.logits import backward
from sage_select.ops.tilings import AMPERE, FLOAT32, HOPPER, Tiling
from sage_select.ops.tuning import CANDIDATES

pytestmark = pytest.mark.slow


class Case(NamedTuple):
    arch: int
    tiling: Tiling
    dtype: str = "bfloat16"
    extras: bool = False  # a bias and a softcap
    overflows: bool = False  # also compile the kernels that recompute a row around its maximum


POINTERS = HOPPER._replace(descriptors=False)  # for a weight whose rows are not aligned
LIBRARY = HOPPER._replace(library=True)
TWO_PROGRAMS = HOPPER._replace(columns=128, warps=4, stages=3)
TOO_LARGE = Case(80, AMPERE._replace(rows=256, stages=2))  # its sums fill all registers
# candidates that differ only in `group` compile to the same instructions
TUNED = dict.fromkeys(tiling._replace(group=16) for tiling in CANDIDATES if not tiling.library)
CASES = [
    Case(80, FLOAT32, "float32", overflows=True),
    Case(80, AMPERE, overflows=True),
    Case(80, AMPERE, "float16"),
    Case(80, AMPERE, extras=True),
    *(Case(80, tiling) for tiling in TUNED if not tiling.descriptors and tiling != AMPERE),
    Case(120, AMPERE),
    Case(100, HOPPER),
    Case(90, FLOAT32, "float32"),
    Case(90, HOPPER, overflows=True),
    Case(90, HOPPER, "float16"),
    Case(90, HOPPER, extras=True, overflows=True),
    Case(90, POINTERS),
    Case(90, LIBRARY, extras=True),
    *(Case(90, tiling) for tiling in TUNED if tiling != HOPPER),
]
PRODUCTS = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}
SPILL = ("LDL", "STL")
SHARED = {80: 163, 90: 227, 100: 227, 120: 99}  # KB per program at most
# Bytes per thread that the slope kernel may spill, once per tile: at the end of a tile its slopes,
# targets and addresses all need registers at the same time.
SPILLED_BY_SLOPES = 64


def name_of(case: Case) -> str:
    rows, columns, depth, warps, stages = case.tiling[:5]
    options = case.tiling._asdict() | case._asdict()
    flags = [x for x in ("descriptors", "library", "extras", "overflows") if options[x]]
    shape = f"{rows}x{columns}x{depth} {warps} warps {stages} stages"
    return " ".join([f"sm_{case.arch}", case.dtype, shape, *flags])


def compiled(cases: list[Case]) -> list[dict[str, dict]]:
    """Return the kernels of each case, by name."""
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("compile_kernels.py")],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        input=json.dumps(cases),
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    kernels: list[dict[str, dict]] = json.loads(done.stdout.splitlines()[-1])
    return kernels


@pytest.fixture(scope="module")
def results() -> dict[Case, dict[str, dict]]:
    """Compile all cases in two processes, half of the list in each: neighbours share kernels."""
    cases, middle = [TOO_LARGE, *CASES], len(CASES) // 2 + 1
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(compiled, (cases[:middle], cases[middle:]))
    return dict(zip(cases, first + second, strict=True))


@pytest.fixture(params=CASES, ids=name_of)
def case(request) -> Case:
    return request.param


@pytest.fixture
def kernels(case, results) -> dict[str, dict]:
    return results[case]


def positions(kernel: dict, *names: str) -> list[int]:
    """Return the positions of instructions with these names, whatever their modifiers."""
    return [
        position
        for position, instruction in enumerate(kernel["instructions"])
        if any(f"{instruction}.".startswith(f"{name}.") for name in names)
    ]


def positions_between_products(kernel: dict, case: Case, *names: str) -> list[int]:
    """Return the positions of those between the first and the last tensor-core instruction."""
    first, *_, last = positions(kernel, PRODUCTS[case.arch]) or (0, len(kernel["instructions"]))
    return [position for position in positions(kernel, *names) if first < position < last]


def multiplying(kernels: dict[str, dict]) -> list[dict]:
    """Return the kernels that multiply tiles."""
    return [
        kernels[name] for name in ("sum_exp", "sum_exp_around_maximum", "slope") if name in kernels
    ]


def test_every_kernel_is_compiled(case, kernels):
    forward = {"tile"} if case.tiling.library else {"sum_exp", "fold"}
    rare = {"sum_exp_around_maximum", "fold_around_maximum"} if case.overflows else set()
    assert set(kernels) == {"target_logits", "slope"} | forward | rare


def test_forward_kernels_do_not_spill_registers(case, kernels):
    forward = {name: kernel for name, kernel in kernels.items() if name != "slope"}
    if case.arch > 90:  # the tilings were not designed for newer GPUs
        forward.pop("target_logits")
    assert [
        x for x, kernel in forward.items() if kernel["stack"] or positions(kernel, *SPILL)
    ] == []


def test_the_slope_kernel_does_not_spill_between_products(case, kernels):
    assert kernels["slope"]["stack"] <= SPILLED_BY_SLOPES
    assert positions_between_products(kernels["slope"], case, *SPILL) == []


def test_a_tile_that_is_too_large_spills(results):
    sum_exp = results[TOO_LARGE]["sum_exp"]
    assert sum_exp["stack"]
    assert positions_between_products(sum_exp, TOO_LARGE, *SPILL)


def test_tensor_cores_multiply_and_add_in_fp32(case, kernels):
    # the targets' logits too, so that they have the same rounding error as the logits in the sum
    for kernel in [kernels["target_logits"], *multiplying(kernels)]:
        used = {x for x in kernel["instructions"] if "MMA" in x.split(".")[0]}
        if case.dtype == "float32":  # tensor cores would drop bits of fp32 factors
            assert used == set()
            continue
        assert {x.split(".")[0] for x in used} == {PRODUCTS[case.arch]}
        assert case.arch == 100 or all(".F32" in x for x in used)


def test_products_of_a_step_are_issued_together(case, kernels):
    """The compiler does not wait for each product, as it would with `tl.range(flatten=True)`."""
    if PRODUCTS[case.arch] == "HGMMA" and case.dtype != "float32":
        for kernel in multiplying(kernels):
            assert positions_between_products(kernel, case, "WARPGROUP.DEPBAR") == []


def test_loads_are_asynchronous(case, kernels):
    by_tma, by_pointers = "UTMALDG", "LDGSTS"
    expected, other = (by_tma, by_pointers) if case.tiling.descriptors else (by_pointers, by_tma)
    for kernel in multiplying(kernels):
        # loads of both factors, for all stages but the one that is being multiplied
        assert len(positions(kernel, expected)) >= 2 * (case.tiling.stages - 1)
        assert positions(kernel, other) == []


def test_shared_memory_is_sufficient(case, kernels):
    assert max(kernel["shared"] for kernel in kernels.values()) <= SHARED[case.arch] * 1024


def test_one_exponential_per_logit(case, kernels):
    """A softcap adds one, and only the kernels around the maximum compute maxima."""
    logits = case.tiling.rows * case.tiling.columns // (32 * case.tiling.warps)
    expected = logits * (2 if case.extras else 1)
    for kernel in multiplying(kernels):
        assert expected <= len(positions(kernel, "MUFU.EX2")) <= expected + 16
    for name, kernel in kernels.items():
        assert bool(positions(kernel, "FMNMX", "FMNMX3")) == name.endswith("around_maximum")


def test_two_programs_fit_on_a_multiprocessor(results):
    assert TWO_PROGRAMS in CANDIDATES
    kernel = results[Case(90, TWO_PROGRAMS)]["sum_exp"]
    registers = -(-kernel["registers"] // 8) * 8 * kernel["threads"]  # allocated in units of 8
    assert 2 * registers <= 65_536
    assert 2 * (kernel["shared"] + 1024) <= 228 * 1024  # the system reserves 1 KB per program


ALLOCATING = {f"aten::{name}" for name in ("mm", "new_empty", "new_zeros", "zeros_like")}


class PeakMemory(TorchDispatchMode):
    """Peak of the bytes of tensors that the operators in ALLOCATING created."""

    current = peak = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        if operator.name() in ALLOCATING:
            self.current += result.nbytes
            self.peak = max(self.peak, self.current)
            weakref.finalize(result, self.free, result.nbytes)
        return result

    def free(self, size):
        self.current -= size


@pytest.fixture
def predict_head(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples" / "benchmarks")
    return importlib.import_module("predict_head")


def test_predictions_are_printed_for_every_path(predict_head, capsys):
    predict_head.main()
    output = capsys.readouterr().out
    for path in (*predict_head.TILINGS, "library products", "forward and backward"):
        assert len(re.findall(f"^{path}( +[0-9.]+){{5}}$", output, re.MULTILINE)) == 4


def test_predicted_memory_is_the_allocated_memory(predict_head, monkeypatch):
    """Tensors are on "meta", which needs no data, and launches are left out: they allocate none."""
    monkeypatch.setattr(FusedLogits, "_run", lambda *args: None)
    for tokens, hidden in predict_head.SHAPES:
        with torch.device("meta"):
            h, w = (torch.empty(n, hidden, dtype=torch.bfloat16) for n in (tokens, 151_936))
            t, anchor = torch.empty(tokens, dtype=torch.int64), torch.empty(tokens)
        logits = FusedLogits(h, w, None, None, 1.0, HOPPER)
        with PeakMemory() as memory:
            logits.sum_exp(anchor, t)
        assert memory.peak == predict_head.forward_bytes(tokens, 151_936, HOPPER)
        with PeakMemory() as memory:
            replace(logits, tiling=LIBRARY).sum_exp(anchor, t)
        assert memory.peak == predict_head.library_bytes(tokens)
        with PeakMemory() as memory:
            backward(logits, t, anchor, anchor, (True, True, False))
        assert memory.peak - w.nbytes == predict_head.backward_bytes(tokens, hidden, HOPPER)
