"""Correctness, speed and memory of the fused head on a GPU.

    python examples/benchmarks/head_gpu.py --out results
    python examples/benchmarks/head_gpu.py --part times --minutes 5
    TRITON_INTERPRET=1 python examples/benchmarks/head_gpu.py --device cpu

1. Checks, see `head_checks.py`. If one fails, the exit status is 1.
2. Times, in multiples of bare matrix products of the same shapes and dtype: medians, by CUDA
   events, of rounds in which all variants take turns on two sets of hidden states. One variant is
   listed twice, to show the noise. Errors are in nats, against float64 over the first 8,192 tokens:
   the largest, the root mean square, and that of the sum. The error of the gradient is that of the
   hidden states of 64 tokens, relative to its norm. Memory is the peak beyond the inputs, including
   gradients. `repeats` and `alone` are yes if log-probs and the hidden states' gradient are
   bit-identical in a second call, and when computed from a part of the rows.
3. One step of NCA on a pair with responses of 32,768 tokens, with AdamW and activation
   checkpointing, on a model of Qwen2.5-1.5B's shape with random weights.

The report ends with each target and its measured value. Peers that are not installed are skipped,
as is everything that does not fit in the time. On a CPU all sizes are tiny and times mean nothing.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from head import VARIANTS, Head, Problem, chunked, failure, fused, timed, with_memory
from head_checks import (
    Case,
    differing_bytes,
    error_line,
    groups,
    relative_error,
    tiling_name,
    using_tiling,
)
from torch import Tensor

from sage_select import PreferenceDataset, Reader, nca
from sage_select.ops.tilings import Tiling, default_tiling
from sage_select.ops.tuning import CANDIDATES
from sage_select.training.sharding import checkpoint_activations

Row = dict[str, Any]

SHAPES = {  # tokens and hidden, the most important first
    "cuda": [(8192, 1536), (32_768, 3584), (32_768, 1536), (8192, 3584)],
    "cpu": [(16, 24)],
}
VOCABULARY = {"cuda": 151_936, "cpu": 300}
ROUNDS = {"cuda": (3, 20), "cpu": (1, 2)}  # warm-up rounds, and timed ones
PAIR = {"cuda": ("qwen2.5-1.5b", 32_768, "bfloat16"), "cpu": ("tiny", 24, "float32")}
EXACT = 8192  # tokens that are compared with float64
START_SECONDS, PAIR_SECONDS = 12, 90  # reserved for imports, and for the step on a pair
OURS = "sage-select fused"
FORWARD, BOTH, TILINGS = TABLES = ("forward", "forward and backward", "forward, by tiling")
COLUMNS = {
    "ms": ".2f",
    "x mm": ".3f",
    "TFLOP/s": ",.0f",
    "memory, MB": ",.1f",
    "max error": ".1e",
    "rms error": ".1e",
    "of the sum": ".1e",
    "of gradient": ".1e",
    "repeats": "",
    "alone": "",
    "rounds": "",
}


def emit(**row: Any) -> None:
    """Print a row as JSON, for the parent process."""
    print(json.dumps(row), flush=True)


def start_timed(call: Callable[[], object], device: str) -> Callable[[], float]:
    """Start a call, and return a function that returns its milliseconds after `finish`."""
    if device == "cpu":
        milliseconds = 1e3 * timed(call, device)
        return lambda: milliseconds
    event: Any = torch.cuda.Event
    start, end = event(enable_timing=True), event(enable_timing=True)
    start.record()
    call()
    end.record()
    return lambda: float(start.elapsed_time(end))


def finish(device: str) -> None:
    """Wait until all work on the device is done."""
    if device == "cuda":
        torch.cuda.synchronize()


def describe(args: argparse.Namespace) -> None:
    """Emit the device's name, its copy rate, and the versions of packages."""
    name, size = platform.machine(), 1 << 20
    if args.device == "cuda":
        gpu, size = torch.cuda.get_device_properties(0), 1 << 30
        name = f"{gpu.name}, {gpu.total_memory / 1e9:.0f} GB, CUDA {torch.version.cuda}"
    source = torch.randn(size, device=args.device)
    target = torch.empty_like(source)
    copies = [start_timed(partial(target.copy_, source), args.device) for _ in range(13)]
    finish(args.device)
    rate = 2 * source.nbytes / median(copy() for copy in copies[3:]) / 1e6
    packages = ("torch", "triton", "transformers", "trl", "liger-kernel", "cut-cross-entropy")
    versions = ", ".join(f"{package} {installed(package)}" for package in packages)
    emit(device=f"{name}; a copy reads and writes {rate:,.0f} GB/s\n{versions}")


