"""The plain PyTorch host: a loop that reads from top to bottom.

loader -> batch of rows -> log-probs -> loss -> update -> metrics, evaluation, checkpoint
"""

import json
import math
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from transformers import get_scheduler

from sage_select.arrays import Int64Array
from sage_select.data.dataset import PreferenceDataset
from sage_select.losses import nca
from sage_select.metrics import preference_metrics
from sage_select.models.forward import autocast
from sage_select.models.reader import check_updates, measure, pair_logps, updating
from sage_select.models.trials import Layout
from sage_select.models.wrappers import exchanging, is_spread, unwrapped, whole
from sage_select.ops.token_logps import Implementation
from sage_select.pairs import PairLogps, Reference
from sage_select.selecting.loader import SelectiveLoader, dealt
from sage_select.system.files import replace_durably
from sage_select.system.heartbeats import at, watched
from sage_select.system.identity import describe
from sage_select.system.ledger import Ledger, append_costs, phase, read_costs, side_by_side
from sage_select.system.processes import Processes
from sage_select.system.progress_bars import progress_bar
from sage_select.training.checkpoints import (
    checkpoints,
    drop_old,
    load_newest,
    load_whole,
    save_checkpoint,
    whole_weights,
)


class Loader(Protocol):
    """Batches of dataset rows over a whole run, such as `SelectiveLoader`."""

    step: int

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Int64Array]: ...
    def metrics(self) -> dict[str, float]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class Training:
    """How to train. Defaults are the paper's (Table 4) where it says anything.

    Args:
        learning_rate: Peak of the schedule.
        beta: Temperature of the implicit reward, handed to the loss.
        loss: `(policy, reference, beta=...) -> [P]`.
        micro_batch_size: Pairs per process, forward and backward pass; gradients are accumulated
            over a batch. By default all at once.
        schedule: Decay of the learning rate over the exact total of steps.
        warmup_share: Share of the steps in which the learning rate rises.
        weight_decay: Of AdamW.
        max_grad_norm: Gradients are clipped to this norm.
        mixed_precision: Autocast dtype of the body, such as torch.bfloat16; the head, the loss and
            the sums stay in fp32 or wider. By default the model's own dtype.
        impl: How the head's log-probs are computed, in updates and evaluations, see `token_logps`.
        layout: How batches are laid out, in updates and evaluations, see `measure`.
        activation_checkpointing: Whether to keep each layer's input alone and compute the layer
            again in the backward pass: a third more work, for memory that grows with sequence
            length a good deal slower.
        compile_model: Whether to compile the model's body with torch.compile.
        evaluate_every: Steps between evaluations on held-out pairs; also at the start and the end.
        best_by: Metric of an evaluation by which the best weights are kept: "loss" (lowest),
            "accuracy" or "margin" (highest).
        checkpoint_every: Steps between checkpoints; also at the end.
        keep_checkpoints: How many are kept.
    """

    learning_rate: float = 5e-7
    beta: float = 0.1
    loss: Callable[..., Tensor] = nca
    micro_batch_size: int | None = None
    schedule: Literal["linear", "cosine", "constant_with_warmup"] = "linear"
    warmup_share: float = 0.1
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    mixed_precision: torch.dtype | None = None
    impl: Implementation = "auto"
    layout: Layout = "auto"
    activation_checkpointing: bool = False
    compile_model: bool = False
    evaluate_every: int = 50
    best_by: Literal["loss", "accuracy", "margin"] = "loss"
    checkpoint_every: int = 50
    keep_checkpoints: int = 2

    def __post_init__(self) -> None:
        if self.mixed_precision == torch.float16:
            raise ValueError(
                "Training: float16 autocast needs a gradient scaler, which this loop has not; use "
                "mixed_precision=torch.bfloat16"
            )
        for name in ("learning_rate", "beta", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"Training: {name} must be positive, got {getattr(self, name)}")
        for name in ("evaluate_every", "checkpoint_every", "keep_checkpoints", "micro_batch_size"):
            value = getattr(self, name)
            if value is not None and operator.index(value) < 1:
                raise ValueError(f"Training: {name} must be at least 1, got {value}")
        if not 0 <= self.warmup_share <= 1:
            raise ValueError(f"Training: warmup_share must lie in [0, 1], got {self.warmup_share}")
        if self.best_by not in ("loss", "accuracy", "margin"):
            raise ValueError(
                f"Training: best_by must be loss, accuracy or margin, got {self.best_by!r}"
            )

    def decides(self) -> dict[str, str]:
        """The settings that a resumed run must share with the one it goes on with."""
        free = (
            "micro_batch_size",
            "impl",
            "layout",
            "activation_checkpointing",
            "compile_model",
            "evaluate_every",
            "best_by",
            "checkpoint_every",
            "keep_checkpoints",
        )
        return {
            f.name: describe(self.loss) if f.name == "loss" else repr(getattr(self, f.name))
            for f in fields(self)
            if f.name not in free
        }


