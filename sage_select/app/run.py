"""From a configuration to the objects of a run: tokenizer, pairs, plan, policy, reference."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property, partial
from inspect import signature
from pathlib import Path
from typing import Any
from warnings import warn

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from sage_select.adapters.plain import Training, shard
from sage_select.app.config import ConfigError, SageConfig
from sage_select.arrays import Int64Array
from sage_select.data.dataset import PreferenceDataset
from sage_select.losses import LOSSES
from sage_select.models.reader import measure
from sage_select.pairs import PairLogps, Reference, Score
from sage_select.plan import plan_run
from sage_select.references.store import ReferenceStore, read_reference
from sage_select.schedules import Constant, Linear
from sage_select.scores import SCORES
from sage_select.selecting.loader import SelectiveLoader
from sage_select.selecting.log import SelectionLog
from sage_select.selecting.selector import Selector
from sage_select.strata import strata_from_judgments, strata_from_values
from sage_select.system.processes import Processes
from sage_select.timeline import Timeline, kept_count

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Run:
    """All that is known of a run before a model is loaded.

    Attributes:
        config: The description.
        dataset: All usable pairs.
        pairs: Those to train on.
        held_out: Those to evaluate on, or None.
    """

    config: SageConfig
    dataset: PreferenceDataset
    pairs: PreferenceDataset
    held_out: PreferenceDataset | None

    @property
    def used(self) -> PreferenceDataset:
        """The pairs to train on and those to evaluate on."""
        if self.held_out is None:
            return self.pairs
        return self.dataset.take(np.concatenate([self.pairs.index, self.held_out.index]))

    @cached_property
    def strata(self) -> Int64Array:
        """int64 [P], the difficulty of each pair to train on."""
        return strata_of(self.config, self.pairs)

    @cached_property
    def timeline(self) -> Timeline:
        """The plan on the dataset's rows, and every step.

        Raises:
            ConfigError: If a setting does not fit the data.
            ValueError: If the data cannot be planned as asked.
        """
        selection, training = self.config.selection, self.config.training
        plan = plan_run(
            self.strata,
            Linear(selection.mix_start, selection.mix_end),
            batch_size=training.batch_size,
            refresh_steps=selection.refresh_steps,
            epochs=training.epochs,
            scope=selection.scope,
            seed=self.config.seed,
            ids=self.pairs.ids,
            on_infeasible=selection.on_infeasible,
            progress=selection.progress,
        ).on_rows(self.pairs.index)
        keep = Linear(selection.keep_start, selection.keep_end)
        timeline = Timeline(plan, keep, training.batch_size, selection.multiple)
        _check_selects(timeline)
        return timeline


def _check_selects(timeline: Timeline) -> None:
    pools = timeline.plan.pools
    for k, (t, pool) in enumerate(zip(timeline.plan.progress, pools, strict=True)):
        planned = kept_count(timeline.keep(t), len(pool))
        if planned < timeline.multiple:
            raise ConfigError(
                f"selection.multiple: {timeline.multiple} is more than the {planned} pairs that "
                f"interval {k} keeps; lower it, or raise selection.refresh_steps"
            )
    if timeline.total_kept == sum(map(len, pools)):
        warn(
            f"nothing is selected: the {len(pools)} pools are kept whole. With few pairs, lower "
            "selection.refresh_steps, so that there are several pools; else lower "
            "selection.keep_end",
            stacklevel=3,
        )


def prepare(config: SageConfig, *, show_progress: bool | None = None) -> Run:
    """Read the pairs and part them: what needs a tokenizer but no model.

    Raises:
        ConfigError: If a setting is missing.
        FileNotFoundError: If the data or the tokenizer are not there.
        ValueError: If no pair can be used.
    """
    dataset = read_pairs(config, load_tokenizer(config), show_progress=show_progress)
    usable = dataset.take(range(len(dataset))[: config.data.limit])
    if not config.data.held_out:
        return Run(config, dataset, usable, None)
    rows, apart = usable.split(config.data.held_out, seed=config.seed)
    return Run(config, dataset, dataset.take(rows), dataset.take(apart))


def load_tokenizer(config: SageConfig) -> Any:
    """The tokenizer, with the chat template that is asked for."""
    name = config.model.tokenizer or _needed(config.model.name, "model.name")
    setting = "model.name" if config.model.tokenizer is None else "model.tokenizer"
    revision = config.model.revision if config.model.tokenizer is None else None
    tokenizer = _from_pretrained(AutoTokenizer, name, setting, revision=revision)
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # what a folder without one gives
        raise FileNotFoundError(
            f"{setting}: there is no tokenizer in {name!r}; model.tokenizer says where it is"
        )
    if config.model.eos_token is not None:
        if tokenizer.convert_tokens_to_ids(config.model.eos_token) in (
            None,
            tokenizer.unk_token_id,
        ):
            raise ConfigError(
                f"model.eos_token: {config.model.eos_token!r} is not a token of {name!r}"
            )
        tokenizer.eos_token = config.model.eos_token
    if config.model.chat_template is not None:
        file = Path(config.model.chat_template)
        if not file.is_file():
            raise ConfigError(f"model.chat_template: there is no file {file}")
        tokenizer.chat_template = file.read_text(encoding="utf-8")
    return tokenizer


def read_pairs(
    config: SageConfig, tokenizer: Any, *, show_progress: bool | None = None
) -> PreferenceDataset:
    """The pairs, tokenised."""
    data = config.data
    return PreferenceDataset.read(
        _needed(data.path, "data.path"),
        tokenizer=tokenizer,
        max_length=data.max_length,
        on_bad=data.on_bad,
        columns=data.columns or None,
        split=data.split,
        subset=data.subset,
        revision=data.revision,
        num_workers=data.num_workers,
        show_progress=show_progress,
    )


def strata_of(config: SageConfig, pairs: PreferenceDataset) -> Int64Array:
    """The stratum of each pair, 0 being the easiest."""
    strata = config.strata
    if strata.by == "none":
        return np.zeros(len(pairs), dtype=np.int64)
    if strata.by == "judge":
        clarity = _column(pairs, strata.clarity, "strata.clarity")
        return strata_from_judgments(
            clarity, _column(pairs, strata.rejected_score, "strata.rejected_score")
        )
    if strata.by == "value":
        values = _column(pairs, strata.value, "strata.value")
        try:
            return strata_from_values(values, strata.shares, ids=pairs.ids, seed=config.seed)
        except ValueError as error:
            raise ValueError(
                f"{error}, among the pairs to train on, in column {strata.value!r} (strata.value); "
                "mend or drop these rows"
            ) from None
    given = np.asarray(_column(pairs, strata.stratum, "strata.stratum"))
    count = len(config.selection.mix_start)
    for row in np.flatnonzero(~np.isin(given, np.arange(count)))[:1]:
        raise ConfigError(
            f"strata.stratum: row {pairs.index[row]} is {given[row]!r}, not a whole number from 0 "
            f"to {count - 1}; selection.mix_start has {count} shares"
        )
    return given.astype(np.int64)


def load_model(config: SageConfig, name: str | None = None, *, reference: bool = False) -> Any:
    """The policy, the reference, or a checkpoint of the policy, on its device.

    Args:
        config: The description.
        name: A folder or a hub name, in place of what the configuration says.
        reference: Whether it is the reference.
    """
    wanted, setting = config.model.name, "model.name"
    revision: str | None = config.model.revision
    if name is not None:
        setting = "--policy"
    if reference and config.reference.model is not None:
        wanted, setting = config.reference.model, "reference.model"
        revision = config.reference.revision
    device = config.reference.device if reference else None
    options: dict[str, Any] = {"revision": revision if name is None else None}
    options["dtype"] = DTYPES.get(config.model.dtype, "auto")
    if config.model.attention != "auto":
        options["attn_implementation"] = config.model.attention
    model = _from_pretrained(
        AutoModelForCausalLM, name or _needed(wanted, setting), setting, **options
    )
    if device is not None:
        return model.to(device_of(device, "reference.device"))
    return model.to(device_of(config.model.device))


def spread(model: nn.Module, strategy: str) -> nn.Module:
    """The policy as several processes have it, by `training.strategy`; as it is in one alone."""
    if Processes.all().size == 1:
        return model
    return shard(model) if strategy == "fsdp2" else DistributedDataParallel(model)


def device_of(name: str, setting: str = "model.device") -> torch.device:
    """The device of this name; "auto" is cuda where there is one.

    Raises:
        ConfigError: If there is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"{setting}: {name!r} cannot be used here: {reason}; auto takes what there is"
        ) from None


