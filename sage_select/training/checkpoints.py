"""Checkpoints of a run: one format for any number of processes, replicated or sharded.

A checkpoint is a folder. Weights and optimizer state are a PyTorch distributed checkpoint, to which
each rank writes its own shards. `run.pt` has the state that is equal on all ranks, `rng-*.pt` each
rank's random generators. A run can resume from it with a different number of processes.
"""

import pickle
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from warnings import warn

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)

from sage_select.models.wrappers import unwrapped
from sage_select.system.files import flush
from sage_select.system.processes import Processes
from sage_select.training.run_folder import RunFolder

# Errors of a truncated or damaged checkpoint: `torch.load`, the file system and the distributed
# reader each raise their own.
READ_ERRORS = (RuntimeError, EOFError, OSError, pickle.UnpicklingError, CheckpointException)


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
    """
    processes = Processes.all()
    path = RunFolder.of(folder).checkpoint(step)
    partial = path.with_name(f"{path.name}.partial")
    if processes.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)  # left by a killed run
        partial.mkdir(parents=True)
    processes.barrier()
    weights, moments = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": moments}
    with _quiet():
        state_dict_saver.save(state, checkpoint_id=partial, no_dist=processes.group is None)
    generators = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():  # this rank's device only: another machine may have fewer
        generators["cuda"] = torch.cuda.get_rng_state()
    torch.save(generators, partial / f"rng-{processes.rank}.pt")
    if processes.rank == 0:
        torch.save(run, partial / "run.pt")
    processes.barrier()
    if processes.rank == 0:
        # The contents must be on disk before the final name: a crash leaves a whole checkpoint or
        # none.
        for file in partial.iterdir():
            flush(file)
        shutil.rmtree(path, ignore_errors=True)  # exists if the run resumed from an older step
        partial.rename(path)
        flush(path.parent)


def load_newest(
    folder: str | Path | RunFolder, model: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, Any] | None:
    """Restore model, optimizer and generators from the newest readable checkpoint.

    Returns:
        The `run` that `save_checkpoint` was given; None if there is no checkpoint.

    Raises:
        ValueError: If there are checkpoints, but none can be read.
    """
    paths = RunFolder.of(folder).checkpoints()
    for path in paths:
        try:
            run: dict[str, Any] = torch.load(path / "run.pt", weights_only=True)
            weights, moments = get_state_dict(model, optimizer)
            state = {"model": weights, "optimizer": moments}
            with _quiet():
                no_dist = Processes.all().group is None
                state_dict_loader.load(state, checkpoint_id=path, no_dist=no_dist)
        except READ_ERRORS as error:
            reason = (str(error) or repr(error)).splitlines()[0]
            warn(f"train: {path} cannot be read, trying an older one: {reason}", stacklevel=4)
            continue
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
        _restore_generators(path / f"rng-{Processes.all().rank}.pt")
        return run
    if paths:
        raise ValueError(
            f"train: none of the {len(paths)} checkpoints in {RunFolder.of(folder).path} can be "
            "read; start over in another folder"
        )
    return None


def drop_old(folder: str | Path | RunFolder, keep: int) -> None:
    """Delete all checkpoints except the newest `keep`."""
    for old in RunFolder.of(folder).checkpoints()[keep:]:
        shutil.rmtree(old)


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


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence PyTorch's warning about a missing process group, since one process needs none."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


def _restore_generators(path: Path) -> None:
    if not path.exists():  # the run resumes with more processes than wrote the checkpoint
        return
    generators = torch.load(path, weights_only=True)
    torch.set_rng_state(generators["cpu"])
    if torch.cuda.is_available() and "cuda" in generators:
        torch.cuda.set_rng_state(generators["cuda"])
