"""The TRL host: SAGE on an ordinary `DPOTrainer`, which goes on to do all the rest.

trainer -> its own tokens -> reference log-probs, handed over -> batches of what is selected

TRL 0.24 to 1.x is supported; tests run with 0.24 (and transformers 4.57) and with 1.16.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from warnings import warn

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from sage_select.app.config import SageConfig
from sage_select.app.loading import DTYPE_NAMES
from sage_select.app.run import Run, build_loader
from sage_select.data.dataset import PreferenceDataset
from sage_select.models.fingerprints import has_adapters
from sage_select.models.sequences import sequence_keys
from sage_select.pairs import REFERENCE, PairLogps, Reference
from sage_select.selecting.loader import SelectiveLoader
from sage_select.selecting.log import SelectionLog
from sage_select.selecting.selector import check_same_precision
from sage_select.system.processes import Processes
from sage_select.system.settings import ConfigError
from sage_select.training.micro_batches import dealt
from sage_select.training.refusals import Refusal, refuse

from .trl_refusals import check_host, losses_of, refusals_of

SIDES = ("prompt", "chosen", "rejected")
LOSSES = {"nca": "nca_pair", "dpo": "sigmoid"}  # our names of TRL's losses
UNKNOWN = PairLogps(*[torch.zeros(0, dtype=torch.int64)] * 5)  # a reference not measured yet


def pairs_of(trainer: Any) -> PreferenceDataset:
    """The pairs that a trainer has prepared, token by token as it will train on them.

    A pair's id is its column `pair_id`, or else a hash: of its text where the trainer kept it, or
    of its tokens. The column `source_row` says which row of `trainer.train_dataset` it is.

    Args:
        trainer: A `DPOTrainer`.

    Raises:
        TypeError: If it is another trainer.
        ValueError: If its dataset or its settings are not supported, or no pair can be used.

    Example:
        >>> pairs = pairs_of(trainer)  # doctest: +SKIP
        >>> strata = strata_from_judgments(
        ...     pairs.column("clarity"), pairs.column("rejected_score")
        ... )  # doctest: +SKIP
    """
    _check_trainer(trainer)
    pairs = _tokens_of(trainer, trainer.train_dataset)
    if aside := pairs.set_aside.height:
        warn(
            f"pairs_of: {aside} of {aside + len(pairs)} rows of the train dataset cannot be used "
            f"and are not trained on: {_reasons(pairs)}",
            stacklevel=2,
        )
    if getattr(trainer.args, "truncation_mode", "") == "keep_end":
        for name in pairs.ids[pairs.column("truncated").to_numpy()][:1]:
            raise ValueError(
                f"pairs_of: pair {name} is longer than max_length={trainer.args.max_length}, and "
                "truncation_mode='keep_end' cuts its start, where a reference would be another; "
                "set truncation_mode='keep_start', or a larger max_length"
            )
    _check_collator(trainer, pairs)
    return pairs


def attach(
    trainer: Any,
    selection: SageConfig | SelectiveLoader,
    *,
    reference: Reference | None = None,
    log: str | Path | None = None,
    show_progress: bool | None = None,
) -> SelectiveLoader:
    """Have a trainer train on what SAGE selects, with its own loss, optimizer and everything else.

    Reference log-probs are measured once, into the store, and handed to the trainer, for the train
    dataset and those of the evaluation; its reference model is let go. A pool is scored with the
    policy as it is after the update before, in all processes together. Checkpoints carry the
    selection's state, and the trainer's log `selection/interval`, `selection/kept_share` and
    `selection/tokens_scored`. Where a strategy for saving, evaluating or logging is "epoch", an
    interval's end counts as one.

    Args:
        trainer: A `DPOTrainer` that has not trained yet. Any loss, LoRA policies and DDP are
            supported, and policies that transformers shards when it loads them (FSDP2).
        selection: What to select: a configuration, whose batch size, beta and precision are the
            trainer's; or a loader made on `pairs_of(trainer)`.
        reference: Log-probs of `pairs_of(trainer)` under the reference; by default they are
            measured with `trainer.ref_model`, or with the policy, its adapters off.
        log: Folder of the selection log; by default `selection` in the trainer's output folder.
        show_progress: False for no progress bar.

    Returns:
        The loader. Its length is the exact number of updates.

    Raises:
        TypeError: If it is another trainer.
        ImportError: If this version of TRL is not supported.
        ConfigError: If the configuration contradicts the trainer, or does not fit the data.
        ValueError: If the trainer has a setting that does not go with selection, or the run's last
            batch cannot be dealt evenly.

    Example:
        >>> loader = attach(trainer, SageConfig())  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
    """
    pairs = pairs_of(trainer)
    folder = Path(trainer.args.output_dir) / "selection" if log is None else Path(log)
    if isinstance(selection, SageConfig):
        config = _agreed(selection, trainer)
        loader = build_loader(
            config,
            pairs,
            trainer.model,
            UNKNOWN if reference is None else reference,
            batch_size=config.training.batch_size,
            mixed_precision=_precision(trainer),
            log=SelectionLog(folder),
            show_progress=show_progress,
        )
    elif isinstance(selection, SelectiveLoader):
        loader = selection
        config = _agreed(SageConfig(), trainer)
        reference = loader.selector.reference if reference is None else reference
        _check_loader(loader, pairs, trainer)
        loader.log = SelectionLog(folder) if loader.log is None else loader.log
    else:
        raise TypeError(
            "attach: selection must be a SageConfig, or a SelectiveLoader made on "
            f"pairs_of(trainer), got {type(selection).__name__}"
        )
    _check_fits(loader, trainer)

    def measured(pairs: PreferenceDataset) -> PairLogps:
        return _reference_logps(trainer, pairs, config, show_progress)

    known = measured(pairs) if reference is None else reference.take(loader.dataset.index)
    loader.selector = replace(loader.selector, reference=known)
    rows = pairs.column("source_row").to_numpy()
    train = _with_logps(trainer.train_dataset, known, rows[known.index.numpy()])
    evaluated = _evaluated(trainer, measured)
    # from here on nothing fails: a trainer is attached to, or as it was
    trainer.train_dataset, trainer.eval_dataset = train, evaluated
    _use_logps(trainer)
    batches = _Batches(trainer, loader, rows)
    trainer.get_train_dataloader = batches.dataloader
    trainer.log = batches.logging(trainer.log)
    trainer.add_callback(SelectionState(loader))
    trainer.args.ignore_data_skip = True  # the loader knows where it stands
    trainer.args.logging_nan_inf_filter = False  # it would log a loss that is not finite as 0
    return loader


class SelectionState(TrainerCallback, ExportableState):  # type: ignore[misc]
    """What a checkpoint of the trainer says of the selection. `attach` adds it."""

    def __init__(self, loader: SelectiveLoader | None = None) -> None:
        self.loader = loader  # None in a copy that the trainer makes when it resumes

    def state(self) -> dict[str, Any]:
        """Plain numbers and lists."""
        saved = None if self.loader is None else self.loader.state_dict()
        return {"args": {}, "attributes": {"saved": saved}}

    def on_train_begin(
        self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **_: Any
    ) -> None:
        """Go on where the checkpoint stands."""
        if not isinstance(train_dataloader, _Batches):
            raise ValueError(
                "attach: the trainer does not train on the selection's batches; somebody has "
                "replaced trainer.get_train_dataloader, or wraps what it returns"
            )
        self.loader = train_dataloader.loader
        name = type(self).__name__
        if not state.global_step:
            if self.loader.step or self.loader.interval >= 0:
                raise ValueError(
                    "train: this selection has been trained already; build a new trainer and "
                    "attach again, or go on with resume_from_checkpoint"
                )
        elif name in state.stateful_callbacks:
            self.loader.load_state_dict(state.stateful_callbacks[name]["attributes"]["saved"])
        else:
            raise ValueError(
                f"train: the checkpoint of step {state.global_step} says nothing of a selection, "
                "so it was trained without one; start a new run from its weights instead of "
                "resume_from_checkpoint"
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """An update is done; where an interval ends, it ends like an epoch."""
        assert self.loader is not None
        self.loader.step = state.global_step
        state.epoch = state.global_step / state.max_steps
        if state.global_step in self.loader.timeline.first_step[1:]:
            control.should_save |= args.save_strategy == "epoch"
            control.should_evaluate |= args.eval_strategy == "epoch"
            control.should_log |= args.logging_strategy == "epoch"


class _Batches:
    """A whole run's micro-batches of this process, as a trainer wants them: sized, in one epoch.

    Args:
        trainer: The trainer.
        loader: What it trains on.
        rows: The row of its dataset that each pair is.
    """

    def __init__(self, trainer: Any, loader: SelectiveLoader, rows: npt.NDArray[np.int64]) -> None:
        self.trainer = trainer
        self.loader = loader
        self.rows = rows
        self.train_dataset = trainer.train_dataset

    def dataloader(self) -> "_Batches":
        """What the trainer asks for when it begins; its settings may have been changed since."""
        _check_trainer(self.trainer, attached=True)
        if self.trainer.train_dataset is not self.train_dataset:
            raise ValueError(
                "train: trainer.train_dataset is not the one that SAGE was attached to; build a "
                "new trainer with it and attach again"
            )
        _check_fits(self.loader, self.trainer)
        return self

    def __len__(self) -> int:
        accumulation: int = self.trainer.args.gradient_accumulation_steps
        return len(self.loader) * accumulation

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """The micro-batches still to come; nothing happens before the first is asked for."""
        args, processes = self.trainer.args, Processes.all()
        self.loader.model = self.trainer.model_wrapped
        dataset = self.trainer._remove_unused_columns(self.train_dataset, description="training")
        shares = processes.size * args.gradient_accumulation_steps
        for batches in self.loader.decided():
            # made anew for each interval, so that nothing is fetched before it is decided
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
                generator=torch.Generator(),  # the global one belongs to the training
            )

    def logging(self, log: Callable[..., None]) -> Callable[..., None]:
        """The trainer's `log`, with the selection's metrics beside those of training."""

        def with_metrics(logs: dict[str, float], *more: Any, **named: Any) -> None:
            if "loss" in logs:
                logs |= {f"selection/{k}": v for k, v in self.loader.metrics().items()}
            log(logs, *more, **named)

        return with_metrics


def _tokens_of(trainer: Any, dataset: Any, *, each: bool = False) -> PreferenceDataset:
    """A prepared dataset's pairs; with `each`, also such as stand there twice."""
    names = dict.fromkeys(dataset.column_names)
    ends = "_ids" if "prompt_ids" in names else "_input_ids"
    if missing := [side + ends for side in SIDES if side + ends not in names]:
        raise ValueError(
            f"attach: the trainer's dataset has no {', '.join(missing)}; it has "
            f"{', '.join(names)}. Give attach a DPOTrainer that prepared its own dataset"
        )
    tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)

    def records() -> Iterator[dict[str, Any]]:
        for number, row in enumerate(dataset.with_format(None)):
            tokens = {f"{side}_ids": row.pop(side + ends) for side in SIDES}
            for side in SIDES[1:]:  # the trainer wrote the end token into the text, too
                if isinstance(row.get(side), str):
                    row[side] = row[side].removesuffix(tokenizer.eos_token)
            yield row | tokens | ({"pair_id": str(number)} if each else {})

    longest = trainer.args.max_length
    return PreferenceDataset.from_tokens(records(), max_length=longest or np.iinfo(np.int32).max)


