"""The Selector: measure, score, rank, in one call."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal
from warnings import warn

import numpy as np
import numpy.typing as npt
import torch

from sage_select.arrays import Float64Array, all_different
from sage_select.models.reader import Reader
from sage_select.models.reader import measure as measure_pool
from sage_select.models.wrappers import computes_in, unwrapped
from sage_select.pairs import (
    NOISE_FLOOR,
    PairLogps,
    Progress,
    Reference,
    Schedule,
    Score,
    noise_floor,
)
from sage_select.ranking import top
from sage_select.selection import Selection
from sage_select.system.ledger import phase
from sage_select.timeline import kept_count

NoSignal = Literal["hash", "score"]


@dataclass(frozen=True)
class Selector:
    """Decides which pairs of a pool the current policy should train on next.

    Args:
        score: `(policy, reference) -> [P]`, such as `sage`; higher is kept first.
        keep: Schedule of keep ratios.
        reference: Log-probs under the reference, a `PairLogps` or a store, looked up by dataset
            row: in any order, and it may cover more rows than a pool.
        progress: Maps an optimizer step to [0, 1], such as `timeline.progress`.
        measure: `(model, pool) -> PairLogps`, such as a `Reader` or a `ServerMeasure`; by default
            the library's own forward pass with its default settings, `Reader()`.
        multiple: Kept counts are rounded down to a multiple of this.
        seed: Key of the hash that breaks ties.
        no_signal: What to do where the rewards are all alike, as they are while policy = reference,
            so that the score could rank by nothing but length: "hash" keeps the planned number at
            random, reproducibly; "score" follows the paper to the letter.
            A score that does not look at log-probs, such as a judge's, ranks in any case.
        noise_floor: Spread of the log-ratios, in nats, up to which they count as all alike;
            `select` raises it to that of the precision it measures in.
        skip_full: Whether to skip the forward pass where the keep ratio retains the whole pool, so
            that nothing could be dropped; False scores it all the same, as evidence for the log.

    Example:
        >>> from functools import partial
        >>> from sage_select import Constant, sage
        >>> def logps(chosen):
        ...     tokens = torch.full((3,), 10)
        ...     return PairLogps(torch.arange(3), chosen, torch.zeros(3), tokens, tokens)
        >>> reference = logps(torch.zeros(3))
        >>> selector = Selector(partial(sage, beta=0.1), Constant(0.7), reference, lambda step: 0.0)
        >>> selector.rank(logps(torch.tensor([0.0, -9.0, 9.0])), reference, progress=0.0)
        Selection(kept 2 of 3 at step 0, progress 0.000, by score, cut 0.1)
    """

    score: Score
    keep: Schedule
    reference: Reference
    progress: Progress
    measure: Callable[[Any, Any], PairLogps] = measure_pool
    multiple: int = 1
    seed: int = 0
    no_signal: NoSignal = "hash"
    noise_floor: float = NOISE_FLOOR
    skip_full: bool = True

    @property
    def mixed_precision(self) -> torch.dtype | None:
        """The autocast dtype in which `measure` computes, if it says so, or None."""
        return getattr(self.measure, "mixed_precision", None)

    def __post_init__(self) -> None:
        if self.measure is measure_pool:
            object.__setattr__(self, "measure", Reader())
        if isinstance(self.measure, partial) and self.measure.func is measure_pool:
            warn(
                "Selector: the options of functools.partial(measure, ...) cannot be compared with "
                "those of updates and reference; pass a Reader with the same options, such as "
                "measure=Reader(mixed_precision=torch.bfloat16)",
                stacklevel=3,
            )
        if self.no_signal not in ("hash", "score"):
            raise ValueError(f"Selector: no_signal must be hash or score, got {self.no_signal!r}")
        if not hasattr(self.reference, "take"):
            raise TypeError(
                "Selector: reference must be a PairLogps or a store with .take(rows), got "
                f"{type(self.reference).__name__}; use measure(reference_model, dataset)"
            )

    def select(
        self, model: Any, pool: Any, step: int, *, progress: float | None = None
    ) -> Selection:
        """Score the pool with the current policy and keep the best.

        One forward-only pass; the model's mode, gradients and the generators' state are left as
        they were. Call it after an optimizer step, never between backward and step.

        Args:
            model: The current policy, whatever `measure` takes.
            pool: The candidates, whatever `measure` takes: by default `dataset.take(rows)`.
            step: Optimizer steps taken so far.
            progress: Progress in [0, 1], where `self.progress(step)` is not meant.

        Returns:
            The selection; every process gets the same one.
        """
        at = self.progress(step) if progress is None else progress
        ids = getattr(pool, "ids", None)
        index = getattr(pool, "index", None)
        rows = index if isinstance(index, np.ndarray) else None  # a list's `index` is a method
        if self.skip_full and rows is not None and self._count(at, len(rows)) == len(rows):
            return self._everything(rows, ids, at, step)
        with phase("scoring"):
            policy = self.measure(model, pool)
        floor = max(self.noise_floor, noise_floor(self.mixed_precision or _precision(model)))
        return replace(self, noise_floor=floor).rank(policy, self.reference, at, step, ids=ids)

    def rank(
        self,
        policy: PairLogps,
        reference: Reference,
        progress: float,
        step: int = 0,
        *,
        ids: npt.ArrayLike | None = None,
    ) -> Selection:
        """The same decision from log-probs somebody already has.

        Args:
            policy: Log-probs of the pool under the policy.
            reference: The same under the reference, looked up by dataset row.
            progress: Progress in [0, 1].
            step: Optimizer steps taken so far.
            ids: [P], stable ids that break ties; by default the dataset rows.
        """
        policy = PairLogps(*(field.detach() for field in policy))
        pool = policy.index.numpy(force=True).astype(np.int64)
        names = pool if ids is None else np.asarray(ids)
        if len(names) != len(pool) or not all_different(pool):
            raise ValueError(
                f"Selector.rank: a pool needs different rows and one id for each, got {len(pool)} "
                f"rows of which {len(set(pool.tolist()))} differ, and {len(names)} ids"
            )
        known = reference.take(pool).to(policy.index.device)
        reference = PairLogps(*(field.detach() for field in known))
        _check_comparable(policy, reference)
        scores = torch.as_tensor(self.score(policy, reference)).double().numpy(force=True)
        if scores.shape != pool.shape:
            raise ValueError(
                f"Selector: the score must return one value per pair, [{len(pool)}], got shape "
                f"{list(scores.shape)}"
            )
        count = self._count(progress, len(pool))
        signal = log_ratio_spread(policy, reference)
        rule = "score"
        if (
            self.no_signal == "hash"
            and signal <= self.noise_floor
            and count < len(pool)
            and _looks_at_logps(self.score, policy, reference)
        ):
            rule = "hash"
            warn(
                f"Selector: at step {step} the log-ratios of all {len(pool)} candidates are alike "
                f"(spread {signal:.2g} nats, floor {self.noise_floor:g}), so a score can rank by "
                f"length alone; {count} pairs are kept at random, by the hash of their ids. "
                f"{self._remedy(progress)}, or set no_signal='score' (selection.no_signal in a "
                "configuration) to rank all the same",
                stacklevel=2,
            )
        ranked_by = scores if rule == "score" else np.zeros_like(scores)
        best = top(ranked_by, count, ids=names, key=(self.seed, step))
        kept = np.zeros(len(pool), dtype=bool)
        kept[best] = True
        return Selection(
            indices=pool[best],
            pool=pool,
            scores=scores,
            kept=kept,
            step=step,
            progress=progress,
            rule=rule,
            signal=signal,
            policy=policy,
            reference=reference,
        )

    def _remedy(self, progress: float) -> str:
        if self.keep(progress) < 1:
            return "Start the keep schedule at 1.0"
        return f"The keep ratio is 1.0, but counts are rounded down to multiples of {self.multiple}"

    def _count(self, progress: float, size: int) -> int:
        return kept_count(self.keep(progress), size, self.multiple)

    def _everything(
        self, index: npt.ArrayLike, ids: npt.ArrayLike | None, progress: float, step: int
    ) -> Selection:
        pool = np.asarray(index, dtype=np.int64)
        nothing: Float64Array = np.full(len(pool), np.nan)
        names = pool if ids is None else np.asarray(ids)
        order = top(np.zeros(len(pool)), len(pool), ids=names, key=(self.seed, step))
        return Selection(
            indices=pool[order],
            pool=pool,
            scores=nothing,
            kept=np.ones(len(pool), dtype=bool),
            step=step,
            progress=progress,
            rule="all",
        )


def check_same_precision(selector: Selector, updates: torch.dtype | None, call: str) -> None:
    """Refuse updates in another precision than scoring: it would look like a change in the policy.

    Args:
        selector: Only a selector that measures with a `Reader` is checked.
        updates: Autocast dtype of the updates.
        call: What the error names.

    Raises:
        ValueError: If the two differ.
    """
    if isinstance(selector.measure, Reader) and selector.mixed_precision != updates:
        raise ValueError(
            f"{call}: updates run in {updates or 'full precision'}, but the selector measures in "
            f"{selector.mixed_precision or 'full precision'}, and the difference would look like a "
            f"change in the policy; give the Selector measure=Reader(mixed_precision={updates}), "
            "and the reference the same reader"
        )


def log_ratio_spread(policy: PairLogps, reference: PairLogps) -> float:
    """How much the log-ratios differ from pair to pair, in nats; 0 at policy = reference.

    The larger of the standard deviations of log(policy / reference) over chosen and over rejected
    responses. Where it vanishes, all pairs have the same rewards: only length tells them apart.
    """
    if len(policy.index) == 0:
        return 0.0
    ratios = torch.stack(
        [
            policy.chosen.double() - reference.chosen.double(),
            policy.rejected.double() - reference.rejected.double(),
        ]
    )
    return float(ratios.std(dim=1, correction=0).max())


def _precision(model: Any) -> torch.dtype:
    """Dtype in which a model computes; fp32 for a policy that is no torch module."""
    if not isinstance(model, torch.nn.Module) or next(model.parameters(), None) is None:
        return torch.float32
    return computes_in(unwrapped(model))


def _looks_at_logps(score: Score, policy: PairLogps, reference: PairLogps) -> bool:
    """Whether a score changes with the policy's log-probs; a judge's or a length does not."""
    shift = torch.arange(1, len(policy.index) + 1, device=policy.chosen.device)
    moved = policy._replace(chosen=policy.chosen - shift, rejected=policy.rejected + shift)
    before, after = (torch.as_tensor(score(logps, reference)) for logps in (policy, moved))
    return not torch.equal(before, after)


def _check_comparable(policy: PairLogps, reference: PairLogps) -> None:
    same = (policy.chosen_tokens == reference.chosen_tokens) & (
        policy.rejected_tokens == reference.rejected_tokens
    )
    for row in policy.index[~same][:1].tolist():
        raise ValueError(
            f"Selector: policy and reference counted different response tokens for row {row}; "
            "measure both with the same tokenizer, template and max_length"
        )
    for name, logps in (("policy", policy), ("reference", reference)):
        finite = logps.chosen.isfinite() & logps.rejected.isfinite()
        for row in logps.index[~finite][:1].tolist():
            raise ValueError(
                f"Selector: the {name}'s log-probs of row {row} are not finite; its weights or "
                "activations have overflowed"
            )
