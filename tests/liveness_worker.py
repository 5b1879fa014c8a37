"""One of two ranks that select together; rank 1 dies or hangs during the run."""

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


def measure_in_small_batches(model, pool):
    return measure(model, pool, max_batch_tokens=BUDGET, layout="padded")


plan = plan_pools([0] * len(pairs), Constant((1.0,)), num_pools=2, copies=2)
timeline = Timeline(plan, Linear(1.0, 0.5), batch_size=2)
selector = Selector(
    sage,
    timeline.keep,
    measure_in_small_batches(model, pairs),
    timeline.progress,
    measure=measure_in_small_batches,
)
loader = SelectiveLoader(selector, timeline, pairs, model)
forward_logps, calls = measuring.forward_logps, iter(range(100))


def failing_forward_logps(*args):
    # in the second batch, so that the first heartbeats have been sent
    if dist.get_rank() == 1 and next(calls) == 1:
        os.kill(os.getpid(), {"hangs": signal.SIGSTOP}.get(how, signal.SIGKILL))
    return forward_logps(*args)


if how == "dies in an update":
    passes, preference_losses = iter(range(100)), update.preference_losses

    def failing_preference_losses(*args, **options):
        if dist.get_rank() == 1 and next(passes) == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return preference_losses(*args, **options)

    update.preference_losses = failing_preference_losses
    fit(model, loader, pairs, selector.reference, Training(learning_rate=1e-3))
for _ in loader:
    measuring.forward_logps = failing_forward_logps  # the first interval is scored normally
