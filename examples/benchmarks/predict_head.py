"""What the fused head should take on an H200 in bf16, from its tilings and the device's rates.

    python examples/benchmarks/predict_head.py

Needs no GPU: a run of `head.py` on one can be held against it. Times are in multiples of the bare
product; forward and backward, in multiples of three. Memory is beyond inputs and gradients.

A tile is multiplied and added up, and only then do loads of the next one begin; a second program on
the multiprocessor, if there is room, multiplies meanwhile. Programs go, in order, to whoever is
free. How fast the L2 cache feeds multiprocessors is the least known: microbenchmarks say 5.5 to
7 TB/s, Triton's published products on an H100 imply 8, neighbours that load the same may see more.
"""

from collections.abc import Iterable, Iterator
from heapq import heapreplace

from triton import cdiv

from sage_select.ops.fused import PRODUCT, SLOPES
from sage_select.ops.tilings import HOPPER, Tiling

VOCABULARY = 151_936
SHAPES = [(tokens, hidden) for tokens in (8192, 32_768) for hidden in (1536, 3584)]
FORWARD, WHOLE = {1536: 1.18, 3584: 1.12}, 1.25  # targets

# the device
TENSOR = 790e12  # FLOP/s of a large product, so of the bare one, under the limit of power
L2_RATES = (5.5e12, 7e12, 8e12, 10e12)  # bytes/s
HBM = 4.8e12  # bytes/s
MULTIPROCESSORS, SHARED, CLOCK = 132, 228 * 1024, 1.6e9
EXPONENTIALS, INSTRUCTIONS = 16, 128  # a clock and multiprocessor
# the kernels, as they are compiled
PER_LOGIT, PER_SLOPE = 4, 11  # instructions
FILL = 0.6e-6  # seconds until a tile's first operands are there
START = 1e-6  # of a program: descriptors, barriers
# the host
GAP = 1e-6  # between kernels
LAUNCH = 45e-6  # of a library product and its fold, from Python
WAITS = 100e-6  # small kernels, and answers about targets and overflow that are waited for

TILINGS = {
    "fused, 128 x 256": HOPPER,
    "fused, 256 x 128": HOPPER._replace(rows=256, columns=128),
    "fused, 128 x 128, two at a time": HOPPER._replace(columns=128, warps=4, stages=3),
}


def dealt(durations: Iterable[float], workers: int) -> float:
    """When the last is done, if each goes to the first that is free."""
    free = [0.0] * workers
    for duration in durations:
        heapreplace(free, free[0] + duration)
    return max(free)


def tile_seconds(tiling: Tiling, hidden: int, l2: float, instructions: int) -> tuple[float, int]:
    """Of a tile, and how many programs a multiprocessor holds."""
    logits, operands = tiling.rows * tiling.columns, 2 * (tiling.rows + tiling.columns)
    programs = SHARED // (operands * tiling.depth * tiling.stages + 1024)
    multiplied = 2 * logits * hidden / TENSOR * MULTIPROCESSORS
    loaded = operands * hidden / l2 * MULTIPROCESSORS
    added = logits * max(1 / EXPONENTIALS, instructions / INSTRUCTIONS) / CLOCK
    return max(programs * multiplied, programs * loaded, multiplied + added + FILL), programs


def fused_seconds(tokens: int, hidden: int, tiling: Tiling, l2: float) -> float:
    tile, programs = tile_seconds(tiling, hidden, l2, PER_LOGIT)
    blocks = cdiv(tokens, tiling.rows)
    order = (
        START + cdiv(min(tiling.part, VOCABULARY - start), tiling.columns) * tile
        for first in range(0, blocks, tiling.group)
        for start in range(0, VOCABULARY, tiling.part)
        for _ in range(min(tiling.group, blocks - first))
    )
    targets = 4 * tokens * hidden / HBM  # their logits are made before
    return WAITS + targets + dealt(order, programs * MULTIPROCESSORS)


def library_seconds(tokens: int, hidden: int, l2: float) -> float:
    """Each product is one round of tiles; its logits are written to the L2 cache and read there."""
    rows, columns = PRODUCT
    tile = 2 * HOPPER.rows * HOPPER.columns * hidden / TENSOR * MULTIPROCESSORS
    device = START + FILL + tile + 2 * (4 * rows * columns / l2 + GAP)
    products: int = cdiv(tokens, rows) * cdiv(VOCABULARY, columns)
    return WAITS + products * max(device, LAUNCH)


def width_of_a_block(tokens: int, columns: int) -> int:
    return columns * max(1, SLOPES // columns // tokens)


def backward_seconds(tokens: int, hidden: int, tiling: Tiling, l2: float) -> float:
    tile, programs = tile_seconds(tiling, hidden, l2, PER_SLOPE)
    width, total = width_of_a_block(tokens, tiling.columns), WAITS
    for start in range(0, VOCABULARY, width):
        columns = min(width, VOCABULARY - start)
        tiles = cdiv(tokens, tiling.rows) * cdiv(columns, tiling.columns)
        slopes = dealt([START + tile] * tiles, programs * MULTIPROCESSORS)
        products = 2 * (2 * tokens * hidden * columns) / TENSOR
        # hidden's gradient is read and written; weight's is written in fp32, scaled, and cast
        gradients = (8 * tokens * hidden + (4 + 8 + 6) * columns * hidden) / HBM
        total += max(slopes, 2 * tokens * columns / HBM) + products + gradients + 5 * GAP
    return total


def forward_bytes(tokens: int, vocabulary: int, tiling: Tiling) -> int:
    """Sums of the parts, and of the whole; the kernel that adds them has room for maxima."""
    return 4 * tokens * (int(cdiv(vocabulary, tiling.part)) + 2)


def library_bytes(tokens: int) -> int:
    """The logits of a product, and the sums."""
    return 4 * (PRODUCT[0] * PRODUCT[1] + tokens)


def backward_bytes(tokens: int, hidden: int, tiling: Tiling) -> int:
    """Hidden's gradient in fp32; two blocks of slopes, or one and its weight's gradient in fp32."""
    width = width_of_a_block(tokens, tiling.columns)
    return 4 * tokens * hidden + width * max(4 * tokens, 2 * tokens + 4 * hidden)


def predictions(tokens: int, hidden: int) -> Iterator[tuple[str, list[float], int]]:
    """Paths, their ratios at each rate of the L2 cache, and their extra bytes."""
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
        found = list(predictions(tokens, hidden))
        for path, ratios, extra in found:
            print(f"{path:34}{''.join(f'{x:10.2f}' for x in ratios)}{extra / 1e6:10.1f}")
        for (path, ratios, _), most in ((found[0], FORWARD[hidden]), (found[-1], WHOLE)):
            met = [l2 for l2, x in zip(L2_RATES, ratios, strict=True) if x <= most]
            print(f"{path} <= {most}: " + (f"from {met[0] / 1e12:g} TB/s" if met else "never"))
        print()
    print("Forward and backward make logits twice: four products for three, at least 1.33.")


if __name__ == "__main__":
    main()