@dataclass
class History:
    """What happened: one record per step, one per evaluation, and what all of it took."""

    steps: list[dict[str, float]] = field(default_factory=list)
    evaluations: list[dict[str, float]] = field(default_factory=list)
    costs: Ledger = field(default_factory=Ledger)


def train(
    model: nn.Module,
    loader: Loader,
    dataset: PreferenceDataset,
    reference: Reference,
    training: Training,
    *,
    held_out: PreferenceDataset | None = None,
    folder: str | Path | None = None,
    resume: bool = False,
    show_progress: bool | None = None,
) -> History:
    """Train a policy on the batches of a loader; the model stays in train mode.

    With several processes all call this with the same arguments, each with the model on its
    device, replicated by DistributedDataParallel or sharded by `fully_shard` (see `shard`). A batch
    is dealt to them; updates are those of one process to within rounding.

    Args:
        model: The policy, a Hugging Face causal language model on its device, or wrapped.
        loader: Batches of rows, such as `SelectiveLoader` or `ShuffledLoader`.
        dataset: The pairs the rows refer to.
        reference: Log-probs under the reference of every pair trained on or held out.
        training: How to train.
        held_out: Pairs to evaluate on, `dataset.take(rows)`.
        folder: Where to put `metrics.jsonl`, `evaluations.jsonl`, `costs.jsonl`, checkpoints and
            `best.pt`; the same place for all processes, and process 0 writes.
        resume: Go on from the folder's newest checkpoint, if there is one. The run then ends with
            the same bits as one that was never interrupted, where the device is deterministic and
            the number of processes the same; with another number it goes on all the same.
        show_progress: False for no progress bar.

    Returns:
        Metrics per step and per evaluation, those before the resumption included.

    Raises:
        FileExistsError: If the folder holds a run already and resume is False.
        ValueError: If the loader was made for another model or precision, has handed out batches
            already, or the folder's run was trained with other settings.
        FloatingPointError: If a gradient is not finite.
        TypeError: If there are several processes and the model is in one alone.
    """
    _check_belongs(model, loader, training, held_out)
    run = _Run(model, loader, training, Path(folder) if folder is not None else None)
    run.start(resume)
    if training.compile_model:
        unwrapped(model).base_model.compile()  # type: ignore[union-attr]
    if training.activation_checkpointing:
        checkpoint_activations(unwrapped(model))
    model.train()
    check_updates(
        model,
        dataset,
        layout=training.layout,
        impl=training.impl,
        mixed_precision=training.mixed_precision,
    )
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
    with watched(run.processes), bar:
        while loader.step < len(loader):
            with Ledger() as spent:  # the loader scores where an interval begins
                metrics = run.update(dataset.take(next(batches)), reference)
            run.record(metrics)
            run.spend(spent, int(metrics.get("interval", 0)))
            bar.set_postfix(
                {name: f"{metrics[name]:.3f}" for name in ("loss", "accuracy")}, refresh=False
            )
            bar.update()
            last = loader.step == len(loader)
            if last or loader.step % training.evaluate_every == 0:
                run.evaluate(held_out, reference)
            if last or loader.step % training.checkpoint_every == 0:
                run.checkpoint()
    return run.history