def _reasons(pairs: PreferenceDataset) -> str:
    counts = pairs.set_aside["reason"].value_counts(sort=True).rows()
    return ", ".join(f"{count} {reason}" for reason, count in counts)


def _agreed(config: SageConfig, trainer: Any) -> SageConfig:
    """The configuration with what the trainer decides; what is set in both must agree.

    Raises:
        ConfigError: If it does not.
    """
    args, precision = trainer.args, _precision(trainer)
    theirs = {
        "beta": ("beta", args.beta),
        "data.max_length": ("max_length", args.max_length),
        "training.batch_size": (
            "per_device_train_batch_size x gradient_accumulation_steps x processes",
            _global_batch(trainer),
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
        f"{setting} is {ours}, but the trainer's {name} is {value}; leave {setting} out of the "
        "configuration, or make them agree"
        for setting, (name, value) in theirs.items()
        if (ours := _set(config, setting)) not in (None, value)
    ]
    loss, losses = _set(config, "training.loss"), losses_of(args)
    if loss is not None and [LOSSES.get(loss)] != losses:
        conflicts.append(
            f"training.loss is {loss}, but the trainer's loss_type is {losses}; leave "
            "training.loss out of the configuration, or set "
            f"loss_type={LOSSES.get(loss, 'one that TRL has')!r}"
        )
    for setting in ("reference.model", "reference.file"):
        if (given := _set(config, setting)) is not None:
            conflicts.append(
                f"{setting} is {given}, but the trainer brings its own reference model; pass it to "
                "the trainer as ref_model, or log-probs to attach as reference"
            )
    if conflicts:
        raise ConfigError("\n".join(f"attach: {conflict}" for conflict in conflicts))
    training = {"batch_size": _global_batch(trainer)}
    return config.model_copy(
        update={
            "beta": args.beta,
            "training": config.training.model_copy(
                update=training | {"mixed_precision": theirs["training.mixed_precision"][1]}
            ),
        }
    )


def _set(config: SageConfig, setting: str) -> Any:
    """A setting that was set, by its dotted name; None where the default stands."""
    section: Any = config
    *sections, name = setting.split(".")
    for part in sections:
        section = getattr(section, part)
    return getattr(section, name) if name in section.model_fields_set else None


def _reference_logps(
    trainer: Any, pairs: PreferenceDataset, config: SageConfig, show_progress: bool | None
) -> PairLogps:
    """Log-probs under what the trainer would take for the reference."""
    own, run = trainer.ref_model, Run(config, pairs, pairs, show_progress=show_progress)
    if own is not None and has_adapters(own):
        return run.reader(own, pairs)
    if own is None and (adapter := _reference_adapter(trainer)) is not None:
        with _with_adapter(trainer.model, adapter):
            return run.reader(trainer.model, pairs)
    store = run.store(trainer.model if own is None else own)  # which switches adapters off
    store.fill()
    return store.take(pairs.index)


def _reference_adapter(trainer: Any) -> str | None:
    """The adapter of a PEFT policy that is its reference, where it is not the base model."""
    if hasattr(trainer, "ref_adapter_name"):  # TRL before 0.29
        name: str | None = trainer.ref_adapter_name
        return name
    return "ref" if "ref" in getattr(trainer.model, "peft_config", {}) else None


@contextmanager
def _with_adapter(model: nn.Module, name: str) -> Iterator[None]:
    """This adapter speaks inside; what is active and what is trained stay as they were."""
    peft: Any = model
    active, trained = peft.active_adapter, [p for p in model.parameters() if p.requires_grad]
    peft.set_adapter(name)
    try:
        yield
    finally:
        peft.set_adapter(active)
        model.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)


