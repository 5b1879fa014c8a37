"""Loaders: the batches of a whole run, in order, as dataset rows; they can be resumed."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from sage_select.arguments import is_number, is_whole, scalar, seed_number, shown, whole_number
from sage_select.arrays import Int64Array, checked_rows
from sage_select.data.dataset import PreferenceDataset
from sage_select.hashing import hash_order
from sage_select.schedules import Constant, Linear
from sage_select.selecting.answers import check_selection
from sage_select.selecting.log import SelectionLog
from sage_select.selecting.selector import Selector
from sage_select.selection import Selection
from sage_select.system.heartbeats import during
from sage_select.system.identity import describe, digest_arrays
from sage_select.system.processes import Processes
from sage_select.timeline import Timeline

State = dict[str, Any]

REFERENCE_PAIRS = 32  # pairs whose reference log-probs a state contains, to check them on resuming
# Tolerances for the mean difference of those log-probs: above the rounding of another device or
# precision, below the change of a policy that has been trained.
RELATIVE_TOLERANCE = 0.01  # share of the mean absolute log-prob
ABSOLUTE_TOLERANCE = 0.1  # nats, added to the relative part because short responses are near 0


class SelectiveLoader:
    """A sized iterable over a run: each item is one batch of dataset rows, int64.

    An interval's pool is scored when its first batch is pulled, that is, with the policy after all
    earlier updates. The kept pairs come in a seeded shuffled order, in full batches; the remainder
    is carried to the front of the next interval, and only the last batch of the run may be short.

    The state consists of the step, the interval and the remaining rows. A resumed run never scores
    an interval again, and no pair is repeated or lost. Save the state after an update, before the
    next batch is pulled.

    With several processes, each rank has a loader, and all pull the same batches; `dealt` gives the
    pairs of a batch that a rank trains on.

    Args:
        selector: Selects the pairs to keep: a `Selector`, or an object with a method
            `select(model, pool, step, *, progress)` that returns a `Selection` of the pool, and
            with `keep`, `multiple` and `reference`. Each selection is checked against its pool.
        timeline: The plan, the keep schedule and the batch size.
        dataset: The pairs to train on; the plan's pools are rows of it.
        model: The current policy, passed to the selector.
        seed: Key of the shuffle.
        log: Log to which each decision is written before the first update that uses it.
        on_select: Called with the interval and the selection, after the log is written.

    Attributes:
        step: Number of batches yielded so far, which equals the optimizer steps taken. A host that
            fetches ahead (`decided`) sets it to its own step count before it asks for the state.
        tokens_scored: Number of tokens scored so far.

    Raises:
        TypeError: If an argument is not of its type.
        ValueError: If the plan has rows that are not in the dataset, or the selector's schedule is
            not the timeline's; on iterating, if the selector keeps other rows than the pool's.

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
        _check_types(
            "SelectiveLoader",
            timeline=(timeline, Timeline),
            dataset=(dataset, PreferenceDataset),
        )
        if log is not None and not callable(getattr(log, "write", None)):
            raise TypeError(
                f"SelectiveLoader: log must be a SelectionLog, got {shown(log)}; pass "
                "SelectionLog(folder)"
            )
        for name in ("select", "keep", "multiple", "reference"):
            if not hasattr(selector, name):
                raise TypeError(
                    f"SelectiveLoader: {shown(selector)} has no `{name}`; pass a Selector, or an "
                    "object with select, keep, multiple and reference"
                )
        if on_select is not None and not callable(on_select):
            raise TypeError(
                "SelectiveLoader: on_select must be a function of interval and selection, got "
                f"{shown(on_select)}"
            )
        seed = seed_number(seed, "SelectiveLoader: seed")
        planned_rows = np.concatenate(timeline.plan.pools)
        for row in planned_rows[~np.isin(planned_rows, dataset.index)][:1]:
            raise ValueError(
                f"SelectiveLoader: the plan contains row {row}, which is not one of the "
                f"{len(dataset)} pairs given; plan with the same pairs, and map a plan for part of "
                "a dataset to its rows with plan.on_rows(rows)"
            )
        for name in ("keep", "multiple"):
            selecting, planned = getattr(selector, name), getattr(timeline, name)
            if selecting != planned:
                raise ValueError(
                    f"SelectiveLoader: the selector's {name} is {selecting}, but the timeline's is "
                    f"{planned}; make them equal, because the timeline computes the run's steps in "
                    "advance"
                )
        self.selector = selector
        self.timeline = timeline
        self.dataset = dataset
        self.model = model
        self.seed = seed
        self.log = log
        self.on_select = on_select
        self.step = 0
        self._begun = 0  # intervals whose pairs have been selected
        self._rows: Int64Array = np.empty(0, dtype=np.int64)  # selected rows, from step _rows_from
        self._rows_from = 0
        self.tokens_scored = 0
        # covers everything that determines which pairs are trained in which step, and must match
        # that of a state
        decisive = {
            "pairs": (dataset.index, dataset.ids),
            "plan": timeline.plan.pools,
            "numbers of kept pairs": (np.array(timeline.kept_count),),
            "seed of the loader": (np.array([seed]),),
            "selector": (np.frombuffer(_settings(selector).encode(), np.uint8),),
        }
        self._run = digest_arrays(
            *timeline.plan.pools,
            np.array([*timeline.kept_count, timeline.batch_size, seed]),
            *decisive["pairs"],
            *decisive["selector"],
        )
        self._parts = {
            name: digest_arrays(*arrays) for name, arrays in (decisive | _tokens(dataset)).items()
        }

    def __len__(self) -> int:
        return self.timeline.total_steps

    @property
    def interval(self) -> int:
        """The current interval, from 0; -1 before the first."""
        return self._begun - 1

    def __iter__(self) -> Iterator[Int64Array]:
        """Yield the remaining batches."""
        for batches in self.decided():
            for batch in batches:
                self.step += 1
                yield batch

    def decided(self) -> Iterator[list[Int64Array]]:
        """Yield the remaining batches in lists, one list per decision.

        For hosts that fetch batches ahead: the batches of a list do not depend on updates within
        it. Pulling the next list scores the next pool, so pull it only after the last batch of this
        list has been trained on.
        """
        size, pools = self.timeline.batch_size, self.timeline.plan.pools
        while self.step < len(self):
            # an interval may keep fewer pairs than a batch needs, so begin as many as it takes
            while len(rows := self._remaining()) < size and self._begun < len(pools):
                self._begin_interval()
            # round down while an interval is left to take the remainder, and up at the end
            full_only = self._begun < len(pools)
            count = len(rows) // size if full_only else -(-len(rows) // size)
            # the host may set `step` meanwhile, so the value after this list is computed first
            after = self.step + count
            yield [rows[i * size : (i + 1) * size] for i in range(count)]
            self.step = after

    def metrics(self) -> dict[str, float]:
        """Return the metrics to log for the current interval; empty before the first."""
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
        """Return the state of the run after `step` updates, as plain numbers and lists."""
        return {
            "run": self._run,
            "batch_size": self.timeline.batch_size,
            "step": self.step,
            "scored": self._begun,
            "rows": self._remaining().tolist(),
            "tokens_scored": self.tokens_scored,
            "reference": self._reference_logps(),
            "parts": dict(self._parts),
        }

    def load_state_dict(self, state: State) -> None:
        """Resume from a state of the same run.

        Raises:
            ValueError: If the state was saved with different pairs, tokens, plan, schedule, batch
                size, seed, selector or reference, or is damaged. The loader is then unchanged.
        """
        _check_same_run(state, self._run, self._parts, self.timeline.batch_size)
        step = _count_in(state, "step", most=len(self))
        begun = _count_in(state, "scored", most=len(self.timeline.plan.pools))
        tokens_scored = _count_in(state, "tokens_scored")
        rows = self._rows_in(state, step, begun)
        _check_same_reference(state.get("reference", []), self._reference_logps())
        self.step = self._rows_from = step
        self._begun, self._rows, self.tokens_scored = begun, rows, tokens_scored

    def _rows_in(self, state: State, step: int, begun: int) -> Int64Array:
        """Return the remaining rows of a state: those that its intervals kept and did not train."""
        saved = _entry(state, "rows")
        try:
            rows = checked_rows(saved, "rows")
        except (TypeError, ValueError, OverflowError):
            raise _damaged(f"its rows are {shown(saved)}, not row numbers") from None
        kept = sum(self.timeline.kept_count[:begun])
        remaining = max(kept - step * self.timeline.batch_size, 0)
        trained_ahead = kept < step * self.timeline.batch_size and step < len(self)
        if len(rows) != remaining or trained_ahead:
            raise _damaged(
                f"it has {len(rows)} remaining rows, but {begun} intervals keep {kept} pairs and "
                f"{step} steps train {self.timeline.batch_size} each"
            )
        scored = np.concatenate([np.empty(0, np.int64), *self.timeline.plan.pools[:begun]])
        for row in rows[~np.isin(rows, scored)][:1]:
            raise _damaged(f"row {row} is in none of the {begun} pools that were scored")
        return rows

    def _remaining(self) -> Int64Array:
        """Return the rows that are selected and not yet yielded."""
        return self._rows[(self.step - self._rows_from) * self.timeline.batch_size :]

    def _reference_logps(self) -> list[float]:
        """Return the reference log-probs of the plan's first pairs; empty if they are missing."""
        try:
            logps = self.selector.reference.take(self.timeline.plan.pools[0][:REFERENCE_PAIRS])
            values = torch.cat([logps.chosen, logps.rejected])
        except (KeyError, ValueError):  # not measured yet: there is nothing to compare
            return []
        return [float(value) for value in values.tolist()]

    def _begin_interval(self) -> None:
        """Select the next interval's pairs, log the decision and append them to the rows."""
        k = self._begun
        rows = self.timeline.plan.pools[k]
        pool = self.dataset.take(rows)
        with during(f"interval {k}"):
            selection = self.selector.select(
                # not progress(step): two intervals can begin at one step
                self.model,
                pool,
                self.step,
                progress=self.timeline.plan.progress[k],
            )
        count = self.timeline.kept_count[k]
        check_selection(selection, pool.index, count, f"SelectiveLoader: interval {k}")
        if selection.rule != "all":  # "all" means that the pool was not scored
            self.tokens_scored += int(pool.num_tokens.sum())
        # logged before any of these pairs is trained on, so a crash leaves no unlogged update
        if self.log is not None and Processes.all().rank == 0:
            self.log.write(k, selection, pool.ids, run=self._run)
        if self.on_select is not None:
            self.on_select(k, selection)
        shuffled = training_order(self.dataset.take(np.asarray(selection)), self.seed, k)
        self._rows, self._rows_from = np.concatenate([self._remaining(), shuffled]), self.step
        self._begun += 1


