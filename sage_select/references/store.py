"""The reference store: log-probs under the reference, on disk, paid for once.

A store is a folder with one folder per reference: one for each combination of weights, settings,
precision and path of computation. In it lie parts, each written whole or not at all and named by
its own content, with one entry per sequence: a hash of the response's tokens in their context, and
their summed log-prob. What tokenizer, template and truncation did is all in the tokens.

Nothing in a part is ever changed, and an entry follows from its key. So any number of processes may
read and write at once, a killed one loses no more than its last seconds, and runs, hosts and
trainers share what they have.
"""

import json
from collections.abc import Collection
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from sage_select.arrays import Float64Array, Int64Array
from sage_select.data.dataset import PreferenceDataset
from sage_select.models.fingerprints import check_adapters_come_off, has_adapters, model_digest
from sage_select.models.reader import Reader
from sage_select.models.sequences import (
    DistinctSequences,
    Keys,
    as_pair_logps,
    distinct_sequences,
    sequence_keys,
)
from sage_select.models.wrappers import computes_in
from sage_select.ops.token_logps import resolved
from sage_select.pairs import PairLogps
from sage_select.references.eviction import default_store, stored_references
from sage_select.references.parts import PartWriter, merge_parts, read_parts
from sage_select.system.files import mark_as_used, partial_path, replace_durably
from sage_select.system.heartbeats import monitored
from sage_select.system.identity import digest
from sage_select.system.ledger import phase
from sage_select.system.processes import Processes

VERSION = 3  # a change of the code that rounds log-probs otherwise needs a new number


