"""Runs on Lightning in one process; as a script, one rank of a run on several processes."""

import sys
import warnings
from copy import deepcopy
from functools import cache, partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import torch
from contract import BATCH, BETA, LEARNING_RATE, config, dataset
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from small_models import small_model
from torch.distributed.tensor import DTensor

from sage_select import (
    PairLogps,
    Processes,
    Selection,
    SelectiveLoader,
    build_loader,
    leave,
    measure,
)
from sage_select.adapters.lightning import PreferenceModule, SageSelection, held_out_batches
from sage_select.adapters.plain import Training
from sage_select.training.checkpoints import whole_weights

SHORT_LAST = 46  # pairs with which the last batch of the run has only three
TRAINING = Training(learning_rate=LEARNING_RATE, beta=BETA, warmup_share=0.0, micro_batch_size=2)


policy = partial(small_model, "qwen2")  # a new model per call, always with the same weights


@cache
def reference_logps() -> PairLogps:
    return measure(policy(), dataset(), processes=Processes())


class Selected(list[tuple[int, Selection]]):
    """The selections of a run, in order; pass it as `on_select`."""

    def __call__(self, interval: int, selection: Selection) -> None:
        self.append((interval, selection))


def loader(
    pairs: int = 48, *, reference: PairLogps | None = None, **options: Any
) -> SelectiveLoader:
    options = {"batch_size": BATCH, "show_progress": False, **options}
    made = build_loader(
        config(), dataset().take(range(pairs)), policy(), reference or reference_logps(), **options
    )
    made.on_select = Selected()
    return made


def trainer(*callbacks: Callback, **options: Any) -> Trainer:
    quiet = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    options = {"max_epochs": 1, "accumulate_grad_batches": 2, **options}
    return Trainer(callbacks=list(callbacks), **quiet | options)


def fit(
    batches: SelectiveLoader,
    *callbacks: Callback,
    module: LightningModule | None = None,
    collate: Any = None,
    held_out: Any = None,
    resume: Any = None,
    **options: Any,
) -> Trainer:
    """Train a whole run, or the rest of a resumed one, and return its trainer."""
    selection = SageSelection(batches, collate=collate)
    module = PreferenceModule(batches, TRAINING) if module is None else module
    made = trainer(selection, *callbacks, **options)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "You defined a `validation_step`")
        made.fit(module, selection.batches, held_out, ckpt_path=resume)
    return made


def saved(folder: Any, **options: Any) -> ModelCheckpoint:
    return ModelCheckpoint(folder, filename="{step}", save_top_k=-1, **options)


class Sharded(Callback):
    """A callback that asserts that weights are sharded, not replicated, before each step."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert all(isinstance(x, DTensor) for x in pl_module.parameters())

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.on_train_start(trainer, pl_module)


class Unsharded(PreferenceModule):
    """A module that forgets to shard its model."""

    def configure_model(self) -> None:
        pass


def several(world: int, folder: Path) -> dict[str, Any]:
    """Train the run with a short last batch on each strategy, and collect the refusals."""
    parallel = partial(ModelParallelStrategy, world, 1)
    options = {"devices": world, "accumulate_grad_batches": 2}
    held_out = held_out_batches(dataset().take(range(40, 48)))
    report: dict[str, Any] = {}
    for strategy, made, watches in (("ddp", "ddp", ()), ("fsdp2", parallel(), (Sharded(),))):
        batches = loader(SHORT_LAST)
        best = saved(folder / strategy, monitor="held_out/loss")
        module = PreferenceModule(batches, TRAINING)
        host = fit(
            batches, best, *watches, module=module, strategy=made, held_out=held_out,
            val_check_interval=8, **options,
        )  # fmt: skip
        weights = deepcopy(whole_weights(module.policy))
        (metrics,) = host.validate(module, held_out, ckpt_path=best.best_model_path, verbose=False)
        report[strategy] = weights, float(best.best_model_score), metrics["held_out/loss"]
    for name, strategy, passes in (("unsharded", parallel(), 1), ("uneven", "ddp", 4)):
        batches = loader(SHORT_LAST)
        changed = options | {"accumulate_grad_batches": passes}
        try:
            fit(batches, module=Unsharded(batches, TRAINING), strategy=strategy, **changed)
        except (TypeError, ValueError) as error:
            report[name] = str(error)
    return report


if __name__ == "__main__":
    world, folder = int(sys.argv[1]), Path(sys.argv[2])
    report = several(world, folder)
    torch.save(report, folder / f"{Processes.all().rank}.pt")
    leave()
