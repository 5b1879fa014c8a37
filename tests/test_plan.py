import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sage_select import (
    Constant,
    Linear,
    Timeline,
    plan_pools,
    plan_run,
    strata_from_judgments,
    strata_from_values,
)
from sage_select.timeline import kept_count

pytestmark = pytest.mark.filterwarnings("ignore:plan_pools. the data cannot follow the mix")

PAPER_STRATA = np.repeat([0, 1, 2], [2674, 1046, 414])
PAPER_MIX = Linear((0.9, 0.1, 0.0), (0.4, 0.4, 0.2))


@st.composite
def shares(draw, num_strata: int) -> tuple[float, ...]:
    weights = draw(
        st.lists(
            st.sampled_from([0.0, 0.1, 1.0, 5.0]), min_size=num_strata, max_size=num_strata
        ).filter(any)
    )
    return tuple(w / sum(weights) for w in weights)


@st.composite
def problems(draw):
    """Arguments of plan_pools: strata, mix, number of pools, copies, seed."""
    num_strata = draw(st.integers(1, 4))
    strata = draw(st.lists(st.integers(0, num_strata - 1), min_size=1, max_size=60))
    copies = draw(st.integers(1, 3))
    num_pools = draw(st.integers(copies, copies * len(strata)))
    mix = Linear(draw(shares(num_strata)), draw(shares(num_strata)))
    return np.array(strata), mix, num_pools, copies, draw(st.integers(0, 1000))


@given(problems())
def test_every_pair_is_assigned_exactly_and_at_most_once_per_pool(problem):
    strata, mix, num_pools, copies, seed = problem
    plan = plan_pools(strata, mix, num_pools, copies=copies, seed=seed)
    assignments = np.bincount(np.concatenate(plan.pools), minlength=len(strata))
    assert (assignments == copies).all()
    assert all(len(np.unique(pool)) == len(pool) for pool in plan.pools)


@pytest.mark.parametrize(("num_pairs", "copies", "num_pools"), [(5, 3, 4), (7, 2, 3), (40, 5, 6)])
def test_a_pool_across_two_traversals_repeats_no_pair(num_pairs, copies, num_pools):
    for seed in range(50):
        plan = plan_pools([0] * num_pairs, Constant((1.0,)), num_pools, copies=copies, seed=seed)
        assert all(len(np.unique(pool)) == len(pool) for pool in plan.pools)


@given(problems())
def test_sizes_and_counts_describe_the_pools(problem):
    strata, mix, num_pools, copies, seed = problem
    plan = plan_pools(strata, mix, num_pools, copies=copies, seed=seed)
    sizes = [len(pool) for pool in plan.pools]
    assert len(plan) == num_pools
    assert max(sizes) - min(sizes) <= 1
    for pool, counts, ideal, t in zip(
        plan.pools, plan.counts, plan.ideal, plan.progress, strict=True
    ):
        assert np.bincount(strata[pool], minlength=len(counts)).tolist() == counts.tolist()
        assert ideal == pytest.approx(np.array(mix(t)) * len(pool))
    assert plan.largest_deviation == np.abs(plan.counts - plan.ideal).max()


@given(problems(), st.randoms(use_true_random=False))
def test_with_ids_the_assignment_does_not_depend_on_the_row_order(problem, shuffler):
    strata, mix, num_pools, copies, seed = problem
    ids = np.array([f"pair-{i}" for i in range(len(strata))])
    order = list(range(len(strata)))
    shuffler.shuffle(order)
    plan = plan_pools(strata, mix, num_pools, copies=copies, seed=seed, ids=ids)
    shuffled = plan_pools(strata[order], mix, num_pools, copies=copies, seed=seed, ids=ids[order])
    for pool, other in zip(plan.pools, shuffled.pools, strict=True):
        assert ids[pool].tolist() == ids[order][other].tolist()


