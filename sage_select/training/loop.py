"""The library's own training loop.

loader -> batch of rows -> log-probs -> loss -> update -> metrics, evaluation, checkpoint
"""

import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol
from warnings import warn

from torch import nn

from sage_select.arrays import Int64Array
from sage_select.data.dataset import PreferenceDataset
from sage_select.metrics import preference_metrics
from sage_select.models.wrappers import check_spread, unwrapped
from sage_select.pairs import Reference
from sage_select.selecting.answers import checked_reference
from sage_select.selecting.loader import SelectiveLoader
from sage_select.selecting.selector import check_same_precision
from sage_select.system.files import check_content
from sage_select.system.heartbeats import beat, during, monitored
from sage_select.system.ledger import Ledger, append_costs, phase, read_costs, side_by_side
from sage_select.system.processes import Processes
from sage_select.system.progress_bars import progress_bar
from sage_select.training.checkpoints import (
    drop_old,
    load_newest,
    save_best,
    save_checkpoint,
    whole_weights,
)
from sage_select.training.run_folder import RunFolder
from sage_select.training.settings import Training
from sage_select.training.sharding import make_ready
from sage_select.training.update import checked_losses, optimizer_of, update


class Loader(Protocol):
    """Batches of dataset rows for a whole run, such as `SelectiveLoader`."""

    step: int

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Int64Array]: ...
    def metrics(self) -> dict[str, float]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass
class History:
    """Record of a run: one entry per step, one per evaluation, and the total costs."""

    steps: list[dict[str, float]] = field(default_factory=list)
    evaluations: list[dict[str, float]] = field(default_factory=list)
    costs: Ledger = field(default_factory=Ledger)


def fit(
    model: nn.Module,
    loader: Loader,
    dataset: PreferenceDataset,
    reference: Reference,
    training: Training,
    *,
    held_out: PreferenceDataset | None = None,
    folder: str | Path | RunFolder | None = None,
    resume: bool = False,
    show_progress: bool | None = None,
) -> History:
    """Train a policy on the batches of a loader; the model stays in train mode.

    With several processes, all call this with the same arguments, each with the model on its
    device, replicated by DistributedDataParallel or sharded by `fully_shard` (see `shard`). Each
    batch is dealt to the processes; updates equal those of one process up to rounding.

    Args:
        model: The policy: a Hugging Face causal language model on its device, bare or wrapped.
        loader: Batches of rows, such as `SelectiveLoader` or `ShuffledLoader`.
        dataset: The pairs that the rows index.
        reference: Reference log-probs of every training and held-out pair.
        training: Loss, optimizer and schedule, reader, evaluation and checkpoint settings.
        held_out: Pairs to evaluate on, `dataset.take(rows)`.
        folder: Folder for `metrics.jsonl`, `evaluations.jsonl`, `costs.jsonl`, checkpoints and
            `best.pt`, shared by all processes; rank 0 writes the single files.
        resume: Resume from the folder's newest checkpoint, if there is one. The run then ends with
            weights bit-identical to those of an uninterrupted run, if the device is deterministic
            and the number of processes is unchanged; any other number can resume it, too.
        show_progress: False for no progress bar.

    Returns:
        Metrics per step and per evaluation, including those from before the run was resumed.

    Raises:
        FileExistsError: If the folder already has a run and resume is False, or another process
            trains there.
        ValueError: If the loader was made for another model or precision, has handed out batches
            already, or the folder's run was trained with different settings.
        FloatingPointError: If a gradient is not finite.
        TypeError: If there are several processes, but the model is neither replicated nor sharded.
    """
    _check_belongs(model, loader, training, held_out)
    run = _Run(model, loader, training, None if folder is None else RunFolder.of(folder))
    with nullcontext() if run.folder is None else run.folder.hold():
        run.start(resume)
        make_ready(model, training)
        training.reader.check(model, dataset)
        if loader.step == 0:
            run.evaluate(held_out, reference)
        batches = iter(loader)
        bar = progress_bar(
            len(loader),
            "training",
            "steps",
            initial=loader.step,
            show=show_progress if run.processes.rank == 0 else False,
        )
        with monitored(run.processes), bar:
            while loader.step < len(loader):
                with Ledger() as spent:  # the first batch of an interval scores its pool
                    metrics = run.update(dataset.take(next(batches)), reference)
                run.record(metrics)
                run.spend(spent, int(metrics.get("interval", 0)))
                bar.set_postfix(
                    {name: f"{metrics[name]:.3f}" for name in ("loss", "accuracy")}, refresh=False
                )
                bar.update()
                # Evaluate before the checkpoint, which then contains the evaluation.
                last = loader.step == len(loader)
                if last or loader.step % training.evaluate_every == 0:
                    run.evaluate(held_out, reference)
                if last or loader.step % training.checkpoint_every == 0:
                    run.checkpoint()
    return run.history


