"""Predict time and memory of the fused head on an H200 in bf16, from its tilings and device rates.

    python examples/benchmarks/predict_head.py

Needs no GPU; compare the output with a run of `head.py` on one. Times are in multiples of the bare
product; those of forward and backward, in multiples of three. Memory excludes inputs and gradients.

The model: a program multiplies and sums a tile before it starts to load the next; a second program
on the multiprocessor, if there is room, multiplies meanwhile. Programs start in order, each on the
first free slot. The rate at which the L2 cache feeds the multiprocessors is the least certain
number: microbenchmarks measure 5.5 to 7 TB/s, Triton's published products on an H100 imply 8, and
multiprocessors that load the same data may get more.
"""

from collections.abc import Iterable, Iterator
from heapq import heapreplace

from triton import cdiv

from sage_select.ops.fused import MAX_SLOPES, PRODUCT_SHAPE
from sage_select.ops.tilings import HOPPER, Tiling

VOCABULARY = 151_936
SHAPES = [(tokens, hidden) for tokens in (8192, 32_768) for hidden in (1536, 3584)]
# targets: multiples of the bare product by hidden size, and of three products for both passes
FORWARD_TARGETS, BOTH_TARGET = {1536: 1.18, 3584: 1.12}, 1.25

# the device
TENSOR = 790e12  # FLOP/s of a large product such as the bare one, at the power limit
L2_RATES = (5.5e12, 7e12, 8e12, 10e12)  # bytes/s
HBM = 4.8e12  # bytes/s
MULTIPROCESSORS, SHARED, CLOCK = 132, 228 * 1024, 1.6e9  # number, bytes each, Hz
EXPONENTIALS, INSTRUCTIONS = 16, 128  # per clock cycle and multiprocessor
# the compiled kernels
PER_LOGIT, PER_SLOPE = 4, 11  # instructions
FILL = 0.6e-6  # seconds until a tile's first operands arrive
START = 1e-6  # seconds to start a program: descriptors, barriers
# the host
GAP = 1e-6  # seconds between kernels
LAUNCH = 45e-6  # seconds to launch a library product and its summing kernel from Python
WAITS = 100e-6  # seconds for small kernels, and for checks of targets and overflow on the host

TILINGS = {
    "fused, 128 x 256": HOPPER,
    "fused, 256 x 128": HOPPER._replace(rows=256, columns=128),
    "fused, 128 x 128, two at a time": HOPPER._replace(columns=128, warps=4, stages=3),
}


def finish_time(durations: Iterable[float], workers: int) -> float:
    """Return the time at which the last job ends, if each goes to the first free worker."""
    free_at = [0.0] * workers
    for duration in durations:
        heapreplace(free_at, free_at[0] + duration)
    return max(free_at)


def tile_seconds(tiling: Tiling, hidden: int, l2: float, instructions: int) -> tuple[float, int]:
    """Return the seconds per tile, and the number of programs that fit on a multiprocessor."""
    logits, operands = tiling.rows * tiling.columns, 2 * (tiling.rows + tiling.columns)
    programs = SHARED // (operands * tiling.depth * tiling.stages + 1024)
    multiplying = 2 * logits * hidden / TENSOR * MULTIPROCESSORS
    loading = operands * hidden / l2 * MULTIPROCESSORS
    summing = logits * max(1 / EXPONENTIALS, instructions / INSTRUCTIONS) / CLOCK
    # bound by tensor cores, by the L2 cache, or by the latency of one program
    return max(programs * multiplying, programs * loading, multiplying + summing + FILL), programs


def fused_seconds(tokens: int, hidden: int, tiling: Tiling, l2: float) -> float:
    """Return the seconds of a fused forward pass."""
    tile, programs = tile_seconds(tiling, hidden, l2, PER_LOGIT)
    blocks = cdiv(tokens, tiling.rows)
    durations = (
        START + cdiv(min(tiling.part, VOCABULARY - start), tiling.columns) * tile
        for first in range(0, blocks, tiling.group)
        for start in range(0, VOCABULARY, tiling.part)
        for _ in range(min(tiling.group, blocks - first))
    )
    targets = 4 * tokens * hidden / HBM  # the targets' logits are computed first, memory-bound
    return WAITS + targets + finish_time(durations, programs * MULTIPROCESSORS)