class ReferenceStore:
    """Reference log-probs of a dataset's pairs, kept on disk and measured once where missing.

    It takes the place of a `PairLogps` wherever a reference is asked for, as in `Selector`. Rows
    that were never measured are, when they are first asked for, if a model was given.

    Args:
        model: The reference, a Hugging Face causal language model on any device; a PEFT policy
            is measured with its adapters off. None to use what is there and measure nothing.
        dataset: The pairs.
        folder: The store; by default `reference` in the user's cache.
        identity: Instead of a model: the name of a reference in the store.
        reader: How the model is read, the same as for the policy; by default `Reader()`.

    Attributes:
        identity: The name of this reference: a hash of its weights, settings, dtype and path.
        folder: Where its parts stand.

    Example:
        >>> store = ReferenceStore(reference_model, dataset)  # doctest: +SKIP
        >>> store.fill()  # doctest: +SKIP
        >>> selector = Selector(sage, keep, store, timeline.progress)  # doctest: +SKIP

    Raises:
        ValueError: If neither or both of model and identity are given.
        FileNotFoundError: If the store has no reference of this identity.
    """

    def __init__(
        self,
        model: nn.Module | None,
        dataset: PreferenceDataset,
        *,
        folder: str | Path | None = None,
        identity: str | None = None,
        reader: Reader | None = None,
    ) -> None:
        root = Path(folder) if folder is not None else default_store()
        if (model is None) == (identity is None):
            raise ValueError(
                "ReferenceStore: give a model, or the identity of a reference in the store; "
                "`sage-select store list` shows them"
            )
        self.model = model
        self.dataset = dataset
        self.reader = Reader() if reader is None else reader
        if model is not None:
            check_adapters_come_off(model)
            identity = self._identity_of(model)
        assert identity is not None
        self.identity = identity
        self.folder = root / identity
        if model is None and not self.folder.is_dir():
            known = ", ".join(entry.identity for entry in stored_references(root)) or "none"
            raise FileNotFoundError(
                f"ReferenceStore: {root} has no reference {identity}; it has {known}"
            )
        self._logps: Float64Array | None = None  # [N, 2], chosen and rejected; NaN: not known

    def __len__(self) -> int:
        """Pairs whose log-probs are known."""
        return len(self.dataset) - len(self.missing())

    def __repr__(self) -> str:
        return f"ReferenceStore({self.folder}, {len(self)} of {len(self.dataset)} pairs known)"

    def missing(self) -> Int64Array:
        """The dataset rows whose log-probs are not known yet."""
        return self.dataset.index[np.isnan(self._known()).any(axis=1)]

    def fill(self, rows: npt.ArrayLike | None = None) -> int:
        """Measure what is missing, writing it to disk as it comes.

        Killed at any moment, it goes on where it was; the result has the same bits.

        Args:
            rows: The dataset rows wanted; by default all.

        Returns:
            How many sequences were measured; 0 where all were known.

        Raises:
            ValueError: If pairs are missing and there is no model, or its weights have changed.
        """
        processes = Processes.all()
        wanted = self.dataset if rows is None else self.dataset.take(rows)
        unknown = int(np.isnan(self._known()[self._positions(wanted.index)]).any(axis=1).sum())
        self._check_shared(processes, unknown)
        if not unknown:
            return 0
        if self.model is None:
            raise ValueError(
                f"ReferenceStore: {unknown} of {len(wanted)} pairs "
                "were never measured, and there is no model to measure them with; fill the store "
                "first, with `sage-select store fill` or ReferenceStore(model, ...).fill()"
            )
        if self._identity_of(self.model) != self.identity:
            raise ValueError(
                "ReferenceStore: the reference model's weights have changed since the store was "
                "opened, or its precision, device or attention, so what is missing cannot be "
                "measured any more; call fill() before training, or give the reference a model of "
                "its own"
            )
        self._describe(self.model)
        distinct = distinct_sequences(wanted)
        found = np.flatnonzero(~np.isnan(read_parts(self.folder).look_up(distinct.keys)))
        with monitored(processes):
            self._measure(distinct, set(found.tolist()))
            processes.barrier()  # all have written
        if processes.rank == 0:
            merge_parts(self.folder)
        self._logps = None  # what was written is read back
        self._check_shared(processes, len(self.missing()))
        return len(distinct) - len(found)

    def take(self, rows: npt.ArrayLike, /) -> PairLogps:
        """The log-probs of these dataset rows, in the order asked for.

        Raises:
            KeyError: If a row is not one of the dataset's.
            ValueError: As `fill`, or if a stored log-prob is not finite.
        """
        wanted = self.dataset.take(rows)
        positions = self._positions(wanted.index)
        if np.isnan(self._known()[positions]).any():
            if Processes.all().size > 1:  # the others may want other rows
                raise ValueError(
                    "ReferenceStore: log-probs are missing, and processes can only measure "
                    "together; call fill() in all of them first"
                )
            self.fill(wanted.index)
        logps = torch.from_numpy(self._known()[positions].T.copy())
        return as_pair_logps(wanted, logps.reshape(-1))

    def _identity_of(self, model: nn.Module) -> str:
        return digest([model_digest(model), self._path_of(model)])

    def _path_of(self, model: nn.Module) -> dict[str, str]:
        """What decides the rounding of a log-prob, besides the weights."""
        weight = next(model.parameters())
        config: Any = getattr(model, "config", None)
        return {
            "dtype": str(computes_in(model)),
            "mixed_precision": str(self.reader.mixed_precision),
            "device": weight.device.type,
            "attention": str(getattr(config, "_attn_implementation", "")),
            "head": f"{resolved(self.reader.impl)} {VERSION}",
        }

    def _check_shared(self, processes: Processes, unknown: int) -> None:
        """All processes must see the same files."""
        every = [count for (count,) in processes.all_gather([unknown])]
        if len(set(every)) > 1:
            raise ValueError(
                f"ReferenceStore: of the same pairs the processes miss {every}; their folder "
                f"{self.folder} must be one that all of them share"
            )

    def _measure(self, distinct: DistinctSequences, known: Collection[int]) -> None:
        assert self.model is not None
        off = self.model.disable_adapter() if has_adapters(self.model) else nullcontext()  # type: ignore[operator]
        with off, phase("reference"), PartWriter(self.folder) as writer:
            self.reader.measure_sequences(
                self.model,
                distinct,
                lambda places, logps: writer.add(*self._finite(distinct.keys[places], logps)),
                known=known,
                desc="measuring the reference",
            )

    def _known(self) -> Float64Array:
        if self._logps is None:
            self._logps = read_parts(self.folder).look_up(self._dataset_keys)
            mark_as_used(self.folder / "reference.json")
        return self._logps

    @cached_property
    def _dataset_keys(self) -> Keys:
        """[N, 2], chosen and rejected."""
        return sequence_keys(self.dataset).sequences.reshape(2, len(self.dataset)).T

    def _finite(self, keys: Keys, logps: Tensor) -> tuple[Keys, Tensor]:
        for key, logp in zip(
            keys[~logps.isfinite().numpy()], logps[~logps.isfinite()], strict=True
        ):
            first = int(np.flatnonzero((self._dataset_keys == key).any(axis=1))[0])
            raise ValueError(
                f"ReferenceStore: a response of pair {self.dataset.ids[first]} (row "
                f"{self.dataset.index[first]}) has log-prob {logp.item()}; the reference's weights "
                "or activations are not finite"
            )
        return keys, logps

    def _positions(self, rows: Int64Array) -> Int64Array:
        order, ascending = self._order
        places = np.searchsorted(ascending, rows)  # no pass over the whole set: asked every batch
        inside = places < len(ascending)
        inside[inside] = ascending[places[inside]] == rows[inside]
        for row in rows[~inside][:1]:
            raise KeyError(
                f"ReferenceStore.take: row {row} is not among the {len(order)} pairs of the "
                "store's dataset; open the store with the whole dataset"
            )
        positions: Int64Array = order[places]
        return positions

    @cached_property
    def _order(self) -> tuple[Int64Array, Int64Array]:
        """The dataset's positions by ascending row, and these rows."""
        order = np.argsort(self.dataset.index, kind="stable")
        return order, self.dataset.index[order]

    def _describe(self, model: nn.Module) -> None:
        """What a person should know of this reference; nothing depends on it."""
        path = self.folder / "reference.json"
        if path.exists():
            mark_as_used(path)
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(
                f"ReferenceStore: {self.folder} cannot be made: {error}; give a folder that can be "
                "written (reference.store in a configuration)"
            ) from None
        config: Any = getattr(model, "config", None)
        told = {"model": str(getattr(config, "_name_or_path", "")), **self._path_of(model)}
        partial = partial_path(path)
        partial.write_text(json.dumps(told))
        replace_durably(partial, path)


# Parts
