"""The TRL host: SAGE selection for an ordinary `DPOTrainer`.

trainer -> its tokenised pairs -> reference log-probs, added to its datasets -> selected batches

TRL 0.24 to 1.x is supported; tests run with 0.24 (and transformers 4.57) and with 1.16.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from warnings import warn

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from sage_select.app.config import SageConfig
from sage_select.app.loading import DTYPE_NAMES
from sage_select.app.run import build_loader
from sage_select.data.dataset import PreferenceDataset
from sage_select.pairs import PairLogps, Reference
from sage_select.selecting.loader import SelectiveLoader
from sage_select.selecting.log import SelectionLog
from sage_select.system.files import user_path
from sage_select.system.processes import Processes
from sage_select.system.settings import ConfigError
from sage_select.training.micro_batches import dealt
from sage_select.training.refusals import refuse

from .trl_reference import (
    counted_reasons,
    evaluation_with_logps,
    measured_reference,
    tokens_of,
    use_precomputed_logps,
    with_logps,
)
from .trl_refusals import (
    autocast_dtype,
    check_batches,
    check_collator,
    check_host,
    check_loader,
    global_batch,
    losses_of,
    trainer_refusals,
)

TRL_LOSSES = {"nca": "nca_pair", "dpo": "sigmoid"}  # TRL's name of each of our losses
NOT_MEASURED = PairLogps(*[torch.zeros(0, dtype=torch.int64)] * 5)  # replaced once measured


def pairs_of(trainer: Any) -> PreferenceDataset:
    """Return the pairs that a trainer has prepared, with exactly the tokens it will train on.

    A pair's id is its column `pair_id`, or otherwise a hash of its text, or of its tokens if the
    trainer did not keep the text. The column `source_row` is its row in `trainer.train_dataset`.

    Args:
        trainer: A `DPOTrainer`.

    Raises:
        TypeError: If it is not a DPOTrainer.
        ValueError: If its dataset or its settings are not supported, or no pair can be used.

    Example:
        >>> pairs = pairs_of(trainer)  # doctest: +SKIP
        >>> strata = strata_from_judgments(
        ...     pairs.column("clarity"), pairs.column("rejected_score")
        ... )  # doctest: +SKIP
    """
    _check_trainer(trainer)
    pairs = tokens_of(trainer, trainer.train_dataset)
    if unusable := pairs.set_aside.height:
        warn(
            f"pairs_of: {unusable} of {unusable + len(pairs)} rows of the train dataset cannot be "
            f"used and are not trained on: {counted_reasons(pairs)}",
            stacklevel=2,
        )
    if getattr(trainer.args, "truncation_mode", "") == "keep_end":
        for name in pairs.ids[pairs.column("truncated").to_numpy()][:1]:
            raise ValueError(
                f"pairs_of: pair {name} is longer than max_length={trainer.args.max_length}, and "
                "truncation_mode='keep_end' cuts its start, but scoring would cut its end; set "
                "truncation_mode='keep_start', or a larger max_length"
            )
    check_collator(trainer, pairs)
    return pairs


def attach(
    trainer: Any,
    selection: SageConfig | SelectiveLoader,
    *,
    reference: Reference | None = None,
    log: str | Path | None = None,
    show_progress: bool | None = None,
) -> SelectiveLoader:
    """Make a trainer train on the pairs that SAGE selects; everything else stays the trainer's.

    Reference log-probs are measured once, kept in the store, and added to the trainer's training
    and evaluation datasets; its reference model is then released. An interval's pool is scored with
    the policy after the preceding update, by all processes together. Checkpoints contain the
    selection's state, and the trainer logs `selection/interval`, `selection/kept_share` and
    `selection/tokens_scored`. If a strategy for saving, evaluating or logging is "epoch", the end
    of an interval counts as the end of an epoch.

    Args:
        trainer: A `DPOTrainer` that has not trained yet. Any loss, LoRA policies, DDP, and policies
            that transformers shards when it loads them (FSDP2) are supported.
        selection: A configuration, which takes batch size, beta and precision from the trainer; or
            a loader made on `pairs_of(trainer)`.
        reference: Reference log-probs of `pairs_of(trainer)`; by default they are measured with
            `trainer.ref_model`, or with the policy with its adapters off.
        log: Folder of the selection log; by default `selection` in the trainer's output folder.
        show_progress: False for no progress bar.

    Returns:
        The loader. Its length is the exact number of updates.

    Raises:
        TypeError: If the trainer is not a DPOTrainer.
        ImportError: If this version of TRL is not supported.
        ConfigError: If the configuration contradicts the trainer, or does not fit the data.
        ValueError: If the trainer has a setting that is incompatible with selection, or the run's
            last batch cannot be dealt evenly.

    Example:
        >>> loader = attach(trainer, SageConfig())  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
    """
    pairs = pairs_of(trainer)
    folder = Path(trainer.args.output_dir) / "selection" if log is None else user_path(log)
    if isinstance(selection, SageConfig):
        config = _config_of(selection, trainer)
        loader = build_loader(
            config,
            pairs,
            trainer.model,
            NOT_MEASURED if reference is None else reference,
            batch_size=config.training.batch_size,
            mixed_precision=autocast_dtype(trainer),
            log=SelectionLog(folder),
            show_progress=show_progress,
        )
    elif isinstance(selection, SelectiveLoader):
        loader = selection
        config = _config_of(SageConfig(), trainer)
        reference = loader.selector.reference if reference is None else reference
        check_loader(loader, pairs, trainer)
        loader.log = SelectionLog(folder) if loader.log is None else loader.log
    else:
        raise TypeError(
            "attach: selection must be a SageConfig, or a SelectiveLoader made on "
            f"pairs_of(trainer), got {type(selection).__name__}"
        )
    check_batches(loader, trainer)

    def measured(pairs: PreferenceDataset) -> PairLogps:
        return measured_reference(trainer, pairs, config, show_progress)

    logps = measured(pairs) if reference is None else reference.take(loader.dataset.index)
    loader.selector = replace(loader.selector, reference=logps)
    rows = pairs.column("source_row").to_numpy()
    train = with_logps(trainer.train_dataset, logps, rows[logps.index.numpy()])
    evaluation = evaluation_with_logps(trainer, measured)
    # Nothing below can fail, so a failed call leaves the trainer as it was.
    trainer.train_dataset, trainer.eval_dataset = train, evaluation
    use_precomputed_logps(trainer)
    batches = _Batches(trainer, loader, rows)
    trainer.get_train_dataloader = batches.dataloader
    trainer.log = batches.logging(trainer.log)
    trainer.add_callback(SelectionState(loader))
    trainer.args.ignore_data_skip = True  # the loader resumes at its own step
    trainer.args.logging_nan_inf_filter = False  # it logs a loss that is not finite as 0
    return loader


class SelectionState(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Callback that saves the selection's state in the trainer's checkpoints; `attach` adds it."""

    def __init__(self, loader: SelectiveLoader | None = None) -> None:
        self.loader = loader  # None in a copy that the trainer makes when it resumes

    def state(self) -> dict[str, Any]:
        """Return the state to save: numbers, strings and lists."""
        saved = None if self.loader is None else self.loader.state_dict()
        return {"args": {}, "attributes": {"saved": saved}}

    def on_train_begin(
        self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **_: Any
    ) -> None:
        """Restore the selection's state, if the trainer resumes from a checkpoint."""
        if not isinstance(train_dataloader, _Batches):
            raise ValueError(
                "attach: the trainer does not train on the selected batches: "
                "trainer.get_train_dataloader was replaced, or its result is wrapped; leave it as "
                "attach set it"
            )
        self.loader = train_dataloader.loader
        name = type(self).__name__
        if not state.global_step:
            if self.loader.step or self.loader.interval >= 0:
                raise ValueError(
                    "train: this loader has already been used for training; build a new trainer "
                    "and attach again, or resume with resume_from_checkpoint"
                )
        elif name in state.stateful_callbacks:
            if args.save_only_model:
                warn(
                    "train: save_only_model=True saves no optimizer state, so the resumed run "
                    "starts with a new optimizer and ends with other weights than an uninterrupted "
                    "one; leave it out to resume exactly",
                    stacklevel=2,
                )
            self.loader.load_state_dict(state.stateful_callbacks[name]["attributes"]["saved"])
        else:
            raise ValueError(
                f"train: the checkpoint of step {state.global_step} has no selection state, since "
                "it was trained without selection; start a new run from its weights instead of "
                "resume_from_checkpoint"
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Count the update; the end of an interval counts as the end of an epoch."""
        assert self.loader is not None
        self.loader.step = state.global_step
        state.epoch = state.global_step / state.max_steps
        if state.global_step in self.loader.timeline.first_step[1:]:
            control.should_save |= args.save_strategy == "epoch"
            control.should_evaluate |= args.eval_strategy == "epoch"
            control.should_log |= args.logging_strategy == "epoch"


class _Batches:
    """This rank's micro-batches for the whole run, in the form a trainer needs: sized, one epoch.

    Args:
        trainer: The trainer.
        loader: The batches to train on.
        rows: int64 [N], each pair's row in the trainer's dataset.
    """

    def __init__(self, trainer: Any, loader: SelectiveLoader, rows: npt.NDArray[np.int64]) -> None:
        self.trainer = trainer
        self.loader = loader
        self.rows = rows
        self.train_dataset = trainer.train_dataset

    def dataloader(self) -> "_Batches":
        """Return the batches when training starts, and check for changes since `attach`."""
        _check_trainer(self.trainer, attached=True)
        if self.trainer.train_dataset is not self.train_dataset:
            raise ValueError(
                "train: trainer.train_dataset was replaced after attach; build a new trainer with "
                "that dataset, and attach again"
            )
        check_batches(self.loader, self.trainer)
        return self

    def __len__(self) -> int:
        accumulation: int = self.trainer.args.gradient_accumulation_steps
        return len(self.loader) * accumulation

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Yield the remaining micro-batches; nothing is scored before the first is requested."""
        args, processes = self.trainer.args, Processes.all()
        self.loader.model = self.trainer.model_wrapped
        dataset = self.trainer._remove_unused_columns(self.train_dataset, description="training")
        shares = processes.size * args.gradient_accumulation_steps
        for batches in self.loader.decided():
            # A new DataLoader per decision, so that workers prefetch no undecided batch.
            yield from DataLoader(
                dataset,
                batch_sampler=[
                    self.rows[part.rows].tolist()
                    for batch in batches
                    for part in dealt(batch, processes, len(batch) // shares)
                ],
                collate_fn=self.trainer.data_collator,
                num_workers=args.dataloader_num_workers,
                prefetch_factor=args.dataloader_prefetch_factor,
                pin_memory=args.dataloader_pin_memory and torch.cuda.is_available(),
                generator=torch.Generator(),  # leave the global generator to training
            )

    def logging(self, log: Callable[..., None]) -> Callable[..., None]:
        """Return the trainer's `log`, extended by the selection's metrics."""

        def with_metrics(logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
            if "loss" in logs:  # a record of training, not of evaluation
                logs |= {f"selection/{k}": v for k, v in self.loader.metrics().items()}
            log(logs, *args, **kwargs)

        return with_metrics


def _config_of(config: SageConfig, trainer: Any) -> SageConfig:
    """Return the configuration with the trainer's batch size, beta and precision.

    Raises:
        ConfigError: If a setting of the configuration contradicts the trainer's.
    """
    args, precision = trainer.args, autocast_dtype(trainer)
    trainer_settings = {
        "beta": ("beta", args.beta),
        "data.max_length": ("max_length", args.max_length),
        "training.batch_size": (
            "per_device_train_batch_size x gradient_accumulation_steps x processes",
            global_batch(trainer),
        ),
        "training.micro_batch_size": (
            "per_device_train_batch_size",
            args.per_device_train_batch_size,
        ),
        "training.mixed_precision": (
            "mixed precision",
            DTYPE_NAMES[precision],
        ),
        "training.learning_rate": ("learning_rate", args.learning_rate),
        "training.weight_decay": ("weight_decay", args.weight_decay),
        "training.max_grad_norm": ("max_grad_norm", args.max_grad_norm),
    }
    conflicts = [
        f"{setting} is {given}, but the trainer's {name} is {value}; leave {setting} out of the "
        "configuration, or set both to the same value"
        for setting, (name, value) in trainer_settings.items()
        if (given := _explicit(config, setting)) not in (None, value)
    ]
    loss, losses = _explicit(config, "training.loss"), losses_of(args)
    if loss is not None and [TRL_LOSSES.get(loss)] != losses:
        conflicts.append(
            f"training.loss is {loss}, but the trainer's loss_type is {losses}; leave "
            "training.loss out of the configuration, or set "
            f"loss_type={TRL_LOSSES.get(loss, 'a loss of TRL')!r}"
        )
    for setting in ("reference.model", "reference.file"):
        if (given := _explicit(config, setting)) is not None:
            conflicts.append(
                f"{setting} is {given}, but the trainer has its own reference model; leave "
                f"{setting} out, and pass a model to the trainer as ref_model, or log-probs to "
                "attach as reference"
            )
    if conflicts:
        raise ConfigError("\n".join(f"attach: {conflict}" for conflict in conflicts))
    training = {"batch_size": global_batch(trainer)}
    return config.model_copy(
        update={
            "beta": args.beta,
            "training": config.training.model_copy(
                update=training | {"mixed_precision": DTYPE_NAMES[precision]}
            ),
        }
    )


def _explicit(config: SageConfig, setting: str) -> Any:
    """Return a setting by its dotted name, if it was set explicitly, and None otherwise."""
    section: Any = config
    *sections, name = setting.split(".")
    for part in sections:
        section = getattr(section, part)
    return getattr(section, name) if name in section.model_fields_set else None


def _check_trainer(trainer: Any, *, attached: bool = False) -> None:
    """Refuse trainers and settings that are incompatible with selection.

    Raises:
        ImportError: If this version of TRL is not supported.
        TypeError: If it is not a DPOTrainer.
        Refused: If settings are incompatible, with the fix for each.
    """
    check_host(trainer)
    is_attached = isinstance(getattr(trainer.get_train_dataloader, "__self__", None), _Batches)
    if is_attached and not attached:
        raise ValueError("attach: SAGE is already attached to this trainer; build a new trainer")
    refuse("attach", trainer_refusals(trainer, attached=attached))
