"""Checkpoints of a run: one format for any number of processes, replicated or sharded.

A checkpoint is a folder. Weights and optimizer state are a PyTorch distributed checkpoint, to which
each rank writes its own shards. `run.pt` has the state that is equal on all ranks, `rng-*.pt` each
rank's random generators. `checksums.txt`, written last, lists the CRC-32 checksum of every file;
they are compared before anything is parsed. A run can resume from it with a different number of
processes.
"""

import io
import pickle
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from warnings import warn

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)

from sage_select.models.wrappers import unwrapped
from sage_select.system.files import (
    SpoiledFile,
    check_content,
    content_checksum,
    flush,
    named_on_failure,
    written_whole,
)
from sage_select.system.processes import Processes
from sage_select.training.run_folder import RunFolder, checkpoint_step

T = TypeVar("T")

CHECKSUMS = "checksums.txt"
OF_A_RANK = re.compile(r"__(\d+)_\d+\.distcp|rng-(\d+)\.pt")


def save_checkpoint(
    folder: str | Path | RunFolder,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    run: dict[str, Any],
) -> None:
    """Write the state of a run after `step` updates, whole or not at all (a collective call).

    Args:
        folder: The run's folder, shared by all processes.
        step: Updates so far.
        model: The policy: bare, in DistributedDataParallel, or sharded by `fully_shard`.
        optimizer: The optimizer of its parameters.
        run: All other state that a resumed run needs, equal on all ranks.

    Raises:
        OSError: If it cannot be written, such as for a full disk; on all ranks. Earlier checkpoints
            are unchanged, and nothing is left of this one.
    """
    processes, folder = Processes.all(), RunFolder.of(folder)
    path, unfinished = folder.checkpoint(step), folder.partial_checkpoint(step)
    first = processes.rank == 0
    checksums: dict[str, str] = {}

    def begin() -> None:
        if first:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)

    def write_own_files() -> dict[str, str]:
        generators = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():  # this rank's device only: another machine may have fewer
            generators["cuda"] = torch.cuda.get_rng_state()
        save(generators, unfinished / f"rng-{processes.rank}.pt")
        if first:
            save(run, unfinished / "run.pt")
        # The contents must be on disk before the final name: a crash leaves a whole checkpoint or
        # none. Each rank flushes what it wrote, since no other machine can, and computes checksums
        # while the disk is busy.
        own = [file for file in unfinished.iterdir() if _rank_of(file) == processes.rank]
        with ThreadPoolExecutor(1) as disk:
            flushed = disk.map(flush, own)
            of_rank = {file.name: content_checksum(file) for file in own}
            list(flushed)  # raises what a flush has raised
        return of_rank

    def finish() -> None:
        if first:
            (unfinished / CHECKSUMS).write_bytes(_as_manifest(checksums))
            flush(unfinished / CHECKSUMS)
            flush(unfinished)
            if path.exists():  # it could not be read when the run resumed
                _delete(path)
            unfinished.rename(path)
            flush(path.parent)

    try:
        with named_on_failure(path):
            _on_all_ranks(begin)
            weights, moments = get_state_dict(model, optimizer)
            state = {"model": weights, "optimizer": moments}
            with _quiet(), _plain_errors():
                writer = _Writer(unfinished, sync_files=False)  # flushed below
                state_dict_saver.save(state, storage_writer=writer, no_dist=processes.group is None)
            for of_rank in processes.all_gather_object(_on_all_ranks(write_own_files)):
                checksums |= of_rank
            _on_all_ranks(finish)
    except BaseException:
        if first:
            shutil.rmtree(unfinished, ignore_errors=True)
        raise


def save(value: object, path: Path) -> None:
    """Write a value with `torch.save`.

    Raises:
        OSError: If it cannot be written. `torch.save` to a path raises a RuntimeError without the
            reason instead.
    """
    with path.open("wb") as file:
        try:
            torch.save(value, file)
        except RuntimeError as error:
            raise _cause(error) from None


def _cause(error: BaseException) -> BaseException:
    """Return the file's error, if `torch.save` has raised another one while it handled it."""
    return error.__context__ if isinstance(error.__context__, OSError) else error


