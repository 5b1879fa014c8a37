"""Loaders: the batches of a whole run, in order, as dataset rows. They know how to resume."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from sage_select.arrays import Int64Array
from sage_select.data.dataset import PreferenceDataset
from sage_select.hashing import hash_order
from sage_select.schedules import Constant, Linear
from sage_select.selecting.log import SelectionLog
from sage_select.selecting.selector import Selector
from sage_select.selection import Selection
from sage_select.system.heartbeats import during
from sage_select.system.identity import describe, digest_arrays
from sage_select.system.processes import Processes
from sage_select.timeline import Timeline

State = dict[str, Any]

EXCERPT = 32  # pairs by which a reference is known again
# what devices and precisions differ by on average, and policies do not, once they have moved
RELATIVE, NATS = 0.01, 0.1  # a share of a log-prob, and as much more


class SelectiveLoader:
    """A sized iterable over a run: each item is one batch of dataset rows, int64.

    An interval's pool is scored when its first batch is pulled, hence with the policy as it is
    after all earlier updates. Its kept pairs come in a seeded shuffled order, in whole batches;
    what is left over is carried to the front of the next interval, and only the last batch of the
    run may be short.

    The loader's state is a value: the step, the interval and the rows still to come of it. Resuming
    never scores an interval again, and repeats or loses no pair. Save it after an update, before
    the next batch is pulled.

    With several processes each has a loader, and all pull the same batches: `dealt` says which of
    a batch's pairs a process trains on.

    Args:
        selector: Decides what is kept.
        timeline: The plan, the keep schedule and the batch size.
        dataset: The pairs to train on; the plan deals rows of these.
        model: The current policy, handed to the selector.
        seed: Key of the shuffle.
        log: Where decisions are put on disk before the first update that follows from them.
        on_select: Called with the interval and the selection, after it is on disk.

    Attributes:
        step: Batches handed out so far, which is optimizer steps taken. A host that fetches ahead
            (`decided`) sets it to its own count before it asks for the state.

    Example:
        >>> for rows in loader:  # doctest: +SKIP
        ...     train_step(model, dataset.take(rows))
    """

    def __init__(
        self,
        selector: Selector,
        timeline: Timeline,
        dataset: PreferenceDataset,
        model: Any,
        *,
        seed: int = 0,
        log: SelectionLog | None = None,
        on_select: Callable[[int, Selection], None] | None = None,
    ) -> None:
        dealt = np.concatenate(timeline.plan.pools)
        for row in dealt[~np.isin(dealt, dataset.index)][:1]:
            raise ValueError(
                f"SelectiveLoader: the plan deals row {row}, which is not among the "
                f"{len(dataset)} pairs given; plan with the same pairs, and put a plan for a "
                "part of a dataset on its rows with plan.on_rows(rows)"
            )
        for name in ("keep", "multiple"):
            ours, planned = getattr(selector, name), getattr(timeline, name)
            if ours != planned:
                raise ValueError(
                    f"SelectiveLoader: the selector's {name} is {ours}, the timeline's is "
                    f"{planned}; they must agree, since totals are computed beforehand"
                )
        self.selector = selector
        self.timeline = timeline
        self.dataset = dataset
        self.model = model
        self.seed = seed
        self.log = log
        self.on_select = on_select
        self.step = 0
        self._scored = 0  # intervals scored so far
        self._rows: Int64Array = np.empty(0, dtype=np.int64)  # to train from step _first on
        self._first = 0
        self.tokens_scored = 0
        self._run = digest_arrays(
            *timeline.plan.pools,
            np.array([*timeline.kept_count, timeline.batch_size, seed]),
            dataset.index,
            dataset.ids,
            np.frombuffer(_decides(selector).encode(), np.uint8),
        )

    def __len__(self) -> int:
        return self.timeline.total_steps

    @property
    def interval(self) -> int:
        """The interval under way, from 0; -1 before the first."""
        return self._scored - 1

    def __iter__(self) -> Iterator[Int64Array]:
        """The batches that are still to come."""
        for batches in self.decided():
            for batch in batches:
                self.step += 1
                yield batch

    def decided(self) -> Iterator[list[Int64Array]]:
        """The batches that are still to come, together those that are decided together.

        For hosts that fetch batches ahead: within a list nothing depends on the policy. Asking for
        the next list scores the next pool, so ask when the last batch of this one is trained.
        """
        size, pools = self.timeline.batch_size, self.timeline.plan.pools
        while self.step < len(self):
            while len(rows := self._to_come()) < size and self._scored < len(pools):
                self._begin_interval()
            whole = self._scored < len(pools)  # what is left over waits for the next interval
            count = len(rows) // size if whole else -(-len(rows) // size)
            after = self.step + count
            yield [rows[i * size : (i + 1) * size] for i in range(count)]
            self.step = after

    def metrics(self) -> dict[str, float]:
        """What a log should say of the interval under way; nothing before the first."""
        if self.interval < 0:
            return {}
        kept = self.timeline.kept_count[self.interval]
        pool = len(self.timeline.plan.pools[self.interval])
        return {
            "interval": self.interval,
            "kept_share": kept / pool,
            "tokens_scored": self.tokens_scored,
        }

    def state_dict(self) -> State:
        """Where the run stands after `step` updates: plain numbers and lists."""
        return {
            "run": self._run,
            "batch_size": self.timeline.batch_size,
            "step": self.step,
            "scored": self._scored,
            "rows": self._to_come().tolist(),
            "tokens_scored": self.tokens_scored,
            "reference": self._reference_logps(),
        }

    def load_state_dict(self, state: State) -> None:
        """Go on from where another loader of the same run stood.

        Raises:
            ValueError: If the state belongs to other pairs, another plan, schedule, batch size,
                seed, selector or reference.
        """
        _check_same_run(state, self._run, self.timeline.batch_size)
        _check_same_reference(state.get("reference", []), self._reference_logps())
        self.step = self._first = state["step"]
        self._scored = state["scored"]
        self._rows = np.asarray(state["rows"], dtype=np.int64)
        self.tokens_scored = state["tokens_scored"]

    def _to_come(self) -> Int64Array:
        """Rows that are decided and not yet handed out."""
        return self._rows[(self.step - self._first) * self.timeline.batch_size :]

    def _reference_logps(self) -> list[float]:
        """Of the first few pairs; nothing where the reference does not know them (yet)."""
        try:
            logps = self.selector.reference.take(self.timeline.plan.pools[0][:EXCERPT])
        except (KeyError, ValueError):
            return []
        return [*logps.chosen.tolist(), *logps.rejected.tolist()]

    def _begin_interval(self) -> None:
        k = self._scored
        rows = self.timeline.plan.pools[k]
        pool = self.dataset.take(rows)
        with during(f"interval {k}"):
            selection = self.selector.select(
                self.model, pool, self.step, progress=self.timeline.plan.progress[k]
            )
        if len(selection) != self.timeline.kept_count[k]:
            raise ValueError(
                f"SelectiveLoader: interval {k} should keep {self.timeline.kept_count[k]} of "
                f"{len(rows)} pairs, but the selection has {len(selection)}"
            )
        if selection.rule != "all":
            self.tokens_scored += int(pool.num_tokens.sum())
        if self.log is not None and Processes.all().rank == 0:
            self.log.write(k, selection, pool.ids, run=self._run)
        if self.on_select is not None:
            self.on_select(k, selection)
        shuffled = training_order(self.dataset.take(np.asarray(selection)), self.seed, k)
        self._rows, self._first = np.concatenate([self._to_come(), shuffled]), self.step
        self._scored += 1


def training_order(kept: PreferenceDataset, seed: int, interval: int) -> Int64Array:
    """The rows of an interval's kept pairs in the seeded order in which they are trained."""
    return kept.index[hash_order(kept.ids, "train", seed, interval)]


