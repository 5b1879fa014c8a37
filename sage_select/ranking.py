"""Ranking: the candidates with the highest scores (Eq. 9)."""

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
        count: Number of candidates to keep, 0 to P.
        ids: [P], a stable id per candidate.
        key: Key of the hash that breaks ties, such as a seed and a step.

    Raises:
        ValueError: If a score is NaN, there is not one id per score, or `count` is not between 0
            and P.

    Example:
        >>> top(np.array([0.1, 0.9, 0.5]), 2, ids=[10, 11, 12]).tolist()
        [1, 2]
    """
    if not 0 <= count <= len(scores):
        raise ValueError(
            f"top: cannot keep {count} of {len(scores)} candidates; count must lie in "
            f"[0, {len(scores)}]"
        )
    id_array = np.asarray(ids)
    if id_array.shape != (len(scores),):
        raise ValueError(
            f"top: {len(scores)} scores need ids of shape [{len(scores)}], got "
            f"{list(id_array.shape)}"
        )
    for position in np.flatnonzero(np.isnan(scores))[:1]:
        raise ValueError(f"top: the score of pair {id_array[position]} is NaN; check its log-probs")
    if count == 0:
        return np.empty(0, dtype=np.int64)
    # sort only candidates at or above the cut; random numbers decide between those exactly at it
    cut = np.partition(scores, len(scores) - count)[len(scores) - count]
    candidates = np.flatnonzero(scores >= cut)
    random_numbers = keyed_hash(id_array[candidates], "tie", *key)
    return candidates[np.lexsort((random_numbers, -scores[candidates]))[:count]]
