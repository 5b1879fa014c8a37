"""Checks of the fused head, which `head_gpu.py` makes in processes of their own.

A check is a figure and what it must not exceed: an error against float64 in nats, an error of
gradients relative to their norm, or a number of bytes that differ where none should. An exception
fails it too, and the next one is made; but an illegal access to memory is the end of a process.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial, reduce
from itertools import product
from math import isnan
from operator import add
from typing import Any, NamedTuple

import torch
from head import Problem
from torch import Tensor
from triton.runtime.errors import OutOfResources

from sage_select import token_logps
from sage_select.ops import fused
from sage_select.ops.tilings import Tiling
from sage_select.ops.tuning import CANDIDATES

Shape = tuple[int, int, int]  # tokens, hidden, vocabulary


class Sizes(NamedTuple):
    """What the checks are made with."""

    tokens: tuple[int, ...]
    hidden: tuple[int, ...]
    vocabulary: tuple[int, ...]
    usual: Shape
    gradients: tuple[Shape, ...]
    tilings: tuple[Shape, ...]
    large: dict[str, Shape]


SIZES = {
    "cuda": Sizes(
        tokens=(1, 17, 129, 1000),
        hidden=(8, 33, 80, 896),
        vocabulary=(1, 127, 257, 1000, 151_936),
        usual=(300, 896, 151_936),
        gradients=(
            (2, 8, 127), (17, 33, 257), (129, 80, 1000), (1000, 896, 1000), (257, 896, 151_936),
        ),
        tilings=((129, 896, 151_936), (65, 80, 1000), (17, 33, 257)),
        large={
            "more than 65,536 tokens": (70_001, 80, 1000),
            "more than 2^31 logits": (16_000, 64, 151_936),
            "more than 2^31 weights": (64, 16_384, 140_000),
            "more than 2^31 hidden states": (250_000, 8_960, 300),
        },
    ),
    "cpu": Sizes(
        tokens=(1, 17),
        hidden=(8, 33),
        vocabulary=(1, 127),
        usual=(18, 40, 150),
        gradients=((2, 8, 127), (17, 33, 129)),
        tilings=((17, 40, 257),),
        large={"many tokens": (130, 8, 33)},
    ),
}  # fmt: skip
OPTIONS: list[dict[str, Any]] = [
    {},
    {"biased": True},
    {"softcap": 20.0, "temperature": 0.7},
    {"biased": True, "softcap": 20.0, "temperature": 1.3},
]
NATS = 5e-5  # a token; logits rounded to bf16 err by 2e-2
FAR = 1e-5  # of a log-prob
# of the norm, by dtype; the interpreter cuts bf16 off where a GPU rounds
GRADIENTS = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 6e-3}
AT_ONCE = 1 << 26  # logits in float64
EVERY = slice(None)


@dataclass(frozen=True)
class Case:
    """A problem, and what becomes of its logits."""

    problem: Problem
    bias: tuple[Tensor, ...] = ()  # one or none
    softcap: float | None = None
    temperature: float = 1.0

    @classmethod
    def draw(
        cls,
        shape: Shape,
        dtype: str,
        device: str,
        *,
        biased: bool = False,
        softcap: float | None = None,
        temperature: float = 1.0,
    ) -> "Case":
        """With both ends of the vocabulary among its targets; with options, some are ignored."""
        problem = Problem.draw(*shape, getattr(torch, dtype), device)
        tokens, _, vocabulary = shape
        problem.targets[: tokens // 2 : 5] = vocabulary - 1
        problem.targets[1 : tokens // 2 : 5] = 0
        if biased or softcap is not None:
            problem.targets[3::7] = -100
        bias = torch.randn(vocabulary, device=device).to(problem.weight.dtype)
        return cls(problem, (bias,) * biased, softcap, temperature)

    def rows(self, some: slice | Tensor) -> "Case":
        """Some of the tokens."""
        return replace(self, problem=self.problem.rows(some))

    def changed(self, **tensors: Tensor) -> "Case":
        """With other hidden states, weight, targets or slope."""
        return replace(self, problem=self.problem._replace(**tensors))

    def results(self, *, impl: Any = "fused", backward: bool = False) -> list[Tensor]:
        """Log-probs; and the gradients of hidden states, weight and bias, if asked for."""

        def head(hidden: Tensor, weight: Tensor, targets: Tensor, *bias: Tensor) -> Tensor:
            options = {"softcap": self.softcap, "temperature": self.temperature, "impl": impl}
            return token_logps(hidden, weight, targets, bias=bias[0] if bias else None, **options)

        return self.problem.results(head, *self.bias, backward=backward)

    def exact(self, *, backward: bool = False) -> list[Tensor]:
        """The same in float64, by the specification, some tokens at a time."""
        weight, bias = self.problem.weight.double(), tuple(b.double() for b in self.bias)
        at_once = max(1, AT_ONCE // len(weight))
        parts = []
        for first in range(0, len(self.problem.hidden), at_once):
            some = self.problem.rows(slice(first, first + at_once))
            problem = Problem(some.hidden.double(), weight, some.targets, some.slope.double())
            case = replace(self, problem=problem, bias=bias)
            parts.append(case.results(impl="reference", backward=backward))
        found, by_token = list(zip(*parts, strict=True)), 1 + backward
        return [*map(torch.cat, found[:by_token]), *(reduce(add, x) for x in found[by_token:])]


def check(
    name: str, limit: float, figure: Callable[..., float], *args: Any, **options: Any
) -> None:
    """Print what comes of a check, in JSON."""
    row: dict[str, Any] = {"check": name, "limit": limit}
    try:
        found = figure(*args, **options)
        row |= {"figure": found, "passed": found <= limit}  # NaN does not pass
    except Exception as error:
        row |= {"passed": False, "reason": in_a_line(error)}
    print(json.dumps(row), flush=True)
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # raises again if the process can do no more


def not_made(name: str, reason: str) -> None:
    """Say why a check is left out."""
    print(json.dumps({"check": name, "reason": reason}), flush=True)


def in_a_line(error: Exception) -> str:
    """What went wrong."""
    return f"{type(error).__name__}: {(str(error) or 'no reason given').splitlines()[0][:120]}"


def worst(figures: Iterable[float]) -> float:
    """The largest; NaN if there is one."""
    return float(torch.tensor(list(figures)).max())


def differing(found: Sequence[Tensor], expected: Sequence[Tensor]) -> int:
    """How many bytes differ."""
    return sum(
        int((a.contiguous().view(torch.uint8) != b.contiguous().view(torch.uint8)).sum())
        for a, b in zip(found, expected, strict=True)
    )


def apart(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The largest distance, relative to the norm."""
    return worst(
        float((a.double() - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)
    )


def error(case: Case, some: slice = EVERY) -> float:
    """The largest of some tokens, in nats."""
    exact = case.rows(some).exact()[0]
    return float((case.results()[0][some].double() - exact).abs().max())


def error_of_numbers(tokens: Iterable[int], shape: tuple[int, int], *on: str, **how: Any) -> float:
    """The largest for several numbers of tokens."""
    return worst(error(Case.draw((n, *shape), *on, **how)) for n in tokens)


def error_of_gradients(case: Case, some: slice = EVERY) -> float:
    """The largest of hidden states', weight's and bias'; or that of some hidden states'."""
    found, exact = case.results(backward=True)[1:], case.rows(some).exact(backward=True)[1:]
    return apart(found, exact) if some == EVERY else apart([found[0][some]], exact[:1])


def alone(case: Case) -> int:
    """Rows by themselves, or with fewer others."""
    whole, end = case.results()[0], len(case.problem.hidden)
    cuts = [(0, 1), (end // 2, end // 2 + 1), (end - 1, end), (3, 20), (1, end)]
    return sum(differing(case.rows(slice(*cut)).results(), [whole[slice(*cut)]]) for cut in cuts)


def shuffled(case: Case) -> int:
    """Rows in another order."""
    order = torch.randperm(len(case.problem.hidden), device=case.problem.hidden.device)
    return differing(case.rows(order).results(), [case.results()[0][order]])


def repeated(case: Case) -> int:
    """All once more, with gradients."""
    return differing(case.results(backward=True), case.results(backward=True))


def poisoned(case: Case) -> int:
    """All once more, in memory that holds NaN before anything is written to it."""
    expected = case.results(backward=True)
    torch.use_deterministic_algorithms(True, warn_only=True)  # which fills what is new, too
    try:
        assert torch.empty_like(expected[0]).isnan().all(), "new memory was not filled"
        return differing(case.results(backward=True), expected)
    finally:
        torch.use_deterministic_algorithms(False)


def surrounded(case: Case) -> Case:
    """The same operands, with NaN before, behind and between their rows."""

    def inside(x: Tensor) -> Tensor:
        whole = x.new_full((len(x) + 16, x.shape[1] + 16), torch.nan)
        whole[8:-8, :-16] = x
        return whole[8:-8, :-16]

    return case.changed(hidden=inside(case.problem.hidden), weight=inside(case.problem.weight))


def spoiled(case: Case, factor: float) -> tuple[Case, Tensor]:
    """Every seventh hidden state times a factor; and a mask of the others."""
    hidden = case.problem.hidden.clone()
    hidden[::7] *= factor
    return case.changed(hidden=hidden), torch.arange(len(hidden), device=hidden.device) % 7 != 0


def error_far_off(case: Case) -> float:
    """Of log-probs so low that the sum around the target's logit overflows; relative to them."""
    far, _ = spoiled(case, -40.0)
    exact, found = far.exact()[0], far.results()[0].double()
    low = exact < -88
    assert low.any(), "none overflows"
    return float((found / exact - 1)[low].abs().max())


def beside(case: Case, factor: float) -> int:
    """Rows beside spoiled ones; and if those are NaN, how many do not say so."""
    changed, others = spoiled(case, factor)
    found = changed.results()[0]
    silent = int((~found[~others].isnan()).sum()) if isnan(factor) else 0
    return silent + differing([found[others]], [case.results()[0][others]])


def error_beside_what_does_not_count(case: Case) -> float:
    """Of gradients, where tokens that are ignored, or have no slope, hold NaN."""
    changed, others = spoiled(case, torch.nan)
    targets, slope = case.problem.targets.clone(), case.problem.slope.clone()
    targets[::14], slope[7::14] = -100, 0
    logps, hidden, weight = changed.changed(targets=targets, slope=slope).results(backward=True)
    assert (logps[::14] == 0).all(), "an ignored token has a log-prob"
    assert (hidden[~others] == 0).all(), "a token that does not count has a gradient"
    return apart([hidden[others], weight], case.rows(others).exact(backward=True)[1:])


def compiled(case: Case, backend: str) -> int:
    """All in one graph, against the same without."""

    def head(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return token_logps(hidden * 2, weight, targets, impl="fused") * 2

    graph = torch.compile(head, fullgraph=True, backend=backend)
    found, expected = (case.problem.results(each, backward=True) for each in (graph, head))
    return differing(found, expected)


def check_rows(dtype: str, device: str) -> None:
    """Rows owe each other nothing."""
    case = Case.draw(SIZES[device].usual, dtype, device)
    check(f"{dtype}, rows alone", 0, alone, case)
    check(f"{dtype}, rows shuffled", 0, shuffled, case)
    check(f"{dtype}, repeated", 0, repeated, case)
    check(f"{dtype}, in memory that held NaN", 0, poisoned, case)
    check(f"{dtype}, operands among NaN", NATS, error, surrounded(case))
    check(f"{dtype}, their gradients", GRADIENTS[dtype], error_of_gradients, surrounded(case))
    check(f"{dtype}, log p below -88", FAR, error_far_off, case)
    for factor in (-40.0, torch.inf, torch.nan):
        check(f"{dtype}, rows beside others times {factor}", 0, beside, case, factor)
    name = f"{dtype}, gradients beside what does not count"
    check(name, GRADIENTS[dtype], error_beside_what_does_not_count, case)


def check_gradients(dtype: str, device: str) -> None:
    """Of hidden states, weight and bias."""
    for shape, options in zip(SIZES[device].gradients, [*OPTIONS, {}], strict=False):
        case = Case.draw(shape, dtype, device, **options)
        check(f"{dtype}, gradients, {shape}", GRADIENTS[dtype], error_of_gradients, case)


def check_shapes(dtype: str, device: str) -> None:
    """Ugly ones."""
    sizes = SIZES[device]
    for i, shape in enumerate(product(sizes.hidden, sizes.vocabulary)):
        options = OPTIONS[i % len(OPTIONS)]
        name = ", ".join([f"{dtype}, {sizes.tokens} x {shape[0]} x {shape[1]}", *options])
        check(name, NATS, error_of_numbers, sizes.tokens, shape, dtype, device, **options)


def check_compiled(device: str) -> None:
    """By `torch.compile`."""
    case = Case.draw(SIZES[device].usual, "bfloat16", device)
    check("compiled", 0, compiled, case, "inductor" if device == "cuda" else "aot_eager")


def check_large(device: str) -> None:
    """More than 16 and 32 bits can count."""
    for name, shape in SIZES[device].large.items():
        tokens, hidden, vocabulary = shape
        operand = max(tokens, vocabulary) * hidden
        if device == "cuda" and torch.cuda.mem_get_info()[0] < 30 * operand:
            not_made(name, f"{30 * operand / 1e9:.0f} GB are not free")
            continue
        case = Case.draw(shape, "bfloat16", device)
        some = EVERY if operand < 1 << 31 else slice(-64, None)
        limit = NATS * max(1, hidden / 1024)  # errors grow with the number of terms
        check(f"{name}, {shape}", limit, error, case, some)
        check(f"{name}, gradients", GRADIENTS["bfloat16"], error_of_gradients, case, some)
        del case


def check_tiling(tiling: Tiling, device: str) -> None:
    """One that `tune` tries."""
    first, *_ = SIZES[device].tilings
    with used(tiling):
        for dtype in ("bfloat16", "float16"):
            name, usual = f"{words(tiling)}, {dtype}", Case.draw(first, dtype, device)
            try:
                usual.results(backward=True)
            except OutOfResources as lack:  # of shared memory, on a smaller device
                not_made(name, in_a_line(lack))
                continue
            for shape, options in zip(SIZES[device].tilings, OPTIONS, strict=False):
                case = Case.draw(shape, dtype, device, **options)
                check(f"{name}, {shape}", NATS, error, case)
                check(f"{name}, {shape}, gradients", GRADIENTS[dtype], error_of_gradients, case)
            check(f"{name}, rows alone", 0, alone, usual)
            check(f"{name}, rows shuffled", 0, shuffled, usual)
            check(f"{name}, in memory that held NaN", 0, poisoned, usual)
            check(f"{name}, log p below -88", FAR, error_far_off, usual)


@contextmanager
def used(tiling: Tiling) -> Iterator[None]:
    """Around calls of the fused head that are to use a tiling."""
    module: Any = fused
    before = module.tiling_of
    module.tiling_of = lambda weight_VH: tiling
    try:
        yield
    finally:
        module.tiling_of = before


def words(tiling: Tiling) -> str:
    """A tiling in a few words."""
    rows, columns, depth, warps, stages = tiling[:5]
    how = " TMA" * tiling.descriptors + " library" * tiling.library
    return f"{rows}x{columns}x{depth} w{warps} s{stages} g{tiling.group}{how}"


def groups(device: str) -> Mapping[str, Callable[[], None]]:
    """All checks, the most important first."""
    kinds = {"rows": check_rows, "gradients": check_gradients, "shapes": check_shapes}
    found: dict[str, Callable[[], None]] = {
        f"{name}, {dtype}": partial(kind, dtype, device)
        for name, kind in kinds.items()
        for dtype in GRADIENTS
    }
    found |= {"large": partial(check_large, device), "compiled": partial(check_compiled, device)}
    return found | {words(tiling): partial(check_tiling, tiling, device) for tiling in CANDIDATES}