def training_order(kept: PreferenceDataset, seed: int, interval: int) -> Int64Array:
    """Return the rows of an interval's kept pairs in the seeded order of training."""
    return kept.index[hash_order(kept.ids, "train", seed, interval)]


class ShuffledLoader:
    """Shuffled epochs over all pairs, without selection: the baseline.

    Args:
        pairs: The pairs to train on.
        batch_size: Pairs per optimizer step; the remainder of an epoch is carried to the next, so
            that only the last batch of the run may be short.
        epochs: Number of passes over the pairs.
        seed: Key of the shuffle.

    Attributes:
        step: Number of batches yielded so far.

    Example:
        >>> for rows in ShuffledLoader(dataset, batch_size=16, epochs=3):  # doctest: +SKIP
        ...     train_step(model, dataset.take(rows))
    """

    def __init__(
        self, pairs: PreferenceDataset, *, batch_size: int, epochs: int = 1, seed: int = 0
    ) -> None:
        _check_types("ShuffledLoader", pairs=(pairs, PreferenceDataset))
        self.pairs = pairs
        self.batch_size = batch_size = whole_number(batch_size, "ShuffledLoader: batch_size")
        self.epochs = epochs = whole_number(epochs, "ShuffledLoader: epochs")
        self.seed = seed = seed_number(seed, "ShuffledLoader: seed")
        self.step = 0
        self._run = digest_arrays(np.array([batch_size, epochs, seed]), pairs.ids)
        decisive = {
            "pairs": (pairs.ids,),
            "epochs": (np.array([epochs]),),
            "seed of the loader": (np.array([seed]),),
        }
        self._parts = {
            name: digest_arrays(*arrays) for name, arrays in (decisive | _tokens(pairs)).items()
        }

    def __len__(self) -> int:
        return -(-len(self.pairs) * self.epochs // self.batch_size)

    def __iter__(self) -> Iterator[Int64Array]:
        """Yield the remaining batches."""
        ids = self.pairs.ids
        sequence = np.concatenate(
            [
                self.pairs.index[hash_order(ids, "epoch", self.seed, epoch)]
                for epoch in range(self.epochs)
            ]
        )
        while self.step < len(self):
            self.step += 1  # before the yield, so that a state saved after the update counts it
            yield sequence[(self.step - 1) * self.batch_size : self.step * self.batch_size]

    def metrics(self) -> dict[str, float]:
        """Return the metrics to log: every pair is kept, none is scored."""
        return {"kept_share": 1.0, "tokens_scored": 0}

    def state_dict(self) -> State:
        """Return the state of the run."""
        return {
            "run": self._run,
            "batch_size": self.batch_size,
            "step": self.step,
            "parts": dict(self._parts),
        }

    def load_state_dict(self, state: State) -> None:
        """Resume from a state of the same run.

        Raises:
            ValueError: If the state was saved with different pairs, tokens, batch size, epochs or
                seed, or is damaged. The loader is then unchanged.
        """
        _check_same_run(state, self._run, self._parts, self.batch_size)
        self.step = _count_in(state, "step", most=len(self))


def _settings(selector: Any) -> str:
    """Return the settings that decide which pairs are kept, as a string equal on all ranks."""
    keep = (
        selector.keep if isinstance(selector.keep, Constant | Linear) else describe(selector.keep)
    )
    if not isinstance(selector, Selector):  # one of the user's own has other settings
        return f"{describe(selector)} keep={keep} multiple={selector.multiple}"
    return (
        f"{describe(selector.score)} keep={keep} multiple={selector.multiple} "
        f"seed={selector.seed} no_signal={selector.no_signal} floor={selector.noise_floor}"
    )


def _tokens(pairs: PreferenceDataset) -> dict[str, tuple[Int64Array, ...]]:
    """Return the token counts of pairs, which tokenizer, template and max_length decide."""
    counts = (pairs.sequence_lengths, pairs.chosen_tokens, pairs.rejected_tokens)
    return {"token counts": counts}


def _check_types(call: str, **arguments: tuple[Any, type]) -> None:
    """Refuse arguments that are not of their types, given as (value, type)."""
    for name, (value, kind) in arguments.items():
        if not isinstance(value, kind):
            raise TypeError(f"{call}: {name} must be a {kind.__name__}, got {shown(value)}")


def _damaged(fault: str) -> ValueError:
    return ValueError(
        f"load_state_dict: this is no state of the loader, or a damaged one: {fault}; pass what "
        "state_dict() returned, from an older checkpoint if this one is damaged"
    )


def _entry(state: State, name: str) -> Any:
    if name not in state:
        raise _damaged(f"it has no entry {name!r}")
    return state[name]


def _count_in(state: State, name: str, most: int | None = None) -> int:
    """Return a count from a state, or refuse it."""
    value = scalar(_entry(state, name))
    if not is_whole(value) or value < 0 or (most is not None and value > most):
        limits = "of at least 0" if most is None else f"from 0 to {most}"
        raise _damaged(f"its entry {name!r} is {shown(value)}, not a whole number {limits}")
    return int(value)


def _check_same_run(state: State, run: str, parts: dict[str, str], batch_size: int) -> None:
    """Refuse a state of another run, and name what differs."""
    if not isinstance(state, Mapping):
        raise _damaged(f"it is {shown(state)}")
    saved_size = _count_in(state, "batch_size")
    if saved_size != batch_size:
        raise ValueError(
            f"load_state_dict: this run takes {saved_size} pairs per optimizer step over "
            f"all processes, and now they would be {batch_size}. It can resume on any number of "
            "processes if pairs per process x processes x accumulation steps stays the same"
        )
    saved = state.get("parts", {})  # a state of an older version has none
    if not isinstance(saved, Mapping):
        raise _damaged(f"its entry 'parts' is {shown(saved)}")
    differing = [name for name, value in parts.items() if saved.get(name, value) != value]
    if _entry(state, "run") == run and not differing:
        return
    if not differing:
        names = "the pairs, the plan, the keep schedule, the batch size, the score or a seed differ"
    else:
        # a run's pairs decide its plan, so a difference in both begins with the pairs
        names = f"it differs in {', '.join(differing)}"
    if "token counts" in differing:
        names += (
            "; other token counts come from another max_length, tokenizer or chat template, or "
            "from other data"
        )
    raise ValueError(
        f"load_state_dict: this state belongs to another run: {names}; resume with the settings it "
        "was saved with, or start a new run"
    )


def _check_same_reference(saved: list[float], now: list[float]) -> None:
    """Refuse a reference that the run did not start with, such as a policy that was trained."""
    if not saved or not now:  # a state of an older version, or a reference not measured yet
        return
    if not isinstance(saved, list) or not all(map(is_number, saved)):
        raise _damaged(f"its entry 'reference' is {shown(saved)}, not a list of log-probs")
    if len(saved) != len(now):
        raise _damaged(f"it has {len(saved)} reference log-probs, not {len(now)}")
    difference, size = np.abs(np.subtract(now, saved)).mean(), np.abs(saved).mean()
    if difference > RELATIVE_TOLERANCE * size + ABSOLUTE_TOLERANCE:
        raise ValueError(
            "load_state_dict: the reference is another than the run's: the log-probs of "
            f"{len(saved) // 2} pairs differ by {difference:.2f} nats on average, at a mean size "
            f"of {size:.2f}; measure the reference with the model that the run started from, not "
            "with one of its checkpoints"
        )