class ShuffledLoader:
    """Plain epochs over all pairs, without selection: the baseline.

    Args:
        pairs: The pairs to train on.
        batch_size: Pairs per optimizer step; the rest of an epoch is carried to the next, so that
            only the very last batch may be short.
        epochs: Traversals of the pairs.
        seed: Key of the shuffle.

    Example:
        >>> for rows in ShuffledLoader(dataset, batch_size=16, epochs=3):  # doctest: +SKIP
        ...     train_step(model, dataset.take(rows))
    """

    def __init__(
        self, pairs: PreferenceDataset, *, batch_size: int, epochs: int = 1, seed: int = 0
    ) -> None:
        if batch_size < 1 or epochs < 1:
            raise ValueError(
                "ShuffledLoader: batch_size and epochs must be at least 1, got "
                f"{batch_size} and {epochs}"
            )
        self.pairs = pairs
        self.batch_size = batch_size
        self.epochs = epochs
        self.seed = seed
        self.step = 0
        self._run = digest_arrays(np.array([batch_size, epochs, seed]), pairs.ids)

    def __len__(self) -> int:
        return -(-len(self.pairs) * self.epochs // self.batch_size)

    def __iter__(self) -> Iterator[Int64Array]:
        """The batches that are still to come."""
        ids = self.pairs.ids
        sequence = np.concatenate(
            [
                self.pairs.index[hash_order(ids, "epoch", self.seed, epoch)]
                for epoch in range(self.epochs)
            ]
        )
        while self.step < len(self):
            self.step += 1
            yield sequence[(self.step - 1) * self.batch_size : self.step * self.batch_size]

    def metrics(self) -> dict[str, float]:
        """What a log should say of the batch under way: everything is kept, nothing scored."""
        return {"kept_share": 1.0, "tokens_scored": 0}

    def state_dict(self) -> State:
        """Where the run stands."""
        return {"run": self._run, "batch_size": self.batch_size, "step": self.step}

    def load_state_dict(self, state: State) -> None:
        """Go on from where another loader of the same run stood."""
        _check_same_run(state, self._run, self.batch_size)
        self.step = state["step"]


def _decides(selector: Selector) -> str:
    """What of a selector decides, in words that are the same in every process."""
    keep = (
        selector.keep if isinstance(selector.keep, Constant | Linear) else describe(selector.keep)
    )
    return (
        f"{describe(selector.score)} keep={keep} multiple={selector.multiple} "
        f"seed={selector.seed} no_signal={selector.no_signal} floor={selector.noise_floor}"
    )


def _check_same_run(state: State, run: str, batch_size: int) -> None:
    if state["batch_size"] != batch_size:
        raise ValueError(
            f"load_state_dict: this run takes {state['batch_size']} pairs per optimizer step over "
            f"all processes, and now they would be {batch_size}. Any number of processes can go on "
            "with it if pairs per process x processes x accumulation steps stay as many"
        )
    if state["run"] != run:
        raise ValueError(
            "load_state_dict: this state belongs to another run: the pairs, the plan, the keep "
            "schedule, the batch size, the score or a seed differ; resume with the same, or start "
            "a new run"
        )


def _check_same_reference(saved: list[float], now: list[float]) -> None:
    """A policy that has been trained is easily taken for the reference where a run goes on."""
    if not saved or not now:
        return
    differ, size = np.abs(np.subtract(now, saved)).mean(), np.abs(saved).mean()
    if differ > RELATIVE * size + NATS:
        raise ValueError(
            "load_state_dict: the reference is another than the run's: its log-probs of "
            f"{len(saved) // 2} pairs differ by {differ:.2f} nats of {size:.2f} on average; "
            "measure it with the model that the run began with, not with one of its checkpoints"
        )
