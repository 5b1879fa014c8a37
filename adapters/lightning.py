"""Lightning: a callback that selects pairs, and a small module that trains on them.

An existing LightningModule needs `SageSelection` only; `PreferenceModule` is a ready-made module.
Both are for the package `lightning`.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any
from warnings import warn

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import (
    ModelParallelStrategy,
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
from sage_select.selecting.answers import checked_logps
from sage_select.selecting.loader import SelectiveLoader
from sage_select.selecting.selector import check_same_precision
from sage_select.system.processes import Processes
from sage_select.training.micro_batches import MicroBatch as MicroBatch
from sage_select.training.micro_batches import dealt
from sage_select.training.refusals import refuse
from sage_select.training.settings import Training
from sage_select.training.sharding import make_ready, shard
from sage_select.training.update import (
    Passes,
    clip_gradients,
    optimizer_of,
    preference_losses,
    weighted,
)

from .lightning_refusals import AUTOCASTS, refusals_of


class Batches:
    """An iterable for a Trainer that is sized and starts only when it is iterated.

    It has a length since Lightning prefetches from iterables without one, and a prefetched batch
    would be selected before the update that it should follow.

    Args:
        count: Returns the number of batches.
        begin: Returns an iterator over the batches; called when the first one is requested.
    """

    def __init__(self, count: Callable[[], int], begin: Callable[[], Iterator[Any]]) -> None:
        self._count = count
        self._begin = begin

    def __len__(self) -> int:
        return self._count()

    def __iter__(self) -> Iterator[Any]:
        yield from self._begin()  # a generator: nothing runs before the first batch is requested

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the callback saves the state. Lightning warns without this method."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Do nothing: the callback restores the state."""


def held_out_batches(pairs: PreferenceDataset) -> Batches:
    """Return validation batches for `PreferenceModule`: one batch, measured by all ranks together.

    Args:
        pairs: Held-out pairs, `dataset.take(rows)`, in the loader's dataset or not; the loader's
            reference must have their log-probs.

    Example:
        >>> len(held_out_batches(dataset.take(held_out)))  # doctest: +SKIP
        1
    """
    return Batches(lambda: 1, lambda: iter([pairs]))


