"""Identity: short names for values, arrays and functions, the same in every process."""

import hashlib
import json
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt


def digest(value: Any) -> str:
    """A fingerprint of plain values, the same in every process.

    Example:
        >>> digest({"a": 1, "b": [2, 3]}) == digest({"b": [2, 3], "a": 1})
        True
    """
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def describe(function: Callable[..., Any]) -> str:
    """A function's name, with what was bound to it by functools.partial.

    Example:
        >>> from functools import partial
        >>> describe(partial(sorted, reverse=True))
        'builtins.sorted(reverse=True)'
    """
    if isinstance(function, partial):
        bound = [*map(repr, function.args), *(f"{k}={v!r}" for k, v in function.keywords.items())]
        return f"{describe(function.func)}({', '.join(bound)})"
    name = getattr(function, "__qualname__", type(function).__qualname__)
    return f"{getattr(function, '__module__', '')}.{name}"


def digest_arrays(*arrays: npt.NDArray[Any]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for array in arrays:
        digest.update(str(array.shape).encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
