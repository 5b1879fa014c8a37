"""Results of checks on a live model, cached for as long as the model exists."""

from dataclasses import dataclass, field
from threading import RLock
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from sage_select.models.flops import Shape

Path = tuple[object, ...]
"""Device, dtypes and attention, which determine how a forward pass is computed."""


@dataclass
class Known:
    """Cached facts about one model.

    Attributes:
        lock: Held while the model is changed temporarily; reentrant.
        own_attention: For each configuration, by its `id`, the attention it had before the switch
            to packed attention.
        shape: Sizes that determine its FLOPs, once they are counted.
        checked_heads: Paths on which the output head was compared with the model's own logits.
        packing: For each path, the longest sequence with which packing was tried, and the reason
            not to pack, or "".
        warned: Warnings already issued.
    """

    lock: Any = field(default_factory=RLock)
    own_attention: dict[int, str] = field(default_factory=dict)
    shape: Shape | None = None
    checked_heads: set[Path] = field(default_factory=set)
    packing: dict[Path, tuple[int, str]] = field(default_factory=dict)
    warned: set[tuple[object, ...]] = field(default_factory=set)


_records: WeakKeyDictionary[nn.Module, Known] = WeakKeyDictionary()


def known(model: nn.Module) -> Known:
    """Return the record of this model, which is empty at first."""
    return _records.setdefault(model, Known())


def own_attention(config: Any) -> str | None:
    """Return the attention that a configuration itself names, even while packed attention is on.

    A model and its wrappers share configurations, so every record is searched.
    """
    for record in list(_records.values()):  # a copy, since another thread may add a record
        if (name := record.own_attention.get(id(config))) is not None:
            return name
    return getattr(config, "_attn_implementation", None)
