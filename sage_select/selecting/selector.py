"""The Selector: measure, score and rank a pool in one call."""

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
    """The rule by which a run selects pairs: it scores a pool and keeps the best pairs.

    Args:
        score: `(policy, reference) -> [P]`, such as `sage`; pairs with higher scores are kept.
        keep: Schedule of keep ratios.
        reference: Log-probs under the reference, a `PairLogps` or a store. They are looked up by
            dataset row, so their order does not matter and they may cover more rows than a pool.
        progress: Maps an optimizer step to [0, 1], such as `timeline.progress`.
        measure: `(model, pool) -> PairLogps`, such as a `Reader` or a `ServerMeasure`; by default
            `Reader()`.
        multiple: Kept counts are rounded down to a multiple of this.
        seed: Key of the hash that breaks ties.
        no_signal: Rule for a pool in which all rewards are equal up to rounding, as they are while
            policy = reference, so that the score could rank only by length. "hash" keeps the
            planned number of pairs at random, reproducibly; "score" ranks by the score, as the
            paper does. A score that does not depend on log-probs, such as a judge's, always ranks.
        noise_floor: Spread of the log-ratios, in nats, up to which they count as equal; `select`
            raises it to the noise floor of the precision it measures in.
        skip_full: True skips the forward pass if the keep ratio retains the whole pool, so that
            nothing can be dropped; False scores the pool anyway, for the log.

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
        """Autocast dtype of `measure`; None if unset or unknown."""
        return getattr(self.measure, "mixed_precision", None)

    def __post_init__(self) -> None:
        # a Reader has settings that can be compared with those of the updates and the reference
        if self.measure is measure_pool:
            object.__setattr__(self, "measure", Reader())
        if isinstance(self.measure, partial) and self.measure.func is measure_pool:
            warn(
                "Selector: the options in functools.partial(measure, ...) cannot be compared with "
                "those of the updates and the reference; pass a Reader with the same options, such "
                "as measure=Reader(mixed_precision=torch.bfloat16)",
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
        """Score a pool with the current policy and keep the best pairs.

        It makes one forward-only pass and leaves the model's mode, its gradients and the state of
        the random number generators unchanged. Call it after an optimizer step, not between
        backward pass and step.

        Args:
            model: The current policy, as `measure` takes it.
            pool: The candidates, as `measure` takes them; for a `Reader`, `dataset.take(rows)`.
            step: Optimizer steps taken so far.
            progress: Progress in [0, 1]; by default `self.progress(step)`.

        Returns:
            The selection, which is equal on all ranks.
        """
        progress = self.progress(step) if progress is None else progress
        ids = getattr(pool, "ids", None)
        index = getattr(pool, "index", None)
        rows = index if isinstance(index, np.ndarray) else None  # a list's `index` is a method
        if self.skip_full and rows is not None and self._count(progress, len(rows)) == len(rows):
            return self._keep_all(rows, ids, progress, step)
        with phase("scoring"):
            policy = self.measure(model, pool)
        # in bfloat16, rounding alone gives log-ratios a larger spread than the default floor
        floor = max(self.noise_floor, noise_floor(self.mixed_precision or _precision(model)))
        raised = replace(self, noise_floor=floor)
        return raised.rank(policy, self.reference, progress, step, ids=ids)

    def rank(
        self,
        policy: PairLogps,
        reference: Reference,
        progress: float,
        step: int = 0,
        *,
        ids: npt.ArrayLike | None = None,
    ) -> Selection:
        """Select from log-probs that were measured before, as `select` does after measuring.

        Args:
            policy: Log-probs of the pool under the policy.
            reference: Log-probs under the reference, looked up by dataset row.
            progress: Progress in [0, 1].
            step: Optimizer steps taken so far.
            ids: [P], stable ids that break ties; by default the dataset rows.

        Raises:
            KeyError: If the reference has no log-probs of a row.
            ValueError: If rows repeat, log-probs are not finite, token counts of policy and
                reference differ, or the score does not return one value per pair.
        """
        # detached, since the selection would otherwise keep the graph of the whole pool alive
        policy = PairLogps(*(field.detach() for field in policy))
        pool = policy.index.numpy(force=True).astype(np.int64)
        names = pool if ids is None else np.asarray(ids)
        if len(names) != len(pool) or not all_different(pool):
            raise ValueError(
                "Selector.rank: a pool must have no row twice and one id per row, got "
                f"{len(pool)} rows ({len(set(pool.tolist()))} distinct) and {len(names)} ids"
            )
        pool_reference = reference.take(pool).to(policy.index.device)
        reference = PairLogps(*(field.detach() for field in pool_reference))
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
        # the hash decides only if pairs are dropped and the score depends on log-probs at all
        if (
            self.no_signal == "hash"
            and signal <= self.noise_floor
            and count < len(pool)
            and _depends_on_logps(self.score, policy, reference)
        ):
            rule = "hash"
            warn(
                f"Selector: at step {step} the log-ratios of all {len(pool)} candidates are equal "
                f"up to rounding (spread {signal:.2g} nats, floor {self.noise_floor:g}), so the "
                f"score could rank only by length; {count} pairs are kept at random, by the hash "
                f"of their ids. {self._remedy(progress)}, or set no_signal='score' "
                "(selection.no_signal in a configuration) to rank by the score anyway",
                stacklevel=2,
            )
        # the hash that breaks ties decides alone if all scores are equal
        ranked_by = scores if rule == "score" else np.zeros_like(scores)
        # keyed by the step, so that ties do not favour the same pairs in every interval
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
        """Return what would avoid the warning: at ratio 1.0 only rounding drops pairs."""
        if self.keep(progress) < 1:
            return "Start the keep schedule at 1.0 (selection.keep_start in a configuration)"
        return f"The keep ratio is 1.0, but counts are rounded down to multiples of {self.multiple}"

    def _count(self, progress: float, size: int) -> int:
        return kept_count(self.keep(progress), size, self.multiple)

    def _keep_all(
        self, index: npt.ArrayLike, ids: npt.ArrayLike | None, progress: float, step: int
    ) -> Selection:
        """Return a selection of the whole pool, without scores."""
        pool = np.asarray(index, dtype=np.int64)
        no_scores: Float64Array = np.full(len(pool), np.nan)
        names = pool if ids is None else np.asarray(ids)
        order = top(np.zeros(len(pool)), len(pool), ids=names, key=(self.seed, step))
        return Selection(
            indices=pool[order],
            pool=pool,
            scores=no_scores,
            kept=np.ones(len(pool), dtype=bool),
            step=step,
            progress=progress,
            rule="all",
        )


def check_same_precision(selector: Selector, reader: Reader, call: str) -> None:
    """Refuse updates and scoring in different precisions.

    The rounding would look like a change in the policy.

    Args:
        selector: The selector; checked only if it measures with a `Reader`.
        reader: How updates read the policy.
        call: Name of the caller, for the error message.

    Raises:
        ValueError: If the precisions differ.
    """
    scoring, updates = selector.mixed_precision, reader.mixed_precision
    if isinstance(selector.measure, Reader) and scoring != updates:
        raise ValueError(
            f"{call}: updates run in {updates or 'full precision'}, but the selector measures in "
            f"{scoring or 'full precision'}, and the rounding would look like a "
            f"change in the policy; pass measure=Reader(mixed_precision={updates}) to the Selector "
            "and the same reader to the reference"
        )


def log_ratio_spread(policy: PairLogps, reference: PairLogps) -> float:
    """Return the spread of the log-ratios over pairs, in nats; 0 at policy = reference.

    It is the larger of the standard deviations of log(policy / reference) over chosen and over
    rejected responses. If it is 0, all pairs have equal rewards and differ only in length.
    """
    if len(policy.index) == 0:
        return 0.0
    ratios = torch.stack(
        [
            policy.chosen.double() - reference.chosen.double(),
            policy.rejected.double() - reference.rejected.double(),
        ]
    )
    # deviations, not magnitudes: a shift common to all pairs does not rank them
    return float(ratios.std(dim=1, correction=0).max())


def _precision(model: Any) -> torch.dtype:
    """Return the dtype in which a model computes; fp32 for a policy that is not a torch module."""
    if not isinstance(model, torch.nn.Module) or next(model.parameters(), None) is None:
        return torch.float32
    return computes_in(unwrapped(model))


def _depends_on_logps(score: Score, policy: PairLogps, reference: PairLogps) -> bool:
    """Return whether a score depends on the policy's log-probs, tested by changing them."""
    # a different shift for each pair: a common one could cancel in the score
    shift = torch.arange(1, len(policy.index) + 1, device=policy.chosen.device)
    changed = policy._replace(chosen=policy.chosen - shift, rejected=policy.rejected + shift)
    before, after = (torch.as_tensor(score(logps, reference)) for logps in (policy, changed))
    return not torch.equal(before, after)


def _check_comparable(policy: PairLogps, reference: PairLogps) -> None:
    """Refuse log-probs of different tokens, and log-probs that are not finite."""
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
                f"Selector: the {name}'s log-probs of row {row} are not finite; check its weights "
                "for NaN and its precision for overflow"
            )
