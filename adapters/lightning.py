"""Lightning: a callback that selects, and a small module that trains on what was selected.

`SageSelection` is all that an existing LightningModule needs; `PreferenceModule` is a module of the
library's own. Both are for the package `lightning`.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
)
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
)
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from sage_select.data.dataset import PreferenceDataset
from sage_select.metrics import preference_metrics
from sage_select.models.attention import packed_attention, packs
from sage_select.models.reader import Reader
from sage_select.models.wrappers import is_sharded
from sage_select.pairs import PairLogps
from sage_select.references.store import ReferenceStore
from sage_select.selecting.loader import SelectiveLoader
from sage_select.selecting.selector import check_same_precision
from sage_select.system.processes import Processes
from sage_select.training.micro_batches import MicroBatch as MicroBatch
from sage_select.training.micro_batches import dealt
from sage_select.training.refusals import Refusal, refuse
from sage_select.training.settings import Training
from sage_select.training.sharding import make_ready, shard
from sage_select.training.update import (
    Passes,
    clip_gradients,
    optimizer_of,
    preference_losses,
    weighted,
)

AUTOCASTS = {"32-true": None, "bf16-mixed": torch.bfloat16}
"""The trainer's precisions that are supported, with the autocast dtype of each."""


class Batches:
    """A sized iterable for a trainer, which asks for its length and begins with it when it runs.

    Lightning fetches nothing ahead from what has a length.

    Args:
        count: How many batches there are.
        begin: Called when the first is wanted.
    """

    def __init__(self, count: Callable[[], int], begin: Callable[[], Iterator[Any]]) -> None:
        self._count = count
        self._begin = begin

    def __len__(self) -> int:
        return self._count()

    def __iter__(self) -> Iterator[Any]:
        yield from self._begin()  # a generator: nothing happens before the first batch is wanted

    def state_dict(self) -> dict[str, Any]:
        """Nothing: where a run stands is the callback's to say. Lightning warns without this."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing, likewise."""


def held_out_batches(pairs: PreferenceDataset) -> Batches:
    """Pairs for `PreferenceModule` to validate on: one batch, which all processes measure together.

    Args:
        pairs: Rows of the loader's dataset or beside them, `dataset.take(rows)`, whose reference
            log-probs are known.

    Example:
        >>> len(held_out_batches(dataset.take(held_out)))  # doctest: +SKIP
        1
    """
    return Batches(lambda: 1, lambda: iter([pairs]))


