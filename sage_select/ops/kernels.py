"""Triton kernels of the output head. N tokens, H hidden, V vocabulary, S parts of the vocabulary.

Each program handles a block of rows and visits its columns in a fixed order. No program adds to
another one's result, so the bits of a row depend neither on the other rows nor on the schedule.
Exponentials are computed as powers of two, since that is the hardware's instruction.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # lowest finite fp32; -inf - -inf would be NaN


@triton.jit
def _position(row_blocks, vocabulary_blocks, GROUP: tl.constexpr):
    """This program's block of rows and its block of the vocabulary.

    Programs that run at the same time share GROUP blocks of rows and a few blocks of the
    vocabulary, so that their operands stay in the L2 cache.
    """
    program = tl.program_id(0)
    first = program // (GROUP * vocabulary_blocks) * GROUP
    inside = program % (GROUP * vocabulary_blocks)
    height = min(row_blocks - first, GROUP)
    return first + inside % height, inside // height


@triton.jit
def _capped(logits, softcap):
    """softcap tanh(z / softcap), with tanh x = 1 - 2 / (1 + exp(2 x)) and a series near 0.

    The exponential may underflow to 0 or overflow to infinity: tanh is then -1 or 1, as it should.
    Near 0 the subtraction would cancel, while the series is accurate.
    """
    x = logits / softcap
    y = x * x
    series = x + x * y * (-1 / 3 + y * (2 / 15 + y * (-17 / 315 + y * (62 / 2835))))
    by_exponential = 1 - 2 / (1 + tl.exp2(x * (2 * LOG2_E)))
    return softcap * tl.where(y < 0.0625, series, by_exponential)


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
    """Logits of the given rows and columns, [ROWS, COLUMNS] in fp32, before the temperature.

    `hidden` and `weight` are pointers, or descriptors for the tensor memory accelerator, which
    loads contiguous tiles from `first_row` and `first_column`. EVEN: H is a multiple of DEPTH.
    INTERPRETED: Triton's interpreter runs this, and products are in fp64. There, `tl.dot` would
    multiply the bit patterns of bf16, and on some processors numpy rounds a row differently at
    another position in the tile.
    """
    if not DESCRIPTORS:
        # 64-bit offsets: a weight may have more than 2^31 entries
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
            # "ieee" keeps fp32 factors whole, where TF32 would round them to 10 bits
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
    """Logits [ROWS, COLUMNS] from the first row and column; -inf beyond the vocabulary's end."""
    rows = first_row + tl.arange(0, ROWS)
    # indices beyond the end are clamped, so that loads need no mask for rows and columns
    columns = first_column + tl.arange(0, COLUMNS)
    logits = _logits(
        hidden, weight, bias_V, tl.minimum(rows, N - 1), tl.minimum(columns, V - 1), first_row,
        first_column, H, hidden_stride, weight_stride, softcap, HAS_BIAS, HAS_SOFTCAP, DESCRIPTORS,
        EVEN, INTERPRETED, ROWS, COLUMNS, DEPTH,
    )  # fmt: skip
    if first_column + COLUMNS > V:  # only the last tile pays for a selection per logit
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
    """Store sum_j exp(z_j - anchor) over one part of the vocabulary. Without an anchor, the sum is
    taken around the part's maximum, which is then stored as well.
    """
    block, part = _position(tl.cdiv(N, ROWS), tl.cdiv(V, PART), GROUP)
    rows = block * ROWS + tl.arange(0, ROWS)
    valid = rows < N
    scale = inverse_temperature * LOG2_E
    if ANCHORED:
        anchor = tl.load(anchor_N + rows, mask=valid, other=0.0) * LOG2_E
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
        # one fused multiply-add, one exponential and one addition per logit
        total += tl.sum(tl.exp2(tl.fma(logits, scale, -anchor[:, None])), axis=1)
    offset = part.to(tl.int64) * N + rows
    tl.store(sum_SN + offset, total, mask=valid)
    if not ANCHORED:
        tl.store(maximum_SN + offset, anchor / LOG2_E, mask=valid)


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
    """Add the sums of all parts, in the order of the parts."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = rows < N
    total = tl.zeros((ROWS,), dtype=tl.float32)
    maximum = tl.full((ROWS,), LOWEST, dtype=tl.float32)
    for part in range(0, S):
        offset = tl.cast(part, tl.int64) * N + rows
        part_sum = tl.load(sum_SN + offset, mask=valid, other=0.0)
        if not ANCHORED:
            before = maximum
            part_maximum = tl.load(maximum_SN + offset, mask=valid, other=0.0)
            maximum = tl.maximum(maximum, part_maximum)
            total *= tl.exp2((before - maximum) * LOG2_E)
            part_sum *= tl.exp2((part_maximum - maximum) * LOG2_E)
        total += part_sum
    if ANCHORED:
        # anchor * LOG2_E was rounded, by the same amount for all terms; fma recovers that amount
        anchor = tl.load(anchor_N + rows, mask=valid, other=0.0)
        total *= tl.exp2(-tl.fma(anchor, LOG2_E, -(anchor * LOG2_E)))
    tl.store(sum_N + rows, total, mask=valid)
    if not ANCHORED:
        tl.store(maximum_N + rows, maximum, mask=valid)


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
    """Store z_t of each row; 0 if the target is not a row of the weight.

    z_t is on the diagonal of the product of ROWS rows with their ROWS targets. One dot product per
    row would be less work, but would not have the error of the tensor cores, which truncate instead
    of rounding: every logit in the sum is off in the same direction, and z_t must be off equally.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = rows < N
    target = tl.load(target_N + rows, mask=valid, other=-1)
    in_shard = (target >= 0) & (target < V)
    logits = _logits(
        hidden, weight, bias_V, tl.minimum(rows, N - 1), tl.where(in_shard, target, 0), 0, 0, H,
        hidden_stride, weight_stride, softcap, HAS_BIAS, HAS_SOFTCAP, False, EVEN,
        INTERPRETED, ROWS, ROWS, DEPTH,
    )  # fmt: skip
    index = tl.arange(0, ROWS)
    diagonal = index[:, None] == index[None, :]
    logit = tl.sum(tl.where(diagonal, logits, 0.0), axis=1) * inverse_temperature
    tl.store(logit_N + rows, tl.where(in_shard, logit, 0.0), mask=valid)


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
    """Store grad_i (1[j = target_i] - p_ij) times the derivative of softcap and temperature, for a
    block of the vocabulary whose logits are recomputed.
    """
    block, tile = _position(tl.cdiv(N, ROWS), tl.cdiv(V, COLUMNS), GROUP)
    rows = block * ROWS + tl.arange(0, ROWS)
    columns = tile * COLUMNS + tl.arange(0, COLUMNS)
    valid = rows < N
    logits = _tile(
        hidden, weight, bias_V, block * ROWS, tile * COLUMNS, N, V, H, hidden_stride, weight_stride,
        softcap, HAS_BIAS, HAS_SOFTCAP, DESCRIPTORS, EVEN, INTERPRETED, ROWS, COLUMNS, DEPTH,
    )  # fmt: skip
    target = tl.load(target_N + rows, mask=valid, other=-1).to(tl.int32)
    grad = tl.load(grad_N + rows, mask=valid, other=0.0) * inverse_temperature
    logsumexp = tl.load(logsumexp_N + rows, mask=valid, other=0.0) * LOG2_E
    scale = inverse_temperature * LOG2_E
    slope = tl.exp2(tl.fma(logits, scale, -logsumexp[:, None])) * -grad[:, None]
    slope += tl.where(target[:, None] == columns[None, :], grad[:, None], 0.0)
    if HAS_SOFTCAP:
        tanh = logits * (1 / softcap)
        slope *= 1 - tanh * tanh
    # only the corner's offset needs 64 bits; 32-bit offsets within the tile avoid register spills
    corner = slope_NB + (block * ROWS).to(tl.int64) * slope_stride + tile * COLUMNS
    offsets = tl.arange(0, ROWS)[:, None] * slope_stride + tl.arange(0, COLUMNS)[None, :]
    slope = slope.to(slope_NB.dtype.element_ty)
    tl.store(corner + offsets, slope, mask=valid[:, None] & (columns < V)[None, :])


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
    """Add sum_j exp(z_j - anchor) over stored logits [rows, V] to the sums; one program per row."""
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
        difference = tl.fma(logits, inverse_temperature, -anchor)
        total += tl.where(inside, tl.exp2(difference * LOG2_E), 0.0)
    tl.store(sum_N + row, tl.load(sum_N + row) + tl.sum(total, axis=0))
