"""The reference store: reference log-probs on disk, measured once.

A store is a folder with one subfolder per reference, that is, per combination of weights, model
settings, precision, device and attention. It contains part files, which are written atomically and
named by a checksum of their content. A part has one entry per sequence: a hash of the tokens of
prompt and response, and the summed log-prob of the response. The effects of tokenizer, template and
truncation are all in the tokens.

Parts are never modified, and an entry is determined by its key. So any number of processes can read
and write at the same time, a killed one loses only its last few seconds of work, and runs, hosts
and trainers share their entries.
"""

from collections.abc import Collection
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any
from warnings import warn

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from sage_select.arrays import Float64Array, Int64Array
from sage_select.data.dataset import PreferenceDataset
from sage_select.models.fingerprints import (
    adapters_change,
    check_adapters_come_off,
    has_adapters,
    model_digest,
)
from sage_select.models.reader import Reader
from sage_select.models.sequences import (
    DistinctSequences,
    Keys,
    as_pair_logps,
    distinct_sequences,
    sequence_keys,
)
from sage_select.pairs import PairLogps
from sage_select.references.eviction import default_store, stored_references
from sage_select.references.parts import (
    PartWriter,
    merge_parts,
    read_description,
    read_parts,
    write_description,
)
from sage_select.system.files import mark_as_used, user_path
from sage_select.system.heartbeats import monitored
from sage_select.system.identity import digest
from sage_select.system.ledger import phase
from sage_select.system.processes import Processes

LOGPS_VERSION = 3  # part of every identity: raise it if a code change alters how log-probs round


