"""Difficulty strata, from a judge's two labels or from any number that orders pairs."""

from collections.abc import Sequence
from warnings import warn

import numpy as np
import numpy.typing as npt

from sage_select.arrays import Int64Array
from sage_select.hashing import keyed_hash

STRATA = ("easy", "medium", "hard")


TIED_SHARE = 0.1  # of the pairs, with one value on both sides of a cut, before that is pointed out


def strata_from_judgments(clarity: npt.ArrayLike, rejected_score: npt.ArrayLike) -> Int64Array:
    """Difficulty strata from a judge's two labels (section 3.2).

    easy: clarity high and score <= 2; medium: clarity medium and score 2 or 3; hard: the rest.

    Args:
        clarity: [N], how clearly the chosen response is preferred: high, medium or low, any case.
        rejected_score: [N], quality of the rejected response, a whole number from 1 to 5.

    Returns:
        int64 [N]: 0 easy, 1 medium, 2 hard.

    Raises:
        ValueError: If a pair is not judged, or a label is none of these.

    Example:
        >>> strata_from_judgments(["High", "medium", "low"], [1, 3, 2]).tolist()
        [0, 1, 2]
    """
    given = np.asarray(clarity, dtype=object)
    labels = np.array([str(label).strip().lower() for label in given], dtype=np.str_)
    quality = np.asarray(rejected_score, dtype=np.float64)
    if labels.shape != quality.shape:
        raise ValueError(
            f"strata_from_judgments: {len(labels)} clarity labels but {quality.size} scores"
        )
    for row in np.flatnonzero(~np.isin(labels, ["high", "medium", "low"]))[:1]:
        raise ValueError(
            f"strata_from_judgments: clarity of row {row} is {given[row]!r}, not high, medium or "
            "low; judge the pair, or drop it before planning"
        )
    for row in np.flatnonzero(~np.isin(quality, [1, 2, 3, 4, 5]))[:1]:
        raise ValueError(
            f"strata_from_judgments: rejected_score of row {row} is {quality[row]}, not a whole "
            "number from 1 to 5; judge the pair, or drop it before planning"
        )
    easy = (labels == "high") & (quality <= 2)
    medium = (labels == "medium") & ((quality == 2) | (quality == 3))
    return np.select([easy, medium], [0, 1], default=2).astype(np.int64)


def strata_from_values(
    values: npt.ArrayLike,
    shares: Sequence[float] = (0.65, 0.25, 0.10),
    *,
    ids: npt.ArrayLike | None = None,
    seed: int = 0,
) -> Int64Array:
    """Strata from any number that is higher for easier pairs, cut at shares of the data.

    For pairs that no judge has labelled: a reward margin, a rating difference, an agreement rate.

    Args:
        values: [N], higher is easier.
        shares: One share of the pairs per stratum, the easiest first; they sum to 1.
        ids: [N], stable ids; a keyed hash of them decides between equal values at a cut.
        seed: Key of that hash.

    Returns:
        int64 [N]: 0 is the easiest stratum.

    Raises:
        ValueError: If a value is missing, or the shares do not sum to 1.

    Example:
        >>> strata_from_values([0.9, 0.1, 0.5, 0.7], shares=(0.5, 0.5)).tolist()
        [0, 1, 1, 0]
    """
    given = np.asarray(values)
    try:
        easiness = given.astype(np.float64)
    except (TypeError, ValueError):
        for row, value in enumerate(given.tolist()):
            if value is not None and not isinstance(value, int | float):
                raise ValueError(
                    f"strata_from_values: the value of row {row} is {value!r}, not a number"
                ) from None
        raise
    for row in np.flatnonzero(np.isnan(easiness))[:1]:
        raise ValueError(f"strata_from_values: the value of row {row} is missing")
    if not (min(shares) >= 0 and abs(sum(shares) - 1) <= 1e-6):  # NaN fails both
        raise ValueError(f"strata_from_values: shares must be >= 0 and sum to 1, got {shares}")
    names = np.arange(len(easiness)) if ids is None else np.asarray(ids)
    order = np.lexsort((keyed_hash(names, "strata", seed), -easiness))
    cuts = np.rint(np.cumsum(shares)[:-1] * len(easiness))
    strata = np.empty(len(easiness), dtype=np.int64)
    strata[order] = np.searchsorted(cuts, np.arange(len(easiness)), side="right")
    ordered = easiness[order]
    for cut in (int(cut) for cut in cuts if 0 < cut < len(ordered)):
        alike = int((ordered == ordered[cut]).sum()) if ordered[cut - 1] == ordered[cut] else 0
        if alike > TIED_SHARE * len(ordered):
            warn(
                f"strata_from_values: {alike} of {len(ordered)} pairs have the value "
                f"{ordered[cut]:g} and stand on both sides of a cut, where a hash parts them; move "
                "the shares to where values change, or take a finer value",
                stacklevel=2,
            )
    return strata
