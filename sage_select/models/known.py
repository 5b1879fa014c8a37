"""What has been found out about a live model, kept for as long as the model lives."""

from dataclasses import dataclass, field
from threading import RLock
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from sage_select.models.flops import Shape

Path = tuple[object, ...]
"""Device, dtypes and attention: what decides how a forward pass is computed."""


@dataclass
class Known:
    """Everything the library remembers about one model.

    Attributes:
        lock: Held by whoever changes the model for a while; reentrant.
        own_attention: For each configuration, by its `id`, the attention it had before it was
            switched to packed attention.
        shape: What decides its FLOPs, once it was counted.
        checked_heads: Paths on which the output head was compared with the model's own logits.
        packing: For each path, the longest sequence with which packing was tried, and the reason
            not to pack, or "".
        warned: Warnings that were given.
    """

    lock: Any = field(default_factory=RLock)
    own_attention: dict[int, str] = field(default_factory=dict)
    shape: Shape | None = None
    checked_heads: set[Path] = field(default_factory=set)
    packing: dict[Path, tuple[int, str]] = field(default_factory=dict)
    warned: set[tuple[object, ...]] = field(default_factory=set)


_models: WeakKeyDictionary[nn.Module, Known] = WeakKeyDictionary()


def known(model: nn.Module) -> Known:
    """The record of this model, new if nothing is known of it yet."""
    return _models.setdefault(model, Known())


def own_attention(config: Any) -> str | None:
    """Name of the attention that a configuration chose itself, also while it is packed.

    A model and its wrappers share configurations, so every record is searched.
    """
    for record in list(_models.values()):
        if (name := record.own_attention.get(id(config))) is not None:
            return name
    return getattr(config, "_attn_implementation", None)