def _with_logps(dataset: Any, logps: PairLogps, rows: npt.NDArray[np.int64]) -> Any:
    """A dataset with the columns in which TRL looks for reference log-probs."""
    for name, values in logps.columns(REFERENCE).items():
        column = np.full(len(dataset), np.nan)  # in rows that are never trained on
        column[rows] = values
        dataset = dataset.add_column(name, column)
    return dataset


def _evaluated(trainer: Any, measured: Callable[[PreferenceDataset], PairLogps]) -> Any:
    """The evaluation's dataset or datasets, with reference log-probs."""

    def with_reference(name: str, dataset: Any) -> Any:
        pairs = _tokens_of(trainer, dataset, each=True)
        if pairs.set_aside.height:
            warn(
                f"attach: {pairs.set_aside.height} rows of the {name} dataset cannot be used and "
                f"are not evaluated on: {_reasons(pairs)}",
                stacklevel=4,
            )
            dataset = dataset.select(pairs.column("source_row").to_list())
        return _with_logps(dataset, measured(pairs), np.arange(len(pairs)))

    given = trainer.eval_dataset
    if given is None:
        return None
    if isinstance(given, dict):
        return {name: with_reference(name, dataset) for name, dataset in given.items()}
    return with_reference("eval", given)


def _use_logps(trainer: Any) -> None:
    """From now on the trainer reads reference log-probs from its datasets."""
    if hasattr(trainer, "precompute_ref_logps"):
        trainer.precompute_ref_logps = True
    else:  # TRL before 0.29
        trainer.precompute_ref_log_probs = True
        trainer._precomputed_train_ref_log_probs = trainer._precomputed_eval_ref_log_probs = True
    if trainer.ref_model is None:
        return

    def gone(*_: Any, **__: Any) -> None:
        raise ValueError(
            "evaluate: the reference model was let go once the trainer's datasets were measured; "
            "give this dataset to the trainer as one of its eval_dataset, before attach"
        )

    trainer.ref_model = None
    trainer.compute_ref_log_probs = gone  # which would measure the policy instead


