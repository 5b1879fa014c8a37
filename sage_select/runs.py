"""From a configuration to the objects of a run: tokenizer, pairs, plan, policy, reference."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from sage_select.adapters.plain import Training
from sage_select.config import ConfigError, SageConfig
from sage_select.dataset import PreferenceDataset
from sage_select.hashing import Int64Array
from sage_select.losses import LOSSES
from sage_select.measuring import measure
from sage_select.pairs import Reference, Score
from sage_select.plan import Timeline, plan_run, strata_from_judgments, strata_from_values
from sage_select.schedules import Linear
from sage_select.scores import SCORES
from sage_select.selector import Selector
from sage_select.store import ReferenceStore, read_reference

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Run:
    """All that is known of a run before a model is loaded.

    Attributes:
        config: The description.
        dataset: All usable pairs.
        pairs: Those to train on.
        held_out: Those to evaluate on, or None.
        strata: int64 [P], the difficulty of each pair to train on.
        timeline: The plan on the dataset's rows, and every step.
    """

    config: SageConfig
    dataset: PreferenceDataset
    pairs: PreferenceDataset
    held_out: PreferenceDataset | None
    strata: Int64Array
    timeline: Timeline

    @property
    def used(self) -> PreferenceDataset:
        """The pairs to train on and those to evaluate on."""
        if self.held_out is None:
            return self.pairs
        return self.dataset.take(np.concatenate([self.pairs.index, self.held_out.index]))


def prepare(config: SageConfig, *, show_progress: bool | None = None) -> Run:
    """Read the pairs, part them, and plan every step: what needs a tokenizer but no model.

    Raises:
        ConfigError: If a setting is missing, or does not fit the data.
        FileNotFoundError: If the data or the tokenizer are not there.
        ValueError: If no pair can be used, or the data cannot be planned as asked.
    """
    dataset = read_pairs(config, load_tokenizer(config), show_progress=show_progress)
    usable = dataset.take(range(len(dataset))[: config.data.limit])
    rows, held_out = usable.index, None
    if config.data.held_out:
        rows, apart = usable.split(config.data.held_out, seed=config.seed)
        held_out = dataset.take(apart)
    pairs = dataset.take(rows)
    strata = strata_of(config, pairs)
    selection, training = config.selection, config.training
    plan = plan_run(
        strata,
        Linear(selection.mix_start, selection.mix_end),
        batch_size=training.batch_size,
        refresh_steps=selection.refresh_steps,
        epochs=training.epochs,
        scope=selection.scope,
        seed=config.seed,
        ids=pairs.ids,
        on_infeasible=selection.on_infeasible,
        progress=selection.progress,
    ).on_rows(rows)
    keep = Linear(selection.keep_start, selection.keep_end)
    timeline = Timeline(plan, keep, training.batch_size, selection.multiple)
    return Run(config, dataset, pairs, held_out, strata, timeline)


def load_tokenizer(config: SageConfig) -> Any:
    """The tokenizer, with the chat template that is asked for."""
    name = config.model.tokenizer or _needed(config.model.name, "model.name")
    revision = config.model.revision if config.model.tokenizer is None else None
    tokenizer = _from_pretrained(AutoTokenizer, name, "model.tokenizer", revision=revision)
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
        return strata_from_values(values, strata.shares, ids=pairs.ids, seed=config.seed)
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
    return model.to(device_of(device or config.model.device))


def device_of(name: str) -> torch.device:
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
            f"model.device: {name!r} cannot be used here: {reason}; auto takes what there is"
        ) from None


def model_settings(config: SageConfig) -> Any:
    """The policy's own configuration, without its weights."""
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
    store = ReferenceStore(
        model,
        run.used,
        folder=config.reference.store,
        mixed_precision=mixed_precision(config),
        show_progress=show_progress,
    )
    store.fill()
    return store


def selector_of(run: Run, reference: Reference, *, show_progress: bool | None = None) -> Selector:
    """The selector of a run."""
    selection = run.config.selection
    return Selector(
        score_of(run.config),
        run.timeline.keep,
        reference,
        run.timeline.progress,
        measure=partial(
            measure, mixed_precision=mixed_precision(run.config), show_progress=show_progress
        ),
        multiple=selection.multiple,
        seed=run.config.seed,
        no_signal=selection.no_signal,
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
    try:
        return kind.from_pretrained(name, **options)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(f"{setting}: {name!r} cannot be loaded: {reason}") from error
