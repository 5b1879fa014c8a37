"""Checks of the fused head, which `head_gpu.py` runs in separate processes.

A check is a figure with an upper limit: an error against float64 in nats, an error of gradients
relative to their norm, or a number of bytes that must be equal but differ. An exception also fails
a check, and the next one runs; only an illegal memory access ends the process.
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
    """Sizes of the problems that the checks use."""

    tokens: tuple[int, ...]
    hidden: tuple[int, ...]
    vocabulary: tuple[int, ...]
    typical: Shape
    gradients: tuple[Shape, ...]
    tilings: tuple[Shape, ...]
    large: dict[str, Shape]


SIZES = {
    "cuda": Sizes(
        tokens=(1, 17, 129, 1000),
        hidden=(8, 33, 80, 896),
        vocabulary=(1, 127, 257, 1000, 151_936),
        typical=(300, 896, 151_936),
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
        typical=(18, 40, 150),
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
MAX_ERROR = 5e-5  # nats per token; with logits rounded to bf16 the error is 2e-2
MAX_RELATIVE_ERROR = 1e-5  # of log-probs below -88
# relative to the gradient's norm, by dtype; the interpreter truncates bf16 where a GPU rounds
MAX_GRADIENT_ERROR = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 6e-3}
EXACT_LOGITS = 1 << 26  # float64 logits in memory at a time
ALL_ROWS = slice(None)


@dataclass(frozen=True)
class Case:
    """A problem, with the options of its head."""

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
        """Draw a case whose targets include the first and the last token of the vocabulary. With a
        bias or a softcap, some targets are ignored.
        """
        problem = Problem.draw(*shape, getattr(torch, dtype), device)
        tokens, _, vocabulary = shape
        problem.targets[: tokens // 2 : 5] = vocabulary - 1
        problem.targets[1 : tokens // 2 : 5] = 0
        if biased or softcap is not None:
            problem.targets[3::7] = -100
        bias = torch.randn(vocabulary, device=device).to(problem.weight.dtype)
        return cls(problem, (bias,) * biased, softcap, temperature)

    def rows(self, selected: slice | Tensor) -> "Case":
        """Return the case of selected tokens."""
        return replace(self, problem=self.problem.rows(selected))

    def changed(self, **tensors: Tensor) -> "Case":
        """Return the case with other hidden states, weight, targets or slope."""
        return replace(self, problem=self.problem._replace(**tensors))

    def results(self, *, impl: Any = "fused", backward: bool = False) -> list[Tensor]:
        """Compute log-probs; with `backward`, also gradients of hidden, weight and bias."""

        def head(hidden: Tensor, weight: Tensor, targets: Tensor, *bias: Tensor) -> Tensor:
            options = {"softcap": self.softcap, "temperature": self.temperature, "impl": impl}
            return token_logps(hidden, weight, targets, bias=bias[0] if bias else None, **options)

        return self.problem.results(head, *self.bias, backward=backward)

    def exact(self, *, backward: bool = False) -> list[Tensor]:
        """Compute the same results in float64 with the reference, in chunks of tokens."""
        weight, bias = self.problem.weight.double(), tuple(b.double() for b in self.bias)
        chunk_rows = max(1, EXACT_LOGITS // len(weight))
        chunks = []
        for first in range(0, len(self.problem.hidden), chunk_rows):
            chunk = self.problem.rows(slice(first, first + chunk_rows))
            problem = Problem(chunk.hidden.double(), weight, chunk.targets, chunk.slope.double())
            case = replace(self, problem=problem, bias=bias)
            chunks.append(case.results(impl="reference", backward=backward))
        # log-probs and hidden gradients have one row per token; weight and bias gradients are sums
        results, by_token = list(zip(*chunks, strict=True)), 1 + backward
        return [*map(torch.cat, results[:by_token]), *(reduce(add, x) for x in results[by_token:])]


def check(
    name: str, limit: float, figure: Callable[..., float], *args: Any, **options: Any
) -> None:
    """Run a check, and print its result as JSON."""
    row: dict[str, Any] = {"check": name, "limit": limit}
    try:
        measured = figure(*args, **options)
        row |= {"figure": measured, "passed": measured <= limit}  # NaN does not pass
    except Exception as error:
        row |= {"passed": False, "reason": error_line(error)}
    print(json.dumps(row), flush=True)
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # raises again after an illegal access, which ends the process


def skip(name: str, reason: str) -> None:
    """Print that a check is skipped, and the reason."""
    print(json.dumps({"check": name, "reason": reason}), flush=True)


def error_line(error: Exception) -> str:
    """Return an error's type and message in one line."""
    return f"{type(error).__name__}: {(str(error) or 'no message').splitlines()[0][:120]}"