def _precision(trainer: Any) -> torch.dtype | None:
    """The accelerator's, which a launcher may have set whatever the arguments say."""
    return torch.bfloat16 if trainer.accelerator.mixed_precision == "bf16" else None


def _global_batch(trainer: Any) -> int:
    """Pairs per update, over all processes."""
    args = trainer.args
    pairs: int = args.per_device_train_batch_size * args.gradient_accumulation_steps
    return pairs * Processes.all().size


def _check_fits(loader: SelectiveLoader, trainer: Any) -> None:
    """Every update must be dealt to processes and accumulation steps in equal parts.

    Raises:
        ValueError: If one cannot be.
    """
    refuse("attach", _misfits(loader, trainer))


def _misfits(loader: SelectiveLoader, trainer: Any) -> Iterator[Refusal]:
    size, batch = _global_batch(trainer), loader.timeline.batch_size
    args, processes = trainer.args, Processes.all().size
    if batch != size:
        yield Refusal(
            f"the loader has {batch} pairs per update, but the trainer takes "
            f"per_device_train_batch_size x gradient_accumulation_steps x processes = "
            f"{args.per_device_train_batch_size} x {args.gradient_accumulation_steps} x "
            f"{processes} = {size}",
            "make them agree",
        )
        return
    share = args.gradient_accumulation_steps * processes
    if (last := loader.timeline.total_kept % batch) % share:
        yield Refusal(
            f"the run's last update has {last} pairs, which processes x accumulation steps = "
            f"{processes} x {args.gradient_accumulation_steps} cannot share evenly",
            f"keep multiples of {share}: selection.multiple={share} in the configuration, or "
            f"multiple={share} for Timeline and Selector",
        )


