"""Micro-batches: the part of a batch that one process trains on in one pass."""

from typing import NamedTuple

import numpy as np

from sage_select.arrays import Float64Array, Int64Array
from sage_select.system.processes import Processes


class MicroBatch(NamedTuple):
    """The pairs of one forward and backward pass in one process; never empty.

    Attributes:
        rows: int64 [P], dataset rows.
        share: Factor on each pair's loss when losses are summed and gradients are averaged over
            processes, so that the update follows the mean over the whole batch. 0 if the process
            has no pairs left; it still makes the pass, on any pair, so that collectives match.
        mean_share: Weight of the pass's mean loss for a host that averages over passes: 1 for a
            full pass, 0 if `share` is 0.
        weights: float64 [P], a factor on each pair's loss, or None to weigh all pairs equally.
    """

    rows: Int64Array
    share: float
    mean_share: float
    weights: Float64Array | None = None


def dealt(
    batch: Int64Array,
    processes: Processes,
    micro_batch_size: int,
    *,
    passes: int = 0,
    weights: Float64Array | None = None,
) -> list[MicroBatch]:
    """Deal a batch to processes, and return this rank's micro-batches: equally many on all ranks.

    Args:
        batch: int64 [B], the rows of one optimizer step over all processes.
        processes: The processes that train together.
        micro_batch_size: Maximum number of pairs per process and pass.
        passes: At least this many micro-batches, for a host with a fixed number of passes.
        weights: float64 [B], a factor on each pair's loss.

    Example:
        >>> [micro.rows.tolist() for micro in dealt(np.arange(7), Processes(), 4)]
        [[0, 1, 2, 3], [4, 5, 6]]
    """
    positions = np.arange(len(batch))[processes.rank :: processes.size]
    # Count passes from the largest share, not from this rank's: every pass has collectives, so all
    # ranks must make the same number.
    largest = -(-len(batch) // processes.size)
    count = max(-(-largest // micro_batch_size), passes)
    parts = [positions[i * micro_batch_size : (i + 1) * micro_batch_size] for i in range(count)]
    return [
        MicroBatch(
            batch[part],
            share=processes.size / len(batch),
            mean_share=len(part) * count * processes.size / len(batch),
            weights=None if weights is None else weights[part],
        )
        if len(part)
        else MicroBatch(batch[:1], 0.0, 0.0)
        for part in parts
    ]
