"""Forecasts: what a run will do and cost, before it starts."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from sage_select.config import SageConfig
from sage_select.plan import STRATA
from sage_select.runs import Run, model_settings


def forecast(run: Run) -> dict[str, Any]:
    """A run in plain values: its rows, strata, intervals, steps and cost."""
    timeline, plan, training = run.timeline, run.timeline.plan, run.config.training
    names = strata_names(plan.counts.shape[1])
    cost, parameters = cost_of(run), num_parameters(run.config)
    return {
        "config": run.config.hash,
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
            }
            for k, pool in enumerate(plan.pools)
        ],
        "largest_deviation": plan.largest_deviation,
        "kept": timeline.total_kept,
        "steps": timeline.total_steps,
        "steps_without_selection": -(-len(run.pairs) * training.epochs // training.batch_size),
        "cost": asdict(cost) | {"relative": cost.relative},
        "parameters": parameters,
        # a multiplication and an addition per parameter and token; twice that backward
        "petaflops": None
        if parameters is None
        else 2e-15 * parameters * (cost.reference + cost.scoring + 3 * cost.training),
    }


def strata_names(count: int) -> list[str]:
    """Easy, medium and hard, or numbers where there are not three."""
    return list(STRATA) if count == len(STRATA) else [f"stratum {c}" for c in range(count)]


@dataclass(frozen=True)
class Cost:
    """Tokens that a run reads, known before it starts; prompts and responses, of both sides.

    Attributes:
        reference: Of all pairs, forward; less where the store knows them already.
        scoring: Of all pools of which something is dropped, forward.
        training: Of the kept pairs, forward and backward, if they are as long as the others; a
            score that prefers short pairs needs less.
        full: Of the same epochs without selection, forward and backward.
    """

    reference: int
    scoring: int
    training: int
    full: int

    @property
    def relative(self) -> float:
        """The run's cost over that of training on everything, a backward pass costing two forward
        ones, and the reference being measured once in both."""
        return (self.reference + self.scoring + 3 * self.training) / (
            self.reference + 3 * self.full
        )


def cost_of(run: Run) -> Cost:
    """What a run will read."""
    tokens = dict(zip(run.pairs.index.tolist(), run.pairs.num_tokens.tolist(), strict=True))
    pools = [
        (sum(tokens[row] for row in pool.tolist()), count, len(pool))
        for pool, count in zip(run.timeline.plan.pools, run.timeline.kept_count, strict=True)
    ]
    return Cost(
        reference=int(run.used.num_tokens.sum()),
        scoring=sum(total for total, count, size in pools if count < size),
        training=round(sum(total * count / size for total, count, size in pools)),
        full=sum(tokens.values()) * run.config.training.epochs,
    )


def num_parameters(config: SageConfig) -> int | None:
    """Parameters of the policy, counted without loading a weight; None where it is elsewhere."""
    try:
        settings = model_settings(config)
    except FileNotFoundError:
        return None
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(settings)
    total: int = sum(parameter.numel() for parameter in model.parameters())
    return total
