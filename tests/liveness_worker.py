"""One process of two that select together, the second of which dies or hangs on the way."""

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import torch.distributed as dist
from measure_worker import BUDGET, STRATEGIES
from small_models import few_pairs

from sage_select import (
    Linear,
    SelectiveLoader,
    Selector,
    Timeline,
    Training,
    fit,
    measure,
    plan_pools,
    sage,
)
from sage_select.models import measuring
from sage_select.schedules import Constant
from sage_select.training import update

how, strategy = sys.argv[1:]
dist.init_process_group("gloo")
pairs, model = few_pairs(), STRATEGIES[strategy]()


def small(model, pool):
    return measure(model, pool, max_batch_tokens=BUDGET, layout="padded")


plan = plan_pools([0] * len(pairs), Constant((1.0,)), num_pools=2, copies=2)
timeline = Timeline(plan, Linear(1.0, 0.5), batch_size=2)
selector = Selector(sage, timeline.keep, small(model, pairs), timeline.progress, measure=small)
loader = SelectiveLoader(selector, timeline, pairs, model)
real, calls = measuring.forward_logps, iter(range(100))


def forward(*args):
    if dist.get_rank() == 1 and next(calls) == 1:
        os.kill(os.getpid(), {"hangs": signal.SIGSTOP}.get(how, signal.SIGKILL))
    return real(*args)


if how == "dies in an update":
    made, preference_losses = iter(range(100)), update.preference_losses

    def forward_pairs(*args, **options):
        if dist.get_rank() == 1 and next(made) == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return preference_losses(*args, **options)

    update.preference_losses = forward_pairs
    fit(model, loader, pairs, selector.reference, Training(learning_rate=1e-3))
for _ in loader:
    measuring.forward_logps = forward