def test_pool_sizes_of_the_paper():
    plan = plan_run(PAPER_STRATA, PAPER_MIX, batch_size=16, refresh_steps=25, epochs=3)
    assert len(plan) == 31
    assert sorted({len(pool) for pool in plan.pools}) == [400, 401]
    assert plan.largest_deviation <= 2.5
    assert plan.counts.sum(axis=0).tolist() == [3 * 2674, 3 * 1046, 3 * 414]
    timeline = Timeline(plan, Linear(1.0, 0.4), batch_size=16)
    assert timeline.kept_count[0] == len(plan.pools[0])
    assert timeline.kept_count[-1] == 160
    assert timeline.total_steps == -(-sum(timeline.kept_count) // 16)


def test_rounding_errors_are_spread_over_the_pools():
    """Pools of one pair alternate between equal strata, rather than exhaust one first."""
    plan = plan_pools([0] * 50 + [1] * 50, Constant((0.5, 0.5)), 100)
    so_far = np.cumsum(plan.counts - plan.ideal, axis=0)
    assert np.abs(so_far).max() <= 1


def test_a_feasible_mix_is_followed_exactly():
    plan = plan_pools([0] * 60 + [1] * 40, Linear((0.8, 0.2), (0.4, 0.6)), 5, on_infeasible="error")
    assert plan.counts.tolist() == [[16, 4], [14, 6], [12, 8], [10, 10], [8, 12]]


def test_an_infeasible_mix_is_rebalanced_or_refused():
    strata, mix = [0] * 90 + [1] * 10, Constant((0.5, 0.5))
    plan = plan_pools(strata, mix, 5)
    assert plan.counts.tolist() == [[18, 2]] * 5
    assert plan.largest_deviation == 8
    with pytest.raises(
        ValueError, match=r"asks for shares \[0.5, 0.5\], but the data contain \[0.9, 0.1\]"
    ):
        plan_pools(strata, mix, 5, on_infeasible="error")


def test_a_stratum_that_the_mix_never_asks_for_is_assigned_too():
    plan = plan_pools([0, 0, 1, 1], Constant((1.0, 0.0)), 2)
    assert plan.counts.sum(axis=0).tolist() == [2, 2]


def test_seeds_give_different_plans_and_leave_the_global_generator_alone():
    np.random.seed(0)  # noqa: NPY002
    state = np.random.get_state()[1].tolist()  # noqa: NPY002
    first, again, other = (plan_pools(PAPER_STRATA, PAPER_MIX, 10, seed=s) for s in (0, 0, 1))
    assert all((a == b).all() for a, b in zip(first.pools, again.pools, strict=True))
    assert any(
        (a != b).any() for a, b in zip(first.pools, other.pools, strict=False) if len(a) == len(b)
    )
    assert np.random.get_state()[1].tolist() == state  # noqa: NPY002


@pytest.mark.parametrize(
    ("rule", "expected"), [("inclusive", (0.0, 0.5, 1.0)), ("k_over_K", (1 / 3, 2 / 3, 1.0))]
)
def test_progress(rule, expected):
    plan = plan_pools([0] * 9, Constant((1.0,)), 3, progress=rule)
    assert plan.progress == pytest.approx(expected)


def test_a_single_interval_has_progress_0():
    plan = plan_pools([0] * 9, Constant((1.0,)), 1)
    assert plan.progress == (0.0,)
    assert Timeline(plan, Constant(0.5), 2).progress(2) == 0.0


@pytest.mark.parametrize(("scope", "copies"), [("run", 3), ("epoch", 3), ("single_pass", 1)])
def test_scopes(scope, copies):
    plan = plan_run(PAPER_STRATA, PAPER_MIX, batch_size=16, epochs=3, scope=scope)
    assert (np.bincount(np.concatenate(plan.pools)) == copies).all()
    assert plan.copies == copies
    if scope == "epoch":  # each epoch is a separate partition, and the schedule restarts
        assert plan.progress.count(0.0) == 3
        first = np.concatenate(plan.pools[: len(plan) // 3])
        assert sorted(first) == list(range(len(PAPER_STRATA)))


def test_on_rows_translates_row_numbers():
    plan = plan_pools([0, 0, 0], Constant((1.0,)), 3).on_rows([7, 8, 9])
    assert sorted(np.concatenate(plan.pools).tolist()) == [7, 8, 9]


# Kept counts and the timeline


@given(st.floats(0, 1), st.integers(1, 5000), st.integers(1, 20))
def test_kept_count(ratio, size, multiple):
    count = kept_count(ratio, size, multiple)
    assert 1 <= count <= size
    assert count <= max(ratio * size + 1e-9, multiple)
    assert count % multiple == 0 or count == size
    assert ratio * size - count < multiple or count == size


@given(st.integers(0, 100), st.integers(1, 1000))
def test_kept_count_is_exact_for_whole_percentages(percent, hundreds):
    assert kept_count(percent / 100, 100 * hundreds) == max(1, percent * hundreds)


@given(problems(), st.floats(0.05, 1), st.floats(0.05, 1), st.integers(1, 9))
def test_steps_are_known_in_advance(problem, start, end, batch_size):
    strata, mix, num_pools, copies, seed = problem
    plan = plan_pools(strata, mix, num_pools, copies=copies, seed=seed)
    timeline = Timeline(plan, Linear(start, end), batch_size)
    carried = step = 0
    for k in range(num_pools):  # full batches, with the remainder carried over
        assert timeline.first_step[k] == step
        step += (carried + timeline.kept_count[k]) // batch_size
        carried = (carried + timeline.kept_count[k]) % batch_size
    assert timeline.total_steps == step + (carried > 0)


@given(problems(), st.floats(0.05, 1), st.integers(1, 9))
def test_the_interval_at_a_step_is_the_last_one_started(problem, keep, batch_size):
    strata, mix, num_pools, copies, seed = problem
    timeline = Timeline(
        plan_pools(strata, mix, num_pools, copies=copies, seed=seed), Constant(keep), batch_size
    )
    for step in range(timeline.total_steps):
        k = timeline.interval_at(step)
        assert timeline.first_step[k] <= step
        assert k == num_pools - 1 or timeline.first_step[k + 1] > step
        assert timeline.progress(step) == timeline.plan.progress[k]


# Strata

JUDGMENTS = [
    ("high", 1, 0), ("High", 2, 0), ("HIGH", 3, 2), ("high", 5, 2),
    ("medium", 1, 2), ("medium", 2, 1), (" Medium ", 3, 1), ("medium", 4, 2),
    ("low", 1, 2), ("low", 5, 2),
]  # fmt: skip


def test_strata_from_judgments():
    clarity, score, stratum = zip(*JUDGMENTS, strict=True)
    assert strata_from_judgments(clarity, score).tolist() == list(stratum)


def test_equal_values_on_both_sides_of_a_cut_give_a_warning():
    with pytest.warns(UserWarning, match="10 of 12 pairs have the value 1 and lie on both sides"):
        strata_from_values([3.0, *[1.0] * 10, 0.5], (0.5, 0.5))


@pytest.mark.filterwarnings("ignore:strata_from_values")
@given(st.lists(st.floats(-5, 5), min_size=1, max_size=50))
def test_strata_from_values_are_ordered_and_have_the_requested_sizes(values):
    strata = strata_from_values(values, shares=(0.5, 0.3, 0.2))
    easiest_first = np.asarray(values)[np.argsort(strata, kind="stable")]
    for k in range(2):
        inside, harder = np.asarray(values)[strata == k], np.asarray(values)[strata > k]
        assert not len(inside) or not len(harder) or inside.min() >= harder.max()
    assert abs((strata == 0).sum() - len(values) / 2) <= 1
    assert len(easiest_first) == len(values)
