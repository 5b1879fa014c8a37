"""What the kernels become on GPUs that are not here: registers, shared memory, instructions."""

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
    overflows: bool = False  # so that a row is done again, around its maximum


POINTERS = HOPPER._replace(descriptors=False)  # for a weight whose rows are not aligned
LIBRARY = HOPPER._replace(library=True)
TAKING_TURNS = HOPPER._replace(columns=128, warps=4, stages=3)
TOO_LARGE = Case(80, AMPERE._replace(rows=256, stages=2))  # its sums are all registers there are
# another group is other numbers in the same code
TUNED = dict.fromkeys(some._replace(group=16) for some in CANDIDATES if not some.library)
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
SHARED = {80: 163, 90: 227, 100: 227, 120: 99}  # KB that a program may have
# The slopes of a tile, their targets and addresses are alive at once where they are made. Bytes a
# thread, once a tile.
SPILLED_BY_SLOPES = 64


def name_of(case: Case) -> str:
    rows, columns, depth, warps, stages = case.tiling[:5]
    ways = case.tiling._asdict() | case._asdict()
    named = [way for way in ("descriptors", "library", "extras", "overflows") if ways[way]]
    shape = f"{rows}x{columns}x{depth} {warps} warps {stages} stages"
    return " ".join([f"sm_{case.arch}", case.dtype, shape, *named])