def optimizer_of(
    model: nn.Module, training: Training, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """AdamW, and the schedule of its learning rate over so many steps."""
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad],
        lr=training.learning_rate,
        weight_decay=training.weight_decay,
    )
    scheduler = get_scheduler(
        training.schedule,
        optimizer,
        num_warmup_steps=round(training.warmup_share * steps),
        num_training_steps=steps,
    )
    return optimizer, scheduler


def add_gradients(
    model: nn.Module,
    pairs: PreferenceDataset,
    reference: PairLogps,
    training: Training,
    *,
    share: float,
) -> tuple[PairLogps, Tensor]:
    """Forward and backward of one micro-batch, in the model's mode.

    Args:
        model: The policy; gradients add to what it has.
        pairs: The micro-batch.
        reference: Its log-probs under the reference.
        training: How to train.
        share: What the losses, one per pair, are multiplied with before they are added up.

    Returns:
        Log-probs under the policy, and the losses [P].
    """
    with updating(model, pairs, layout=training.layout, mixed_precision=training.mixed_precision):
        with autocast(model, training.mixed_precision):
            policy = pair_logps(model, pairs, layout=training.layout, impl=training.impl)
        known = reference.to(policy.chosen.device)
        losses = training.loss(policy, known, beta=training.beta)
        torch.autograd.backward(losses.sum() * share)
    return policy, losses


def load_best(model: nn.Module, folder: str | Path) -> dict[str, float]:
    """Put the best weights of a run into the model, and return the evaluation they won.

    Raises:
        FileNotFoundError: If the run was never evaluated.
    """
    best = torch.load(Path(folder) / "best.pt", map_location="cpu", weights_only=True)
    load_whole(model, best["model"])
    evaluation: dict[str, float] = best["evaluation"]
    return evaluation


def shard(model: nn.Module, **options: Any) -> nn.Module:
    """Spread a Hugging Face model over all processes with `fully_shard` (FSDP2), layer by layer.

    Args:
        model: The model, the same in every process, on its device.
        options: What `fully_shard` takes, such as `mesh` or `mp_policy`.

    Returns:
        The same model.

    Example:
        >>> torch.distributed.init_process_group()  # doctest: +SKIP
        >>> model = shard(model)  # doctest: +SKIP

    Raises:
        TypeError: If the model does not say what its layers are.
    """
    layers = set(getattr(model, "_no_split_modules", None) or ())
    if not layers:
        raise TypeError(
            f"shard: {type(model).__name__} does not say what its layers are "
            "(_no_split_modules); call fully_shard on each of them, and on the model"
        )
    for module in list(model.modules()):
        if type(module).__name__ in layers:
            fully_shard(module, **options)
    fully_shard(model, **options)
    return model


def save_pretrained(model: nn.Module, folder: str | Path) -> None:
    """Put the whole model where any other program can read it, whatever it is wrapped in.

    Args:
        model: A Hugging Face model, in all processes that share it.
        folder: Where process 0 writes it.
    """
    weights = whole_weights(model)
    if Processes.all().rank == 0:
        inner: Any = unwrapped(model)
        inner.save_pretrained(folder, state_dict=weights)
    Processes.all().wait()


def checkpoint_activations(model: nn.Module) -> None:
    """Compute each layer of a Hugging Face model again in the backward pass, from now on.

    Raises:
        TypeError: If the model does not offer it.
    """
    for kind in ("activation", "gradient"):  # the name of newer transformers, and of older
        enable = getattr(model, f"{kind}_checkpointing_enable", None)
        if enable is not None:
            enable({"use_reentrant": False})
            return
    raise TypeError(
        f"train: {type(model).__name__} has no gradient_checkpointing_enable(); checkpoint its "
        "layers yourself and leave activation_checkpointing off"
    )