def largest(figures: Iterable[float]) -> float:
    """Return the largest figure, or NaN if one is NaN."""
    return float(torch.tensor(list(figures)).max())


def differing_bytes(results: Sequence[Tensor], expected: Sequence[Tensor]) -> int:
    """Return the number of bytes that differ."""
    return sum(
        int((a.contiguous().view(torch.uint8) != b.contiguous().view(torch.uint8)).sum())
        for a, b in zip(results, expected, strict=True)
    )


def relative_error(results: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Return the largest distance between two tensors, relative to the exact one's norm."""
    return largest(
        float((a.double() - b).norm() / b.norm()) for a, b in zip(results, exact, strict=True)
    )


def error(case: Case, rows: slice = ALL_ROWS) -> float:
    """Return the largest error of a log-prob among these rows, in nats."""
    exact = case.rows(rows).exact()[0]
    return float((case.results()[0][rows].double() - exact).abs().max())


def error_by_tokens(
    tokens: Iterable[int], shape: tuple[int, int], *where: str, **options: Any
) -> float:
    """Return the largest error of a log-prob over several numbers of tokens, in nats."""
    return largest(error(Case.draw((n, *shape), *where, **options)) for n in tokens)


def error_of_gradients(case: Case, rows: slice = ALL_ROWS) -> float:
    """Return the largest relative error of the gradients of hidden states, weight and bias; of a
    part of the rows, that of their hidden states.
    """
    gradients, exact = case.results(backward=True)[1:], case.rows(rows).exact(backward=True)[1:]
    if rows == ALL_ROWS:
        return relative_error(gradients, exact)
    return relative_error([gradients[0][rows]], exact[:1])  # others sum over all rows


def changed_alone(case: Case) -> int:
    """Return the bytes that change if rows are computed alone, or with fewer others."""
    whole, end = case.results()[0], len(case.problem.hidden)
    cuts = [slice(0, 1), slice(end // 2, end // 2 + 1), slice(end - 1, end), slice(3, 20)]
    cuts.append(slice(1, end))
    return sum(differing_bytes(case.rows(cut).results(), [whole[cut]]) for cut in cuts)


def changed_shuffled(case: Case) -> int:
    """Return the bytes that change if rows are in another order."""
    order = torch.randperm(len(case.problem.hidden), device=case.problem.hidden.device)
    return differing_bytes(case.rows(order).results(), [case.results()[0][order]])


def changed_repeated(case: Case) -> int:
    """Return the bytes of log-probs and gradients that change in a second call."""
    return differing_bytes(case.results(backward=True), case.results(backward=True))


def changed_in_nan_memory(case: Case) -> int:
    """Return the bytes that change if new memory contains NaN before it is written."""
    expected = case.results(backward=True)
    torch.use_deterministic_algorithms(True, warn_only=True)  # also fills new memory with NaN
    try:
        assert torch.empty_like(expected[0]).isnan().all(), "new memory was not filled"
        return differing_bytes(case.results(backward=True), expected)
    finally:
        torch.use_deterministic_algorithms(False)


def surrounded_by_nan(case: Case) -> Case:
    """Return the case with NaN in memory before, after and between the rows of its operands."""

    def surrounded(x: Tensor) -> Tensor:
        buffer = x.new_full((len(x) + 16, x.shape[1] + 16), torch.nan)
        buffer[8:-8, :-16] = x
        return buffer[8:-8, :-16]

    hidden, weight = case.problem.hidden, case.problem.weight
    return case.changed(hidden=surrounded(hidden), weight=surrounded(weight))


def scaled(case: Case, factor: float) -> tuple[Case, Tensor]:
    """Return the case with every seventh hidden state multiplied, and a mask of the others."""
    hidden = case.problem.hidden.clone()
    hidden[::7] *= factor
    return case.changed(hidden=hidden), torch.arange(len(hidden), device=hidden.device) % 7 != 0


def error_of_overflowing_rows(case: Case) -> float:
    """Return the largest relative error of log-probs below -88, whose sums overflow."""
    overflowing, _ = scaled(case, -40.0)
    exact, logps = overflowing.exact()[0], overflowing.results()[0].double()
    low = exact < -88
    assert low.any(), "none overflows"
    return float((logps / exact - 1)[low].abs().max())


def changed_beside(case: Case, factor: float) -> int:
    """Return the bytes of rows that change beside scaled ones; of rows scaled by NaN, those whose
    log-prob is not NaN are added.
    """
    changed, others = scaled(case, factor)
    logps = changed.results()[0]
    not_nan = int((~logps[~others].isnan()).sum()) if isnan(factor) else 0
    return not_nan + differing_bytes([logps[others]], [case.results()[0][others]])


def error_beside_dropped_tokens(case: Case) -> float:
    """Return the relative error of gradients if ignored and zero-weight tokens contain NaN."""
    changed, others = scaled(case, torch.nan)
    targets, slope = case.problem.targets.clone(), case.problem.slope.clone()
    targets[::14], slope[7::14] = -100, 0
    logps, hidden, weight = changed.changed(targets=targets, slope=slope).results(backward=True)
    assert (logps[::14] == 0).all(), "an ignored token has a log-prob"
    assert (hidden[~others] == 0).all(), "a dropped token has a gradient"
    return relative_error([hidden[others], weight], case.rows(others).exact(backward=True)[1:])


def changed_compiled(case: Case, backend: str) -> int:
    """Return the bytes that change if all is compiled into one graph."""

    def head(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return token_logps(hidden * 2, weight, targets, impl="fused") * 2

    graph = torch.compile(head, fullgraph=True, backend=backend)
    results, expected = (case.problem.results(each, backward=True) for each in (graph, head))
    return differing_bytes(results, expected)


def check_rows(dtype: str, device: str) -> None:
    """Check that the result of a row does not depend on other rows or on other memory."""
    case = Case.draw(SIZES[device].typical, dtype, device)
    gradient_limit = MAX_GRADIENT_ERROR[dtype]
    check(f"{dtype}, rows alone", 0, changed_alone, case)
    check(f"{dtype}, rows shuffled", 0, changed_shuffled, case)
    check(f"{dtype}, repeated", 0, changed_repeated, case)
    check(f"{dtype}, in memory filled with NaN", 0, changed_in_nan_memory, case)
    among_nan = surrounded_by_nan(case)
    check(f"{dtype}, operands surrounded by NaN", MAX_ERROR, error, among_nan)
    check(f"{dtype}, their gradients", gradient_limit, error_of_gradients, among_nan)
    check(f"{dtype}, log p below -88", MAX_RELATIVE_ERROR, error_of_overflowing_rows, case)
    for factor in (-40.0, torch.inf, torch.nan):
        check(f"{dtype}, rows beside others times {factor}", 0, changed_beside, case, factor)
    name = f"{dtype}, gradients beside dropped tokens"
    check(name, gradient_limit, error_beside_dropped_tokens, case)


def check_gradients(dtype: str, device: str) -> None:
    """Check the gradients of hidden states, weight and bias."""
    for shape, options in zip(SIZES[device].gradients, [*OPTIONS, {}], strict=False):
        case = Case.draw(shape, dtype, device, **options)
        check(f"{dtype}, gradients, {shape}", MAX_GRADIENT_ERROR[dtype], error_of_gradients, case)


def check_shapes(dtype: str, device: str) -> None:
    """Check log-probs for shapes that no tile size divides."""
    sizes = SIZES[device]
    for i, shape in enumerate(product(sizes.hidden, sizes.vocabulary)):
        options = OPTIONS[i % len(OPTIONS)]
        name = ", ".join([f"{dtype}, {sizes.tokens} x {shape[0]} x {shape[1]}", *options])
        check(name, MAX_ERROR, error_by_tokens, sizes.tokens, shape, dtype, device, **options)


def check_compiled(device: str) -> None:
    """Check the bits under `torch.compile`."""
    case = Case.draw(SIZES[device].typical, "bfloat16", device)
    backend = "inductor" if device == "cuda" else "aot_eager"
    check("compiled", 0, changed_compiled, case, backend)


def check_large(device: str) -> None:
    """Check sizes whose indices or offsets need more than 16 or 32 bits."""
    for name, shape in SIZES[device].large.items():
        tokens, hidden, vocabulary = shape
        operand = max(tokens, vocabulary) * hidden
        if device == "cuda" and torch.cuda.mem_get_info()[0] < 30 * operand:
            skip(name, f"{30 * operand / 1e9:.0f} GB are not free")
            continue
        case = Case.draw(shape, "bfloat16", device)
        rows = ALL_ROWS if operand < 1 << 31 else slice(-64, None)  # the exact result takes memory
        limit = MAX_ERROR * max(1, hidden / 1024)  # errors grow with the number of terms
        check(f"{name}, {shape}", limit, error, case, rows)
        check(f"{name}, gradients", MAX_GRADIENT_ERROR["bfloat16"], error_of_gradients, case, rows)
        del case


def check_tiling(tiling: Tiling, device: str) -> None:
    """Check one of the tilings that `tune` tries."""
    first, *_ = SIZES[device].tilings
    with using_tiling(tiling):
        for dtype in ("bfloat16", "float16"):
            name, typical = f"{tiling_name(tiling)}, {dtype}", Case.draw(first, dtype, device)
            try:
                typical.results(backward=True)
            except OutOfResources as error_of_device:  # too little shared memory
                skip(name, error_line(error_of_device))
                continue
            limit = MAX_GRADIENT_ERROR[dtype]
            for shape, options in zip(SIZES[device].tilings, OPTIONS, strict=False):
                case = Case.draw(shape, dtype, device, **options)
                check(f"{name}, {shape}", MAX_ERROR, error, case)
                check(f"{name}, {shape}, gradients", limit, error_of_gradients, case)
            check(f"{name}, rows alone", 0, changed_alone, typical)
            check(f"{name}, rows shuffled", 0, changed_shuffled, typical)
            check(f"{name}, in memory filled with NaN", 0, changed_in_nan_memory, typical)
            check(
                f"{name}, log p below -88", MAX_RELATIVE_ERROR, error_of_overflowing_rows, typical
            )


@contextmanager
def using_tiling(tiling: Tiling) -> Iterator[None]:
    """Make the fused head use this tiling inside."""
    module: Any = fused
    before = module.tiling_of
    module.tiling_of = lambda weight_VH: tiling
    try:
        yield
    finally:
        module.tiling_of = before


def tiling_name(tiling: Tiling) -> str:
    """Return a short name of a tiling."""
    rows, columns, depth, warps, stages = tiling[:5]
    options = " TMA" * tiling.descriptors + " library" * tiling.library
    return f"{rows}x{columns}x{depth} w{warps} s{stages} g{tiling.group}{options}"


def groups(device: str) -> Mapping[str, Callable[[], None]]:
    """Return all groups of checks by name, the most important first."""
    kinds = {"rows": check_rows, "gradients": check_gradients, "shapes": check_shapes}
    by_name: dict[str, Callable[[], None]] = {
        f"{name}, {dtype}": partial(kind, dtype, device)
        for name, kind in kinds.items()
        for dtype in MAX_GRADIENT_ERROR
    }
    by_name |= {"large": partial(check_large, device), "compiled": partial(check_compiled, device)}
    return by_name | {
        tiling_name(tiling): partial(check_tiling, tiling, device) for tiling in CANDIDATES
    }
