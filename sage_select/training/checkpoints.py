"""Checkpoints of a run: one format for any number of processes, replicated or sharded.

A checkpoint is a folder. Weights and the optimizer's state lie in it as PyTorch's distributed
checkpoints, each process having written its own shards; `run.pt` has what is the same in all of
them, `rng-*.pt` each one's generators. What one number of processes wrote, another reads.
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

UNREADABLE = (RuntimeError, EOFError, OSError, pickle.UnpicklingError, CheckpointException)


def save_checkpoint(
    folder: str | Path | RunFolder,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    run: dict[str, Any],
) -> None:
    """Put a run as it is after `step` updates on disk, whole or not at all: one collective call.

    Args:
        folder: Of the run; the same place for all processes.
        step: Updates taken.
        model: The policy, bare, in DistributedDataParallel or sharded by `fully_shard`.
        optimizer: Of its parameters.
        run: What else a resumed run needs, the same in every process.
    """
    processes = Processes.all()
    path = RunFolder(folder).checkpoint(step)
    partial = path.with_name(f"{path.name}.partial")
    if processes.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed here
        partial.mkdir(parents=True)
    processes.barrier()
    weights, moments = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": moments}
    with _quiet():
        state_dict_saver.save(state, checkpoint_id=partial, no_dist=processes.group is None)
    own = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():  # of this process's device: another machine may have fewer
        own["cuda"] = torch.cuda.get_rng_state()
    torch.save(own, partial / f"rng-{processes.rank}.pt")
    if processes.rank == 0:
        torch.save(run, partial / "run.pt")
    processes.barrier()
    if processes.rank == 0:
        for file in partial.iterdir():
            flush(file)
        shutil.rmtree(path, ignore_errors=True)  # of steps that are taken again
        partial.rename(path)
        flush(path.parent)


def load_newest(
    folder: str | Path | RunFolder, model: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, Any] | None:
    """Restore model, optimizer and generators from the newest checkpoint that can be read.

    Returns:
        What `save_checkpoint` was given as `run`; None where there is no checkpoint.

    Raises:
        ValueError: If there are checkpoints, and none can be read.
    """
    paths = RunFolder(folder).checkpoints()
    for path in paths:
        try:
            run: dict[str, Any] = torch.load(path / "run.pt", weights_only=True)
            weights, moments = get_state_dict(model, optimizer)
            state = {"model": weights, "optimizer": moments}
            with _quiet():
                alone = Processes.all().group is None
                state_dict_loader.load(state, checkpoint_id=path, no_dist=alone)
        except UNREADABLE as error:
            reason = (str(error) or repr(error)).splitlines()[0]
            warn(f"train: {path} cannot be read, trying an older one: {reason}", stacklevel=4)
            continue
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
        _restore_generators(path / f"rng-{Processes.all().rank}.pt")
        return run
    if paths:
        raise ValueError(
            f"train: none of the {len(paths)} checkpoints in {RunFolder(folder).path} can be read; "
            "start over in another folder"
        )
    return None


def drop_old(folder: str | Path | RunFolder, keep: int) -> None:
    """Delete all checkpoints but the newest few."""
    for old in RunFolder(folder).checkpoints()[keep:]:
        shutil.rmtree(old)


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """All weights on the CPU, by the names of the bare model: one collective call.

    Returns:
        The weights in process 0; nothing in the others of a model that is spread over processes.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights: dict[str, Any] = get_model_state_dict(model, options=options)
    first: dict[int, str] = {}
    for name, parameter in unwrapped(model).named_parameters(remove_duplicate=False):
        if name in weights:  # tied weights stay one tensor
            weights[name] = weights[first.setdefault(id(parameter), name)]
    return weights


def load_whole(model: nn.Module, weights: dict[str, Any]) -> None:
    """Put what `whole_weights` gave into a model, in whatever way it is spread over processes."""
    set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without PyTorch's warning that there is one process, when there is meant to be one."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


def _restore_generators(path: Path) -> None:
    if not path.exists():  # there are more processes now than there were
        return
    own = torch.load(path, weights_only=True)
    torch.set_rng_state(own["cpu"])
    if torch.cuda.is_available() and "cuda" in own:
        torch.cuda.set_rng_state(own["cuda"])
