"""Plans: which pairs are candidates when, dealt before the run starts, exact to the pair."""

from dataclasses import dataclass, replace
from typing import Literal
from warnings import warn

import numpy as np
import numpy.typing as npt

from sage_select.arrays import Float64Array, Int64Array, UInt64Array, all_different, checked_rows
from sage_select.hashing import hash_order, id_words, keyed_hash
from sage_select.pairs import Schedule
from sage_select.quotas import fit_totals, round_keeping_totals

ProgressRule = Literal["inclusive", "k_over_K"]
OnInfeasible = Literal["rebalance", "error"]
Scope = Literal["run", "epoch", "single_pass"]


@dataclass(frozen=True, eq=False)
class Plan:
    """Which pairs stand in which pool.

    Attributes:
        pools: Dataset rows of each pool, int64, in a seeded order. A row stands at most once in a
            pool and `copies` times in all (Eq. 5 for each traversal of the dataset).
        progress: The progress in [0, 1] that belongs to each pool.
        counts: int64 [K, C], pairs of each stratum in each pool.
        ideal: float64 [K, C], what the mixing schedule asks for: `rho_c(k) |P_k|`  (Eq. 6).
        copies: How many times each pair is dealt.
        seed: The seed of the deal.
    """

    pools: tuple[Int64Array, ...]
    progress: tuple[float, ...]
    counts: Int64Array
    ideal: Float64Array
    copies: int
    seed: int

    @property
    def num_pairs(self) -> int:
        """Pairs in the dataset, each dealt `copies` times."""
        return int(self.counts.sum()) // self.copies

    @property
    def largest_deviation(self) -> float:
        """The largest difference between a cell's count and its ideal, in pairs."""
        return float(np.abs(self.counts - self.ideal).max())

    def on_rows(self, rows: npt.ArrayLike) -> "Plan":
        """The same plan for pairs that stand in other rows: what was row i is now rows[i]."""
        names = checked_rows(rows, "Plan.on_rows")
        if len(names) != self.num_pairs or names.min() < 0 or not all_different(names):
            raise ValueError(
                f"Plan.on_rows: needs {self.num_pairs} different rows from 0, one for each pair of "
                f"the plan, got {len(names)}: {names}"
            )
        return replace(self, pools=tuple(names[pool] for pool in self.pools))

    def __len__(self) -> int:
        return len(self.pools)

    def __repr__(self) -> str:
        sizes = sorted({len(pool) for pool in self.pools})
        return (
            f"Plan({len(self)} pools of {' or '.join(map(str, sizes))}, {self.num_pairs} pairs "
            f"dealt {self.copies} times, largest deviation {self.largest_deviation:.2f} pairs)"
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
    """Deal every pair into disjoint pools whose composition follows a schedule  (Eq. 5-6).

    Exact: pool sizes differ by at most one, every pair is dealt exactly `copies` times and at most
    once per pool. The schedule is met as closely as the data allow: its shares are fitted to the
    sizes of pools and strata by proportional fitting, then rounded with both totals kept.

    Args:
        strata: [N], stratum of each pair, whole numbers from 0; C strata.
        mix: Schedule of shares, a tuple of C that sums to 1.
        num_pools: K, the number of pools.
        copies: Traversals of the dataset that are dealt out, at most K.
        seed: Key of the deal.
        ids: [N], a stable id per pair; with ids the deal does not depend on the row order.
        on_infeasible: What to do where the data cannot follow the mix to within one pair or one
            percentage point of a pool: "rebalance" deals as near to it as the data allow, with a
            warning; "error" refuses.
        progress: Progress of pool k = 1..K: "inclusive" is (k - 1) / (K - 1), so that the first
            pool stands at the schedule's start; "k_over_K" is k / K, as printed in Eq. 6.

    Returns:
        The plan; its `largest_deviation` tells how far the mix had to be left.

    Raises:
        ValueError: If no such plan exists, or an argument is malformed.

    Example:
        >>> from sage_select import Linear
        >>> strata = [0] * 6 + [1] * 2
        >>> plan_pools(strata, Linear((1.0, 0.0), (0.5, 0.5)), num_pools=2).counts.tolist()
        [[4, 0], [2, 2]]
    """
    strata = _checked_strata(strata)
    names = id_words(np.arange(len(strata)) if ids is None else ids)
    if len(names) != len(strata):
        raise ValueError(f"plan_pools: {len(strata)} strata but {len(names)} ids")
    if ids is not None and not all_different(names):
        raise ValueError(
            "plan_pools: some ids stand more than once, so the deal would depend on the order of "
            "rows; drop duplicate pairs, or pass no ids"
        )
    slots = len(strata) * copies
    if not 1 <= num_pools <= slots:
        raise ValueError(
            f"plan_pools: num_pools must lie between 1 and the {slots} pairs to deal, "
            f"got {num_pools}"
        )
    if not 1 <= copies <= num_pools:
        raise ValueError(
            f"plan_pools: copies must lie between 1 and num_pools, since a pair stands at most "
            f"once in a pool; got copies={copies} and num_pools={num_pools}"
        )
    times = _progress(num_pools, progress)
    shares = np.array([_checked_shares(mix(t), int(strata.max()) + 1) for t in times])
    # N K = pool sizes in order; the first `slots % K` pools take one pair more
    sizes = np.full(num_pools, slots // num_pools)
    sizes[: slots % num_pools] += 1
    members = np.bincount(strata, minlength=shares.shape[1])
    ideal = shares * sizes[:, None]
    fitted = fit_totals(ideal, rows=sizes, columns=copies * members, most=members)
    if on_infeasible not in ("rebalance", "error"):
        raise ValueError(
            f"plan_pools: on_infeasible must be rebalance or error, got {on_infeasible!r}"
        )
    deviation = _deviation(ideal, fitted, sizes, members)
    if deviation and on_infeasible == "error":
        raise ValueError(f'{deviation}, or pass on_infeasible="rebalance"')
    if deviation:
        warn(f"{deviation}; the pools are as near to it as the data allow", stacklevel=2)
    counts = round_keeping_totals(fitted, rows=sizes, columns=copies * members, most=members)
    parts: list[list[Int64Array]] = [[] for _ in range(num_pools)]
    for stratum in range(len(members)):
        rows = np.flatnonzero(strata == stratum)
        dealt = _deal(rows, names[rows], counts[:, stratum], copies, seed)
        for pool, part in zip(parts, dealt, strict=True):
            pool.append(part)
    pools = [np.concatenate(part) for part in parts]
    return Plan(
        pools=tuple(pool[hash_order(names[pool], "pool", seed, k)] for k, pool in enumerate(pools)),
        progress=times,
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
    """The plan of a training run in the paper's terms: batch size, refresh steps and epochs.

    A pool holds about `refresh_steps * batch_size` candidates. The paper's Table 4 with 4,134
    pairs gives 31 pools of 400.

    Args:
        strata: [N], stratum of each pair.
        mix: Schedule of shares.
        batch_size: Pairs per optimizer step.
        refresh_steps: Candidate batches per pool.
        epochs: Traversals of the dataset.
        scope: "run" makes one plan over all traversals, with one schedule; "epoch" makes a fresh
            partition for each epoch, and the schedule starts again; "single_pass" deals every pair
            once, whatever the number of epochs.
        seed: Key of the deal.
        ids: [N], a stable id per pair.
        on_infeasible: As in `plan_pools`.
        progress: As in `plan_pools`.

    Example:
        >>> from sage_select import Constant
        >>> plan_run([0] * 64, Constant((1.0,)), batch_size=4, refresh_steps=4, epochs=2)
        Plan(8 pools of 16, 64 pairs dealt 2 times, largest deviation 0.00 pairs)
    """
    for name, value in (
        ("batch_size", batch_size),
        ("refresh_steps", refresh_steps),
        ("epochs", epochs),
    ):
        if value < 1:
            raise ValueError(f"plan_run: {name} must be at least 1, got {value}")
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
            # not seed + epoch: another run's seed 1 must not repeat this one's second epoch
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
            f"{array.min()}; see strata_from_judgments"
        )
    return array.astype(np.int64)


def _checked_shares(value: object, num_strata: int) -> tuple[float, ...]:
    shares = tuple(np.asarray(value, dtype=np.float64).reshape(-1).tolist())
    if len(shares) < num_strata:
        raise ValueError(
            f"plan_pools: the mix gives {len(shares)} shares for {num_strata} strata: {value}"
        )
    if not (min(shares) >= -1e-9 and abs(sum(shares) - 1) <= 1e-6):  # NaN fails both
        raise ValueError(
            f"plan_pools: the shares of the mix must be >= 0 and sum to 1, got {value}"
        )
    return tuple(max(0.0, share) for share in shares)


def _progress(num_pools: int, rule: ProgressRule) -> tuple[float, ...]:
    if rule == "inclusive":
        return tuple(k / max(num_pools - 1, 1) for k in range(num_pools))
    if rule == "k_over_K":
        return tuple((k + 1) / num_pools for k in range(num_pools))
    raise ValueError(f"plan_pools: progress must be inclusive or k_over_K, got {rule!r}")


def _deviation(
    ideal: Float64Array, fitted: Float64Array, sizes: Int64Array, members: Int64Array
) -> str:
    """How the data keep the pools from following the mix, in words; empty where they do not."""
    deviation = np.abs(fitted - ideal)
    if not (deviation > np.maximum(1.0, 0.01 * sizes)[:, None]).any():
        return ""
    pool, stratum = np.unravel_index(deviation.argmax(), deviation.shape)
    asked = ideal.sum(axis=0) / ideal.sum()
    return (
        f"plan_pools: the data cannot follow the mix: pool {pool} should hold "
        f"{ideal[pool, stratum]:.1f} pairs of stratum {stratum} but can get "
        f"{fitted[pool, stratum]:.1f}. On average the mix asks for shares "
        f"{np.round(asked, 3).tolist()}, the data hold "
        f"{np.round(members / members.sum(), 3).tolist()}; move the schedule's ends towards these"
    )


def _deal(
    rows: Int64Array, names: UInt64Array, counts: Int64Array, copies: int, seed: int
) -> list[Int64Array]:
    """Deal a stratum's rows to pools: each `copies` times in all, at most once per pool."""
    ends = np.cumsum(counts)
    sequence = np.empty(0, dtype=np.int64)
    for copy in range(copies):
        order = rows[hash_order(names, "deal", seed, copy)]
        # a pool that straddles two traversals must not get a pair of the first part again
        start = len(rows) * copy
        straddling = np.searchsorted(ends, start, side="right")
        if copy and straddling < len(ends) and ends[straddling] - counts[straddling] < start:
            already = sequence[ends[straddling] - counts[straddling] :]
            fresh = np.flatnonzero(~np.isin(order, already))[: ends[straddling] - start]
            order = np.concatenate([order[fresh], np.delete(order, fresh)])
        sequence = np.concatenate([sequence, order])
    return np.split(sequence, ends[:-1])
