"""The cut: which candidates stand above it (Eq. 9)."""

import numpy as np
import numpy.typing as npt

from sage_select.arrays import Float64Array, Int64Array
from sage_select.hashing import keyed_hash


def top(
    scores: Float64Array, count: int, *, ids: npt.ArrayLike, key: tuple[int | str, ...] = ()
) -> Int64Array:
    """Positions of the `count` highest scores, best first: rank(s_i) <= gamma_k |P_k|  (Eq. 9).

    Equal scores are ordered by a keyed hash of their ids, so that the kept set depends neither on
    the order of the rows nor on a generator's state.

    Args:
        scores: float64 [P].
        count: How many to keep, 0 to P.
        ids: [P], a stable id per candidate.
        key: Key of the hash that breaks ties, such as a seed and a step.

    Raises:
        ValueError: If a score is NaN, or the count does not fit.

    Example:
        >>> top(np.array([0.1, 0.9, 0.5]), 2, ids=[10, 11, 12]).tolist()
        [1, 2]
    """
    if not 0 <= count <= len(scores):
        raise ValueError(f"top: cannot keep {count} of {len(scores)} candidates")
    names = np.asarray(ids)
    for position in np.flatnonzero(np.isnan(scores))[:1]:
        raise ValueError(f"top: the score of pair {names[position]} is NaN; check its log-probs")
    if count == 0:
        return np.empty(0, dtype=np.int64)
    # only candidates at or above the cut need to be sorted
    cut = np.partition(scores, len(scores) - count)[len(scores) - count]
    candidates = np.flatnonzero(scores >= cut)
    lots = keyed_hash(names[candidates], "tie", *key)
    return candidates[np.lexsort((lots, -scores[candidates]))[:count]]
