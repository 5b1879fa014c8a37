"""Plans: the candidate pairs of each interval, assigned before the run, exact to the pair."""

from dataclasses import dataclass, replace
from typing import Literal
from warnings import warn

import numpy as np
import numpy.typing as npt

from sage_select.arguments import seed_number, shown, whole_number
from sage_select.arrays import Float64Array, Int64Array, UInt64Array, all_different, checked_rows
from sage_select.hashing import hash_order, id_words, keyed_hash
from sage_select.pairs import Schedule
from sage_select.quotas import fit_totals, round_keeping_totals

ProgressRule = Literal["inclusive", "k_over_K"]
OnInfeasible = Literal["rebalance", "error"]
Scope = Literal["run", "epoch", "single_pass"]


@dataclass(frozen=True, eq=False)
class Plan:
    """An assignment of pairs to pools.

    Attributes:
        pools: Dataset rows of each pool, int64, in a seeded order. A pool contains a row at most
            once, and all pools together `copies` times (Eq. 5 for each traversal of the dataset).
        progress: Progress in [0, 1] at each pool.
        counts: int64 [K, C], number of pairs of each stratum in each pool.
        ideal: float64 [K, C], the counts of the mixing schedule, unrounded: `rho_c(k) |P_k|`
            (Eq. 6).
        copies: How many times each pair is assigned.
        seed: Seed of the assignment.
    """

    pools: tuple[Int64Array, ...]
    progress: tuple[float, ...]
    counts: Int64Array
    ideal: Float64Array
    copies: int
    seed: int

    @property
    def num_pairs(self) -> int:
        """Number of pairs in the dataset, each assigned `copies` times."""
        return int(self.counts.sum()) // self.copies

    @property
    def largest_deviation(self) -> float:
        """Largest difference between a count and its ideal, in pairs."""
        return float(np.abs(self.counts - self.ideal).max())

    def on_rows(self, rows: npt.ArrayLike) -> "Plan":
        """Return this plan with other row numbers: row i becomes rows[i].

        Raises:
            ValueError: If `rows` is not one different row for each pair of the plan.
        """
        new_rows = checked_rows(rows, "Plan.on_rows")
        if len(new_rows) != self.num_pairs or new_rows.min() < 0 or not all_different(new_rows):
            raise ValueError(
                f"Plan.on_rows: needs {self.num_pairs} different rows >= 0, one for each pair of "
                f"the plan, got {len(new_rows)}: {new_rows}"
            )
        return replace(self, pools=tuple(new_rows[pool] for pool in self.pools))

    def __len__(self) -> int:
        return len(self.pools)

    def __repr__(self) -> str:
        sizes = sorted({len(pool) for pool in self.pools})
        return (
            f"Plan({len(self)} pools of {' or '.join(map(str, sizes))}, {self.num_pairs} pairs "
            f"assigned {self.copies} times, largest deviation {self.largest_deviation:.2f} pairs)"
        )


