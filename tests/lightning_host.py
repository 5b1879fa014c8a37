"""The contract's run on Lightning."""

from pathlib import Path
from typing import Any

from contract import BATCH, BETA, LEARNING_RATE, Case, config, dataset, policy
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.environments import LightningEnvironment, TorchElasticEnvironment
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.tensor import DTensor

from sage_select import ReferenceStore, SelectionLog, build_loader
from sage_select.adapters.lightning import PreferenceModule, SageSelection
from sage_select.adapters.plain import Training
from sage_select.training.checkpoints import whole_weights
from sage_select.training.micro_batches import MicroBatch


class Watched(PreferenceModule):
    """A module that traces the pairs that it trains on."""

    case: Case

    def training_step(self, batch: MicroBatch, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if batch.share:
            losses = self._passes._parts[-1][:, -1].tolist()
            self.case.trains(self.loader.dataset.take(batch.rows).ids, losses)
        return loss


class Watch(Callback):
    """A callback that traces the optimizer's updates once its state is restored."""

    def __init__(self, case: Case) -> None:
        self.case = case

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.case.strategy == "fsdp2":
            assert all(isinstance(p, DTensor) for p in pl_module.parameters())
        self.case.watch(trainer.optimizers[0], already=trainer.global_step)


class Checkpoints(ModelCheckpoint):
    """Checkpoints of each update, after which the process may die."""

    case: Case

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        super().on_train_batch_end(trainer, *args)
        if self.case.dies_now():
            self.case.die()


def newest(folder: Path) -> Path | None:
    """Return the checkpoint of the highest step, or None."""
    return max(folder.glob("step=*.ckpt"), default=None)


def run(case: Case) -> None:
    """Train the contract's run in this process, or resume it."""
    model, pairs = policy(), dataset()
    reference = ReferenceStore(model, pairs, folder=case.folder / "reference")
    log = SelectionLog(case.folder / "selection")
    loader = build_loader(
        config(), pairs, model, reference, batch_size=BATCH, log=log, show_progress=False
    )
    case.watch_generators(loader)
    loader.on_select = lambda k, kept: case.measures(k, pairs.take(kept.indices).ids, model)
    training = Training(
        learning_rate=LEARNING_RATE,
        beta=BETA,
        warmup_share=0.0,
        weight_decay=0.0,
        max_grad_norm=1.0,
    )
    module = Watched(loader, training)
    checkpoints = Checkpoints(
        case.folder / "checkpoints", filename="{step:04d}", every_n_train_steps=1, save_top_k=-1
    )
    module.case = checkpoints.case = case
    selection = SageSelection(loader)
    # Whole checkpoints, which any world size can read under any strategy.
    sharded = ModelParallelStrategy(case.world, 1, save_distributed_checkpoint=False)
    elastic = case.world > 1
    trainer = Trainer(
        accelerator="cpu",
        devices=case.world,
        strategy={"single": "auto", "ddp": "ddp", "fsdp2": sharded}[case.strategy],
        plugins=[TorchElasticEnvironment() if elastic else LightningEnvironment()],
        max_epochs=1,
        accumulate_grad_batches=case.accumulation,
        callbacks=[selection, Watch(case), checkpoints],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    resumed = newest(case.folder / "checkpoints") if case.attempt else None
    trainer.fit(module, selection.batches, ckpt_path=resumed)
    case.finish(whole_weights(model))