def load_newest(
    folder: str | Path | RunFolder, model: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, Any] | None:
    """Restore model, optimizer and generators from the newest whole checkpoint (a collective call).

    Checksums are compared before anything is parsed, each rank comparing its share of the files; if
    a file is spoiled, all ranks take the next older checkpoint. No code that a checkpoint contains
    is run. A checkpoint of an older version has no checksums and is parsed without.

    Returns:
        The `run` that `save_checkpoint` was given; None if there is no checkpoint.

    Raises:
        ValueError: If there are checkpoints, but none can be read.
    """
    processes, folder = Processes.all(), RunFolder.of(folder)
    # one list for all ranks, as another machine may see the folder in another state
    paths = processes.all_gather_object(folder.checkpoints())[0]
    reason = ""
    for path in paths:
        weights, moments = get_state_dict(model, optimizer)
        state = {"model": weights, "optimizer": moments}
        try:
            _on_all_ranks(partial(_check_files, path))
            run, metadata = _on_all_ranks(partial(_read_state, path))
            with _quiet(), _plain_errors():
                state_dict_loader.load(
                    state,
                    storage_reader=_Reader(path, metadata),
                    planner=_Planner(),
                    no_dist=processes.group is None,
                )
            _on_all_ranks(partial(_restore_generators, path))
        except Exception as error:  # parsers of spoiled bytes raise errors of any class
            reason = _first_line(error)
            warn(f"train: {path} cannot be read, trying an older one: {reason}", stacklevel=4)
            continue
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
        return run
    if paths:
        raise ValueError(
            f"train: none of the {len(paths)} checkpoints in {folder.path} can be read (the last "
            f"one: {reason}); start over in another folder"
        )
    return None


def drop_old(folder: str | Path | RunFolder, keep: int, step: int) -> None:
    """Delete all checkpoints except the newest `keep` of those up to `step`.

    Later ones are those that could not be read when the run resumed: they do not count, since the
    run would otherwise keep them and lose the readable ones.
    """
    checkpoints = RunFolder.of(folder).checkpoints()
    readable = [path for path in checkpoints if checkpoint_step(path) <= step]
    for old in readable[keep:]:
        if (old / "run.pt").exists():  # otherwise no checkpoint of this library
            _delete(old)


