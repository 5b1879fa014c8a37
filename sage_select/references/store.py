"""The reference store: log-probs under the reference, on disk, paid for once.

A store is a folder with one folder per reference: one for each combination of weights, settings,
precision and path of computation. In it lie parts, each written whole or not at all and named by
its own content, with one entry per sequence: a hash of the response's tokens in their context, and
their summed log-prob. What tokenizer, template and truncation did is all in the tokens.

Nothing in a part is ever changed, and an entry follows from its key. So any number of processes may
read and write at once, a killed one loses no more than its last seconds, and runs, hosts and
trainers share what they have.
"""

import hashlib
import json
import re
import time
from collections.abc import Callable, Collection
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import cached_property
from functools import partial as bound
from pathlib import Path
from typing import Any
from warnings import warn

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import torch
from torch import Tensor, nn

from sage_select.arrays import Float64Array, Int64Array
from sage_select.data.dataset import PreferenceDataset
from sage_select.models.fingerprints import check_adapters_come_off, has_adapters, model_digest
from sage_select.models.reader import joined, measure_sequences
from sage_select.models.sequences import (
    DistinctSequences,
    Keys,
    distinct_sequences,
    sequence_keys,
)
from sage_select.models.trials import Layout
from sage_select.models.wrappers import computes_in
from sage_select.ops.token_logps import Implementation, resolved
from sage_select.pairs import PairLogps
from sage_select.system.files import cache_folder, mark_as_used, partial_path, replace_durably
from sage_select.system.heartbeats import watched
from sage_select.system.identity import digest
from sage_select.system.ledger import phase
from sage_select.system.processes import Processes

WRITE_EVERY = 5.0  # seconds between parts: what a kill can lose
ROUNDING = 3  # a change of the code that rounds log-probs otherwise needs a new number
MERGE_ABOVE = 32  # parts of one reference, before they are merged into one
ABANDONED = 24 * 3600.0  # seconds after which an unfinished part is some killed process's

_SCHEMA = pa.schema({"key": pa.binary(16), "logp": pa.float64()})


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
        mixed_precision: Autocast dtype of the body, the same as for the policy.
        max_batch_tokens: Tokens of one forward pass.
        layout: How batches are laid out, see `measure`.
        impl: How the head's log-probs are computed, see `token_logps`.
        show_progress: False for no progress bar.

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
        mixed_precision: torch.dtype | None = None,
        max_batch_tokens: int = 16_384,
        layout: Layout = "auto",
        impl: Implementation = "auto",
        show_progress: bool | None = None,
    ) -> None:
        root = Path(folder) if folder is not None else default_store()
        if (model is None) == (identity is None):
            raise ValueError(
                "ReferenceStore: give a model, or the identity of a reference in the store; "
                "`sage-select store list` shows them"
            )
        self.model = model
        self.dataset = dataset
        self._measures: dict[str, Any] = {
            "max_batch_tokens": max_batch_tokens,
            "layout": layout,
            "impl": impl,
            "mixed_precision": mixed_precision,
            "show_progress": show_progress,
        }
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
        found = np.flatnonzero(~np.isnan(_read_parts(self.folder).look_up(distinct.keys)))
        with watched(processes):
            self._measure(distinct, set(found.tolist()))
            processes.wait()  # all have written
        if processes.rank == 0:
            _merge(self.folder)
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
        return joined(wanted, logps.reshape(-1))

    def _identity_of(self, model: nn.Module) -> str:
        return digest([model_digest(model), self._path_of(model)])

    def _path_of(self, model: nn.Module) -> dict[str, str]:
        """What decides the rounding of a log-prob, besides the weights."""
        weight = next(model.parameters())
        config: Any = getattr(model, "config", None)
        return {
            "dtype": str(computes_in(model)),
            "mixed_precision": str(self._measures["mixed_precision"]),
            "device": weight.device.type,
            "attention": str(getattr(config, "_attn_implementation", "")),
            "head": f"{resolved(self._measures['impl'])} {ROUNDING}",
        }

    def _check_shared(self, processes: Processes, unknown: int) -> None:
        """All processes must see the same files."""
        every = [count for (count,) in processes.agree([unknown])]
        if len(set(every)) > 1:
            raise ValueError(
                f"ReferenceStore: of the same pairs the processes miss {every}; their folder "
                f"{self.folder} must be one that all of them share"
            )

    def _measure(self, distinct: DistinctSequences, known: Collection[int]) -> None:
        assert self.model is not None
        off = self.model.disable_adapter() if has_adapters(self.model) else nullcontext()  # type: ignore[operator]
        with off, phase("reference"), _Writer(self.folder) as writer:
            measure_sequences(
                self.model,
                distinct,
                lambda places, logps: writer.add(*self._finite(distinct.keys[places], logps)),
                known=known,
                desc="measuring the reference",
                **self._measures,
            )

    def _known(self) -> Float64Array:
        if self._logps is None:
            self._logps = _read_parts(self.folder).look_up(self._dataset_keys)
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