def _check_belongs(
    model: nn.Module, loader: Loader, training: Training, held_out: PreferenceDataset | None
) -> None:
    size = Processes.all().size
    if size > 1 and not is_spread(model):
        raise TypeError(
            f"train: torch.distributed knows of {size} processes, but the model is in each of "
            "them alone, and they would drift apart; pass shard(model), or "
            "DistributedDataParallel(model)"
        )
    if held_out is not None and len(held_out) == 0:
        raise ValueError("train: held_out has no pairs; pass None to train without evaluation")
    if loader.step:
        raise ValueError(
            f"train: the loader has handed out {loader.step} batches already; make a new one (a "
            "run is resumed from its folder, with resume=True)"
        )
    if not isinstance(loader, SelectiveLoader):
        return
    if unwrapped(loader.model) is not unwrapped(model):
        raise ValueError(
            "train: the loader scores pools with another model than the one to train; make it with "
            "SelectiveLoader(..., model=model)"
        )
    scoring = loader.selector.mixed_precision
    measures = loader.selector.measure
    ours = measures is measure or (isinstance(measures, partial) and measures.func is measure)
    if ours and scoring != training.mixed_precision:
        raise ValueError(
            f"train: the updates run in {training.mixed_precision}, but the selector measures in "
            f"{scoring}; the difference would pass for a change of the policy. Give the Selector "
            f"measure=partial(measure, mixed_precision={training.mixed_precision}), and the "
            "reference the same"
        )