def _check_loader(loader: SelectiveLoader, pairs: PreferenceDataset, trainer: Any) -> None:
    """A loader must have been made for these pairs, and measure as the trainer computes."""
    theirs = loader.dataset
    known = np.isin(theirs.index, pairs.index).all()
    if not known or not np.array_equal(
        sequence_keys(theirs).sequences, sequence_keys(pairs.take(theirs.index)).sequences
    ):
        raise ValueError(
            "attach: the loader's pairs are not those of the trainer, token by token; make it on "
            "pairs_of(trainer), or on rows of it"
        )
    check_same_precision(loader.selector, _precision(trainer), "attach")


def _check_collator(trainer: Any, pairs: PreferenceDataset) -> None:
    """What the collator makes of the longest pair must be what is scored.

    Raises:
        ValueError: If it is not.
    """
    longest = pairs.take(pairs.index[[int(pairs.num_tokens.argmax())]])
    row = trainer.train_dataset.with_format(None)[int(longest.column("source_row")[0])]
    batch = trainer.data_collator([row])
    if "completion_mask" not in batch:  # TRL before 0.29 joins prompt and response later
        return
    for i, (tokens, start) in enumerate(longest.sequences()):
        there = batch["attention_mask"][i].bool()
        made = batch["input_ids"][i][there][: pairs.max_length]
        mask = batch["completion_mask"][i][there][: pairs.max_length]
        if not np.array_equal(made, tokens) or int(mask.argmax()) != start:
            raise ValueError(
                f"pairs_of: of pair {longest.ids[0]} the trainer's data_collator makes other "
                "tokens than the dataset has, so they could not be scored as they are trained; "
                "leave data_collator out, or have it cut and mask as DataCollatorForPreference does"
            )


def _check_trainer(trainer: Any, *, attached: bool = False) -> None:
    """Refuse what does not go with selection, before anything is measured.

    Raises:
        ImportError: If this version of TRL is not supported.
        TypeError: If it is not a DPOTrainer.
        Refused: If settings do not fit, with the fix for each.
    """
    check_host(trainer)
    is_attached = isinstance(getattr(trainer.get_train_dataloader, "__self__", None), _Batches)
    if is_attached and not attached:
        raise ValueError("attach: SAGE is attached to this trainer already; build a new trainer")
    refuse("attach", refusals_of(trainer, attached=attached))
