"""Triton kernels of the output head. N tokens, H hidden, V vocabulary, S parts of the vocabulary.

A program owns a block of rows and walks over columns in a fixed order. Programs add nothing to each
other's results, so the bits of a row depend neither on the rows beside it nor on the schedule.
Exponentials are powers of two, which is what the hardware has.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # of fp32


@triton.jit
def _place(blocks_of_rows, across, GROUP: tl.constexpr):
    """This program's block of rows, and its place across the vocabulary.

    Programs that run at the same time share GROUP blocks of rows and a few places: operands that
    the L2 cache holds.
    """
    program = tl.program_id(0)
    first = program // (GROUP * across) * GROUP
    inside = program % (GROUP * across)
    height = min(blocks_of_rows - first, GROUP)
    return first + inside % height, inside // height


@triton.jit
def _capped(logits, softcap):
    """softcap tanh(z / softcap), by an exponential that ends at 0 or infinity as tanh at -+1.

    Near 0 that would cancel, and a series is exact.
    """
    x = logits / softcap
    y = x * x
    series = x + x * y * (-1 / 3 + y * (2 / 15 + y * (-17 / 315 + y * (62 / 2835))))
    ends = 1 - 2 / (1 + tl.exp2(x * (2 * LOG2_E)))
    return softcap * tl.where(y < 0.0625, series, ends)


@triton.jit
def _logits(
    hidden,
    weight,
    bias_V,
    rows,
    columns,
    first_row,
    first_column,
    H,
    hidden_stride,
    weight_stride,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    EVEN: tl.constexpr,
    INTERPRETED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """[ROWS, COLUMNS] in fp32, of these rows and columns, before the temperature.

    `hidden` and `weight` are pointers, or descriptors for the tensor memory accelerator, which
    takes all from the first row and the first column on. EVEN says that H is a multiple of DEPTH.
    INTERPRETED multiplies in fp64 in Triton's interpreter: there, `tl.dot` would multiply the bit
    patterns of bf16, and on some processors numpy rounds a row differently at another place.
    """
    if not DESCRIPTORS:
        depth = tl.arange(0, DEPTH)
        left_at = hidden + rows.to(tl.int64)[:, None] * hidden_stride + depth[None, :]
        right_at = weight + columns.to(tl.int64)[None, :] * weight_stride + depth[:, None]
    logits = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, H, DEPTH):
        if DESCRIPTORS:
            left = hidden.load([first_row, start])
            right = weight.load([first_column, start]).T
        elif EVEN:
            left = tl.load(left_at + start)
            right = tl.load(right_at + start)
        else:
            left = tl.load(left_at + start, mask=depth[None, :] < H - start, other=0.0)
            right = tl.load(right_at + start, mask=depth[:, None] < H - start, other=0.0)
        if INTERPRETED:
            logits += tl.dot(left.to(tl.float64), right.to(tl.float64)).to(tl.float32)
        else:
            logits = tl.dot(left, right, logits, input_precision="ieee")
    if HAS_BIAS:
        logits += tl.load(bias_V + columns).to(tl.float32)[None, :]
    if HAS_SOFTCAP:
        logits = _capped(logits, softcap)
    return logits


@triton.jit
def _tile(
    hidden,
    weight,
    bias_V,
    first_row,
    first_column,
    N,
    V,
    H,
    hidden_stride,
    weight_stride,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    EVEN: tl.constexpr,
    INTERPRETED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """[ROWS, COLUMNS] from the first row and column on; -inf behind the end of the vocabulary."""
    rows = first_row + tl.arange(0, ROWS)
    columns = first_column + tl.arange(0, COLUMNS)
    logits = _logits(
        hidden, weight, bias_V, tl.minimum(rows, N - 1), tl.minimum(columns, V - 1), first_row,
        first_column, H, hidden_stride, weight_stride, softcap, HAS_BIAS, HAS_SOFTCAP, DESCRIPTORS,
        EVEN, INTERPRETED, ROWS, COLUMNS, DEPTH,
    )  # fmt: skip
    if first_column + COLUMNS > V:
        logits = tl.where((columns < V)[None, :], logits, float("-inf"))
    return logits


@triton.jit(do_not_specialize=["N"])
def sum_exp_kernel(
    hidden,
    weight,
    bias_V,
    anchor_N,
    maximum_SN,
    sum_SN,
    N,
    V,
    H,
    hidden_stride,
    weight_stride,
    softcap,
    inverse_temperature,
    ANCHORED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    EVEN: tl.constexpr,
    INTERPRETED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    PART: tl.constexpr,
    GROUP: tl.constexpr,
):
    """sum_j exp(z_j - anchor) over each part of the vocabulary; or around the part's own maximum,
    which is then kept, too.
    """
    block, part = _place(tl.cdiv(N, ROWS), tl.cdiv(V, PART), GROUP)
    rows = block * ROWS + tl.arange(0, ROWS)
    known = rows < N
    scale = inverse_temperature * LOG2_E
    if ANCHORED:
        anchor = tl.load(anchor_N + rows, mask=known, other=0.0) * LOG2_E
    else:
        anchor = tl.full((ROWS,), LOWEST, dtype=tl.float32)
    total = tl.zeros((ROWS,), dtype=tl.float32)
    for first in range(part * PART, min((part + 1) * PART, V), COLUMNS):
        logits = _tile(
            hidden, weight, bias_V, block * ROWS, first, N, V, H, hidden_stride, weight_stride,
            softcap, HAS_BIAS, HAS_SOFTCAP, DESCRIPTORS, EVEN, INTERPRETED, ROWS, COLUMNS, DEPTH,
        )  # fmt: skip
        if not ANCHORED:
            before = anchor
            anchor = tl.maximum(anchor, tl.max(logits, axis=1) * scale)
            total *= tl.exp2(before - anchor)
        total += tl.sum(tl.exp2(tl.fma(logits, scale, -anchor[:, None])), axis=1)
    place = part.to(tl.int64) * N + rows
    tl.store(sum_SN + place, total, mask=known)
    if not ANCHORED:
        tl.store(maximum_SN + place, anchor / LOG2_E, mask=known)


@triton.jit(do_not_specialize=["N", "S"])
def fold_kernel(
    anchor_N,
    maximum_SN,
    sum_SN,
    maximum_N,
    sum_N,
    N,
    S,
    ANCHORED: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The sums of all parts as one, added in their order."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    known = rows < N
    total = tl.zeros((ROWS,), dtype=tl.float32)
    maximum = tl.full((ROWS,), LOWEST, dtype=tl.float32)
    for part in range(0, S):
        place = tl.cast(part, tl.int64) * N + rows
        some = tl.load(sum_SN + place, mask=known, other=0.0)
        if not ANCHORED:
            before = maximum
            top = tl.load(maximum_SN + place, mask=known, other=0.0)
            maximum = tl.maximum(maximum, top)
            total *= tl.exp2((before - maximum) * LOG2_E)
            some *= tl.exp2((top - maximum) * LOG2_E)
        total += some
    if ANCHORED:  # in units of log 2 the anchor was rounded, by the same for all terms
        anchor = tl.load(anchor_N + rows, mask=known, other=0.0)
        total *= tl.exp2(-tl.fma(anchor, LOG2_E, -(anchor * LOG2_E)))
    tl.store(sum_N + rows, total, mask=known)
    if not ANCHORED:
        tl.store(maximum_N + rows, maximum, mask=known)


@triton.jit(do_not_specialize=["N"])
def target_logits_kernel(
    hidden,
    weight,
    bias_V,
    target_N,
    logit_N,
    N,
    V,
    H,
    hidden_stride,
    weight_stride,
    softcap,
    inverse_temperature,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    EVEN: tl.constexpr,
    INTERPRETED: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """z_t of each row, and 0 where the target is no row of the weight.

    The diagonal of the rows' products with all of the rows' targets. One dot product a row would be
    less work, but tensor cores cut off where a dot product rounds: what z_t is compared with has an
    error of the same sign in every term, and this has the same.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    known = rows < N
    target = tl.load(target_N + rows, mask=known, other=-1)
    here = (target >= 0) & (target < V)
    logits = _logits(
        hidden, weight, bias_V, tl.minimum(rows, N - 1), tl.where(here, target, 0), 0, 0, H,
        hidden_stride, weight_stride, softcap, HAS_BIAS, HAS_SOFTCAP, False, EVEN,
        INTERPRETED, ROWS, ROWS, DEPTH,
    )  # fmt: skip
    place = tl.arange(0, ROWS)
    own = place[:, None] == place[None, :]
    logit = tl.sum(tl.where(own, logits, 0.0), axis=1) * inverse_temperature
    tl.store(logit_N + rows, tl.where(here, logit, 0.0), mask=known)


