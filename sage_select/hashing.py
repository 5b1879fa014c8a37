"""Keyed hashes: the only source of randomness in the selection method.

A random number from `keyed_hash(ids, seed, ...)` depends on the id and the key, not on a position
in a generator's stream. It is therefore the same after a resume, in any row order and on any rank.
"""

import hashlib
import operator
from typing import Any

import numpy as np
import numpy.typing as npt

from sage_select.arrays import Int64Array, UInt64Array


def keyed_hash(ids: npt.ArrayLike, *key: int | str) -> UInt64Array:
    """Return a pseudo-random 64-bit word per id, a pure function of the id and the key.

    Args:
        ids: [N] integers or strings.
        *key: Parts that separate this use from all others: a purpose, a seed, a step.

    Returns:
        uint64 [N].

    Raises:
        TypeError: If an id or a part of the key is neither an integer nor a string.

    Example:
        >>> keyed_hash([7, 8], "ties", 0)[::-1].tolist() == keyed_hash([8, 7], "ties", 0).tolist()
        True
    """
    # operator.index: a NumPy 3 and a Python 3 must be the same key, but their reprs differ
    parts = [part if isinstance(part, str) else operator.index(part) for part in key]
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return _mix(id_words(ids) ^ np.uint64(int.from_bytes(digest, "little")))


def hash_order(ids: npt.ArrayLike, *key: int | str) -> Int64Array:
    """Return a shuffle of `ids` as positions: the order of their keyed hashes.

    Example:
        >>> sorted(hash_order(["a", "b", "c"], "shuffle", 0).tolist())
        [0, 1, 2]
    """
    return np.argsort(keyed_hash(ids, *key), kind="stable")


def id_words(names: npt.ArrayLike) -> UInt64Array:
    """Return a 64-bit word per id: the value of an integer, a digest of a string.

    A word can replace its id: `keyed_hash(id_words(ids), ...)` equals `keyed_hash(ids, ...)`.
    """
    ids: npt.NDArray[Any] = np.asarray(names)
    if ids.dtype.kind in "iu" or ids.size == 0:
        return ids.astype(np.int64).view(np.uint64)
    if ids.dtype.kind == "O":  # strings from pandas or a list column
        ids = ids.astype(np.str_)
    if ids.dtype.kind not in "US":
        raise TypeError(f"ids must be integers or strings, got an array of {ids.dtype}")
    letters = np.ascontiguousarray(ids).view(np.uint32 if ids.dtype.kind == "U" else np.uint8)
    words = np.full(len(ids), len("id"), dtype=np.uint64)
    for letter in letters.reshape(len(ids), -1).T:
        # NumPy pads shorter strings with zeros. Skip them, so that a word does not depend on the
        # longest id in the same array.
        words = np.where(letter == 0, words, _mix(words ^ letter.astype(np.uint64)))
    return words


def _mix(words: UInt64Array) -> UInt64Array:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014)."""
    words = words + np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
