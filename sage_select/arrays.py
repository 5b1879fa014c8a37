"""NumPy array types, and the check of row numbers that callers pass."""

from typing import Any

import numpy as np
import numpy.typing as npt

BoolArray = npt.NDArray[np.bool_]
Float64Array = npt.NDArray[np.float64]
Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]
UInt64Array = npt.NDArray[np.uint64]


def checked_rows(rows: Any, call: str) -> Int64Array:
    """Return row numbers as int64 [P], or refuse them.

    Args:
        rows: Row numbers [P], in any sequence or array.
        call: Name of the calling function, for the error message.

    Raises:
        TypeError: If they are not whole numbers; a mask would be read as rows 0 and 1.
        ValueError: If they are not one-dimensional.

    Example:
        >>> checked_rows(range(3), "take").tolist()
        [0, 1, 2]
    """
    try:
        array = np.asarray(rows)
    except ValueError:  # rows of rows of different lengths
        raise ValueError(f"{call}: rows must be [P], got a sequence of sequences") from None
    if array.ndim != 1:
        raise ValueError(f"{call}: rows must be [P], got shape {array.shape}")
    # NumPy makes an empty list float64, which is no mistake of the caller
    if array.dtype.kind not in "iu" and array.size:
        raise TypeError(
            f"{call}: rows must be whole numbers, got an array of {array.dtype}; "
            "turn a mask into rows with np.flatnonzero(mask)"
        )
    return array.astype(np.int64)


def all_different(values: Int64Array | UInt64Array) -> bool:
    """True if no value occurs twice."""
    # one sort, since np.unique fills a hash table
    ascending = np.sort(values)
    return not bool((ascending[1:] == ascending[:-1]).any())