@triton.jit(do_not_specialize=["N"])
def slope_kernel(
    hidden,
    weight,
    bias_V,
    target_N,
    grad_N,
    logsumexp_N,
    slope_NB,
    N,
    V,
    H,
    hidden_stride,
    weight_stride,
    slope_stride,
    softcap,
    inverse_temperature,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    EVEN: tl.constexpr,
    INTERPRETED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    """grad_i (1[j = target_i] - p_ij) times the slope of softcap and temperature, of a block of the
    vocabulary whose logits are computed again.
    """
    block, tile = _place(tl.cdiv(N, ROWS), tl.cdiv(V, COLUMNS), GROUP)
    rows = block * ROWS + tl.arange(0, ROWS)
    columns = tile * COLUMNS + tl.arange(0, COLUMNS)
    known = rows < N
    logits = _tile(
        hidden, weight, bias_V, block * ROWS, tile * COLUMNS, N, V, H, hidden_stride, weight_stride,
        softcap, HAS_BIAS, HAS_SOFTCAP, DESCRIPTORS, EVEN, INTERPRETED, ROWS, COLUMNS, DEPTH,
    )  # fmt: skip
    target = tl.load(target_N + rows, mask=known, other=-1).to(tl.int32)
    grad = tl.load(grad_N + rows, mask=known, other=0.0) * inverse_temperature
    logsumexp = tl.load(logsumexp_N + rows, mask=known, other=0.0) * LOG2_E
    scale = inverse_temperature * LOG2_E
    slope = tl.exp2(tl.fma(logits, scale, -logsumexp[:, None])) * -grad[:, None]
    slope += tl.where(target[:, None] == columns[None, :], grad[:, None], 0.0)
    if HAS_SOFTCAP:
        share = logits * (1 / softcap)
        slope *= 1 - share * share
    corner = slope_NB + (block * ROWS).to(tl.int64) * slope_stride + tile * COLUMNS
    at = tl.arange(0, ROWS)[:, None] * slope_stride + tl.arange(0, COLUMNS)[None, :]
    slope = slope.to(slope_NB.dtype.element_ty)
    tl.store(corner + at, slope, mask=known[:, None] & (columns < V)[None, :])


@triton.jit
def tile_kernel(
    logits_NB,
    bias_V,
    anchor_N,
    sum_N,
    V,
    softcap,
    inverse_temperature,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Adds sum_j exp(z_j - anchor) over logits that exist already, [rows, V]; a row a program."""
    row = tl.program_id(0)
    anchor = tl.load(anchor_N + row)
    total = tl.zeros((COLUMNS,), dtype=tl.float32)
    for first in range(0, V, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        inside = columns < V
        logits = tl.load(logits_NB + row * V + columns, mask=inside, other=0.0)
        if HAS_BIAS:
            logits += tl.load(bias_V + columns, mask=inside, other=0.0).to(tl.float32)
        if HAS_SOFTCAP:
            logits = _capped(logits, softcap)
        above = tl.fma(logits, inverse_temperature, -anchor)
        total += tl.where(inside, tl.exp2(above * LOG2_E), 0.0)
    tl.store(sum_N + row, tl.load(sum_N + row) + tl.sum(total, axis=0))
