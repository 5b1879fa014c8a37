"""A run: from its description to its objects, each made once."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any
from warnings import warn

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sage_select.app.config import SageConfig
from sage_select.app.loading import (
    DTYPE_NAMES,
    DTYPES,
    load_loss,
    load_policy,
    load_reference,
    load_score,
    load_tokenizer,
    required,
)
from sage_select.app.sections import StrataSection
from sage_select.arrays import Int64Array
from sage_select.data.dataset import PreferenceDataset
from sage_select.models.reader import Reader
from sage_select.pairs import Reference, Score
from sage_select.plan import plan_run
from sage_select.references.logp_tables import read_reference
from sage_select.references.store import ReferenceStore
from sage_select.schedules import Constant, Linear
from sage_select.selecting.loader import SelectiveLoader
from sage_select.selecting.log import SelectionLog
from sage_select.selecting.selector import Selector
from sage_select.strata import strata_from_judgments, strata_from_values
from sage_select.system.processes import Processes
from sage_select.system.settings import ConfigError
from sage_select.timeline import Timeline, kept_count
from sage_select.training.settings import Training, UpdateSettings
from sage_select.training.sharding import shard


@dataclass(frozen=True)
class Run:
    """A run as a configuration describes it, from its pairs down to its loader.

    `Run.prepare` reads the pairs; everything else is made from them when it is first needed, once.

    Attributes:
        config: The description.
        dataset: All usable pairs.
        pairs: Those to train on.
        held_out: Those to evaluate on, or None.
        tokenizer: The one that made the pairs' tokens; None if a trainer made them.
        show_progress: False for no progress bars.

    Example:
        >>> run = Run.prepare(SageConfig.read("run.yaml"))  # doctest: +SKIP
        >>> policy = run.load_policy()  # doctest: +SKIP
        >>> loader = run.loader(policy, run.open_reference(policy))  # doctest: +SKIP
    """

    config: SageConfig
    dataset: PreferenceDataset
    pairs: PreferenceDataset
    held_out: PreferenceDataset | None = None
    tokenizer: Any = None
    show_progress: bool | None = None

    @classmethod
    def prepare(
        cls, config: SageConfig, *, tokenizer: Any = None, show_progress: bool | None = None
    ) -> "Run":
        """Read the pairs and split them: everything that needs a tokenizer but no model.

        Args:
            config: The description.
            tokenizer: The configured tokenizer, if it is loaded already.
            show_progress: False for no progress bars.

        Raises:
            ConfigError: If a setting is missing.
            FileNotFoundError: If the data or the tokenizer are not there.
            ValueError: If no pair can be used.
        """
        tokenizer, data = tokenizer or load_tokenizer(config.model), config.data
        dataset = PreferenceDataset.read(
            required(data.path, "data.path"),
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
        pairs, held_out = dataset.take(range(len(dataset))[: data.limit]), None
        if data.held_out:
            rows, apart = pairs.split(data.held_out, seed=config.seed)
            pairs, held_out = dataset.take(rows), dataset.take(apart)
        return cls(config, dataset, pairs, held_out, tokenizer, show_progress)

    @property
    def used(self) -> PreferenceDataset:
        """The pairs to train on and those to evaluate on."""
        if self.held_out is None:
            return self.pairs
        return self.dataset.take(np.concatenate([self.pairs.index, self.held_out.index]))

    @cached_property
    def strata(self) -> Int64Array:
        """int64 [P], the difficulty of each pair to train on; 0 is the easiest."""
        count = len(self.config.selection.mix_start)
        return _strata(self.config.strata, self.pairs, count, self.config.seed)

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

    @cached_property
    def reader(self) -> Reader:
        """How policy and reference are read."""
        scoring, training = self.config.scoring, self.config.training
        return Reader(
            layout=scoring.layout,
            impl=scoring.impl,
            mixed_precision=DTYPES.get(training.mixed_precision),
            max_batch_tokens=scoring.max_batch_tokens,
            show_progress=self.show_progress,
        )

    @cached_property
    def score(self) -> Score:
        """What ranks pairs."""
        return load_score(self.config)

    @cached_property
    def training(self) -> Training:
        """How to train."""
        section = self.config.training
        shared = {name: getattr(section, name) for name in UpdateSettings.model_fields}
        shared |= {"loss": load_loss(self.config), "beta": self.config.beta}
        return Training(**shared, reader=self.reader)

    def load_policy(self, checkpoint: str | None = None) -> Any:
        """The policy on its device, or a checkpoint of it (a folder or a hub name)."""
        return load_policy(self.config.model, checkpoint)

    def load_reference(self) -> Any:
        """The reference model on its device."""
        return load_reference(self.config.model, self.config.reference)

    def open_reference(self, policy: nn.Module | None = None) -> Reference:
        """The reference's log-probs, from a file or from the store; missing ones are measured now.

        Args:
            policy: The policy as it is before training, if it is loaded already.
        """
        reference = self.config.reference
        if reference.file is not None:
            return read_reference(reference.file, self.used, key=reference.key)
        elsewhere = reference.model is not None or reference.device is not None
        store = self.store(self.load_reference() if elsewhere or policy is None else policy)
        store.fill()
        return store

    def store(self, reference: nn.Module) -> ReferenceStore:
        """The store of the reference's log-probs of this run's pairs, filled or not."""
        folder = self.config.reference.store
        return ReferenceStore(reference, self.used, folder=folder, reader=self.reader)

    def selector(self, reference: Reference, *, keep: float | None = None) -> Selector:
        """The selector; with `keep`, one without a plan that keeps this share of any pool."""
        selection = self.config.selection
        return Selector(
            self.score,
            self.timeline.keep if keep is None else Constant(keep),
            reference,
            self.timeline.progress if keep is None else lambda step: 0.0,
            measure=self.reader,
            multiple=selection.multiple,
            seed=self.config.seed,
            no_signal=selection.no_signal,
        )

    def loader(
        self, model: Any, reference: Reference, *, log: SelectionLog | None = None
    ) -> SelectiveLoader:
        """The batches of the whole run, selected with this policy as it is by then."""
        selector, seed = self.selector(reference), self.config.seed
        return SelectiveLoader(selector, self.timeline, self.pairs, model, seed=seed, log=log)


def build_loader(
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
    """Selection as configured, for a trainer that has its own pairs, batch size and precision.

    Args:
        config: The description; of its training section only `epochs` is used.
        pairs: The pairs to train on.
        model: The policy.
        reference: Log-probs of these pairs under the reference.
        batch_size: Pairs per optimizer step over all processes.
        mixed_precision: Autocast dtype of the trainer's updates.
        log: Where decisions are written.
        show_progress: False for no progress bar.

    Raises:
        ConfigError: If a setting does not fit the data.
    """
    update = {"batch_size": batch_size, "mixed_precision": DTYPE_NAMES[mixed_precision]}
    training = config.training.model_copy(update=update)
    config = config.model_copy(update={"training": training})
    run = Run(config, pairs, pairs, show_progress=show_progress)
    return run.loader(model, reference, log=log)


def spread(model: nn.Module, strategy: str) -> nn.Module:
    """The policy as several processes hold it, by `training.strategy`; unchanged in one alone."""
    if Processes.all().size == 1:
        return model
    return shard(model) if strategy == "fsdp2" else DistributedDataParallel(model)


def _strata(section: StrataSection, pairs: PreferenceDataset, count: int, seed: int) -> Int64Array:
    if section.by == "none":
        return np.zeros(len(pairs), dtype=np.int64)
    if section.by == "judge":
        clarity = _column(pairs, section.clarity, "strata.clarity")
        scores = _column(pairs, section.rejected_score, "strata.rejected_score")
        return strata_from_judgments(clarity, scores)
    if section.by == "value":
        values = _column(pairs, section.value, "strata.value")
        try:
            return strata_from_values(values, section.shares, ids=pairs.ids, seed=seed)
        except ValueError as error:
            raise ValueError(
                f"{error}, among the pairs to train on, in column {section.value!r} "
                "(strata.value); fix or drop these rows"
            ) from None
    strata = np.asarray(_column(pairs, section.stratum, "strata.stratum"))
    for row in np.flatnonzero(~np.isin(strata, np.arange(count)))[:1]:
        raise ConfigError(
            f"strata.stratum: row {pairs.index[row]} is {strata[row]!r}, not a whole number from 0 "
            f"to {count - 1}; selection.mix_start has {count} shares"
        )
    return strata.astype(np.int64)


def _column(pairs: PreferenceDataset, name: str, setting: str) -> Any:
    if name not in pairs.columns:
        raise ConfigError(
            f"{setting}: the data have no column {name!r}; they have {', '.join(pairs.columns)}. "
            "If no judge has labelled the pairs, set strata.by: value to use a numeric column "
            "(higher = easier), or strata.by: none with mix_start: [1.0] and mix_end: [1.0]"
        )
    return pairs.column(name)


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