def library_seconds(tokens: int, hidden: int, l2: float) -> float:
    """Return the seconds of a forward pass by products of the matrix library."""
    # each product is one round of tiles; its logits are written to the L2 cache and read from it
    rows, columns = PRODUCT_SHAPE
    tile = 2 * HOPPER.rows * HOPPER.columns * hidden / TENSOR * MULTIPROCESSORS
    device = START + FILL + tile + 2 * (4 * rows * columns / l2 + GAP)
    products: int = cdiv(tokens, rows) * cdiv(VOCABULARY, columns)
    return WAITS + products * max(device, LAUNCH)


def block_width(tokens: int, columns: int) -> int:
    """Return the columns of a block of slopes."""
    return columns * max(1, MAX_SLOPES // columns // tokens)


def backward_seconds(tokens: int, hidden: int, tiling: Tiling, l2: float) -> float:
    """Return the seconds of a backward pass."""
    tile, programs = tile_seconds(tiling, hidden, l2, PER_SLOPE)
    width, total = block_width(tokens, tiling.columns), WAITS
    for start in range(0, VOCABULARY, width):
        columns = min(width, VOCABULARY - start)
        tiles = cdiv(tokens, tiling.rows) * cdiv(columns, tiling.columns)
        slopes = finish_time([START + tile] * tiles, programs * MULTIPROCESSORS)
        products = 2 * (2 * tokens * hidden * columns) / TENSOR
        # hidden's gradient is read and written; weight's is written in fp32, scaled and cast
        gradients = (8 * tokens * hidden + (4 + 8 + 6) * columns * hidden) / HBM
        total += max(slopes, 2 * tokens * columns / HBM) + products + gradients + 5 * GAP
    return total


def forward_bytes(tokens: int, vocabulary: int, tiling: Tiling) -> int:
    """Return the bytes of the parts' sums, the total sums, and the unused buffer of maxima."""
    return 4 * tokens * (int(cdiv(vocabulary, tiling.part)) + 2)


def library_bytes(tokens: int) -> int:
    """Return the bytes of one product's logits, and of the sums."""
    return 4 * (PRODUCT_SHAPE[0] * PRODUCT_SHAPE[1] + tokens)


def backward_bytes(tokens: int, hidden: int, tiling: Tiling) -> int:
    """Return the bytes of hidden's fp32 gradient, and of the buffers of one block."""
    width = block_width(tokens, tiling.columns)
    # either two blocks of slopes, or one block and its part of the weight's gradient in fp32
    return 4 * tokens * hidden + width * max(4 * tokens, 2 * tokens + 4 * hidden)


def predictions(tokens: int, hidden: int) -> Iterator[tuple[str, list[float], int]]:
    """Yield each path's name, its ratio at each rate of the L2 cache, and its extra bytes."""
    bare = 2 * tokens * hidden * VOCABULARY / TENSOR
    for path, tiling in TILINGS.items():
        ratios = [fused_seconds(tokens, hidden, tiling, l2) / bare for l2 in L2_RATES]
        yield path, ratios, forward_bytes(tokens, VOCABULARY, tiling)
    ratios = [library_seconds(tokens, hidden, l2) / bare for l2 in L2_RATES]
    yield "library products", ratios, library_bytes(tokens)
    passes = fused_seconds, backward_seconds
    ratios = [sum(f(tokens, hidden, HOPPER, l2) for f in passes) / (3 * bare) for l2 in L2_RATES]
    yield "forward and backward", ratios, backward_bytes(tokens, hidden, HOPPER)


def main() -> None:
    rates = "".join(f"{f'{l2 / 1e12:g} TB/s':>10}" for l2 in L2_RATES)
    for tokens, hidden in SHAPES:
        print(f"{f'{tokens} x {hidden} x {VOCABULARY}':34}{rates}{'MB':>10}")
        rows = list(predictions(tokens, hidden))
        for path, ratios, extra in rows:
            print(f"{path:34}{''.join(f'{x:10.2f}' for x in ratios)}{extra / 1e6:10.1f}")
        targets = ((rows[0], FORWARD_TARGETS[hidden]), (rows[-1], BOTH_TARGET))
        for (path, ratios, _), target in targets:
            met = [l2 for l2, x in zip(L2_RATES, ratios, strict=True) if x <= target]
            print(f"{path} <= {target}: " + (f"from {met[0] / 1e12:g} TB/s" if met else "never"))
        print()
    print("Forward and backward compute logits twice: 4 products instead of 3, at least 1.33.")


if __name__ == "__main__":
    main()