def plan_pools(
    strata: npt.ArrayLike,
    mix: Schedule,
    num_pools: int,
    *,
    copies: int = 1,
    seed: int = 0,
    ids: npt.ArrayLike | None = None,
    on_infeasible: OnInfeasible = "rebalance",
    progress: ProgressRule = "inclusive",
) -> Plan:
    """Assign every pair to disjoint pools whose composition follows a schedule  (Eq. 5-6).

    Exact: pool sizes differ by at most one, and every pair is assigned exactly `copies` times, at
    most once per pool. The schedule is followed as closely as the data allow: its shares are fitted
    to the sizes of pools and strata by proportional fitting, then rounded with both totals kept.

    Args:
        strata: [N], stratum of each pair, whole numbers from 0; C strata.
        mix: Schedule of shares, a tuple of C that sums to 1.
        num_pools: K, the number of pools.
        copies: Traversals of the dataset to assign, at most K.
        seed: Seed of the assignment.
        ids: [N], a stable id per pair; with ids the assignment does not depend on the row order.
        on_infeasible: If the data cannot follow the mix to within one pair or one percentage point
            of a pool, "rebalance" follows it as closely as the data allow and warns; "error"
            raises.
        progress: Progress of pool k = 1..K: "inclusive" is (k - 1) / (K - 1), so that the first
            pool gets the schedule's start value; "k_over_K" is k / K, as printed in Eq. 6.

    Returns:
        The plan; its `largest_deviation` is the largest distance from the mix.

    Raises:
        ValueError: If no such plan exists, or an argument is malformed.

    Example:
        >>> from sage_select import Linear
        >>> strata = [0] * 6 + [1] * 2
        >>> plan_pools(strata, Linear((1.0, 0.0), (0.5, 0.5)), num_pools=2).counts.tolist()
        [[4, 0], [2, 2]]
    """
    strata = _checked_strata(strata)
    _check_mix(mix, "plan_pools")
    seed = seed_number(seed, "plan_pools: seed")
    num_pools = whole_number(num_pools, "plan_pools: num_pools")
    copies = whole_number(copies, "plan_pools: copies")
    # hash strings once; every later shuffle then works on 64-bit words
    words = id_words(np.arange(len(strata)) if ids is None else ids)
    if len(words) != len(strata):
        raise ValueError(
            f"plan_pools: {len(strata)} strata but {len(words)} ids; pass one id for each pair"
        )
    if ids is not None and not all_different(words):
        raise ValueError(
            "plan_pools: some ids occur more than once, so the assignment would depend on the row "
            "order; drop duplicate pairs, or pass no ids"
        )
    slots = len(strata) * copies
    if not 1 <= num_pools <= slots:
        raise ValueError(
            f"plan_pools: num_pools must lie between 1 and the {slots} pairs to assign, "
            f"got {num_pools}"
        )
    if not 1 <= copies <= num_pools:
        raise ValueError(
            f"plan_pools: copies must lie between 1 and num_pools, since a pool contains a pair at "
            f"most once; got copies={copies} and num_pools={num_pools}"
        )
    pool_progress = _progress(num_pools, progress)
    shares = np.array([_checked_shares(mix(t), int(strata.max()) + 1) for t in pool_progress])
    # the sizes must add up to `slots`: the first `slots % K` pools take one pair more
    sizes = np.full(num_pools, slots // num_pools)
    sizes[: slots % num_pools] += 1
    stratum_sizes = np.bincount(strata, minlength=shares.shape[1])
    ideal = shares * sizes[:, None]
    # no cell may exceed its stratum, since a pool contains a pair at most once
    fitted = fit_totals(ideal, rows=sizes, columns=copies * stratum_sizes, most=stratum_sizes)
    if on_infeasible not in ("rebalance", "error"):
        raise ValueError(
            f"plan_pools: on_infeasible must be rebalance or error, got {on_infeasible!r}"
        )
    deviation = _deviation(ideal, fitted, sizes, stratum_sizes)
    if deviation and on_infeasible == "error":
        raise ValueError(f'{deviation}, or pass on_infeasible="rebalance"')
    if deviation:
        warn(f"{deviation}; the pools follow it as closely as the data allow", stacklevel=2)
    counts = round_keeping_totals(
        fitted, rows=sizes, columns=copies * stratum_sizes, most=stratum_sizes
    )
    parts: list[list[Int64Array]] = [[] for _ in range(num_pools)]
    for stratum in range(len(stratum_sizes)):
        rows = np.flatnonzero(strata == stratum)
        assigned = _assign(rows, words[rows], counts[:, stratum], copies, seed)
        for pool, part in zip(parts, assigned, strict=True):
            pool.append(part)
    pools = [np.concatenate(part) for part in parts]
    return Plan(
        # shuffle each pool, which so far lists its strata one after the other
        pools=tuple(pool[hash_order(words[pool], "pool", seed, k)] for k, pool in enumerate(pools)),
        progress=pool_progress,
        counts=counts,
        ideal=ideal,
        copies=copies,
        seed=seed,
    )


def plan_run(
    strata: npt.ArrayLike,
    mix: Schedule,
    *,
    batch_size: int,
    refresh_steps: int = 25,
    epochs: int = 3,
    scope: Scope = "run",
    seed: int = 0,
    ids: npt.ArrayLike | None = None,
    on_infeasible: OnInfeasible = "rebalance",
    progress: ProgressRule = "inclusive",
) -> Plan:
    """Plan a training run from the paper's settings: batch size, refresh steps and epochs.

    A pool has about `refresh_steps * batch_size` candidates. The paper's Table 4 with 4,134
    pairs gives 31 pools of 400.

    Args:
        strata: [N], stratum of each pair.
        mix: Schedule of shares.
        batch_size: Pairs per optimizer step.
        refresh_steps: Candidate batches per pool.
        epochs: Traversals of the dataset.
        scope: "run" makes one plan over all traversals, with one schedule; "epoch" makes a new
            partition for each epoch, and the schedule restarts; "single_pass" assigns every pair
            once, for any number of epochs.
        seed: Seed of the assignment.
        ids: [N], a stable id per pair.
        on_infeasible: As in `plan_pools`.
        progress: As in `plan_pools`.

    Raises:
        ValueError: If no such plan exists, or an argument is malformed.

    Example:
        >>> from sage_select import Constant
        >>> plan_run([0] * 64, Constant((1.0,)), batch_size=4, refresh_steps=4, epochs=2)
        Plan(8 pools of 16, 64 pairs assigned 2 times, largest deviation 0.00 pairs)
    """
    batch_size = whole_number(batch_size, "plan_run: batch_size")
    refresh_steps = whole_number(refresh_steps, "plan_run: refresh_steps")
    epochs = whole_number(epochs, "plan_run: epochs")
    seed = seed_number(seed, "plan_run: seed")
    _check_mix(mix, "plan_run")
    if not isinstance(scope, str):
        raise TypeError(f"plan_run: scope must be run, epoch or single_pass, got {shown(scope)}")
    traversals = {"run": epochs, "epoch": 1, "single_pass": 1}.get(scope)
    if traversals is None:
        raise ValueError(f"plan_run: scope must be run, epoch or single_pass, got {scope!r}")
    strata = _checked_strata(strata)
    slots = len(strata) * traversals
    num_pools = max(1, traversals, round(slots / (refresh_steps * batch_size)))
    parts = [
        plan_pools(
            strata,
            mix,
            num_pools,
            copies=traversals,
            # not seed + epoch: a run with seed 1 must not repeat the second epoch of seed 0
            seed=seed if epoch == 0 else int(keyed_hash([epoch], "epoch", seed)[0] >> 1),
            ids=ids,
            on_infeasible=on_infeasible,
            progress=progress,
        )
        for epoch in range(epochs if scope == "epoch" else 1)
    ]
    return Plan(
        pools=tuple(pool for part in parts for pool in part.pools),
        progress=tuple(t for part in parts for t in part.progress),
        counts=np.concatenate([part.counts for part in parts]),
        ideal=np.concatenate([part.ideal for part in parts]),
        copies=traversals * len(parts),
        seed=seed,
    )


def _checked_strata(strata: npt.ArrayLike) -> Int64Array:
    array = np.asarray(strata)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"plan_pools: strata must be [N] with N >= 1, got shape {array.shape}")
    if array.dtype.kind not in "iu" or array.min() < 0:
        raise ValueError(
            f"plan_pools: strata must be whole numbers from 0, got {array.dtype} with minimum "
            f"{array.min()}; use strata_from_judgments or strata_from_values"
        )
    strata_numbers = array.astype(np.int64)
    if strata_numbers.min() < 0:  # beyond int64
        raise ValueError(f"plan_pools: strata must be numbered from 0, got {array.max()}")
    return strata_numbers


