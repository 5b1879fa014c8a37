"""Settings and strategies of a Lightning Trainer that do not work with selection."""

from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import LightningModule, callbacks
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
)

from sage_select.selecting.loader import SelectiveLoader
from sage_select.training.refusals import Refusal

AUTOCASTS = {"32-true": None, "bf16-mixed": torch.bfloat16}
"""The supported precisions of a Trainer, with the autocast dtype of each."""

_RESUMED = (
    "leave it out; to train in several sessions, save with "
    "ModelCheckpoint(every_n_train_steps=..., save_last=True), end the process, and resume with "
    "fit(ckpt_path=...)"
)
CALLBACKS: dict[str, tuple[str, str]] = {
    "BatchSizeFinder": (
        "changes the run while it trains, but batches and schedule are planned before it starts",
        "leave it out",
    ),
    "GradientAccumulationScheduler": (
        "changes the run while it trains, but batches and schedule are planned before it starts",
        "leave it out, and set Trainer(accumulate_grad_batches=...)",
    ),
    "LearningRateFinder": (
        "changes the run while it trains, but batches and schedule are planned before it starts",
        "leave it out, and find the rate before selection is added",
    ),
    "StochasticWeightAveraging": (
        "replaces the trained weights by an average, and the schedule by its own",
        "leave it out, and average the weights of saved checkpoints after the run",
    ),
    "WeightAveraging": (  # EMAWeightAveraging as well
        "puts an average in the place of the trained weights, in validation, in checkpoints and "
        "at the end",
        "leave it out, and average the weights of saved checkpoints after the run",
    ),
    "ModelPruning": (
        "sets trained weights to zero during the run, so pools would be scored with another policy "
        "than the updates made",
        "leave it out, and prune the trained model after the run",
    ),
    "BaseFinetuning": (  # BackboneFinetuning as well
        "freezes and unfreezes weights by epochs, but the whole run is one epoch",
        "leave it out, and freeze weights with requires_grad_(False) before fit",
    ),
    "EarlyStopping": (
        "would end the run before all selected pairs are trained and the schedule is done",
        "leave it out, and keep the best weights with ModelCheckpoint(monitor='held_out/loss')",
    ),
    "Timer": (
        "with a duration, as of Trainer(max_time=...), would end the run before all selected pairs "
        "are trained and the schedule is done",
        _RESUMED,
    ),
}
"""Callbacks that are refused, with their subclasses: reason and fix, by the name of the class.

By name, since older versions of Lightning do not have all of them."""


def refusals_of(
    trainer: Any, pl_module: LightningModule, loader: SelectiveLoader
) -> Iterator[Refusal]:
    """Yield everything about a trainer and a module that is incompatible with selection."""
    yield from _strategy_refusals(trainer)
    yield from _settings_refusals(trainer, loader)
    yield from _callback_refusals(trainer)
    if not pl_module.automatic_optimization:
        yield Refusal(
            f"{type(pl_module).__name__} steps its optimizers itself "
            "(automatic_optimization=False), so the pairs of an update cannot be determined",
            "return the loss from training_step instead",
        )


def _callback_refusals(trainer: Any) -> Iterator[Refusal]:
    """Refuse callbacks that end the run early, or change weights or batches."""
    for name, (reason, fix) in CALLBACKS.items():
        kind = getattr(callbacks, name, ())
        for callback in trainer.callbacks:
            if not isinstance(callback, kind):
                continue
            if name == "Timer" and callback.time_remaining() is None:
                continue  # without a duration it only measures
            yield Refusal(f"{type(callback).__name__} {reason}", fix)


def _strategy_refusals(trainer: Any) -> Iterator[Refusal]:
    """Refuse strategies whose weights cannot be scored or whose gradients cannot be clipped."""
    strategy = trainer.strategy
    name, size = type(strategy).__name__, trainer.world_size
    fsdp2 = f"ModelParallelStrategy(data_parallel_size={size}, tensor_parallel_size=1)"
    if isinstance(strategy, FSDPStrategy):
        yield Refusal(
            f"{name} shards with FSDP1, whose weights cannot be scored",
            f"use strategy={fsdp2} (FSDP2)",
        )
    elif isinstance(strategy, DeepSpeedStrategy):
        yield Refusal(
            f"{name} runs optimizer steps and accumulation itself, and gathers weights module by "
            "module",
            f"use strategy={fsdp2} (FSDP2), or 'ddp'",
        )
    elif not isinstance(strategy, SingleDeviceStrategy | DDPStrategy | ModelParallelStrategy):
        yield Refusal(
            f"{name} is not supported",
            f"use one device, strategy='ddp', or strategy={fsdp2} (FSDP2)",
        )
    elif isinstance(strategy, ModelParallelStrategy):
        parts = strategy.device_mesh["tensor_parallel"].size()
        if parts > 1:
            yield Refusal(
                f"ModelParallelStrategy splits each layer over {parts} processes (tensor "
                "parallelism, the meaning of 'auto'), which is not supported",
                f"use strategy={fsdp2}",
            )
    passes = trainer.accumulate_grad_batches
    static_graph = getattr(strategy, "_ddp_kwargs", {}).get("static_graph")
    if static_graph and passes > 1:
        yield Refusal(
            f"{name}(static_graph=True) records its graph in the first backward pass, which "
            f"accumulate_grad_batches={passes} does not synchronise, so gradients would be lost",
            "leave static_graph out, or set accumulate_grad_batches=1",
        )


def _settings_refusals(trainer: Any, loader: SelectiveLoader) -> Iterator[Refusal]:
    """Refuse settings that would end the run early, repeat it, or change batches or precision."""
    steps, size = len(loader), loader.timeline.batch_size
    passes, processes = trainer.accumulate_grad_batches, trainer.world_size
    limit = trainer.limit_train_batches
    # Lightning counts batches if it is an int, and takes a share of them if it is a float.
    cut = limit < (steps * passes if isinstance(limit, int) else 1.0)
    if trainer.max_epochs != 1:
        yield Refusal(
            f"Trainer(max_epochs={trainer.max_epochs}) does not fit: one pass over the batches is "
            "the whole run, with all its epochs",
            "set max_epochs=1",
        )
    if 0 <= trainer.max_steps < steps:
        yield Refusal(
            f"Trainer(max_steps={trainer.max_steps}) does not fit: the run has {steps} steps",
            "leave it out, and fast_dev_run as well",
        )
    if trainer.overfit_batches:
        yield Refusal(
            f"Trainer(overfit_batches={trainer.overfit_batches}) does not fit: it would end the "
            "run early",
            "leave it out",
        )
    if cut:
        yield Refusal(
            f"Trainer(limit_train_batches={limit}) does not fit: the run has {steps * passes} "
            "batches",
            "leave it out, and fast_dev_run as well",
        )
    if trainer.reload_dataloaders_every_n_epochs:
        yield Refusal(
            "Trainer(reload_dataloaders_every_n_epochs) does not fit: the run iterates its batches "
            "once",
            "leave it out",
        )
    if size % (passes * processes):
        yield Refusal(
            f"Trainer(accumulate_grad_batches={passes}) does not fit: the loader's {size} pairs "
            "per optimizer step cannot be dealt evenly to processes x passes = "
            f"{processes} x {passes}",
            "choose a value such that the product divides the pairs, or make a loader with another "
            "batch size",
        )
    if (precision := str(trainer.precision)) not in AUTOCASTS:
        yield Refusal(
            f"Trainer(precision={precision!r}) is not supported",
            "use 'bf16-mixed' or '32-true'; '32-true' keeps the dtype of the weights, so for "
            "bfloat16 weights load the policy in bfloat16",
        )
