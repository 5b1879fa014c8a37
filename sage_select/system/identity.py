"""Identity: fingerprints and names of values, arrays and functions, equal in every process."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


def digest(value: Any) -> str:
    """Return a fingerprint of plain values, equal in every process.

    Example:
        >>> digest({"a": 1, "b": [2, 3]}) == digest({"b": [2, 3], "a": 1})
        True
    """
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def describe(function: Any) -> str:
    """Return the name of a function with everything bound to it by functools.partial.

    Arrays and tensors are identified by their bytes, since different ones can have equal reprs.

    Example:
        >>> from functools import partial
        >>> describe(partial(sorted, reverse=True))
        'builtins.sorted(reverse=True)'
    """
    if isinstance(function, partial):
        bound = [
            *map(_described, function.args),
            *(f"{name}={_described(value)}" for name, value in function.keywords.items()),
        ]
        return f"{describe(function.func)}({', '.join(bound)})"
    if is_dataclass(function) and not isinstance(function, type):
        values = (f"{f.name}={_described(getattr(function, f.name))}" for f in fields(function))
        return f"{type(function).__module__}.{type(function).__qualname__}({', '.join(values)})"
    name = getattr(function, "__qualname__", type(function).__qualname__)
    return f"{getattr(function, '__module__', '')}.{name}"


def _described(value: Any) -> str:
    """Describe a bound value: an array by its bytes, a container item by item."""
    if isinstance(value, Tensor):
        # as bytes, since NumPy has no bfloat16
        data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        return f"tensor({list(value.shape)}, {value.dtype}, {digest_arrays(data)})"
    if hasattr(value, "__array__") and getattr(value, "shape", ()) != ():
        array = np.asarray(value)
        if array.dtype != object:
            return f"array({list(array.shape)}, {array.dtype}, {digest_arrays(array)})"
        # the bytes of an object array are addresses, which differ between processes
        return f"array({_described(array.tolist())})"
    if isinstance(value, list | tuple):
        return f"{type(value).__name__}({', '.join(map(_described, value))})"
    if isinstance(value, Mapping):
        items = (f"{_described(name)}: {_described(x)}" for name, x in value.items())
        return f"{{{', '.join(items)}}}"
    return describe(value) if callable(value) else repr(value)


def digest_arrays(*arrays: npt.NDArray[Any]) -> str:
    """Return a fingerprint of arrays: their shapes and bytes."""
    digest = hashlib.blake2b(digest_size=16)
    for array in arrays:
        digest.update(str(array.shape).encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