class SageSelection(Callback):
    """A callback that lets a Lightning run train on the pairs that a loader selects.

    `batches` are this rank's training batches for the whole run: one epoch, with
    `accumulate_grad_batches` passes per optimizer step. An interval's pool is scored when its first
    pass is due, with the policy after all earlier updates. Checkpoints contain the kept pairs; a
    resumed run scores no interval again, and repeats or loses no pair.

    A training step returns the mean loss of its pairs, as usual. Only passes of the run's last
    batch may have fewer pairs than the others; the callback weights their losses before the
    backward pass, so that an update follows the mean over all pairs of its batch.

    It supports the strategies for one device, DDP, and FSDP2 (`ModelParallelStrategy`), with any
    number of processes that divides the loader's batches; a run can resume with another number.
    Under FSDP2 the policy must be sharded at its root, since scoring calls the root. The trainer's
    `use_distributed_sampler` has no effect: the callback deals batches to processes.

    Args:
        loader: Batches over all processes. Its model is the Hugging Face model inside the
            LightningModule. If its reference is a store, all processes measure the missing
            log-probs together when the trainer starts, on the policy's current device.
        collate: Turns the pairs of a pass into the batch that the LightningModule's `training_step`
            takes; by default the batch is a `MicroBatch`.

    Attributes:
        batches: Pass them to `Trainer.fit`, or return them from `train_dataloader`.

    Example:
        >>> loader = build_loader(config, pairs, policy, reference, batch_size=16)  # doctest: +SKIP
        >>> selection = SageSelection(loader)  # doctest: +SKIP
        >>> trainer = Trainer(max_epochs=1, callbacks=[selection])  # doctest: +SKIP
        >>> trainer.fit(PreferenceModule(loader, Training()), selection.batches)  # doctest: +SKIP

    Raises:
        TypeError: From `fit`, if its strategy or LightningModule is not supported.
        ValueError: From `fit`, if the trainer would end the run early, train on other batches,
            compute in another precision than the selector, or resume another run's checkpoint.
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
        """Refuse incompatible settings, then complete the reference with the untrained policy."""
        if stage == "fit":
            self._trainer = trainer
            refuse("SageSelection", refusals_of(trainer, pl_module, self.loader))
            precision = str(trainer.precision)
            reader = Reader(mixed_precision=AUTOCASTS[precision])
            call = f"SageSelection: Trainer(precision={precision!r})"
            check_same_precision(self.loader.selector, reader, call)
        if isinstance(self.loader.selector.reference, ReferenceStore):
            self.loader.selector.reference.fill()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a loader of another model, or a policy that is not sharded at its root."""
        model = self.loader.model
        if not any(module is model for module in pl_module.modules()):
            raise ValueError(
                "SageSelection: the loader scores pools with a different model than "
                f"{type(pl_module).__name__} trains; make the loader with the model object that "
                "the module contains"
            )
        sharded = isinstance(trainer.strategy, ModelParallelStrategy)
        if sharded and not (is_sharded(model) and isinstance(model, FSDPModule)):
            raise TypeError(
                "SageSelection: ModelParallelStrategy requires "
                f"{type(pl_module).__name__} to shard its model, and the {type(model).__name__} "
                "that is scored is not sharded at its root; call "
                "shard(model, mesh=self.device_mesh['data_parallel']) in configure_model "
                "(sage_select.adapters.plain.shard)"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse other batches than `batches`, and a trainer at another step than the loader."""
        if trainer.train_dataloader is not self.batches:
            raise ValueError(
                "SageSelection: the trainer was not given the selected batches; call "
                "trainer.fit(module, selection.batches), or return them from train_dataloader"
            )
        if trainer.global_step != self.loader.step:
            raise ValueError(
                f"SageSelection: the trainer is at step {trainer.global_step}, but the loader is "
                f"at {self.loader.step}; start a run with a new loader, or resume one with "
                "fit(ckpt_path=...) from a checkpoint that was written with this callback"
            )

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        """Weight the loss of a pass that has fewer pairs than the others."""
        if self._weight != 1:
            loss.mul_(self._weight)  # in place, since Lightning ignores the hook's return value

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Log the selection's metrics, which are equal on all ranks."""
        metrics = self.loader.metrics().items()
        pl_module.log_dict({f"selection/{name}": float(x) for name, x in metrics}, batch_size=1)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn of a run that a callback or the module ended early (`trainer.should_stop`)."""
        if (steps := trainer.global_step) < len(self.loader):
            warn(
                f"SageSelection: the run ended after {steps} of {len(self.loader)} updates, since "
                "trainer.should_stop was set; later pools were not selected, and the schedule is "
                "not done. Resume from its checkpoint with fit(ckpt_path=...) to train the rest",
                stacklevel=2,
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the loader's state after the optimizer steps taken so far."""
        if self._trainer is None:
            return {}
        # `decided` hands out whole intervals, so the trainer counts the steps.
        self.loader.step = self._trainer.global_step
        return self.loader.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the loader's state, if this is `fit`; other calls train nothing."""
        if self._trainer is not None and self._trainer.state.fn == "fit":
            self.loader.load_state_dict(state)

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Restart an unfinished update from its first pass, with the current passes per update."""
        if trainer.state.fn != "fit":
            return
        if self.state_key not in checkpoint["callbacks"]:
            raise ValueError(
                f"SageSelection: the checkpoint of step {checkpoint['global_step']} was written "
                "without this callback, so the kept pairs are not in it; resume from one that was "
                "written with it, or start a new run from its weights alone"
            )
        step = checkpoint["callbacks"][self.state_key]["step"]
        passes = step * trainer.accumulate_grad_batches
        if step < len(self.loader):  # after a run that ended early, its epoch counts as done
            epochs = checkpoint["loops"]["fit_loop"]["epoch_progress"]
            for counts in (epochs["current"], epochs["total"]):
                counts.update(processed=0, completed=0)
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        if progress["current"]["ready"] == passes:
            return
        progress["is_last_batch"] = step == len(self.loader)
        for counts in (progress["current"], progress["total"]):
            uncompleted = counts["processed"] - counts["completed"]  # 1 if saved within a pass
            counts.update(ready=passes, started=passes, processed=passes)
            counts["completed"] = passes - uncompleted

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
                optimizer.zero_grad()  # Lightning waits for the next pass; scoring needs the memory

    def _attached(self) -> Trainer:
        if self._trainer is None:
            raise ValueError(
                "SageSelection: its batches were requested, but it is not one of the trainer's "
                "callbacks; use Trainer(callbacks=[selection]). Before fit, use len(loader), the "
                "number of optimizer steps"
            )
        return self._trainer


class PreferenceModule(LightningModule):
    """A LightningModule that trains a loader's policy on the selected pairs: NCA by default.

    The Trainer sets micro-batches, precision, evaluations and checkpoints, and these settings of
    `training` are ignored. The Trainer's `gradient_clip_val` overrides `max_grad_norm`.

    It logs `loss`, `accuracy`, `margin` and the rewards over all pairs of each update, its
    `gradient_norm`, and `held_out/loss` and so on for each validation.

    Args:
        loader: The selected batches. Its model becomes `self.policy` and is trained; its reference
            is used in the loss.
        training: Loss, beta, optimizer, schedule, clipping and reader.

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
        self._passes = Passes()  # of the current update

    def configure_model(self) -> None:
        """Shard the policy if the strategy is FSDP2."""
        if self.device_mesh is not None and not isinstance(self.policy, FSDPModule):
            shard(self.policy, mesh=self.device_mesh["data_parallel"])

    def configure_optimizers(self) -> Any:
        """Return AdamW and a schedule over the exact number of steps."""
        optimizer, scheduler = optimizer_of(self.policy, self.settings, len(self.loader))
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def on_fit_start(self) -> None:
        """Enter train mode, and check on the device how the policy's batches can be laid out."""
        # Lightning does not change modes, and from_pretrained returns a model in eval mode.
        make_ready(self.policy, self.settings)
        self.training_settings.reader.check(self.policy, self.loader.dataset)

    def training_step(self, batch: MicroBatch, batch_idx: int) -> Tensor:
        """Return the mean loss of a micro-batch."""
        training, pairs = self.training_settings, self.loader.dataset.take(batch.rows)
        reference = self.loader.selector.reference.take(batch.rows)
        with training.reader.updating(self.policy, pairs):
            self._packed = packs(self.policy)
            policy, losses = preference_losses(self.policy, pairs, reference, training)
        losses = weighted(losses, batch)
        self._passes.add(batch, policy, losses)
        return losses.mean()

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Run the backward pass, in which checkpointed layers of a packed batch run again."""
        with packed_attention(self.policy) if self._packed else nullcontext():
            super().backward(loss, *args, **kwargs)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the gradients, and log the update.

        Raises:
            FloatingPointError: If the gradient is not finite.
            ValueError: If the Trainer clips by value.
        """
        if gradient_clip_algorithm == "value":
            raise ValueError(
                "PreferenceModule: gradients are clipped by norm; leave out "
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
        """Return the batch unchanged: tokens of its rows or pairs are moved when laid out."""
        return batch

    def validation_step(self, pairs: PreferenceDataset, batch_idx: int) -> None:
        """Measure the held-out pairs, which are equal on all ranks, and log their metrics."""
        training = self.training_settings
        reader = replace(training.reader, show_progress=False)
        # Lightning validates in inference mode, but tensors cached here are used in training too.
        with torch.inference_mode(False):
            policy = reader(self.policy, pairs)
        losses = training.loss(
            policy, self.loader.selector.reference.take(pairs.index), beta=training.beta
        )
        self._log_all("held_out/", policy, losses, {}, on_step=False, on_epoch=True, sync_dist=True)

    @property
    def training_settings(self) -> Training:
        """The training settings, with the Trainer's precision."""
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
        answer = self.loader.selector.reference.take(policy.index.numpy())
        reference_logps = checked_logps(answer, "PreferenceModule: reference", policy.index.numpy())
        metrics = preference_metrics(policy, reference_logps, beta=self.settings.beta) | others
        size = len(policy.index)
        self.log(f"{prefix}loss", losses.mean().item(), prog_bar=True, batch_size=size, **options)
        self.log_dict({prefix + name: x for name, x in metrics.items()}, batch_size=size, **options)