def model_settings(config: SageConfig, *, reference: bool = False) -> Any:
    """The configuration of the policy, or of a reference of its own, without weights."""
    if reference and config.reference.model is not None:
        theirs, revision = config.reference.model, config.reference.revision
        return _from_pretrained(AutoConfig, theirs, "reference.model", revision=revision)
    name = _needed(config.model.name, "model.name")
    return _from_pretrained(AutoConfig, name, "model.name", revision=config.model.revision)


def open_reference(
    run: Run, *, policy: nn.Module | None = None, show_progress: bool | None = None
) -> Reference:
    """The reference's log-probs: from a file, or from the store, where all that is missing is
    measured now.

    Args:
        run: The run.
        policy: The policy as it is before training, if it is loaded already.
        show_progress: False for no progress bar.
    """
    config = run.config
    if config.reference.file is not None:
        return read_reference(config.reference.file, run.used, key=config.reference.key)
    elsewhere = config.reference.model is not None or config.reference.device is not None
    model = load_model(config, reference=True) if elsewhere or policy is None else policy
    store = store_of(run, model, show_progress=show_progress)
    store.fill()
    return store


def store_of(
    run: Run, reference: nn.Module, *, show_progress: bool | None = None
) -> ReferenceStore:
    """Where the reference's log-probs of a run's pairs are, or will be once they are measured."""
    config = run.config
    return ReferenceStore(
        reference,
        run.used,
        folder=config.reference.store,
        mixed_precision=mixed_precision(config),
        max_batch_tokens=config.scoring.max_batch_tokens,
        impl=config.scoring.impl,
        layout=config.scoring.layout,
        show_progress=show_progress,
    )