def _check_belongs(
    model: nn.Module, loader: Loader, training: Training, held_out: PreferenceDataset | None
) -> None:
    check_spread("train", model)
    if held_out is not None and len(held_out) == 0:
        raise ValueError("train: held_out has no pairs; pass None to train without evaluation")
    if loader.step:
        raise ValueError(
            f"train: the loader has handed out {loader.step} batches already; make a new "
            "loader (to resume a run, pass its folder and resume=True)"
        )
    if not isinstance(loader, SelectiveLoader):
        return
    if unwrapped(loader.model) is not unwrapped(model):
        raise ValueError(
            "train: the loader scores pools with a different model than the one to train; make it "
            "with SelectiveLoader(..., model=model)"
        )
    check_same_precision(loader.selector, training.reader, "train")


class _Run:
    """A training run: its state in memory and its files."""

    def __init__(
        self, model: nn.Module, loader: Loader, training: Training, folder: RunFolder | None
    ) -> None:
        self.model = model
        self.loader = loader
        self.training = training
        self.folder = folder
        self.processes = Processes.all()
        self.history = History()
        self.interval = 0
        self.unwritten = Ledger()  # costs of the interval that are not yet on disk
        self.tokens_trained = 0
        self.best_since = 0  # evaluations before this one have no best weights on disk
        self.optimizer, self.scheduler = optimizer_of(model, training, len(loader))

    @property
    def writes(self) -> RunFolder | None:
        """The run's folder on rank 0, which writes; None on other ranks."""
        return self.folder if self.processes.rank == 0 else None

    def update(self, batch: PreferenceDataset, reference: Reference) -> dict[str, float]:
        """Make one optimizer step, and return its record."""
        # The rate that this step uses: the scheduler advances after it.
        step, learning_rate = self.loader.step, float(self.scheduler.get_last_lr()[0])
        try:
            with during(f"step {step}"):
                metrics = update(self.model, self.optimizer, batch, reference, self.training)
        except FloatingPointError as error:
            raise FloatingPointError(f"train: step {step}: {error}") from None
        self.scheduler.step()
        self.tokens_trained += int(batch.num_tokens.sum())
        return {
            **metrics,
            "learning_rate": learning_rate,
            "pairs": len(batch),
            "tokens_trained": self.tokens_trained,
            **self.loader.metrics(),
        }

    def evaluate(self, held_out: PreferenceDataset | None, reference: Reference) -> None:
        """Measure the held-out pairs, and keep the weights if they are the best so far."""
        if held_out is None:
            return
        training = self.training
        with Ledger() as spent, phase("evaluation"):
            policy = training.reader(self.model, held_out)
        self.spend(spent, int(self.loader.metrics().get("interval", 0)))
        call = "train: evaluation"
        reference_logps = checked_reference(
            reference.take(held_out.index), held_out, f"{call}: reference.take(rows)"
        )
        losses = training.loss(policy, reference_logps, beta=training.beta)
        losses = checked_losses(losses, policy, training.loss, call=call)
        for row in policy.index[~losses.isfinite()][:1].tolist():
            # no reason to end a run: the updates, which use other pairs, are not affected
            warn(
                f"{call}: the loss of row {row} is not finite at step {self.loader.step}, so the "
                "mean is not either; with best_by: loss these weights cannot be the best",
                stacklevel=3,
            )
        evaluation = {
            "step": self.loader.step,
            "loss": losses.mean().item(),
            **preference_metrics(policy, reference_logps, beta=training.beta),
        }
        earlier = [self._merit(e) for e in self.history.evaluations[self.best_since :]]
        self.history.evaluations.append(evaluation)
        if self.writes is not None:
            self.writes.append_line(self.writes.evaluations, evaluation)
        if self.folder is not None and self._merit(evaluation) > max(earlier, default=-math.inf):
            weights = whole_weights(self.model)  # a collective call, so not only on rank 0
            if self.writes is not None:
                save_best(self.writes, weights, evaluation)

    def record(self, metrics: dict[str, float]) -> None:
        """Add a step's metrics to the history and to the file."""
        record = {"step": self.loader.step, **metrics}
        self.history.steps.append(record)
        if self.writes is not None:
            self.writes.append_line(self.writes.metrics, record)

    def spend(self, spent: Ledger, interval: int) -> None:
        """Add costs to those of the interval; when a new one begins, write the last one's."""
        if interval != self.interval:
            self._write_costs()
            self.interval = interval
        for name, work in spent.items():
            self.unwritten.add(name, work)

    def _write_costs(self) -> None:
        # Each rank has its own costs: FLOPs add up over ranks, seconds run in parallel.
        spent = side_by_side(self.processes.all_gather_object(self.unwritten))
        if self.writes is not None:
            append_costs(self.writes.costs, spent, self.interval)
        for name, work in spent.items():
            self.history.costs.add(name, work)
        self.unwritten = Ledger()

    def checkpoint(self) -> None:
        """Write everything that a resumed run needs, and delete the oldest checkpoints."""
        beat(f"checkpoint of step {self.loader.step}")
        self._write_costs()
        if self.folder is None:
            return
        save_checkpoint(
            self.folder,
            self.loader.step,
            self.model,
            self.optimizer,
            {
                "scheduler": self.scheduler.state_dict(),
                "loader": self.loader.state_dict(),
                "training": self.training.resume_settings(),
                "tokens_trained": self.tokens_trained,
                "steps": self.history.steps,
                "evaluations": self.history.evaluations,
            },
        )
        if self.writes is not None:
            drop_old(self.writes, self.training.keep_checkpoints, self.loader.step)

    def start(self, resume: bool) -> None:
        """Start in an empty folder, or from the newest whole checkpoint; the folder is locked."""
        if self.folder is None:
            return
        # rank 0's view for all: another machine may see the folder in another state
        if not resume and self.processes.all_gather_object(self.folder.holds_a_run())[0]:
            raise FileExistsError(
                f"train: {self.folder.path} already has a run; pass resume=True to resume it, or "
                "another folder"
            )
        costs = Ledger() if self.writes is None else read_costs(self.writes.costs)
        self.history.costs.update(self.processes.all_gather_object(costs)[0])
        if (state := load_newest(self.folder, self.model, self.optimizer)) is not None:
            self._restore(state)
        if self.processes.all_gather_object(self._best_is_lost())[0]:
            self.best_since = len(self.history.evaluations)
        if self.writes is not None:
            self.writes.remove_left_behind()
            # Drop the lines of steps after the checkpoint: those steps are taken again.
            self.writes.write_lines(self.writes.metrics, self.history.steps)
            self.writes.write_lines(self.writes.evaluations, self.history.evaluations)

    def _best_is_lost(self) -> bool:
        """Return, on rank 0, whether the best weights so far are missing or spoiled, and warn."""
        if self.writes is None or not self.history.evaluations:
            return False
        try:
            check_content(self.writes.best)
            reason = "" if self.writes.best.exists() else "it is missing"
        except (OSError, ValueError) as error:
            reason = str(error)
        if reason:
            warn(
                f"train: {self.writes.best} cannot be used: {reason}; the best weights from step "
                f"{self.loader.step} on replace it",
                stacklevel=4,
            )
        return bool(reason)

    def _restore(self, state: dict[str, Any]) -> None:
        current = self.training.resume_settings()
        changes = [
            f"{name} was {value} and is now {current[name]}"
            for name, value in state["training"].items()
            if current[name] != value
        ]
        if changes:
            assert self.folder is not None
            raise ValueError(
                f"train: the run in {self.folder.path} was trained with different settings: "
                f"{'; '.join(changes)}. Resume with the same settings, or start a new run in "
                "another folder"
            )
        self.loader.load_state_dict(state["loader"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.tokens_trained = state["tokens_trained"]
        self.history = History(state["steps"], state["evaluations"], self.history.costs)

    def _merit(self, evaluation: dict[str, float]) -> float:
        value = evaluation[self.training.best_by]
        return -value if self.training.best_by == "loss" else value