def _check_mix(mix: object, call: str) -> None:
    if not callable(mix):
        raise TypeError(
            f"{call}: mix must be a schedule, such as Constant((0.6, 0.4)), got {shown(mix)}"
        )


def _checked_shares(value: object, num_strata: int) -> tuple[float, ...]:
    array = np.asarray(value)
    if array.dtype.kind not in "iuf":
        raise TypeError(f"plan_pools: the shares of the mix must be numbers, got {shown(value)}")
    shares = tuple(array.astype(np.float64).reshape(-1).tolist())
    if len(shares) < num_strata:
        raise ValueError(
            f"plan_pools: the mix gives {len(shares)} shares for {num_strata} strata: {value}; "
            "give one share for each stratum"
        )
    if not (min(shares) >= -1e-9 and abs(sum(shares) - 1) <= 1e-6):  # NaN fails both
        raise ValueError(
            f"plan_pools: the shares of the mix must be >= 0 and sum to 1, got {value}"
        )
    return tuple(max(0.0, share) for share in shares)  # -1e-17 from rounding becomes 0


def _progress(num_pools: int, rule: ProgressRule) -> tuple[float, ...]:
    if rule == "inclusive":
        return tuple(k / max(num_pools - 1, 1) for k in range(num_pools))
    if rule == "k_over_K":
        return tuple((k + 1) / num_pools for k in range(num_pools))
    raise ValueError(f"plan_pools: progress must be inclusive or k_over_K, got {rule!r}")


def _deviation(
    ideal: Float64Array, fitted: Float64Array, sizes: Int64Array, stratum_sizes: Int64Array
) -> str:
    """Describe how the data prevent pools from following the mix; empty if they do not."""
    deviation = np.abs(fitted - ideal)
    if not (deviation > np.maximum(1.0, 0.01 * sizes)[:, None]).any():
        return ""
    pool, stratum = np.unravel_index(deviation.argmax(), deviation.shape)
    requested = ideal.sum(axis=0) / ideal.sum()
    return (
        f"plan_pools: the data cannot follow the mix: pool {pool} should have "
        f"{ideal[pool, stratum]:.1f} pairs of stratum {stratum} but can only get "
        f"{fitted[pool, stratum]:.1f}. On average the mix asks for shares "
        f"{np.round(requested, 3).tolist()}, but the data contain "
        f"{np.round(stratum_sizes / stratum_sizes.sum(), 3).tolist()}; move the schedule's start "
        "and end towards these"
    )


def _assign(
    rows: Int64Array, words: UInt64Array, counts: Int64Array, copies: int, seed: int
) -> list[Int64Array]:
    """Assign a stratum's rows to pools: each `copies` times in all, at most once per pool."""
    ends = np.cumsum(counts)
    sequence = np.empty(0, dtype=np.int64)
    for copy in range(copies):
        order = rows[hash_order(words, "deal", seed, copy)]
        # a pool that straddles two traversals must not get a pair of the first one again, so its
        # rest is filled with the first rows of this traversal that it does not contain yet
        start = len(rows) * copy
        straddling = np.searchsorted(ends, start, side="right")
        if copy and straddling < len(ends) and ends[straddling] - counts[straddling] < start:
            in_pool = sequence[ends[straddling] - counts[straddling] :]
            fresh = np.flatnonzero(~np.isin(order, in_pool))[: ends[straddling] - start]
            order = np.concatenate([order[fresh], np.delete(order, fresh)])
        sequence = np.concatenate([sequence, order])
    return np.split(sequence, ends[:-1])