class SageSelection(Callback):
    """Lets a Lightning run train on the pairs that a loader selects.

    `batches` are the train batches of the whole run for this process: one epoch, in
    `accumulate_grad_batches` passes per optimizer step. An interval's pool is scored when its first
    pass is due, with the policy as it is after all earlier updates. What is kept stands in the
    checkpoints; a resumed run scores no interval again, and repeats or loses no pair.

    A training step returns the mean loss of its pairs, as ever. Only passes of the run's last batch
    may hold fewer pairs than others; the callback weighs their losses before the backward pass, so
    that an update follows the mean over the pairs of its batch.

    Strategies are those of one device, DDP, and FSDP2 (`ModelParallelStrategy`), with any number of
    processes that divides the loader's batches; a run that some number of them began, another goes
    on with. FSDP2 shards the policy at its root, which is what scoring calls. The trainer's
    `use_distributed_sampler` does not matter: batches are dealt to processes here.

    Args:
        loader: Batches over all processes. Its model is the Hugging Face model inside the
            LightningModule. Where its reference is a store, all processes measure together what is
            missing when the trainer begins, on the device on which the policy came.
        collate: Makes of some pairs what the LightningModule's `training_step` takes; by default it
            gets a `MicroBatch`.

    Attributes:
        batches: For `Trainer.fit`, or to be returned by a `train_dataloader`.

    Example:
        >>> loader = loader_of(config, pairs, policy, reference, batch_size=16)  # doctest: +SKIP
        >>> selection = SageSelection(loader)  # doctest: +SKIP
        >>> trainer = Trainer(max_epochs=1, callbacks=[selection])  # doctest: +SKIP
        >>> trainer.fit(PreferenceModule(loader, Training()), selection.batches)  # doctest: +SKIP

    Raises:
        TypeError: From `fit`, if its strategy or LightningModule is not supported.
        ValueError: From `fit`, if the trainer would cut the run short, deal other batches, compute
            in another precision than the selector, or go on with another run's checkpoint.
    """

    def __init__(
        self,
        loader: SelectiveLoader,
        *,
        collate: Callable[[PreferenceDataset], Any] | None = None,
    ) -> None:
        self.loader = loader
        self.collate = collate
        self.batches = Batches(self._count, self._passes)
        self._trainer: Trainer | None = None
        self._weight = 1.0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what would go wrong, then complete the reference, with the policy as it came."""
        if stage == "fit":
            self._trainer = trainer
            refuse("SageSelection", _refusals(trainer, pl_module, self.loader))
            precision = str(trainer.precision)
            call = f"SageSelection: Trainer(precision={precision!r})"
            check_same_precision(self.loader.selector, AUTOCASTS[precision], call)
        if isinstance(self.loader.selector.reference, ReferenceStore):
            self.loader.selector.reference.fill()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a model that is not the one to train, or that would drift apart."""
        model = self.loader.model
        if not any(module is model for module in pl_module.modules()):
            raise ValueError(
                "SageSelection: the loader scores pools with another model than "
                f"{type(pl_module).__name__} trains; make the loader with the very model that the "
                "module holds"
            )
        sharded = isinstance(trainer.strategy, ModelParallelStrategy)
        if sharded and not (is_sharded(model) and isinstance(model, FSDPModule)):
            raise TypeError(
                f"SageSelection: ModelParallelStrategy leaves it to {type(pl_module).__name__} to "
                f"shard, and the {type(model).__name__} that is scored is not sharded at its root; "
                "call shard(model, mesh=self.device_mesh['data_parallel']) in configure_model "
                "(sage_select.adapters.plain.shard)"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse other batches than ours, and a start at another place than the loader's."""
        if trainer.train_dataloader is not self.batches:
            raise ValueError(
                "SageSelection: the trainer was given other batches than the selected ones; call "
                "trainer.fit(module, selection.batches), or return them from train_dataloader"
            )
        if trainer.global_step != self.loader.step:
            raise ValueError(
                f"SageSelection: the trainer stands at step {trainer.global_step}, the loader at "
                f"{self.loader.step}; a run goes on with fit(ckpt_path=...) from a checkpoint that "
                "was written with this callback, and begins with a new loader"
            )

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        """Weigh a pass that holds fewer pairs than others."""
        if self._weight != 1:
            loss.mul_(self._weight)  # in place, since Lightning goes on with the loss it has

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Log what is selected: the same in every process."""
        metrics = self.loader.metrics().items()
        pl_module.log_dict({f"selection/{name}": float(x) for name, x in metrics}, batch_size=1)

    def state_dict(self) -> dict[str, Any]:
        """Where the run stands after the optimizer steps taken so far."""
        if self._trainer is None:
            return {}
        self.loader.step = self._trainer.global_step
        return self.loader.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there, if this is a fit."""
        if self._trainer is not None and self._trainer.state.fn == "fit":
            self.loader.load_state_dict(state)

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Begin an update that was under way from its first pass, in as many passes as now."""
        if trainer.state.fn != "fit":
            return
        if self.state_key not in checkpoint["callbacks"]:
            raise ValueError(
                f"SageSelection: the checkpoint of step {checkpoint['global_step']} was written "
                "without this callback, and does not say what was kept; go on from one that was, "
                "or start over with its weights alone"
            )
        step = checkpoint["callbacks"][self.state_key]["step"]
        passes = step * trainer.accumulate_grad_batches
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        if progress["current"]["ready"] == passes:
            return
        progress["is_last_batch"] = step == len(self.loader)
        for counts in (progress["current"], progress["total"]):
            open_end = counts["processed"] - counts["completed"]  # it was written within a pass
            counts.update(ready=passes, started=passes, processed=passes)
            counts["completed"] = passes - open_end

    def _count(self) -> int:
        return len(self.loader) * self._attached().accumulate_grad_batches

    def _passes(self) -> Iterator[Any]:
        trainer, loader, processes = self._attached(), self.loader, Processes.all()
        passes = trainer.accumulate_grad_batches
        size = loader.timeline.batch_size // (processes.size * passes)
        for batches in loader.decided():
            for batch in batches:
                for micro in dealt(batch, processes, size, passes=passes):
                    self._weight = micro.mean_share
                    pairs = loader.dataset.take(micro.rows)
                    yield micro if self.collate is None else self.collate(pairs)
            for optimizer in trainer.optimizers:
                optimizer.zero_grad()  # Lightning would in the next pass: scoring needs the room

    def _attached(self) -> Trainer:
        if self._trainer is None:
            raise ValueError(
                "SageSelection: its batches are asked for, but it is not among the trainer's "
                "callbacks; use Trainer(callbacks=[selection]). Before fit only len(loader), the "
                "optimizer steps, is known"
            )
        return self._trainer


class PreferenceModule(LightningModule):
    """Trains a loader's policy on the pairs that it selects: NCA with AdamW, by default.

    Of the settings, those that are the Trainer's to say are not looked at: micro-batches,
    precision, evaluations and checkpoints. A `gradient_clip_val` of the Trainer goes before
    `max_grad_norm`.

    Logs `loss`, `accuracy`, `margin` and the rewards over all pairs of each update, its
    `gradient_norm`, and `held_out/loss` and so on for each validation.

    Args:
        loader: Its model is trained, `self.policy`; its reference is the loss's.
        training: How to train.

    Example:
        >>> module = PreferenceModule(loader, Training(learning_rate=1e-6))  # doctest: +SKIP
        >>> trainer.fit(module, selection.batches, held_out_batches(held_out))  # doctest: +SKIP
    """

    def __init__(self, loader: SelectiveLoader, training: Training) -> None:
        super().__init__()
        self.loader = loader
        self.policy: nn.Module = loader.model
        self.settings = training
        self._packed = False
        self._passes = Passes()  # of the update under way

    def configure_model(self) -> None:
        """Shard the policy where the strategy is FSDP2."""
        if self.device_mesh is not None and not isinstance(self.policy, FSDPModule):
            shard(self.policy, mesh=self.device_mesh["data_parallel"])

    def configure_optimizers(self) -> Any:
        """AdamW, and a schedule over the exact total of steps."""
        optimizer, scheduler = optimizer_of(self.policy, self.settings, len(self.loader))
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def on_fit_start(self) -> None:
        """Find out, on the device and in all processes together, how batches can be made."""
        # Lightning leaves modes as they are, and from_pretrained gives a model in eval mode
        make_ready(self.policy, self.settings)
        self.training_settings.reader.check(self.policy, self.loader.dataset)

    def training_step(self, batch: MicroBatch, batch_idx: int) -> Tensor:
        """The mean loss of a micro-batch."""
        training, pairs = self.training_settings, self.loader.dataset.take(batch.rows)
        reference = self.loader.selector.reference.take(batch.rows)
        with training.reader.updating(self.policy, pairs):
            self._packed = packs(self.policy)
            policy, losses = preference_losses(self.policy, pairs, reference, training)
        losses = weighted(losses, batch)
        self._passes.add(batch, policy, losses)
        return losses.mean()

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Backward, in which a packed batch may need its attention again."""
        with packed_attention(self.policy) if self._packed else nullcontext():
            super().backward(loss, *args, **kwargs)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip, and log the update.

        Raises:
            FloatingPointError: If the gradient is not finite.
            ValueError: If the Trainer clips by value.
        """
        if gradient_clip_algorithm == "value":
            raise ValueError(
                "PreferenceModule: gradients are clipped to a norm; leave out "
                "Trainer(gradient_clip_algorithm='value')"
            )
        limit = self.settings.max_grad_norm if gradient_clip_val is None else gradient_clip_val
        norm = clip_gradients(self.policy, limit)
        policy, losses = self._passes.gathered(Processes.all())
        if not math.isfinite(norm):
            raise FloatingPointError(
                f"PreferenceModule: step {self.trainer.global_step}: the gradient has norm {norm}; "
                f"the rows of the batch are {policy.index.tolist()}"
            )
        self._log_all("", policy, losses, {"gradient_norm": norm}, on_step=True, on_epoch=False)

    def transfer_batch_to_device(
        self, batch: Any, device: torch.device, dataloader_idx: int
    ) -> Any:
        """Batches are rows or pairs; tokens go to the device when they are laid out."""
        return batch

    def validation_step(self, pairs: PreferenceDataset, batch_idx: int) -> None:
        """Measure held-out pairs, which are the same in every process."""
        training = self.training_settings
        reader = replace(training.reader, show_progress=False)
        with torch.inference_mode(False):  # what is gathered or cached meanwhile is trained on, too
            policy = reader(self.policy, pairs)
        losses = training.loss(
            policy, self.loader.selector.reference.take(pairs.index), beta=training.beta
        )
        self._log_all("held_out/", policy, losses, {}, on_step=False, on_epoch=True, sync_dist=True)

    @property
    def training_settings(self) -> Training:
        """The settings, with the precision that the Trainer has."""
        precision = AUTOCASTS.get(str(self.trainer.precision))
        reader: Reader = replace(self.settings.reader, mixed_precision=precision)
        return self.settings.replace(reader=reader)

    def _log_all(
        self,
        prefix: str,
        policy: PairLogps,
        losses: Tensor,
        others: dict[str, float],
        **options: Any,
    ) -> None:
        known = self.loader.selector.reference.take(policy.index.numpy())
        metrics = preference_metrics(policy, known, beta=self.settings.beta) | others
        size = len(policy.index)
        self.log(f"{prefix}loss", losses.mean().item(), prog_bar=True, batch_size=size, **options)
        self.log_dict({prefix + name: x for name, x in metrics.items()}, batch_size=size, **options)


def _refusals(
    trainer: Any, pl_module: LightningModule, loader: SelectiveLoader
) -> Iterator[Refusal]:
    """Everything about a trainer and a module that does not go with selection."""
    yield from _strategy(trainer)
    yield from _settings(trainer, loader)
    if not pl_module.automatic_optimization:
        yield Refusal(
            f"{type(pl_module).__name__} steps its optimizers itself "
            "(automatic_optimization=False), so nobody knows which pairs an update is made of",
            "return the loss from training_step instead",
        )


def _strategy(trainer: Any) -> Iterator[Refusal]:
    """Strategies under which weights or gradients are not where this library looks for them."""
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
            f"{name} steps and accumulates itself, and gathers weights module by module",
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
                "parallelism, which is what 'auto' means), and that is not supported",
                f"use strategy={fsdp2}",
            )


def _settings(trainer: Any, loader: SelectiveLoader) -> Iterator[Refusal]:
    """Settings that would end the run early, run it twice, change its batches or its precision."""
    steps, size = len(loader), loader.timeline.batch_size
    passes, processes = trainer.accumulate_grad_batches, trainer.world_size
    changing = (BatchSizeFinder, GradientAccumulationScheduler, LearningRateFinder)
    for callback in trainer.callbacks:
        if isinstance(callback, changing):
            yield Refusal(
                f"{type(callback).__name__} changes the run while it is under way, and its batches "
                "and schedule are planned beforehand",
                "leave it out",
            )
    limit = trainer.limit_train_batches
    cut = limit < (steps * passes if isinstance(limit, int) else 1.0)
    if trainer.max_epochs != 1:
        yield Refusal(
            f"Trainer(max_epochs={trainer.max_epochs}) does not fit: the batches are those of the "
            "whole run, however many epochs it has",
            "set max_epochs=1",
        )
    if 0 <= trainer.max_steps < steps:
        yield Refusal(
            f"Trainer(max_steps={trainer.max_steps}) does not fit: the run has {steps} steps",
            "leave it out, and fast_dev_run as well",
        )
    if trainer.overfit_batches:
        yield Refusal(
            f"Trainer(overfit_batches={trainer.overfit_batches}) does not fit: it would cut the "
            "run short",
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
            "Trainer(reload_dataloaders_every_n_epochs) does not fit: the run goes through its "
            "batches once",
            "leave it out",
        )
    if size % (passes * processes):
        yield Refusal(
            f"Trainer(accumulate_grad_batches={passes}) does not fit: the loader's {size} pairs "
            "per optimizer step cannot be dealt evenly to processes x passes = "
            f"{processes} x {passes}",
            "choose it so that the product divides them, or make a loader with another batch size",
        )
    if (precision := str(trainer.precision)) not in AUTOCASTS:
        yield Refusal(
            f"Trainer(precision={precision!r}) is not supported",
            "use 'bf16-mixed', or '32-true', which leaves weights as they are: for weights in "
            "bfloat16, load the policy in bfloat16",
        )