def read_reference(
    path: str | Path,
    dataset: PreferenceDataset,
    *,
    key: str = "pair_id",
    chosen: str = "ref_chosen_logps",
    rejected: str = "ref_rejected_logps",
) -> PairLogps:
    """Reference log-probs that were computed elsewhere, from a Parquet, CSV or JSON Lines file.

    Args:
        path: The file: one row per pair, with summed log-probs in nats.
        dataset: The pairs; every one must stand in the file, which may have more.
        key: The column that names pairs, in the file and among the dataset's columns.
        chosen: The column of the chosen responses' log-probs; by default TRL's name.
        rejected: The same of the rejected ones.

    Returns:
        Log-probs of the dataset's pairs. Where the file has `chosen_tokens` and `rejected_tokens`
        they are compared with the dataset's. Where it has not, nobody can tell: whoever made it
        must have used the same tokenizer and template, and cut responses at the same length.

    Raises:
        ValueError: If a column or a pair is missing, a pair stands there twice with different
            values, or a log-prob is not a finite number of at most 0.
    """
    as_text = {key: pl.String}  # 007 is not 7
    readers: dict[str, Callable[[Path], pl.DataFrame]] = {
        ".parquet": pl.read_parquet,
        ".csv": bound(pl.read_csv, infer_schema_length=None, schema_overrides=as_text),
        ".jsonl": bound(pl.read_ndjson, infer_schema_length=None),
        ".ndjson": bound(pl.read_ndjson, infer_schema_length=None),
    }
    file = Path(path)
    if file.suffix not in readers:
        raise ValueError(
            f"read_reference: cannot read {file.name}; known endings are {', '.join(readers)}"
        )
    if not file.exists():
        raise FileNotFoundError(f"read_reference: no file {file}")
    try:
        table = readers[file.suffix](file)
    except pl.exceptions.PolarsError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"read_reference: {file} cannot be read: {reason}") from error
    for name in (key, chosen, rejected):
        if name not in table.columns:
            raise ValueError(
                f"read_reference: {file} has no column {name!r}; it has {table.columns}"
            )
    counts = [name for name in ("chosen_tokens", "rejected_tokens") if name in table.columns]
    given = table.select(
        *counts,
        pl.col(key).cast(pl.String).alias("key"),
        pl.col(chosen).cast(pl.Float64).alias("chosen"),
        pl.col(rejected).cast(pl.Float64).alias("rejected"),
    ).unique()
    for name in given.filter(pl.col("key").is_duplicated())["key"][:1]:
        raise ValueError(f"read_reference: {file} has different log-probs for pair {name}")
    wanted = pl.DataFrame({"key": dataset.column(key).cast(pl.String)})
    found = wanted.join(given, on="key", how="left", maintain_order="left")
    for name in found.filter(pl.col("chosen").is_null() | pl.col("rejected").is_null())["key"][:1]:
        raise ValueError(
            f"read_reference: {file} has no log-probs for pair {name} (by {key}); "
            "measure it, or take a dataset without it"
        )
    for count in counts:
        ours = pl.Series("ours", getattr(dataset, count))
        for name in found.filter(pl.col(count) != ours)["key"][:1]:
            raise ValueError(
                f"read_reference: the {count} of pair {name} in {file} are not the dataset's: it "
                "was made with another tokenizer, template or max_length"
            )
    both = pl.col("chosen", "rejected")
    for name in found.filter(pl.any_horizontal(~both.is_finite() | (both > 0)))["key"][:1]:
        raise ValueError(
            f"read_reference: {file} has a log-prob for pair {name} that is above 0 or not finite; "
            "log-probs are natural logarithms of probabilities, summed over a response"
        )
    logps = np.concatenate([found["chosen"].to_numpy(), found["rejected"].to_numpy()])
    return joined(dataset, torch.from_numpy(logps))


