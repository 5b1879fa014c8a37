"""Model preparation for training: sharding, compilation, activation checkpointing, saving."""

from pathlib import Path
from typing import Any

from torch import nn
from torch.distributed.fsdp import fully_shard

from sage_select.models.wrappers import unwrapped
from sage_select.system.processes import Processes
from sage_select.training.checkpoints import load_whole, read_best, whole_weights
from sage_select.training.run_folder import RunFolder
from sage_select.training.settings import UpdateSettings


def shard(model: nn.Module, **options: Any) -> nn.Module:
    """Shard a Hugging Face model over all processes with `fully_shard` (FSDP2), layer by layer.

    Args:
        model: The model on its device, with equal weights on all ranks.
        options: Arguments of `fully_shard`, such as `mesh` or `mp_policy`.

    Returns:
        The same model.

    Example:
        >>> torch.distributed.init_process_group()  # doctest: +SKIP
        >>> model = shard(model)  # doctest: +SKIP

    Raises:
        TypeError: If the model does not name its layer classes.
    """
    layers = set(getattr(model, "_no_split_modules", None) or ())
    if not layers:
        raise TypeError(
            f"shard: {type(model).__name__} does not name its layer classes "
            "(_no_split_modules); call fully_shard on each layer, then on the model"
        )
    for module in list(model.modules()):
        if type(module).__name__ in layers:
            fully_shard(module, **options)
    fully_shard(model, **options)  # last: the root takes the parameters that no layer has
    return model


def checkpoint_activations(model: nn.Module) -> None:
    """Turn on activation checkpointing in each layer of a Hugging Face model.

    Raises:
        TypeError: If the model does not support it.
    """
    for kind in ("activation", "gradient"):  # the name in newer and in older transformers
        enable = getattr(model, f"{kind}_checkpointing_enable", None)
        if enable is not None:
            enable({"use_reentrant": False})
            return
    raise TypeError(
        f"train: {type(model).__name__} has no gradient_checkpointing_enable(); checkpoint "
        "its layers yourself, and leave activation_checkpointing off"
    )


def make_ready(model: nn.Module, settings: UpdateSettings) -> None:
    """Apply compilation and activation checkpointing as set, and enter train mode."""
    inner = unwrapped(model)
    if settings.compile_model:
        # the body alone: PEFT's `base_model` would include the head
        language_model: Any = getattr(inner, "get_base_model", lambda: inner)()
        language_model.base_model.compile()
    if settings.activation_checkpointing:
        checkpoint_activations(inner)
    model.train()


def save_pretrained(model: nn.Module, folder: str | Path) -> None:
    """Save the whole model in Hugging Face format, however it is wrapped or sharded.

    Args:
        model: A Hugging Face model; all ranks call this together.
        folder: Folder that rank 0 writes to.
    """
    weights = whole_weights(model)
    if Processes.all().rank == 0:
        inner: Any = unwrapped(model)
        inner.save_pretrained(folder, state_dict=weights)
    Processes.all().barrier()


def load_best(model: nn.Module, folder: str | Path) -> dict[str, float]:
    """Load the best weights of a run into the model, and return their evaluation.

    Raises:
        FileNotFoundError: If the run was never evaluated.
        SpoiledFile: If the file of the best weights is damaged.
    """
    best = read_best(RunFolder.of(folder))
    load_whole(model, best["model"])
    evaluation: dict[str, float] = best["evaluation"]
    return evaluation