def _delete(checkpoint: Path) -> None:
    if checkpoint.is_symlink():  # what it points to is not the run's
        checkpoint.unlink()
        return
    # under another name: a kill in between must not leave half a checkpoint under its own
    doomed = checkpoint.with_name(f"{checkpoint.name}.deleted")
    shutil.rmtree(doomed, ignore_errors=True)
    checkpoint.rename(doomed)
    shutil.rmtree(doomed)


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """Gather all weights on the CPU, by the bare model's names (a collective call).

    Returns:
        The weights on rank 0. On other ranks an empty dictionary, if the model is distributed.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights: dict[str, Any] = get_model_state_dict(model, options=options)
    first: dict[int, str] = {}
    for name, parameter in unwrapped(model).named_parameters(remove_duplicate=False):
        if name in weights:  # keep tied weights as one tensor
            weights[name] = weights[first.setdefault(id(parameter), name)]
    return weights


def load_whole(model: nn.Module, weights: dict[str, Any]) -> None:
    """Load weights from `whole_weights` into a model, however it is wrapped or sharded."""
    set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True))


def save_best(folder: RunFolder, weights: dict[str, Tensor], evaluation: dict[str, float]) -> None:
    """Write the best weights and their evaluation, with a checksum."""
    with written_whole(folder.best, checked=True) as partial:
        save({"model": weights, "evaluation": evaluation}, partial)


def read_best(folder: RunFolder) -> dict[str, Any]:
    """Read what `save_best` wrote, "model" and "evaluation" (a collective call).

    Raises:
        FileNotFoundError: If there is none, because the run was never evaluated.
        SpoiledFile: If the file is spoiled; no code that it contains is run.
    """
    try:
        return _on_all_ranks(partial(_best, folder.best))
    except FileNotFoundError:
        raise FileNotFoundError(
            f"load_best: there is no {folder.best}; set held_out, so that the run is evaluated"
        ) from None
    except Exception as error:
        raise SpoiledFile(
            f"load_best: {folder.best} cannot be read: {_first_line(error)}; use a checkpoint, or "
            "the model after the last step"
        ) from error


def _best(path: Path) -> dict[str, Any]:
    check_content(path)
    best = _load(path)
    return {"model": best["model"], "evaluation": best["evaluation"]}


def _load(file: Path | io.BytesIO) -> Any:
    """Load what `save` wrote, without running code that it contains."""
    return torch.load(file, map_location="cpu", weights_only=True)


def _check_files(path: Path) -> None:
    """Compare this rank's share of a checkpoint's files with their checksums."""
    processes = Processes.all()
    manifest = path / CHECKSUMS
    if not manifest.exists():  # written by an older version
        return
    checksums = _manifest(manifest.read_bytes())
    present = {file.name for file in path.iterdir()} - {CHECKSUMS}
    # a name that is in one and not in the other is a file, or a line, that was damaged
    for name in sorted(present ^ checksums.keys()):
        raise SpoiledFile(
            f"{name} is {'not listed in' if name in present else 'missing, but listed in'} "
            f"{CHECKSUMS}"
        )
    for name in sorted(checksums)[processes.rank :: processes.size]:
        if content_checksum(path / name) != checksums[name]:
            raise SpoiledFile(f"the content of {name} does not match its checksum in {CHECKSUMS}")


def _as_manifest(checksums: dict[str, str]) -> bytes:
    """Return the content of `checksums.txt`: a line of checksum and name for each file."""
    return "".join(f"{checksums[name]}  {name}\n" for name in sorted(checksums)).encode()


def _manifest(content: bytes) -> dict[str, str]:
    """Return the checksums by name, of exactly what `_as_manifest` makes."""
    lines = [line.split("  ", 1) for line in content.decode().splitlines()]
    checksums = {name: checksum for checksum, name in lines}
    if _as_manifest(checksums) != content:
        raise SpoiledFile(f"{CHECKSUMS} is damaged")
    return checksums


def _read_state(path: Path) -> tuple[dict[str, Any], Metadata]:
    run = _load(path / "run.pt")
    if not isinstance(run, dict):
        raise SpoiledFile("run.pt does not contain the state of a run")
    return run, _SafeUnpickler(io.BytesIO((path / ".metadata").read_bytes())).load_metadata()


def _restore_generators(path: Path) -> None:
    file = path / f"rng-{Processes.all().rank}.pt"
    if not file.exists():  # the run resumes with more processes than wrote the checkpoint
        return
    generators = _load(file)
    torch.set_rng_state(generators["cpu"])
    if torch.cuda.is_available() and "cuda" in generators:
        torch.cuda.set_rng_state(generators["cuda"])


class _SafeUnpickler(pickle.Unpickler):
    """Unpickler of a distributed checkpoint's `.metadata` that runs no code of the file.

    Only the classes of such a file can be made, and `torch`'s constants be read.
    """

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _METADATA_CLASSES:
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise SpoiledFile(f".metadata names {module}.{name}, which no checkpoint contains")

    def load_metadata(self) -> Metadata:
        """Return the metadata.

        Raises:
            SpoiledFile: If it is something else, or names files outside the checkpoint.
        """
        metadata = self.load()
        if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
            raise SpoiledFile(".metadata does not describe a distributed checkpoint")
        for place in metadata.storage_data.values():
            if not OF_A_RANK.fullmatch(place.relative_path):
                raise SpoiledFile(f".metadata names the file {place.relative_path!r}")
        return metadata


_METADATA_MODULE = "torch.distributed.checkpoint.metadata"
_METADATA_CLASSES = {
    *(
        (_METADATA_MODULE, name)
        for name in (
            "Metadata",
            "MetadataIndex",
            "TensorStorageMetadata",
            "TensorProperties",
            "ChunkStorageMetadata",
            "BytesStorageMetadata",
            "StorageMeta",
            "_MEM_FORMAT_ENCODING",
        )
    ),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
    ("pathlib", "PurePosixPath"),
    ("pathlib._local", "PosixPath"),  # Python 3.13
    ("pathlib._local", "WindowsPath"),
}


class _Writer(FileSystemWriter):
    """Writer of a distributed checkpoint whose errors are those of the files."""

    def write_data(self, plan: Any, planner: Any) -> Any:
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            raise _cause(error) from None


class _Reader(FileSystemReader):
    """Reader of a distributed checkpoint whose metadata was read before, safely."""

    def __init__(self, path: Path, metadata: Metadata) -> None:
        super().__init__(path)
        self._metadata = metadata

    # without keyword arguments, PyTorch does not look for metadata of single ranks
    def read_metadata(self) -> Metadata:
        return self._metadata


class _Planner(DefaultLoadPlanner):
    """Planner that loads values other than tensors without running code that they contain."""

    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        loaded = _load(value)
        plain = io.BytesIO()
        torch.save(loaded, plain)
        plain.seek(0)
        super().load_bytes(read_item, plain)


def _rank_of(file: Path) -> int:
    """Return the rank that writes a file of a checkpoint."""
    match = OF_A_RANK.fullmatch(file.name)
    return int(match[1] or match[2]) if match else 0


def _on_all_ranks(work: Callable[[], T]) -> T:
    """Do some work on every rank; if it fails on one, raise on all, so that none waits for it."""
    failure: Exception | None = None
    try:
        result = work()
    except Exception as error:
        failure = error
    reports = Processes.all().all_gather_object(
        None if failure is None else (_first_line(failure), getattr(failure, "errno", None))
    )
    if failure is not None:
        raise failure
    for rank, report in enumerate(reports):
        if report is not None:
            of_rank = OSError(f"rank {rank}: {report[0]}")
            of_rank.errno = report[1]
            raise of_rank
    return result


@contextmanager
def _plain_errors() -> Iterator[None]:
    """Raise the error of a rank instead of PyTorch's exception about it, which is no Exception."""
    try:
        yield
    except CheckpointException as error:
        errors = [failure for failure, *_ in error.failures.values()]
        for kind in (KeyboardInterrupt, OSError, BaseException):
            for failure in errors:
                if isinstance(failure, kind):
                    raise failure from None
        raise RuntimeError(_first_line(error)) from None


def _first_line(error: BaseException) -> str:
    return (str(error) or repr(error)).splitlines()[0]


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence PyTorch's warning about a missing process group, since one process needs none."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield
