"""Small real components for tests: a trained model, its tokenizer, and pairs sampled from it."""

from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch

from arithmetic import load_base, make_pairs, make_problems
from sage_select import (
    Linear,
    PreferenceDataset,
    Selector,
    Timeline,
    measure,
    plan_run,
    sage,
    strata_from_judgments,
)

base = cache(load_base)


@cache
def arithmetic_pairs() -> tuple[dict[str, Any], ...]:
    """About a hundred verified pairs, sampled from the demo's policy."""
    model, tokenizer = base()
    return tuple(make_pairs(model, tokenizer, make_problems(90, seed=7, zipf=0.3), seed=0))


@dataclass
class World:
    """A policy, its pairs, and the timeline and selector of a run."""

    model: Any
    tokenizer: Any
    dataset: PreferenceDataset
    timeline: Timeline
    selector: Selector


def arithmetic_world(
    *, num_pairs: int = 96, batch_size: int = 4, refresh_steps: int = 6, epochs: int = 1
) -> World:
    """Return a fresh copy of the demo's policy before a small run of SAGE."""
    torch.manual_seed(0)
    model, tokenizer = deepcopy(base()[0]), base()[1]
    dataset = PreferenceDataset.from_records(
        list(arithmetic_pairs())[:num_pairs], tokenizer=tokenizer, max_length=64
    )
    strata = strata_from_judgments(dataset.column("clarity"), dataset.column("rejected_score"))
    plan = plan_run(
        strata,
        Linear((0.60, 0.35, 0.05), (0.30, 0.40, 0.30)),
        batch_size=batch_size,
        refresh_steps=refresh_steps,
        epochs=epochs,
        ids=dataset.ids,
    )
    timeline = Timeline(plan, Linear(1.0, 0.4), batch_size)
    selector = Selector(sage, timeline.keep, measure(model, dataset), timeline.progress)
    return World(model, tokenizer, dataset, timeline, selector)


def naive_response_logps(model: Any, tokens: np.ndarray, response_start: int) -> float:
    """Summed log-prob of a response, from the model's own logits in float64."""
    input_ids = torch.as_tensor(tokens, dtype=torch.int64, device=model.device)[None]
    with torch.no_grad():
        logits = model(input_ids=input_ids).logits[0].double()
    logps = logits.log_softmax(-1)[response_start - 1 : -1]
    return float(logps.gather(-1, input_ids[0, response_start:, None]).sum())