def default_store() -> Path:
    """Where stores stand unless a call says otherwise."""
    return cache_folder() / "reference"


@dataclass(frozen=True)
class StoredReference:
    """One reference of a store, for people.

    Attributes:
        identity: Its name.
        told: What it is: the model's name, its dtype and path.
        sequences: Entries.
        size: Bytes on disk.
        used: When it was last used, in seconds since the epoch.
    """

    identity: str
    told: dict[str, Any]
    sequences: int
    size: int
    used: float


def stored_references(folder: str | Path | None = None) -> list[StoredReference]:
    """The references of a store, the most recently used first."""
    root = Path(folder) if folder is not None else default_store()
    found = []
    for place in root.iterdir() if root.is_dir() else ():
        if not _IDENTITY.fullmatch(place.name) or not place.is_dir():
            continue  # somebody else's
        states = []
        for file in place.iterdir():
            with suppress(FileNotFoundError):  # merged or finished meanwhile
                states.append(file.stat())
        told = {}
        with suppress(OSError, ValueError):
            told = json.loads((place / "reference.json").read_text())
        found.append(
            StoredReference(
                identity=place.name,
                told=told,
                sequences=len(_read_parts(place).keys),
                size=sum(state.st_size for state in states),
                used=max((state.st_mtime for state in states), default=0.0),
            )
        )
    return sorted(found, key=lambda reference: -reference.used)


_IDENTITY = re.compile(r"[0-9a-f]{32}")


def evict(
    folder: str | Path | None = None,
    *,
    identity: str | None = None,
    unused_for: float | None = None,
    max_size: int | None = None,
) -> list[StoredReference]:
    """Delete references: one by its name, those unused for long, or the oldest above a size.

    Args:
        folder: The store.
        identity: The one to delete.
        unused_for: Seconds.
        max_size: Bytes that may stay; the least recently used go first.

    Returns:
        What was deleted.

    Raises:
        ValueError: If nothing says what to delete, or there is no reference of this identity.
    """
    if identity is None and unused_for is None and max_size is None:
        raise ValueError("evict: say what to delete: identity, unused_for or max_size")
    root = Path(folder) if folder is not None else default_store()
    references = stored_references(root)
    if identity is not None and identity not in {r.identity for r in references}:
        raise ValueError(f"evict: {root} has no reference {identity}")
    going, total = [], 0
    for reference in references:  # the most recently used first
        total += reference.size
        stale = unused_for is not None and time.time() - reference.used > unused_for
        above = max_size is not None and total > max_size
        if reference.identity == identity or stale or above:
            going.append(reference)
    for reference in going:
        place = root / reference.identity
        for pattern in ("part-*.arrow", ".*.partial", "reference.json"):
            for file in place.glob(pattern):
                file.unlink(missing_ok=True)
        with suppress(OSError):  # what else stands there is somebody else's
            place.rmdir()
    return going


# Parts


