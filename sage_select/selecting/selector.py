"""The Selector: measure, score and rank a pool in one call."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal
from warnings import warn

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sage_select.arguments import (
    fraction,
    is_number,
    not_negative,
    scalar,
    seed_number,
    shown,
    switch,
    whole_number,
)
from sage_select.arrays import Float64Array, Int64Array, all_different
from sage_select.models.reader import Reader
from sage_select.models.reader import measure as measure_pool
from sage_select.models.wrappers import computes_in, unwrapped
from sage_select.pairs import (
    HALF,
    NOISE_FLOOR,
    PairLogps,
    Progress,
    Reference,
    Schedule,
    Score,
    noise_floor,
    storage_noise,
)
from sage_select.ranking import top
from sage_select.scores import SCORES
from sage_select.selecting.answers import (
    check_log_probs,
    check_token_counts,
    checked_logps,
    checked_scores,
    undisturbed,
)
from sage_select.selection import Selection
from sage_select.system.ledger import phase
from sage_select.timeline import kept_count

NoSignal = Literal["hash", "score"]

MEASURE = "Selector: measure(model, pool)"
TAKE = "Selector: reference.take(rows)"


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
        noise_floor: Spread of the log-ratios, in nats, up to which they count as equal. It is
            raised to the noise floor of the precision in which policy or reference were measured.
        skip_full: True skips the forward pass if the keep ratio retains the whole pool, so that
            nothing can be dropped; False scores the pool anyway, for the log.

    Raises:
        TypeError: If a function is none, or a setting is not of its type.
        ValueError: If a setting is out of range.

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
        for name, fix in (
            ("score", _instead_of_score(self.score)),
            ("keep", _instead_of_schedule(self.keep)),
            ("progress", "a function of the step, such as timeline.progress or lambda step: 0.0"),
            ("measure", "a function (model, pool) -> PairLogps, such as Reader()"),
        ):
            if not callable(value := getattr(self, name)):
                raise TypeError(
                    f"Selector: {name} must be a function, got {shown(value)}; pass {fix}"
                )
        if not callable(getattr(self.reference, "take", None)):
            raise TypeError(
                "Selector: reference must be a PairLogps or a store with .take(rows), got "
                f"{type(self.reference).__name__}; use measure(reference_model, dataset)"
            )
        whole_number(self.multiple, "Selector: multiple")
        seed_number(self.seed, "Selector: seed")
        not_negative(self.noise_floor, "Selector: noise_floor")
        switch(self.skip_full, "Selector: skip_full")

    def select(
        self, model: Any, pool: Any, step: int, *, progress: float | None = None
    ) -> Selection:
        """Score a pool with the current policy and keep the best pairs.

        It makes one forward-only pass and leaves the model's mode and the state of the random
        number generators unchanged; a `Reader` leaves its gradients unchanged, too. Call it after
        an optimizer step, not between backward pass and step.

        Args:
            model: The current policy, as `measure` takes it.
            pool: The candidates, as `measure` takes them; for a `Reader`, `dataset.take(rows)`.
            step: Optimizer steps taken so far.
            progress: Progress in [0, 1]; by default `self.progress(step)`.

        Returns:
            The selection, which is equal on all ranks.

        Raises:
            TypeError: If a function of the selector returned something else than it should.
            ValueError: If `measure` or the reference answered for other rows or tokens than the
                pool's, or with log-probs that are not finite or above 0; otherwise as `rank`.
        """
        step = whole_number(step, "Selector.select: step", least=0)
        if progress is None:
            progress = fraction(self.progress(step), f"Selector: progress({step})")
        else:
            progress = fraction(progress, "Selector.select: progress")
        ids = getattr(pool, "ids", None)
        index = getattr(pool, "index", None)
        index = index.numpy(force=True) if isinstance(index, Tensor) else index
        rows = index if isinstance(index, np.ndarray) else None  # a list's `index` is a method
        if self.skip_full and rows is not None and self._count(progress, len(rows)) == len(rows):
            return self._keep_all(rows, ids, progress, step)
        with phase("scoring"):
            if isinstance(self.measure, Reader):
                answer = self.measure(model, pool)
            else:
                with undisturbed(model):
                    answer = self.measure(model, pool)
        policy = checked_logps(answer, MEASURE, rows)
        check_token_counts(policy, pool, MEASURE)
        if policy.precision is None:
            policy = policy.measured_in(self.mixed_precision or _precision(model))
        return self._rank(policy, self.reference, progress, step, ids, measured=True)

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

        Numbers above 0 are ranked, too, so that rewards can be passed with a reference of zeros.

        Args:
            policy: Log-probs of the pool under the policy.
            reference: Log-probs under the reference, looked up by dataset row.
            progress: Progress in [0, 1].
            step: Optimizer steps taken so far.
            ids: [P], stable ids that break ties; by default the dataset rows.

        Raises:
            KeyError: If the reference has no log-probs of a row.
            TypeError: If the log-probs are no `PairLogps`, or the scores no numbers.
            ValueError: If rows repeat, log-probs are not finite, token counts of policy and
                reference differ, the reference answers for other rows, the score does not return
                one value per pair, or a keep ratio or progress is not in [0, 1].
        """
        step = whole_number(step, "Selector.rank: step", least=0)
        progress = fraction(progress, "Selector.rank: progress")
        policy = checked_logps(policy, "Selector.rank: the caller", measured=False)
        return self._rank(policy, reference, progress, step, ids, measured=False)

    def _rank(
        self,
        policy: PairLogps,
        reference: Reference,
        progress: float,
        step: int,
        ids: npt.ArrayLike | None,
        *,
        measured: bool,
    ) -> Selection:
        """Rank checked log-probs; `measured` refuses those that no model can have."""
        pool: Int64Array = policy.index.numpy(force=True)
        names = pool if ids is None else np.asarray(ids)
        if len(names) != len(pool) or not all_different(pool):
            raise ValueError(
                "Selector.rank: a pool must have no row twice and one id per row, got "
                f"{len(pool)} rows ({len(set(pool.tolist()))} distinct) and {len(names)} ids"
            )
        answer = reference.take(pool)
        reference = checked_logps(answer, TAKE, pool, measured=measured).to(policy.index.device)
        _check_comparable(policy, reference)
        if measured:
            check_log_probs(policy, MEASURE)
            check_log_probs(reference, TAKE)
        score_of = _given_copies(self.score)
        values = checked_scores(score_of(policy, reference), pool)
        count = self._count(progress, len(pool))
        signal = log_ratio_spread(policy, reference)
        floor = max(self.noise_floor, *map(_noise, (policy, reference)))
        rule = "score"
        # the hash decides only if pairs are dropped and the score depends on log-probs at all
        if (
            self.no_signal == "hash"
            and signal <= max(floor, noise_floor(HALF))
            and count < len(pool)
            and _depends_on_logps(score_of, policy, reference)
        ):
            if signal <= floor:
                rule = "hash"
                warn(
                    f"Selector: at step {step} the log-ratios of all {len(pool)} candidates are "
                    f"equal up to rounding (spread {signal:.2g} nats, floor {floor:g}), so the "
                    f"score could rank only by length; {count} pairs are kept at random, by the "
                    f"hash of their ids. {self._remedy(progress)}, or set no_signal='score' "
                    "(selection.no_signal in a configuration) to rank by the score anyway",
                    stacklevel=3,
                )
            else:
                _warn_of_unknown_precision(policy, reference)
        if count < len(pool):
            _warn_of_different_precisions(policy, reference)
        # the hash that breaks ties decides alone if all scores are equal
        ranked_by = values if rule == "score" else np.zeros_like(values)
        # keyed by the step, so that ties do not favour the same pairs in every interval
        best = top(ranked_by, count, ids=names, key=(self.seed, step))
        kept = np.zeros(len(pool), dtype=bool)
        kept[best] = True
        return Selection(
            indices=pool[best],
            pool=pool,
            scores=values,
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
        ratio = self.keep(progress)
        fraction(ratio, f"Selector: the keep ratio of {shown(self.keep)} at progress {progress:g}")
        return kept_count(ratio, size, self.multiple)

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


def _precision(model: Any) -> torch.dtype | None:
    """Return the dtype in which a model computes; None for a policy that is not a torch module."""
    if not isinstance(model, torch.nn.Module) or next(model.parameters(), None) is None:
        return None
    return computes_in(unwrapped(model))


def _noise(logps: PairLogps) -> float:
    """Return the noise floor of log-probs, as far as it is known."""
    measured = NOISE_FLOOR if logps.precision is None else noise_floor(logps.precision)
    return max(measured, storage_noise(logps))


def _warn_of_unknown_precision(policy: PairLogps, reference: PairLogps) -> None:
    """Warn that the log-ratios may be rounding, if a precision is unknown."""
    sides = (("policy", policy), ("reference", reference))
    unknown = [name for name, logps in sides if logps.precision is None]
    if unknown:
        names = " and ".join(unknown)
        warn(
            f"Selector: the log-ratios spread by no more than {noise_floor(HALF):.1g} nats, which "
            f"is the rounding of half precision, and the precision in which the {names} was "
            "measured is not known, so the ranking may be that of rounding. Measure with a Reader "
            "or a ReferenceStore; or name the precision, as in "
            "logps.measured_in(torch.float32), or set noise_floor in nats",
            stacklevel=4,
        )


def _warn_of_different_precisions(policy: PairLogps, reference: PairLogps) -> None:
    """Warn if the reference was measured in another precision than the policy."""
    if policy.precision is None or reference.precision is None:
        return
    floors = noise_floor(policy.precision), noise_floor(reference.precision)
    if floors[0] != floors[1]:
        warn(
            f"Selector: the reference was measured in {reference.precision}, the policy in "
            f"{policy.precision}; rounding of {max(floors):.2g} nats and more would look like a "
            "change in the policy. Load both in one dtype, and measure both with one Reader",
            stacklevel=4,
        )


def _given_copies(score: Score) -> Score:
    """Return the score; one of the user's own gets copies, and cannot change the evidence."""
    function: Any = score
    while isinstance(function, partial):
        function = function.func
    if getattr(function, "__module__", "").partition(".")[0] == "sage_select":
        return score

    def given_copies(policy: PairLogps, reference: PairLogps) -> Tensor:
        copies = [
            PairLogps(*(field.clone() for field in logps)).measured_in(logps.precision)
            for logps in (policy, reference)
        ]
        return score(*copies)

    return given_copies


def _depends_on_logps(score: Score, policy: PairLogps, reference: PairLogps) -> bool:
    """Return whether a score depends on the policy's log-probs, tested by changing them."""
    # a different shift for each pair: a common one could cancel in the score
    shift = torch.arange(1, len(policy.index) + 1, device=policy.chosen.device)
    changed = policy._replace(chosen=policy.chosen - shift, rejected=policy.rejected + shift)
    before, after = (torch.as_tensor(score(logps, reference)) for logps in (policy, changed))
    return not torch.equal(before, after)


def _instead_of_score(score: Any) -> str:
    """Return what to pass for a score that is no function."""
    if isinstance(score, str) and score in SCORES:
        return f"the function, sage_select.scores.{score}"
    return f"a function (policy, reference) -> [P]; sage_select.scores has {', '.join(SCORES)}"


def _instead_of_schedule(keep: Any) -> str:
    """Return what to pass for a keep ratio that is no schedule."""
    ratios = keep if isinstance(keep, tuple | list) else [keep]
    if all(is_number(scalar(ratio)) for ratio in ratios) and len(ratios) in (1, 2):
        return f"{'Constant' if len(ratios) == 1 else 'Linear'}({', '.join(map(str, ratios))})"
    return "a schedule of ratios in [0, 1], such as Constant(0.5) or Linear(1.0, 0.4)"


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