def installed(package: str) -> str:
    """Return a package's version, or "not installed"."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def check(args: argparse.Namespace, *names: str) -> None:
    """Run groups of checks; an error in one group does not stop the next."""
    for name in names:
        try:
            groups(args.device)[name]()
        except Exception as error:
            emit(check=name, passed=False, reason=error_line(error))


def time_shape(args: argparse.Namespace, *shape: str) -> None:
    """Emit all tables for one number of tokens and hidden dimensions."""
    end = time.monotonic() + args.seconds
    tokens, hidden = map(int, shape)
    vocabulary = VOCABULARY[args.device]
    problem = Problem.draw(tokens, hidden, vocabulary, torch.bfloat16, args.device)
    # the same tokens in reverse order, for every other round
    reversed_problem = problem.rows(torch.arange(tokens - 1, -1, -1, device=args.device))
    for i, table in enumerate(TABLES):
        left = end - time.monotonic()
        rows: dict[str, Row] = {"all": {"reason": "no time left"}}
        if left > args.seconds / 20:
            until = time.monotonic() + left / (len(TABLES) - i)
            rows = compare(table, [problem, reversed_problem], until, args)
        for name, row in rows.items():
            emit(table=table, tokens=tokens, hidden=hidden, variant=name, **row)


def variants(table: str, weight: Tensor, *, peers: bool) -> dict[str, Head]:
    """Return the heads that a table compares, by name."""
    if table == TILINGS:
        return {tiling_name(tiling): with_tiling(tiling) for tiling in CANDIDATES}
    library = default_tiling(weight.device, weight.dtype)._replace(library=True)
    ours = {
        OURS: fused,
        f"{OURS}, again": fused,
        f"{OURS}, library products": with_tiling(library),
        "sage-select chunked": chunked,
    }
    # the two named peers are too slow for the time
    excluded = {"cross_entropy of all logits", "CCE torch_compile", *ours}
    others = {name: head for name, head in VARIANTS.items() if name not in excluded}
    return ours | others if peers else ours


def with_tiling(tiling: Tiling) -> Head:
    """Return the fused head with this tiling in its forward pass."""

    def head(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        with using_tiling(tiling):
            return fused(hidden, weight, targets)

    return head


def compare(
    table: str, problems: list[Problem], end: float, args: argparse.Namespace
) -> dict[str, Row]:
    """Examine each variant, then time in turns those that ran."""
    problem, backward, device = problems[0], table == BOTH, args.device
    exact = Case(problem.rows(slice(0, EXACT))).exact()
    if backward:
        exact += Case(problem.rows(slice(0, 64))).exact(backward=True)[1:2]
    products = problem.products(backward=backward)
    products(problem)  # allocates the library's workspace, before memory is measured
    calls: dict[str, Callable[[Problem], object]] = {"torch.mm": products}
    rows: dict[str, Row] = {"torch.mm": {}}
    for name, head in variants(table, problem.weight, peers=not args.no_peers).items():
        results = partial(Problem.results, head=head, backward=backward)
        try:
            rows[name] = examine(results, problem, exact, device)
            calls[name] = results
        except Exception as error:  # not installed, unsupported device, or out of memory
            rows[name] = {"reason": error_line(error)}
        if device == "cuda":
            torch.cuda.empty_cache()

    timers: dict[str, list[Callable[[], float]]] = {name: [] for name in calls}
    warm_up, rounds = ROUNDS[device]
    end = max(end, time.monotonic() + 8)
    for turn in range(warm_up + rounds):
        for name in calls:
            timers[name].append(start_timed(partial(calls[name], problems[turn % 2]), device))
        finish(device)
        if time.monotonic() > end and turn >= warm_up + 4:
            break
    bare = median(timer() for timer in timers["torch.mm"][warm_up:])
    flops = (3 if backward else 1) * 2 * problem.hidden.numel() * len(problem.weight)
    for name, of_variant in timers.items():
        ms = median(timer() for timer in of_variant[warm_up:])
        rows[name] |= {"ms": ms, "x mm": ms / bare, "TFLOP/s": flops / ms / 1e9}
        rows[name]["rounds"] = len(of_variant) - warm_up
    return rows


def examine(
    results: Callable[[Problem], list[Tensor]], problem: Problem, exact: list[Tensor], device: str
) -> Row:
    """Measure memory and errors of a variant, and whether its bits are reproducible."""
    tokens = len(problem.hidden)
    part = slice(tokens // 3, tokens // 2)
    first = results(problem)  # imports and compiles
    again, memory = with_memory(partial(results, problem), device)
    alone = results(problem.rows(part))
    error = first[0][:EXACT].double() - exact[0]
    row = {
        "memory, MB": memory,
        "max error": float(error.abs().max()),
        "rms error": float(error.square().mean().sqrt()),
        "of the sum": float(error.sum().abs()),
        "repeats": "no" if differing_bytes(first[:2], again[:2]) else "yes",
        "alone": "no" if differing_bytes([x[part] for x in first[:2]], alone[:2]) else "yes",
    }
    return row | ({"of gradient": relative_error([first[1][:64]], exact[1:])} if exact[1:] else {})


def train_pair(args: argparse.Namespace) -> None:
    """Train one step on a pair; memory includes weights, gradients and optimizer states."""
    from engine import build_model, build_tokenizer, make_records

    shape, tokens, dtype = PAIR[args.device]
    prompt = 64

    def step() -> tuple[float, float]:
        with torch.device(args.device):
            model = build_model(shape, 1, prompt + tokens, dtype, args.device)
        vocabulary = model.config.vocab_size
        pair = PreferenceDataset.from_records(
            make_records(np.array([[prompt, tokens, tokens]]), vocabulary, seed=0),
            tokenizer=build_tokenizer(vocabulary),
            max_length=prompt + tokens,
            on_bad="error",
            show_progress=False,
        )
        reader = Reader(impl="fused", show_progress=False)
        reference = reader(model, pair).to(args.device)
        checkpoint_activations(model.train())
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
        start = time.perf_counter()
        with reader.updating(model, pair):
            loss = nca(reader.pair_logps(model, pair), reference).sum()
            torch.autograd.backward(loss)
        optimizer.step()
        finish(args.device)
        return loss.item(), time.perf_counter() - start

    finish(args.device)  # initialises CUDA, so that memory can be measured
    (loss, seconds), memory = with_memory(step, args.device)
    emit(pair=shape, tokens=tokens, memory=memory / 1e3, seconds=seconds, loss=loss)


def run_job(args: argparse.Namespace, seconds: float, *job: str) -> list[Row]:
    """Run a job in a subprocess and return its rows; if it fails, the last row has the reason."""
    command = [sys.executable, __file__, "--device", args.device, "--seconds", str(seconds)]
    command += ["--no-peers"] * args.no_peers + ["--job", *job]
    limit = 2 * seconds + 60  # only for a job that hangs; jobs keep to `seconds` themselves
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+", errors="replace") as err:
        try:
            done = subprocess.run(command, stdout=out, stderr=err, timeout=limit, check=False)
            err.seek(0)
            code = done.returncode
            reason = f"{failure(err.read())} (status {code})" if code else ""
        except subprocess.TimeoutExpired:
            reason = f"stopped after {limit:.0f} s"
        out.seek(0)
        # libraries may print other lines, and a killed job may leave half a line
        rows = [json.loads(line) for line in out if line.startswith("{") and line.endswith("}\n")]
    return [*rows, {"ended": job[:3], "reason": reason}] if reason else rows


class Report:
    """Rows of results, and the lines printed about them."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.rows: list[Row] = []
        self.text: list[str] = []

    def say(self, text: str) -> None:
        """Print a text, and add it to the report."""
        print(text, flush=True)
        self.text.append(text)

    def add(self, rows: list[Row]) -> None:
        """Add rows, and print those that are not in a table."""
        self.rows += rows
        for row in rows:
            if "device" in row:
                self.say(row["device"])
            elif "pair" in row:
                self.say(f"\n{row['pair']}, a pair with responses of {row['tokens']:,} tokens: "
                         f"{row['memory']:.1f} GB at the peak, {row['seconds']:.1f} s, "
                         f"loss {row['loss']:.4f}")  # fmt: skip
            elif "ended" in row:
                self.say(f"FAIL  {' '.join(row['ended'])}: {row['reason']}")
            elif "check" in row:
                verdict = {True: "PASS", False: "FAIL", None: "SKIP"}[row.get("passed")]
                result = row.get("reason") or f"{row['figure']:.1e}, at most {row['limit']:.0e}"
                self.say(f"{verdict}  {row['check']}: {result}")
        self.write()

    def write(self) -> None:
        """Write the report so far, as text with tables and as JSON."""
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "head_gpu.md").write_text("\n".join(self.text) + "\n")
            (self.folder / "head_gpu.json").write_text(json.dumps(self.rows, indent=1) + "\n")