@dataclass(frozen=True)
class _Entries:
    """Entries by ascending key."""

    keys: Keys  # [E]
    logps: Float64Array  # [E]

    def look_up(self, keys: Keys) -> Float64Array:
        """The log-prob of each key, in its shape; NaN where it is not known."""
        if not len(self.keys):
            return np.full(keys.shape, np.nan)
        places = np.searchsorted(self.keys, keys).clip(max=len(self.keys) - 1)
        return np.where(self.keys[places] == keys, self.logps[places], np.nan)


class _Writer:
    """Puts entries on disk every few seconds, in parts."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._keys: list[Keys] = []
        self._logps: list[Float64Array] = []
        self._written = time.monotonic()

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, *error: object) -> None:
        self.flush()  # what was measured before an error is worth keeping

    def add(self, keys: Keys, logps: Tensor) -> None:
        """Take entries in, and put them on disk if it is time to."""
        self._keys.append(keys)
        self._logps.append(logps.numpy())
        if time.monotonic() - self._written >= WRITE_EVERY:
            self.flush()

    def flush(self) -> None:
        """Put on disk what was taken in."""
        if self._keys:
            _write_part(self._folder, np.concatenate(self._keys), np.concatenate(self._logps))
            mark_as_used(self._folder / "reference.json")
        self._keys, self._logps, self._written = [], [], time.monotonic()


def _write_part(folder: Path, keys: Keys, logps: Float64Array) -> Path:
    """One part, named by its content, so that a spoiled one is known."""
    column = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(16), len(keys), [None, pa.py_buffer(keys.tobytes())]
    )
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, _SCHEMA) as writer:
        writer.write_table(pa.table([column, pa.array(logps)], schema=_SCHEMA))
    content = sink.getvalue().to_pybytes()
    path = folder / f"part-{_checksum(content)}.arrow"
    folder.mkdir(parents=True, exist_ok=True)  # somebody may have evicted it
    partial = partial_path(path)
    partial.write_bytes(content)
    replace_durably(partial, path)
    return path


def _read_part(path: Path) -> tuple[Keys, Float64Array] | None:
    """A part's entries; None where it is gone, since somebody merged it, or spoiled."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    if path.stem != f"part-{_checksum(content)}":
        warn(
            f"ReferenceStore: {path} is not what was written and is passed over; delete it, its "
            "pairs are measured again",
            stacklevel=2,
        )
        return None
    table = pa.ipc.open_file(content).read_all()
    keys = b"".join(chunk.buffers()[1].to_pybytes() for chunk in table["key"].chunks)
    return np.frombuffer(keys, "S16"), table["logp"].to_numpy()


def _checksum(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _read_parts(folder: Path) -> _Entries:
    """All entries of a reference; of one that stands in several parts, always the same one."""
    parts, seen = [], set[Path]()
    while fresh := sorted(set(folder.glob("part-*.arrow")) - seen):
        seen |= set(fresh)  # looked again: what vanished meanwhile stands merged in a new part
        parts += [part for part in map(_read_part, fresh) if part is not None]
    if not parts:
        return _Entries(np.empty(0, "S16"), np.empty(0))
    keys = np.concatenate([keys for keys, _ in parts])
    logps = np.concatenate([logps for _, logps in parts])
    order = np.lexsort((logps, keys))
    first = np.ones(len(keys), dtype=bool)
    first[1:] = keys[order][1:] != keys[order][:-1]
    return _Entries(keys[order][first], logps[order][first])


def _merge(folder: Path) -> None:
    """One part for many, and no leftovers of killed processes."""
    for path in folder.glob(".*.partial"):
        with suppress(FileNotFoundError):  # just finished by another process
            if time.time() - path.stat().st_mtime > ABANDONED:
                path.unlink()
    parts = list(folder.glob("part-*.arrow"))
    if len(parts) > MERGE_ABOVE:
        entries = _read_parts(folder)
        merged = _write_part(folder, entries.keys, entries.logps)
        for path in parts:
            if path != merged:
                path.unlink(missing_ok=True)
