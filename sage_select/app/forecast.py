"""Forecasts: what a run will do and cost, before it starts."""

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
    """A run in plain values: its rows, strata, intervals, steps and cost."""
    timeline, plan, training = run.timeline, run.timeline.plan, run.config.training
    names = strata_names(plan.counts.shape[1])
    cost, parameters = cost_of(run), num_parameters(run.config)
    flops = parameters is not None
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
            "flops": {name: work.needed if flops else None for name, work in phases.items()},
            "relative": cost.relative,
            "break_even": cost.break_even,
            "keep": timeline.total_kept / sum(map(len, plan.pools)),
        },
        "parameters": parameters,
    }


def strata_names(count: int) -> list[str]:
    """Easy, medium and hard, or numbers where there are not three."""
    return list(STRATA) if count == len(STRATA) else [f"stratum {c}" for c in range(count)]


@dataclass(frozen=True)
class Cost:
    """What a run needs, known before it starts; FLOPs where the model's shape is known.

    Attributes:
        reference: All pairs forward; less where the store knows them already.
        scoring: Of each interval, its pool forward; nothing where the pool is kept whole.
        training: Of each interval, its kept pairs forward and backward, if they are as long as the
            others; a score that prefers short pairs needs less, and so do batches in which pairs
            share a prompt.
        evaluation: The held-out pairs forward, as often as they are evaluated.
        full: The same epochs without selection, forward and backward.
    """

    reference: Work
    scoring: tuple[Work, ...]
    training: tuple[Work, ...]
    evaluation: Work
    full: Work

    @property
    def phases(self) -> Ledger:
        """As the run will book it."""
        return Ledger(
            reference=self.reference,
            scoring=sum(self.scoring, Work()),
            training=sum(self.training, Work()),
            evaluation=self.evaluation,
        )

    @property
    def relative(self) -> float:
        """The cost over that of training on everything, the reference being measured in both."""
        selected = self.reference + self.phases["scoring"] + self.phases["training"]
        return selected.needed / (self.reference + self.full).needed

    @property
    def break_even(self) -> float:
        """The share of pairs to keep, all intervals together, below which the run is cheaper."""
        return break_even(self.phases["scoring"].needed, self.full.needed)


def compared(cost: Cost, spent: Ledger) -> dict[str, Any]:
    """What was forecast beside what it took, phase by phase, in plain values.

    `break_even` is the share to keep below which the run took less time than training on all of
    its pairs would have taken, at the speed at which it trained.
    """
    ahead = cost.phases
    names = [
        *(name for name in ahead if name in spent),
        *(name for name in spent if name not in ahead),
    ]
    phases = {
        name: {"forecast": ahead.get(name, Work()).needed, **asdict(spent[name])} for name in names
    }
    training, scoring = spent.get("training", Work()), spent.get("scoring", Work())
    full = training.seconds * cost.full.needed / training.needed if training.needed else math.nan
    return {"phases": phases, "break_even": break_even(scoring.seconds, full)}


def cost_of(run: Run) -> Cost:
    """What a run will take."""
    shape = _shape(run.config) or Shape(body=1, head=0, attention=0)  # tokens are all that is known
    training, timeline, used = run.config.training, run.timeline, run.used
    keys = sequence_keys(used)
    place = np.zeros(len(run.dataset), dtype=np.int64)
    place[used.index] = np.arange(len(used))

    def measured(pairs: PreferenceDataset) -> Work:
        distinct = distinct_sequences(pairs, keys.at(place[pairs.index]))
        return shape.needed(*distinct.needed(np.arange(len(distinct))))

    def trained(pairs: PreferenceDataset) -> Work:
        lengths = pairs.sequence_lengths
        starts = lengths - np.concatenate([pairs.chosen_tokens, pairs.rejected_tokens])
        first = np.arange(len(lengths)) < len(pairs)  # a pair's responses share their prompt
        return shape.needed(starts, lengths, first) * shape.passes

    evaluations = 1 + -(-timeline.total_steps // training.evaluate_every)
    pools = [run.dataset.take(pool) for pool in timeline.plan.pools]
    kept = timeline.kept_count
    return Cost(
        reference=measured(used),
        scoring=tuple(
            measured(pool) if count < len(pool) else Work()
            for pool, count in zip(pools, kept, strict=True)
        ),
        training=tuple(
            trained(pool).repeated(count / len(pool))
            for pool, count in zip(pools, kept, strict=True)
        ),
        evaluation=Work() if run.held_out is None else measured(run.held_out).repeated(evaluations),
        full=trained(run.pairs).repeated(training.epochs),
    )


def _shape(config: SageConfig) -> Shape | None:
    """What decides the policy's FLOPs, without loading a weight; None where it is elsewhere."""
    model = _without_weights(config)
    return None if model is None else shape_of(model)


def num_parameters(config: SageConfig) -> int | None:
    """Parameters of the policy, counted without loading a weight; None where it is elsewhere."""
    model = _without_weights(config)
    return None if model is None else sum(parameter.numel() for parameter in model.parameters())


def _without_weights(config: SageConfig) -> Any:
    try:
        settings = policy_config(config.model)
    except FileNotFoundError:
        return None
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(settings)
