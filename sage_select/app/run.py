"""Run: the objects that a configuration describes, each created once."""

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
    """Objects of a run, from its pairs to its loader, as the configuration describes them.

    `Run.prepare` reads the pairs; everything else is created from them on first use, once.

    Attributes:
        config: The configuration.
        dataset: All usable pairs.
        pairs: Pairs to train on.
        held_out: Pairs to evaluate on, or None.
        tokenizer: Tokenizer of the pairs; None if a trainer has tokenised them.
        show_progress: False to hide progress bars.

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
        """Read and split the pairs, which needs the tokenizer but no model.

        Args:
            config: The configuration.
            tokenizer: The configured tokenizer, if already loaded.
            show_progress: False to hide progress bars.

        Raises:
            ConfigError: If a setting is missing.
            FileNotFoundError: If the data or the tokenizer cannot be found.
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
            chat_template_kwargs=data.chat_template_kwargs or None,
            special_tokens=data.special_tokens,
        )
        pairs, held_out = dataset.take(range(len(dataset))[: data.limit]), None
        if data.held_out:
            training_rows, held_out_rows = pairs.split(data.held_out, seed=config.seed)
            pairs, held_out = dataset.take(training_rows), dataset.take(held_out_rows)
        return cls(config, dataset, pairs, held_out, tokenizer, show_progress)

    @property
    def used(self) -> PreferenceDataset:
        """Pairs to train on, followed by pairs to evaluate on."""
        if self.held_out is None:
            return self.pairs
        return self.dataset.take(np.concatenate([self.pairs.index, self.held_out.index]))

    @cached_property
    def strata(self) -> Int64Array:
        """Stratum of each pair to train on, int64 [P]; 0 is the easiest."""
        num_strata = len(self.config.selection.mix_start)
        return _strata(self.config.strata, self.pairs, num_strata, self.config.seed)

    @cached_property
    def timeline(self) -> Timeline:
        """Pools of dataset rows, keep ratios and the step at which each interval starts.

        Raises:
            ConfigError: If a setting does not fit the data.
            ValueError: If the data do not allow the plan, for instance its mix.
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
        _check_kept_counts(timeline)
        return timeline

    @cached_property
    def reader(self) -> Reader:
        """Reader shared by policy and reference, so that their log-probs are comparable."""
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
        """Score that ranks pairs, with its settings bound."""
        return load_score(self.config)

    @cached_property
    def training(self) -> Training:
        """Settings of updates, with the loss loaded."""
        section = self.config.training
        shared = {name: getattr(section, name) for name in UpdateSettings.model_fields}
        shared |= {"loss": load_loss(self.config), "beta": self.config.beta}
        return Training(**shared, reader=self.reader)

    def load_policy(self, checkpoint: str | None = None) -> Any:
        """Load the policy, or a checkpoint of it (a folder or a hub name), onto its device."""
        return load_policy(self.config.model, checkpoint)

    def load_reference(self) -> Any:
        """Load the reference model onto its device."""
        return load_reference(self.config.model, self.config.reference)

    def open_reference(self, policy: nn.Module | None = None) -> Reference:
        """Return the reference's log-probs, from a file or from the store.

        Log-probs that the store lacks are measured now.

        Args:
            policy: The policy before training, if already loaded.
        """
        reference = self.config.reference
        if reference.file is not None:
            return read_reference(reference.file, self.used, key=reference.key)
        # otherwise the initial policy is the reference, and need not be loaded twice
        separate = reference.model is not None or reference.device is not None
        store = self.store(self.load_reference() if separate or policy is None else policy)
        store.fill()
        return store

    def store(self, reference: nn.Module) -> ReferenceStore:
        """Return the store of reference log-probs for this run's pairs, without filling it."""
        folder = self.config.reference.store
        return ReferenceStore(reference, self.used, folder=folder, reader=self.reader)

    def selector(self, reference: Reference, *, keep: float | None = None) -> Selector:
        """Return the selector of the plan, or with `keep` one that needs no plan.

        Args:
            reference: Log-probs of the reference.
            keep: Share of any pool to keep, in (0, 1]; by default the schedule of the plan.
        """
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
        """Return the loader of the whole run; each interval is selected with the current policy.

        Args:
            model: The policy, which is trained between intervals.
            reference: Log-probs of the reference.
            log: Log to which selections are written.
        """
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
    """Build the loader of a configuration for a trainer that sets pairs, batch size and precision.

    Args:
        config: The configuration; of its `training` section only `epochs` is used.
        pairs: Pairs to train on.
        model: The policy.
        reference: Log-probs of these pairs under the reference.
        batch_size: Pairs per optimizer step, over all processes.
        mixed_precision: Autocast dtype of the trainer's updates; None without autocast.
        log: Log to which selections are written.
        show_progress: False to hide progress bars.

    Returns:
        The loader, whose batches are rows of the dataset of `pairs`.

    Raises:
        ConfigError: If a setting does not fit the data.
    """
    if mixed_precision not in DTYPE_NAMES:
        raise ConfigError(
            "build_loader: mixed_precision must be None or one of "
            f"{', '.join(map(str, filter(None, DTYPE_NAMES)))}, got {mixed_precision!r}"
        )
    update = {"batch_size": batch_size, "mixed_precision": DTYPE_NAMES[mixed_precision]}
    training = config.training.model_copy(update=update)
    config = config.model_copy(update={"training": training})
    # the trainer has prepared the pairs, so nothing is read, split or held out here
    run = Run(config, pairs, pairs, show_progress=show_progress)
    return run.loader(model, reference, log=log)


def spread(model: nn.Module, strategy: str) -> nn.Module:
    """Shard or replicate the policy over processes, see `training.strategy`; no-op in one."""
    if Processes.all().size == 1:
        return model
    return shard(model) if strategy == "fsdp2" else DistributedDataParallel(model)


def _strata(
    section: StrataSection, pairs: PreferenceDataset, num_strata: int, seed: int
) -> Int64Array:
    """Return the stratum of each pair, int64 [P]."""
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
    for row in np.flatnonzero(~np.isin(strata, np.arange(num_strata)))[:1]:
        raise ConfigError(
            f"strata.stratum: row {pairs.index[row]} is {strata[row]!r}, not a whole number from 0 "
            f"to {num_strata - 1}; selection.mix_start must have one share per stratum, and has "
            f"{num_strata}"
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


def _check_kept_counts(timeline: Timeline) -> None:
    """Refuse a plan that keeps nothing of a pool; warn about one that keeps everything."""
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
            f"selection has no effect: the {len(pools)} pools are kept whole. With few pairs, "
            "lower selection.refresh_steps to get more pools; otherwise lower selection.keep_end",
            stacklevel=3,
        )