def selector_of(
    run: Run,
    reference: Reference,
    *,
    keep: float | None = None,
    show_progress: bool | None = None,
) -> Selector:
    """The selector of a run; with `keep`, one without a plan that keeps this share of any pool."""
    selection = run.config.selection
    return Selector(
        score_of(run.config),
        run.timeline.keep if keep is None else Constant(keep),
        reference,
        run.timeline.progress if keep is None else lambda step: 0.0,
        measure=measure_of(run.config, show_progress=show_progress),
        multiple=selection.multiple,
        seed=run.config.seed,
        no_signal=selection.no_signal,
    )


def loader_of(
    config: SageConfig,
    pairs: PreferenceDataset,
    model: Any,
    reference: Reference,
    *,
    batch_size: int,
    mixed_precision: torch.dtype | None = None,
    log: SelectionLog | None = None,
    show_progress: bool | None = None,
) -> SelectiveLoader:
    """Selection as described, for a trainer that has its own pairs, batch size and precision.

    Args:
        config: The description; of its training section only `epochs` is looked at.
        pairs: The pairs to train on.
        model: The policy, whatever `measure` takes.
        reference: Log-probs of these pairs under the reference.
        batch_size: Pairs per optimizer step over all processes.
        mixed_precision: Autocast dtype of the trainer's updates.
        log: Where decisions are put on disk.
        show_progress: False for no progress bar.

    Raises:
        ConfigError: If a setting does not fit the data.
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    precision = "none" if mixed_precision is None else names[mixed_precision]
    training = config.training.model_copy(
        update={"batch_size": batch_size, "mixed_precision": precision}
    )
    run = Run(config.model_copy(update={"training": training}), pairs, pairs, None)
    selector = selector_of(run, reference, show_progress=show_progress)
    return SelectiveLoader(selector, run.timeline, pairs, model, seed=config.seed, log=log)


def measure_of(
    config: SageConfig, *, show_progress: bool | None = None
) -> Callable[..., PairLogps]:
    """How log-probs are measured."""
    return partial(
        measure,
        max_batch_tokens=config.scoring.max_batch_tokens,
        impl=config.scoring.impl,
        layout=config.scoring.layout,
        mixed_precision=mixed_precision(config),
        show_progress=show_progress,
    )


def score_of(config: SageConfig) -> Score:
    """The score, with those of the settings bound that it takes."""
    selection = config.selection
    given = {
        "beta": config.beta,
        "eps": selection.eps,
        "length_norm": selection.length_norm,
        "seed": config.seed,
    }
    score = _function(selection.score, SCORES, "selection.score")
    taken = signature(score).parameters
    return partial(score, **{name: value for name, value in given.items() if name in taken})


def training_of(config: SageConfig) -> Training:
    """How to train, as the plain host takes it."""
    settings = config.training
    same = {f.name for f in fields(Training)} & set(type(settings).model_fields)
    return Training(
        **{name: getattr(settings, name) for name in same - {"loss", "mixed_precision"}},
        loss=_function(settings.loss, LOSSES, "training.loss"),
        impl=config.scoring.impl,
        layout=config.scoring.layout,
        mixed_precision=mixed_precision(config),
        beta=config.beta,
    )


def mixed_precision(config: SageConfig) -> torch.dtype | None:
    """The autocast dtype of training and measuring."""
    return DTYPES.get(config.training.mixed_precision)


def _needed(value: str | None, setting: str) -> str:
    if value is None:
        raise ConfigError(f"{setting} is not set, and there is no default for it")
    return value


def _column(pairs: PreferenceDataset, name: str, setting: str) -> Any:
    if name not in pairs.columns:
        raise ConfigError(
            f"{setting}: the data have no column {name!r}; they have {', '.join(pairs.columns)}. "
            "Where no judge has labelled the pairs, strata by value take any number that is higher "
            "for easier pairs, and strata by none (with mix_start and mix_end [1.0]) do without"
        )
    return pairs.column(name)


def _function(name: str, known: dict[str, Callable[..., Any]], setting: str) -> Callable[..., Any]:
    if name in known:
        return known[name]
    module, _, function = name.partition(":")
    try:
        found: Callable[..., Any] = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{setting}: {name!r} cannot be imported: {error}") from None
    return found


def _from_pretrained(kind: Any, name: str, setting: str, **options: Any) -> Any:
    if not Path(name).exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise FileNotFoundError(f"{setting}: there is no folder {name}")
    if Path(name).is_file():
        raise FileNotFoundError(
            f"{setting}: {name} is a file; give the folder of a model, as save_pretrained writes it"
        )
    try:
        return kind.from_pretrained(name, **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(f"{setting}: {name!r} cannot be loaded: {reason}") from error
