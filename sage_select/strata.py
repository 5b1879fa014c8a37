"""Difficulty strata, from a judge's two labels or from any numbers that order the pairs."""

from collections.abc import Sequence
from warnings import warn

import numpy as np
import numpy.typing as npt

from sage_select.arguments import fraction, seed_number, shown
from sage_select.arrays import Int64Array
from sage_select.hashing import keyed_hash

STRATA = ("easy", "medium", "hard")


# warn if more than this share of the pairs has one value on both sides of a cut
TIED_SHARE = 0.1


def strata_from_judgments(clarity: npt.ArrayLike, rejected_score: npt.ArrayLike) -> Int64Array:
    """Difficulty strata from a judge's two labels (section 3.2).

    easy: clarity high and score <= 2; medium: clarity medium and score 2 or 3; hard: the rest.

    Args:
        clarity: [N], how clearly the chosen response is preferred: high, medium or low, any case.
        rejected_score: [N], quality of the rejected response, a whole number from 1 to 5.

    Returns:
        int64 [N]: 0 easy, 1 medium, 2 hard.

    Raises:
        ValueError: If a pair is not judged, or a label is not one of these.

    Example:
        >>> strata_from_judgments(["High", "medium", "low"], [1, 3, 2]).tolist()
        [0, 1, 2]
    """
    raw_labels = np.asarray(clarity, dtype=object)  # as given, for the error message
    labels = np.array([str(label).strip().lower() for label in raw_labels], dtype=np.str_)
    quality = np.asarray(rejected_score, dtype=np.float64)
    if labels.shape != quality.shape:
        raise ValueError(
            f"strata_from_judgments: {len(labels)} clarity labels but {quality.size} scores"
        )
    for row in np.flatnonzero(~np.isin(labels, ["high", "medium", "low"]))[:1]:
        raise ValueError(
            f"strata_from_judgments: clarity of row {row} is {raw_labels[row]!r}, not high, medium "
            "or low; label the pair, or drop it before planning"
        )
    for row in np.flatnonzero(~np.isin(quality, [1, 2, 3, 4, 5]))[:1]:
        raise ValueError(
            f"strata_from_judgments: rejected_score of row {row} is {quality[row]}, not a whole "
            "number from 1 to 5; label the pair, or drop it before planning"
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
    """Difficulty strata from any numbers that are higher for easier pairs, cut by shares.

    For pairs without a judge's labels: a reward margin, a rating difference or an agreement rate.

    Args:
        values: [N], higher is easier.
        shares: One share of the pairs per stratum, the easiest first; they sum to 1.
        ids: [N], stable ids; a keyed hash of them orders equal values at a cut.
        seed: Key of that hash.

    Returns:
        int64 [N]: 0 is the easiest stratum.

    Raises:
        ValueError: If a value is missing or not a number, or the shares do not sum to 1.

    Example:
        >>> strata_from_values([0.9, 0.1, 0.5, 0.7], shares=(0.5, 0.5)).tolist()
        [0, 1, 1, 0]
    """
    seed = seed_number(seed, "strata_from_values: seed")
    given = list(shares) if np.iterable(shares) else []
    if not given:
        raise TypeError(
            "strata_from_values: shares must be a sequence with one share per stratum, such as "
            f"(0.5, 0.5), got {shown(shares)}"
        )
    shares = [fraction(share, "strata_from_values: a share") for share in given]
    raw_values = np.asarray(values)
    if raw_values.ndim != 1:
        raise ValueError(f"strata_from_values: values must be [N], got shape {raw_values.shape}")
    try:
        easiness = raw_values.astype(np.float64)
    except (TypeError, ValueError):
        # NumPy's message does not say which value is at fault
        for row, value in enumerate(raw_values.tolist()):
            if value is not None and not isinstance(value, int | float):
                raise ValueError(
                    f"strata_from_values: the value of row {row} is {value!r}, not a number"
                ) from None
        raise
    for row in np.flatnonzero(np.isnan(easiness))[:1]:
        raise ValueError(
            f"strata_from_values: the value of row {row} is missing; drop the pair before planning"
        )
    if abs(sum(shares) - 1) > 1e-6:
        raise ValueError(f"strata_from_values: shares must be >= 0 and sum to 1, got {shares}")
    id_array = np.arange(len(easiness)) if ids is None else np.asarray(ids)
    order = np.lexsort((keyed_hash(id_array, "strata", seed), -easiness))
    cuts = np.rint(np.cumsum(shares)[:-1] * len(easiness))
    strata = np.empty(len(easiness), dtype=np.int64)
    strata[order] = np.searchsorted(cuts, np.arange(len(easiness)), side="right")
    ordered = easiness[order]
    for cut in (int(cut) for cut in cuts if 0 < cut < len(ordered)):
        tied = int((ordered == ordered[cut]).sum()) if ordered[cut - 1] == ordered[cut] else 0
        if tied > TIED_SHARE * len(ordered):
            warn(
                f"strata_from_values: {tied} of {len(ordered)} pairs have the value "
                f"{ordered[cut]:g} and lie on both sides of a cut, so a hash decides their "
                "stratum; choose shares that cut where the values change, or use a finer value",
                stacklevel=2,
            )
    return strata