def compiled(cases: list[Case]) -> list[dict[str, dict]]:
    """The kernels of each case, by name."""
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
    found: list[dict[str, dict]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def results() -> dict[Case, dict[str, dict]]:
    """All cases, in two processes; neighbours share kernels."""
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


def places(kernel: dict, *names: str) -> list[int]:
    """Where a kernel has instructions of these names, whatever their modifiers."""
    return [
        place
        for place, found in enumerate(kernel["instructions"])
        if any(f"{found}.".startswith(f"{name}.") for name in names)
    ]


def inside(kernel: dict, case: Case, *names: str) -> list[int]:
    """The same, of those between products."""
    first, *_, last = places(kernel, PRODUCTS[case.arch]) or (0, len(kernel["instructions"]))
    return [place for place in places(kernel, *names) if first < place < last]


def products(kernels: dict[str, dict]) -> list[dict]:
    """The kernels that multiply tiles."""
    return [
        kernels[name] for name in ("sum_exp", "sum_exp_around_maximum", "slope") if name in kernels
    ]


def test_every_kernel_is_compiled(case, kernels):
    forward = {"tile"} if case.tiling.library else {"sum_exp", "fold"}
    rare = {"sum_exp_around_maximum", "fold_around_maximum"} if case.overflows else set()
    assert set(kernels) == {"target_logits", "slope"} | forward | rare


def test_forward_spills_nothing(case, kernels):
    forward = {name: kernel for name, kernel in kernels.items() if name != "slope"}
    if case.arch > 90:  # a glance at GPUs that the tilings were not made for
        forward.pop("target_logits")
    assert [x for x, kernel in forward.items() if kernel["stack"] or places(kernel, *SPILL)] == []


def test_slopes_spill_nothing_while_they_multiply(case, kernels):
    assert kernels["slope"]["stack"] <= SPILLED_BY_SLOPES
    assert inside(kernels["slope"], case, *SPILL) == []


def test_a_tile_that_is_too_large_spills(results):
    sum_exp = results[TOO_LARGE]["sum_exp"]
    assert sum_exp["stack"]
    assert inside(sum_exp, TOO_LARGE, *SPILL)


def test_tensor_cores_multiply_and_add_in_fp32(case, kernels):
    for kernel in [kernels["target_logits"], *products(kernels)]:  # so that errors are alike
        used = {x for x in kernel["instructions"] if "MMA" in x.split(".")[0]}
        if case.dtype == "float32":  # of which they would drop bits
            assert used == set()
            continue
        assert {x.split(".")[0] for x in used} == {PRODUCTS[case.arch]}
        assert case.arch == 100 or all(".F32" in x for x in used)


def test_products_of_a_step_are_issued_together(case, kernels):
    """As they are unless the compiler has to wait for each; `tl.range(flatten=True)` makes it."""
    if PRODUCTS[case.arch] == "HGMMA" and case.dtype != "float32":
        for kernel in products(kernels):
            assert inside(kernel, case, "WARPGROUP.DEPBAR") == []


def test_loads_are_asynchronous(case, kernels):
    ours, other = ("UTMALDG", "LDGSTS") if case.tiling.descriptors else ("LDGSTS", "UTMALDG")
    for kernel in products(kernels):
        # those of both factors, for all stages but the one that is multiplied
        assert len(places(kernel, ours)) >= 2 * (case.tiling.stages - 1)
        assert places(kernel, other) == []


def test_shared_memory_suffices(case, kernels):
    assert max(kernel["shared"] for kernel in kernels.values()) <= SHARED[case.arch] * 1024


def test_a_logit_takes_one_exponential(case, kernels):
    """Another one if it is capped; and maxima are taken only where they are asked for."""
    logits = case.tiling.rows * case.tiling.columns // (32 * case.tiling.warps)
    expected = logits * (2 if case.extras else 1)
    for kernel in products(kernels):
        assert expected <= len(places(kernel, "MUFU.EX2")) <= expected + 16
    for name, kernel in kernels.items():
        assert bool(places(kernel, "FMNMX", "FMNMX3")) == name.endswith("around_maximum")


def test_two_programs_take_turns_on_a_multiprocessor(results):
    assert TAKING_TURNS in CANDIDATES
    kernel = results[Case(90, TAKING_TURNS)]["sum_exp"]
    registers = -(-kernel["registers"] // 8) * 8 * kernel["threads"]  # in eights
    assert 2 * registers <= 65_536
    assert 2 * (kernel["shared"] + 1024) <= 228 * 1024  # the system takes 1 KB of each


MAKERS = {f"aten::{name}" for name in ("mm", "new_empty", "new_zeros", "zeros_like")}


class Alive(TorchDispatchMode):
    """The most bytes at a time of tensors that were made for results."""

    now = most = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        made = operator(*args, **(kwargs or {}))
        if operator.name() in MAKERS:
            self.now += made.nbytes
            self.most = max(self.most, self.now)
            weakref.finalize(made, self.freed, made.nbytes)
        return made

    def freed(self, size):
        self.now -= size


@pytest.fixture
def predict_head(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples" / "benchmarks")
    return importlib.import_module("predict_head")


def test_predictions(predict_head, capsys):
    predict_head.main()
    output = capsys.readouterr().out
    for path in (*predict_head.TILINGS, "library products", "forward and backward"):
        assert len(re.findall(f"^{path}( +[0-9.]+){{5}}$", output, re.MULTILINE)) == 4


def test_predicted_memory(predict_head, monkeypatch):
    """Is what is taken; tensors on "meta" say so without data, and launches take nothing."""
    monkeypatch.setattr(FusedLogits, "_run", lambda *args: None)
    for tokens, hidden in predict_head.SHAPES:
        with torch.device("meta"):
            h, w = (torch.empty(n, hidden, dtype=torch.bfloat16) for n in (tokens, 151_936))
            t, anchor = torch.empty(tokens, dtype=torch.int64), torch.empty(tokens)
        logits = FusedLogits(h, w, None, None, 1.0, HOPPER)
        with Alive() as alive:
            logits.sum_exp(anchor, t)
        assert alive.most == predict_head.forward_bytes(tokens, 151_936, HOPPER)
        with Alive() as alive:
            replace(logits, tiling=LIBRARY).sum_exp(anchor, t)
        assert alive.most == predict_head.library_bytes(tokens)
        with Alive() as alive:
            backward(logits, t, anchor, anchor, (True, True, False))
        assert alive.most - w.nbytes == predict_head.backward_bytes(tokens, hidden, HOPPER)
