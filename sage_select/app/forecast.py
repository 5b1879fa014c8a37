"""Forecasts: the plan and the cost of a run, before it starts."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from sage_select.app.config import SageConfig
from sage_select.app.loading import policy_config
from sage_select.app.run import Run
from sage_select.data.dataset import PreferenceDataset
from sage_select.models.flops import Shape, shape_of
from sage_select.models.sequences import distinct_sequences, sequence_keys
from sage_select.strata import STRATA
from sage_select.system.ledger import Ledger, Work, break_even


def forecast(run: Run) -> dict[str, Any]:
    """Return the rows, strata, intervals, steps and cost of a run as plain values."""
    timeline, plan, training = run.timeline, run.timeline.plan, run.config.training
    names = strata_names(plan.counts.shape[1])
    cost, parameters = cost_of(run), num_parameters(run.config)
    flops_known = parameters is not None
    phases = {**cost.phases, "full": cost.full}
    return {
        "config": run.config.hash,
        "run_folder": str(run.config.run_folder),
        "waterfall": run.dataset.waterfall(),
        "plan": str(plan),
        "rows_read": len(run.dataset) + run.dataset.set_aside.height,
        "set_aside": dict(run.dataset.set_aside["reason"].value_counts().rows()),
        "pairs": len(run.pairs),
        "held_out": 0 if run.held_out is None else len(run.held_out),
        "strata": {name: int((run.strata == c).sum()) for c, name in enumerate(names)},
        "intervals": [
            {
                "interval": k,
                "progress": plan.progress[k],
                "pairs": len(pool),
                **dict(zip(names, plan.counts[k].tolist(), strict=True)),
                **{
                    f"{name} asked": ideal
                    for name, ideal in zip(names, plan.ideal[k].round(1).tolist(), strict=True)
                },
                "keep": float(timeline.keep(plan.progress[k])),
                "kept": timeline.kept_count[k],
                "first step": timeline.first_step[k],
                "scored Mtok": cost.scoring[k].tokens / 1e6,
                "trained Mtok": cost.training[k].tokens / 1e6,
            }
            for k, pool in enumerate(plan.pools)
        ],
        "largest_deviation": plan.largest_deviation,
        "kept": timeline.total_kept,
        "steps": timeline.total_steps,
        "steps_without_selection": -(-len(run.pairs) * training.epochs // training.batch_size),
        "cost": {
            "tokens": {name: work.tokens for name, work in phases.items()},
            "flops": {name: work.needed if flops_known else None for name, work in phases.items()},
            "relative": cost.relative,
            "break_even": cost.break_even,
            "keep": timeline.total_kept / sum(map(len, plan.pools)),
        },
        "parameters": parameters,
    }


def strata_names(count: int) -> list[str]:
    """Return easy, medium and hard for three strata, and numbers for any other count."""
    return list(STRATA) if count == len(STRATA) else [f"stratum {c}" for c in range(count)]


@dataclass(frozen=True)
class Cost:
    """Forecast cost of a run: tokens, and FLOPs if the model's shape is known.

    Attributes:
        reference: Forward pass over all pairs; less if the store already has some of them.
        scoring: Forward pass over the pool of each interval; none if the pool is kept whole.
        training: Forward and backward pass over the kept pairs of each interval, assuming that they
            are as long as the others. A score that prefers short pairs needs less, and so do
            batches in which pairs share a prompt.
        evaluation: Forward pass over the held-out pairs, times the number of evaluations.
        full: Forward and backward pass over the same epochs without selection.
    """

    reference: Work
    scoring: tuple[Work, ...]
    training: tuple[Work, ...]
    evaluation: Work
    full: Work

    @property
    def phases(self) -> Ledger:
        """Ledger of the phases, with the names under which the run books its work."""
        return Ledger(
            reference=self.reference,
            scoring=sum(self.scoring, Work()),
            training=sum(self.training, Work()),
            evaluation=self.evaluation,
        )

    @property
    def relative(self) -> float:
        """Cost relative to training on everything; both include measuring the reference."""
        selected = self.reference + self.phases["scoring"] + self.phases["training"]
        return selected.needed / (self.reference + self.full).needed

    @property
    def break_even(self) -> float:
        """Share of pairs to keep, over all intervals, below which the run is cheaper."""
        return break_even(self.phases["scoring"].needed, self.full.needed)


def compared(cost: Cost, spent: Ledger) -> dict[str, Any]:
    """Compare forecast and actual work, phase by phase, as plain values.

    `break_even` is the share to keep below which the run took less time than training on all of
    its pairs would have taken, at the measured training speed.
    """
    planned = cost.phases
    # in the order of the forecast, then work that was not forecast
    names = [
        *(name for name in planned if name in spent),
        *(name for name in spent if name not in planned),
    ]
    phases = {
        name: {"forecast": planned.get(name, Work()).needed, **asdict(spent[name])}
        for name in names
    }
    training, scoring = spent.get("training", Work()), spent.get("scoring", Work())
    # seconds of training on everything, scaled from the FLOPs of the pairs that were kept
    full = training.seconds * cost.full.needed / training.needed if training.needed else math.nan
    return {"phases": phases, "break_even": break_even(scoring.seconds, full)}


def cost_of(run: Run) -> Cost:
    """Compute the forecast cost of a run."""
    # without the model's shape, count one unit of work per token
    shape = _shape(run.config) or Shape(body=1, head=0, attention=0)
    training, timeline, used = run.config.training, run.timeline, run.used
    keys = sequence_keys(used)
    position = np.zeros(len(run.dataset), dtype=np.int64)  # from dataset row to row of `keys`
    position[used.index] = np.arange(len(used))

    def forward_work(pairs: PreferenceDataset) -> Work:
        # a sequence that several pairs share is measured once
        distinct = distinct_sequences(pairs, keys.at(position[pairs.index]))
        return shape.needed(*distinct.needed(np.arange(len(distinct))))

    def training_work(pairs: PreferenceDataset) -> Work:
        lengths = pairs.sequence_lengths
        scored = np.concatenate([pairs.chosen_tokens, pairs.rejected_tokens])
        starts = lengths - scored  # turns of a response that are not scored count as prompt
        first = np.arange(len(lengths)) < len(pairs)  # a pair's responses share their prompt
        return shape.needed(starts, lengths, scored, first) * shape.passes

    # one before the first step, one every `evaluate_every` steps, and one at the end
    evaluations = 1 + -(-timeline.total_steps // training.evaluate_every)
    pools = [run.dataset.take(pool) for pool in timeline.plan.pools]
    kept = timeline.kept_count
    return Cost(
        reference=forward_work(used),
        scoring=tuple(
            forward_work(pool) if count < len(pool) else Work()
            for pool, count in zip(pools, kept, strict=True)
        ),
        training=tuple(
            training_work(pool).repeated(count / len(pool))
            for pool, count in zip(pools, kept, strict=True)
        ),
        evaluation=(
            Work() if run.held_out is None else forward_work(run.held_out).repeated(evaluations)
        ),
        full=training_work(run.pairs).repeated(training.epochs),
    )


def _shape(config: SageConfig) -> Shape | None:
    """Return the shape that determines the policy's FLOPs, or None if its files are not here."""
    model = _without_weights(config)
    return None if model is None else shape_of(model)


def num_parameters(config: SageConfig) -> int | None:
    """Count the policy's parameters without loading weights; None if its files are not here."""
    model = _without_weights(config)
    return None if model is None else sum(parameter.numel() for parameter in model.parameters())


def _without_weights(config: SageConfig) -> Any:
    """Return the policy on the meta device, without weights, or None if its files are not here."""
    try:
        settings = policy_config(config.model)
    except FileNotFoundError:
        return None
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(settings)