class _Run:
    """A training run: what changes while it goes on, and what of it is on disk."""

    def __init__(
        self, model: nn.Module, loader: Loader, training: Training, folder: Path | None
    ) -> None:
        self.model = model
        self.loader = loader
        self.training = training
        self.folder = folder
        self.processes = Processes.all()
        self.history = History()
        self.interval = 0
        self.unwritten = Ledger()  # costs of the interval that are not on disk
        self.tokens_trained = 0
        self.optimizer, self.scheduler = optimizer_of(model, training, len(loader))

    def update(self, batch: PreferenceDataset, reference: Reference) -> dict[str, float]:
        """One optimizer step on a batch, in micro-batches whose gradients add up."""
        training, processes = self.training, self.processes
        parts: list[Tensor] = []
        passes = dealt(batch.index, processes, training.micro_batch_size or len(batch))
        for i, rows in enumerate(passes):
            at(f"step {self.loader.step}, pass {i + 1} of {len(passes)}")
            # a process without a pair makes the pass all the same, for nothing: others wait for it
            pairs = batch.take(rows if len(rows) else batch.index[:1])
            # gradients are averaged over processes
            share = processes.size / len(batch) if len(rows) else 0.0
            with phase("training"), exchanging(self.model, i == len(passes) - 1):
                policy, losses = add_gradients(
                    self.model, pairs, reference.take(pairs.index), training, share=share
                )
            known = torch.stack([*(x.detach().double().cpu() for x in (*policy, losses))], dim=1)
            parts.append(known[: len(rows)])
        with phase("training"):
            norm = whole(
                nn.utils.clip_grad_norm_(self.model.parameters(), training.max_grad_norm)
            ).item()
        if not math.isfinite(norm):
            raise FloatingPointError(
                f"train: the gradient of step {self.loader.step} has norm {norm}; its rows are "
                f"{batch.index.tolist()}"
            )
        learning_rate = self.scheduler.get_last_lr()[0]
        with phase("training"):
            self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.tokens_trained += int(batch.num_tokens.sum())
        index, *logps, losses = processes.joined(torch.cat(parts)).T
        policy = PairLogps(index.long(), *logps)
        return {
            "loss": losses.mean().item(),
            **preference_metrics(policy, reference.take(policy.index), beta=training.beta),
            "gradient_norm": norm,
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
            policy = measure(
                self.model,
                held_out,
                impl=training.impl,
                layout=training.layout,
                mixed_precision=training.mixed_precision,
            )
        self.spend(spent, int(self.loader.metrics().get("interval", 0)))
        known = reference.take(held_out.index)
        losses = training.loss(policy, known, beta=training.beta)
        evaluation = {
            "step": self.loader.step,
            "loss": losses.mean().item(),
            **preference_metrics(policy, known, beta=training.beta),
        }
        earlier = [self._merit(e) for e in self.history.evaluations]
        self.history.evaluations.append(evaluation)
        self._append("evaluations.jsonl", evaluation)
        if self.folder is not None and self._merit(evaluation) > max(earlier, default=-math.inf):
            weights = whole_weights(self.model)
            if self.processes.rank == 0:
                partial = self.folder / "best.pt.partial"
                torch.save({"model": weights, "evaluation": evaluation}, partial)
                replace_durably(partial, self.folder / "best.pt")

    def record(self, metrics: dict[str, float]) -> None:
        """Add a step's metrics to the history and to the file."""
        record = {"step": self.loader.step, **metrics}
        self.history.steps.append(record)
        self._append("metrics.jsonl", record)

    def spend(self, spent: Ledger, interval: int) -> None:
        """Add what some passes took to the run's costs, and to those of the interval."""
        if interval != self.interval:
            self._write_costs()
            self.interval = interval
        for name, work in spent.items():
            self.unwritten.add(name, work)

    def _write_costs(self) -> None:
        spent = side_by_side(self.processes.each(self.unwritten))
        if self.folder is not None and self.processes.rank == 0:
            append_costs(self.folder / "costs.jsonl", spent, self.interval)
        for name, work in spent.items():
            self.history.costs.add(name, work)
        self.unwritten = Ledger()

    def checkpoint(self) -> None:
        """Put on disk all that a resumed run needs, and drop the oldest checkpoints."""
        at(f"checkpoint of step {self.loader.step}")
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
                "training": self.training.decides(),
                "tokens_trained": self.tokens_trained,
                "steps": self.history.steps,
                "evaluations": self.history.evaluations,
            },
        )
        if self.processes.rank == 0:
            drop_old(self.folder, self.training.keep_checkpoints)

    def start(self, resume: bool) -> None:
        """Begin in an empty folder, or where the newest readable checkpoint stands."""
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        if not resume and (checkpoints(self.folder) or (self.folder / "metrics.jsonl").exists()):
            raise FileExistsError(
                f"train: {self.folder} holds a run already; pass resume=True to go on with it, or "
                "another folder"
            )
        self.processes.wait()  # all have looked before anything is written
        self.history.costs.update(read_costs(self.folder / "costs.jsonl"))
        if (state := load_newest(self.folder, self.model, self.optimizer)) is not None:
            self._restore(state)
        if self.processes.rank != 0:
            return
        for name, records in (
            ("metrics.jsonl", self.history.steps),
            ("evaluations.jsonl", self.history.evaluations),
        ):  # lines of steps after the checkpoint are void: those steps are taken again
            partial = self.folder / f"{name}.partial"
            partial.write_text("".join(json.dumps(record) + "\n" for record in records))
            replace_durably(partial, self.folder / name)

    def _restore(self, state: dict[str, Any]) -> None:
        ours = self.training.decides()
        other = [
            f"{name} was {value} and is now {ours[name]}"
            for name, value in state["training"].items()
            if ours[name] != value
        ]
        if other:
            raise ValueError(
                f"train: the run in {self.folder} was trained with other settings: "
                f"{'; '.join(other)}. Resume with the same, or start a new run in another folder"
            )
        self.loader.load_state_dict(state["loader"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.tokens_trained = state["tokens_trained"]
        self.history = History(state["steps"], state["evaluations"], self.history.costs)

    def _merit(self, evaluation: dict[str, float]) -> float:
        value = evaluation[self.training.best_by]
        return -value if self.training.best_by == "loss" else value

    def _append(self, name: str, record: dict[str, float]) -> None:
        if self.folder is not None and self.processes.rank == 0:
            with (self.folder / name).open("a") as file:
                file.write(json.dumps(record) + "\n")