class ReferenceStore:
    """Reference log-probs of a dataset's pairs, kept on disk and measured once.

    It can be passed instead of a `PairLogps` wherever a reference is expected, as in `Selector`. If
    it has a model, rows that are not stored are measured when they are first requested.

    Args:
        model: The reference, a Hugging Face causal language model on any device; a PEFT policy
            is measured with its adapters disabled. None to use only what is stored.
        dataset: The pairs.
        folder: The store; by default `reference` in the user's cache.
        identity: The name of a reference in the store, instead of a model.
        reader: Reads the model; it should equal the policy's reader. By default `Reader()`.

    Attributes:
        identity: The name of this reference: a hash of its weights, model settings, precision,
            device, attention and head.
        folder: The folder of its part files.
        precision: Dtype of the forward pass that measured it; None if unknown.

    Example:
        >>> store = ReferenceStore(reference_model, dataset)  # doctest: +SKIP
        >>> store.fill()  # doctest: +SKIP
        >>> selector = Selector(sage, keep, store, timeline.progress)  # doctest: +SKIP

    Raises:
        ValueError: If neither or both of model and identity are given, or the model's adapters
            cannot be disabled to get the base model.
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
        root = user_path(folder) if folder is not None else default_store()
        if (model is None) == (identity is None):
            raise ValueError(
                "ReferenceStore: pass either a model or the identity of a reference in the store; "
                "`sage-select store list` lists them"
            )
        self.model = model
        self.dataset = dataset
        self.reader = Reader() if reader is None else reader
        if model is not None:
            # hashed now, before training can change the weights of a model that is also the policy
            check_adapters_come_off(model)
            if has_adapters(model) and adapters_change(model):
                warn(
                    "ReferenceStore: the model's adapters are trained already, and the reference "
                    "is the model without them; if the run shall continue from the adapters, merge "
                    "them first (merge_and_unload) or pass the reference as a separate model",
                    stacklevel=2,
                )
            identity = self._identity_of(model)
        assert identity is not None
        self.identity = identity
        self.folder = root / identity
        if model is None and not self.folder.is_dir():
            available = ", ".join(entry.identity for entry in stored_references(root)) or "none"
            raise FileNotFoundError(
                f"ReferenceStore: {root} has no reference {identity}; it has {available}"
            )
        # of the model as it is now: as the policy it may be converted later
        self.precision = _precision_of(
            read_description(self.folder) if model is None else self.reader.rounding(model)
        )
        self._logps: Float64Array | None = None  # read on first use, see `_stored_logps`

    def __len__(self) -> int:
        """Number of pairs of the dataset whose log-probs are stored."""
        return len(self.dataset) - len(self.missing())

    def __repr__(self) -> str:
        return f"ReferenceStore({self.folder}, {len(self)} of {len(self.dataset)} pairs stored)"

    def missing(self) -> Int64Array:
        """Return the dataset rows whose log-probs are not stored yet."""
        return self.dataset.index[np.isnan(self._stored_logps()).any(axis=1)]

    def fill(self, rows: npt.ArrayLike | None = None) -> int:
        """Measure the rows that are not stored, and write their log-probs to disk on the way.

        A killed call can be repeated: it resumes with what is missing and gives the same bits. With
        several processes, all must call it, on a folder that they share.

        Args:
            rows: The dataset rows to measure; by default all.

        Returns:
            Number of sequences measured; 0 if all were stored.

        Raises:
            ValueError: If pairs are missing and there is no model, or its weights have changed, or
                if a log-prob is not finite.
        """
        processes = Processes.all()
        requested = self.dataset if rows is None else self.dataset.take(rows)
        stored = self._stored_logps()[self._positions(requested.index)]
        num_missing = int(np.isnan(stored).any(axis=1).sum())
        # before any rank returns or raises: ranks that disagree would wait for each other forever
        self._check_shared_folder(processes, num_missing)
        if not num_missing:
            return 0
        if self.model is None:
            raise ValueError(
                f"ReferenceStore: {num_missing} of {len(requested)} pairs are not stored, and "
                "there is no model to measure them with; fill the store first, with `sage-select "
                "store fill` or ReferenceStore(model, ...).fill()"
            )
        # the model may be the policy itself, which training has changed meanwhile
        if self._identity_of(self.model) != self.identity:
            raise ValueError(
                "ReferenceStore: the model's weights, precision, device or attention have changed "
                "since the store was opened, so it is not the reference any more and the missing "
                "pairs cannot be measured; call fill() before training, or pass the reference as a "
                "separate model"
            )
        self._describe(self.model)  # before measuring, so that a killed fill is listed with a name
        distinct = distinct_sequences(requested)
        # by sequence, not by pair: a pair with one stored response needs only the other
        stored_places = np.flatnonzero(~np.isnan(read_parts(self.folder).look_up(distinct.keys)))
        with monitored(processes):
            self._measure(distinct, set(stored_places.tolist()))
            processes.barrier()  # until every rank has written its parts
        if processes.rank == 0:
            merge_parts(self.folder)
        self._logps = None  # read again, with what the other ranks have written
        self._check_shared_folder(processes, len(self.missing()))
        return len(distinct) - len(stored_places)

    def take(self, rows: npt.ArrayLike, /) -> PairLogps:
        """Return the log-probs of these dataset rows, in the given order.

        Raises:
            KeyError: If a row is not in the dataset.
            ValueError: As for `fill`, or if rows are missing and there are several processes, or if
                another process deletes them as soon as they are measured.
        """
        requested = self.dataset.take(rows)
        positions = self._positions(requested.index)
        if np.isnan(self._stored_logps()[positions]).any():
            # measuring is collective, but each rank may request different rows here
            if Processes.all().size > 1:
                raise ValueError(
                    "ReferenceStore: log-probs are missing, and several processes can only measure "
                    "them together; call fill() in all processes first"
                )
            self.fill(requested.index)
            if missing := int(np.isnan(self._stored_logps()[positions]).any(axis=1).sum()):
                raise ValueError(
                    f"ReferenceStore: {missing} of {len(requested)} pairs were measured, but their "
                    f"log-probs have disappeared from {self.folder}; another process evicts "
                    "references, or the disk is failing: stop it, and start again"
                )
        logps = torch.from_numpy(self._stored_logps()[positions].T.copy())
        return as_pair_logps(requested, logps.reshape(-1)).measured_in(self.precision)

    def _identity_of(self, model: nn.Module) -> str:
        return digest([model_digest(model), self._rounding_of(model)])

    def _rounding_of(self, model: nn.Module) -> dict[str, str]:
        """Return what decides how an entry rounds, with the version of the code that made it."""
        rounding = self.reader.rounding(model)
        return rounding | {"head": f"{rounding['head']} {LOGPS_VERSION}"}

    def _check_shared_folder(self, processes: Processes, num_missing: int) -> None:
        """Refuse a folder in which the ranks see different files."""
        missing_by_rank = [count for (count,) in processes.all_gather([num_missing])]
        if len(set(missing_by_rank)) > 1:
            raise ValueError(
                "ReferenceStore: the processes find different numbers of pairs missing (by rank: "
                f"{missing_by_rank}); put the store on a file system that all of them share, "
                f"instead of {self.folder}"
            )

    def _measure(self, distinct: DistinctSequences, stored_places: Collection[int]) -> None:
        """Measure the sequences that are not stored, and write them in parts."""
        assert self.model is not None
        # with its adapters disabled, a PEFT policy is its own reference
        base = self.model.disable_adapter() if has_adapters(self.model) else nullcontext()  # type: ignore[operator]
        with base, phase("reference"), PartWriter(self.folder) as writer:
            self.reader.measure_sequences(
                self.model,
                distinct,
                lambda places, logps: writer.add(*self._finite(distinct.keys[places], logps)),
                skip=stored_places,
                desc="measuring the reference",
            )

    def _stored_logps(self) -> Float64Array:
        """Log-probs of the dataset's pairs, [N, 2], chosen and rejected; NaN if not stored."""
        if self._logps is None:
            self._logps = read_parts(self.folder).look_up(self._dataset_keys)
            mark_as_used(self.folder / "reference.json")  # eviction goes by the last read or write
        return self._logps

    @cached_property
    def _dataset_keys(self) -> Keys:
        """Keys of the dataset's sequences, [N, 2], chosen and rejected."""
        return sequence_keys(self.dataset).sequences.reshape(2, len(self.dataset)).T

    def _finite(self, keys: Keys, logps: Tensor) -> tuple[Keys, Tensor]:
        """Return keys and log-probs as they are, or refuse them if a log-prob is not finite."""
        for key, logp in zip(
            keys[~logps.isfinite().numpy()], logps[~logps.isfinite()], strict=True
        ):
            first = int(np.flatnonzero((self._dataset_keys == key).any(axis=1))[0])
            raise ValueError(
                f"ReferenceStore: a response of pair {self.dataset.ids[first]} (row "
                f"{self.dataset.index[first]}) has log-prob {logp.item()}, which is not finite; "
                "check the reference's weights for NaN, and its precision for overflow"
            )
        return keys, logps

    def _positions(self, rows: Int64Array) -> Int64Array:
        """Return the positions of these dataset rows in the dataset."""
        order, ascending = self._order
        # a binary search, because this runs for every batch: no pass over the whole dataset
        places = np.searchsorted(ascending, rows)
        present = places < len(ascending)
        present[present] = ascending[places[present]] == rows[present]
        for row in rows[~present][:1]:
            raise KeyError(
                f"ReferenceStore.take: row {row} is not one of the {len(order)} pairs of the "
                "store's dataset; open the store with the whole dataset"
            )
        positions: Int64Array = order[places]
        return positions

    @cached_property
    def _order(self) -> tuple[Int64Array, Int64Array]:
        """Positions in the dataset, ordered by row, and the rows in ascending order."""
        order = np.argsort(self.dataset.index, kind="stable")
        return order, self.dataset.index[order]

    def _describe(self, model: nn.Module) -> None:
        """Write `reference.json`, which `sage-select store list` shows; nothing depends on it."""
        path = self.folder / "reference.json"
        if read_description(self.folder):
            mark_as_used(path)
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(
                f"ReferenceStore: cannot create {self.folder}: {error}; pass a folder that is "
                "writable (reference.store in a configuration)"
            ) from None
        config: Any = getattr(model, "config", None)
        description = {
            "model": str(getattr(config, "_name_or_path", "")),
            **self._rounding_of(model),
        }
        write_description(self.folder, description)


def _precision_of(rounding: dict[str, Any]) -> torch.dtype | None:
    """Return the dtype of the forward pass from `Reader.rounding`; None if it has none."""
    names = (str(rounding.get(key)).removeprefix("torch.") for key in ("mixed_precision", "dtype"))
    dtypes = [getattr(torch, name, None) for name in names if name != "None"]
    return next((dtype for dtype in dtypes if isinstance(dtype, torch.dtype)), None)
