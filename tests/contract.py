"""The contract's run: a small run of SAGE that every host must train, observed from outside.

A host is a function `(Case) -> None` that trains in the process that calls it. Events are written
as they happen, to one file per process and attempt, so that they survive a kill.
"""

import hashlib
import json
import os
import random
import signal
from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from worlds import arithmetic_pairs, base

from sage_select import Linear, PairLogps, PreferenceDataset, SageConfig, SelectiveLoader

PAIRS = 48
BATCH = 4  # pairs per optimizer step over all processes
STEPS = 8
FIRST_STEPS = (0, 3, 5, 7)  # updates before each interval's pool is measured
KEPT = (12, 9, 7, 4)
LEARNING_RATE = 1e-3
BETA = 0.1
SAVE_EVERY = 1


def config() -> SageConfig:
    """Return the run's configuration."""
    return SageConfig(
        beta=BETA,
        selection={
            "refresh_steps": 3,
            "mix_start": (0.60, 0.35, 0.05),
            "mix_end": (0.30, 0.40, 0.30),
            "keep_start": 1.0,
            "keep_end": 0.4,
        },
        training={"batch_size": BATCH, "epochs": 1},
    )


def policy() -> Any:
    """Return the untrained policy, the demo's, with equal weights in every process."""
    torch.manual_seed(0)
    return deepcopy(base()[0]).float()


@cache
def records() -> list[dict[str, Any]]:
    """Return the pairs as records, from the file `CONTRACT_RECORDS` or generated (slow)."""
    if path := os.environ.get("CONTRACT_RECORDS"):
        stored: list[dict[str, Any]] = json.loads(Path(path).read_text())
        return stored
    return list(arithmetic_pairs())[:PAIRS]


def dataset() -> PreferenceDataset:
    """Return the tokenised pairs."""
    return PreferenceDataset.from_records(records(), tokenizer=base()[1], max_length=64)


def learning_rates() -> list[float]:
    """Return the learning rate of each update: linear to zero over the exact number of steps."""
    rates = Linear(LEARNING_RATE, 0.0)
    return [float(rates(step / STEPS)) for step in range(STEPS)]


@dataclass
class Case:
    """One attempt at the run, in this process.

    Attributes:
        folder: The run's folder, shared by all processes and attempts.
        strategy: "single", "ddp" or "fsdp2".
        rank: Rank of this process.
        world: Number of processes.
        attempt: Number of the attempt, from 0; later ones resume.
        die_after: Updates after which this process kills itself, with the checkpoint written.
        updates: Updates so far.
        generator: Hash of the generators before the current pool was scored; empty if none was.
    """

    folder: Path
    strategy: str = "single"
    rank: int = 0
    world: int = 1
    attempt: int = 0
    die_after: int | None = None
    updates: int = field(default=0, init=False)
    generator: str = field(default="", init=False)

    @property
    def per_process(self) -> int:
        """Pairs per forward pass: half of the rank's share of a batch, at least one."""
        return max(1, BATCH // (2 * self.world))

    @property
    def accumulation(self) -> int:
        """Forward passes per update and process."""
        return BATCH // (self.world * self.per_process)

    def note(self, event: str, **facts: Any) -> None:
        """Write an event to this process's trace, with the number of updates so far."""
        path = self.folder / f"trace-{self.attempt}-{self.rank}.jsonl"
        with path.open("a") as file:
            file.write(json.dumps({"event": event, "step": self.updates, **facts}) + "\n")

    def watch(self, optimizer: torch.optim.Optimizer, *, already: int = 0) -> None:
        """Count and trace updates; call it once the optimizer exists and its state is restored."""
        self.updates = already

        def before(optimizer: Any, *_: Any) -> None:
            self.note("update", learning_rate=float(optimizer.param_groups[0]["lr"]))

        def after(*_: Any) -> None:
            self.updates += 1

        optimizer.register_step_pre_hook(before)
        optimizer.register_step_post_hook(after)

    def watch_generators(self, loader: SelectiveLoader) -> None:
        """Record the global generators before each pool is scored."""
        measure = loader.selector.measure

        def watched(model: Any, pool: Any) -> PairLogps:
            self.generator = _generator_state()
            return measure(model, pool)

        loader.selector = replace(loader.selector, measure=watched)

    def trains(self, ids: Iterable[str], losses: Iterable[float] = ()) -> None:
        """Trace that this process trains on these pairs now."""
        self.note("train", ids=list(ids), losses=list(losses))

    def measures(self, interval: int, kept: Iterable[str], model: Any) -> None:
        """Trace that a pool was just scored, and the state of the model afterwards."""
        self.note(
            "measure",
            interval=interval,
            kept=list(kept),
            training=all(module.training for module in model.modules()),
            gradients=any(p.grad is not None for p in model.parameters()),
            trainable=all(p.requires_grad for p in model.parameters()),
            generators_moved=self.generator not in ("", _generator_state()),
        )
        self.generator = ""

    def dies_now(self) -> bool:
        """Return whether the process must die now; call it when a checkpoint is on disk."""
        return self.die_after is not None and self.updates >= self.die_after

    def die(self) -> None:
        """Kill this process with SIGKILL, so that it cannot clean up."""
        os.kill(os.getpid(), signal.SIGKILL)

    def finish(self, weights: dict[str, torch.Tensor]) -> None:
        """Save the whole weights, by the names of the bare model."""
        if self.rank == 0:
            torch.save({n: w.cpu() for n, w in weights.items()}, self.folder / "weights.pt")


def trace(folder: Path, attempt: int, rank: int) -> list[dict[str, Any]]:
    """Return the events that a process of an attempt wrote."""
    path = folder / f"trace-{attempt}-{rank}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _generator_state() -> str:
    """Return a hash of the state of the global generators."""
    state = torch.get_rng_state().numpy().tobytes() + str(random.getstate()).encode()
    return hashlib.blake2b(state + str(np.random.get_state()).encode()).hexdigest()[:16]  # noqa: NPY002