def make_checks(args: argparse.Namespace, report: Report, end: float) -> None:
    """Run all checks: on a GPU one subprocess per group, several at once; on a CPU one for all."""
    gpu, names = args.device == "cuda", list(groups(args.device))

    def run_groups(job: list[str]) -> list[Row]:
        left = end - time.monotonic()
        if left < START_SECONDS:
            return [{"check": name, "reason": "no time left"} for name in job]
        return run_job(args, min(left, 60), "check", *job)

    workers = max(1, min(8, (os.cpu_count() or 1) // 2)) if gpu else 1
    with ThreadPoolExecutor(workers) as pool:
        for rows in pool.map(run_groups, [[name] for name in names] if gpu else [names]):
            report.add(rows)


def take_times(args: argparse.Namespace, report: Report, end: float) -> None:
    """Run the tables of each shape in a subprocess, with a share of the time by its size."""
    shapes = SHAPES[args.device]
    for i, (tokens, hidden) in enumerate(shapes):
        sizes = [n * h + 5e7 for n, h in shapes[i:]]  # 5e7: the part that is equal for all shapes
        share = (end - time.monotonic()) * sizes[0] / sum(sizes) - START_SECONDS
        heading = f"{tokens:,} x {hidden:,} x {VOCABULARY[args.device]:,}, bfloat16"
        if share < START_SECONDS:
            report.say(f"\n{heading}: no time left")
            continue
        rows = run_job(args, share, "time_shape", str(tokens), str(hidden))
        if "ended" in rows[-1] and not args.no_peers:  # a peer may have crashed the process
            report.say(f"\n{heading}: {rows[-1]['reason']}; repeated without peers")
            ours = argparse.Namespace(**vars(args) | {"no_peers": True})
            rows = run_job(ours, share, "time_shape", str(tokens), str(hidden))
        for name in TABLES:
            table = [row for row in rows if row.get("table") == name]
            report.say(f"\n{name}: {heading}\n\n{markdown(table)}")
        report.add(rows)


def markdown(rows: list[Row]) -> str:
    """Format the measured rows as a table, with the reasons of the other rows below."""
    cells = [["", *COLUMNS]]
    for row in rows:
        if "ms" in row:
            values = [format(row[key], spec) if key in row else "" for key, spec in COLUMNS.items()]
            cells.append([row["variant"], *values])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    lines = [
        f"| {' | '.join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])} |"
        for line in cells
    ]
    missing = [f"{row['variant']}: {row['reason']}" for row in rows if "reason" in row]
    return "\n".join(lines + [""] * bool(missing) + missing)


def targets(rows: list[Row]) -> list[tuple[str, float, list[float]]]:
    """Return the name, upper limit and measured values of each target."""
    timed_rows = [row for row in rows if "ms" in row]

    def ours(table: str, key: str, **shape: int) -> list[float]:
        wanted = {"table": table, "variant": OURS, **shape}
        return [row[key] for row in timed_rows if wanted.items() <= row.items()]

    def relative_to_peers(table: str) -> list[float]:
        peers = [row for row in timed_rows if row["variant"].startswith(("TRL", "Liger"))]
        return [
            ms / peer["ms"]
            for peer in peers
            if peer["table"] == table
            for ms in ours(table, "ms", tokens=peer["tokens"], hidden=peer["hidden"])
        ]

    return [
        ("forward, hidden 1,536, x mm", 1.18, ours(FORWARD, "x mm", hidden=1536)),
        ("forward, hidden 3,584, x mm", 1.12, ours(FORWARD, "x mm", hidden=3584)),
        ("forward and backward, x 3 mm", 1.25, ours(BOTH, "x mm")),
        ("forward, 32,768 tokens, MB", 8, ours(FORWARD, "memory, MB", tokens=32_768)),
        ("forward, sum of 8,192 tokens, nats", 0.005, ours(FORWARD, "of the sum")),
        ("forward, x TRL's and Liger's times", 1, relative_to_peers(FORWARD)),
        ("forward and backward, x TRL's and Liger's times", 1, relative_to_peers(BOTH)),
        ("pair, GB", 80, [row["memory"] for row in rows if "pair" in row]),
    ]


def sum_up(report: Report) -> int:
    """Report the targets and the number of checks, and return the number of failed checks."""
    report.say("")
    for name, limit, values in targets(report.rows):
        verdict = "MET" if values and max(values) <= limit else "MISSED" if values else "-"
        measured = f"{max(values):.3g}" if values else "not measured"
        report.say(f"{verdict:8}{name}: {measured}, at most {limit:g}")
    checks = [row.get("passed") for row in report.rows if "check" in row or "ended" in row]
    ended = sum("ended" in row for row in report.rows)
    failed, skipped = checks.count(False) + ended, checks.count(None) - ended
    report.say(f"{checks.count(True)} checks passed, {failed} failed, {skipped} skipped")
    return failed


JOBS: dict[str, Callable[..., None]] = {
    job.__name__: job for job in (describe, check, time_shape, train_pair)
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=["checks", "times", "pair", "all"], default="all")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--minutes", type=float, default=10, help="time for all parts together")
    parser.add_argument("--no-peers", action="store_true", help="measure sage-select only")
    parser.add_argument("--out", type=Path, help="folder for the report")
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)  # time for a job
    parser.add_argument("--job", nargs="+", help=argparse.SUPPRESS)  # run in a subprocess
    args = parser.parse_args()
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if interpreted is not (args.device == "cpu"):
        parser.error("set TRITON_INTERPRET=1 with --device cpu, and only with it")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU found; use TRITON_INTERPRET=1 with --device cpu")
    if args.job:
        JOBS[args.job[0]](args, *args.job[1:])
        return 0

    end, report = time.monotonic() + 60 * args.minutes, Report(args.out)
    parts = ["checks", "times", "pair"] if args.part == "all" else [args.part]
    report.add(run_job(args, 60, "describe"))
    if "checks" in parts:
        make_checks(args, report, end if len(parts) == 1 else end - 60 * args.minutes * 0.55)
    if "times" in parts:
        take_times(args, report, end - PAIR_SECONDS * ("pair" in parts))
    if "pair" in parts:
        report.add(run_job(args, max(end - time.monotonic(), START_SECONDS), "train_pair"))
    failed = sum_up(report)
    report.write()
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
