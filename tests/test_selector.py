"""Tests of the Selector: the cut, ranking, pools without signal, and measuring."""

import warnings
from copy import deepcopy
from functools import partial

import numpy as np
import pytest
import torch
from cases import SCORES
from hypothesis import given
from hypothesis import strategies as st
from strategies import pools, with_rewards

from sage_select import (
    Constant,
    Linear,
    PairLogps,
    Reader,
    ReferenceStore,
    Selector,
    log_sage,
    measure,
    sage,
    scores,
)
from sage_select.ranking import top
from sage_select.selecting.selector import log_ratio_spread


def selector(score=sage, keep=Constant(0.5), reference=None, **options) -> Selector:  # noqa: B008
    return Selector(score, keep, reference, lambda step: 0.0, no_signal="score", **options)


# The cut (Eq. 9)


@given(st.lists(st.sampled_from([0.0, 1.0, 2.5, -1.0]), min_size=1, max_size=30), st.data())
def test_top_equals_the_start_of_a_full_sort(values, data):
    values = np.array(values)
    count = data.draw(st.integers(0, len(values)))
    best = top(values, count, ids=np.arange(len(values)))
    dropped = np.delete(values, best)
    assert len(np.unique(best)) == count
    assert (np.diff(values[best]) <= 0).all()
    assert not count or not len(dropped) or values[best].min() >= dropped.max()
    full = top(values, len(values), ids=np.arange(len(values)))
    assert best.tolist() == full[:count].tolist()


@given(st.integers(2, 30), st.randoms(use_true_random=False))
def test_ties_are_broken_by_id(size, shuffler):
    order = list(range(size))
    shuffler.shuffle(order)
    ids = np.array([f"pair-{i}" for i in range(size)])
    first = ids[top(np.zeros(size), size // 2, ids=ids)]
    assert first.tolist() == ids[order][top(np.zeros(size), size // 2, ids=ids[order])].tolist()


def test_the_key_decides_how_ties_are_broken():
    draws = {tuple(top(np.zeros(20), 5, ids=np.arange(20), key=(seed,))) for seed in range(10)}
    assert len(draws) > 5


# rank


@pytest.mark.parametrize("name", SCORES)
@given(pool=pools(), ratio=st.floats(0, 1))
def test_rank_keeps_the_highest_scores(name, pool, ratio):
    policy, reference = pool
    decision = selector(SCORES[name], Constant(ratio), reference).rank(policy, reference, 0.0)
    assert len(decision) == max(1, int(ratio * len(policy.index) + 1e-9))
    assert set(decision) <= set(policy.index.tolist())
    assert decision.pool[decision.kept].tolist() == [r for r in decision.pool if r in set(decision)]
    kept, dropped = decision.scores[decision.kept], decision.scores[~decision.kept]
    assert not len(dropped) or kept.min() >= dropped.max()
    assert decision.cut == kept.min()


@given(pools(), st.randoms(use_true_random=False), st.floats(0, 1))
def test_the_order_of_rows_does_not_matter(pool, shuffler, ratio):
    policy, reference = pool
    order = policy.index.tolist()
    shuffler.shuffle(order)
    decide = selector(log_sage, Constant(ratio), reference).rank
    # the reference is looked up by row, so neither its order nor further rows matter
    assert list(decide(policy, reference, 0.0)) == list(
        decide(policy.take(order), reference.take(order[::-1]), 0.0)
    )


@given(pools(min_size=8), st.integers(1, 4))
def test_kept_counts_are_multiples(pool, multiple):
    policy, reference = pool
    decision = selector(keep=Constant(0.7), reference=reference, multiple=multiple).rank(
        policy, reference, 0.0
    )
    assert len(decision) % multiple == 0


def test_the_keep_schedule_is_evaluated_at_the_progress():
    policy, reference = with_rewards(torch.randn(100), torch.randn(100))
    decide = selector(keep=Linear(1.0, 0.4), reference=reference).rank
    assert [len(decide(policy, reference, t)) for t in (0.0, 0.5, 1.0)] == [100, 70, 40]


def test_a_missing_reference_row_is_an_error():
    policy, reference = with_rewards([1.0, 2.0], [0.0, 0.0])
    with pytest.raises(KeyError, match="1 of 2 rows were never measured, the first is row 1"):
        selector(reference=reference).rank(policy, reference.take([0]), 0.0)


def test_different_token_counts_are_an_error():
    policy, reference = with_rewards([1.0, 2.0], [0.0, 0.0])
    other = reference._replace(chosen_tokens=reference.chosen_tokens + 1)
    with pytest.raises(ValueError, match="counted different response tokens for row 0"):
        selector(reference=other).rank(policy, other, 0.0)


# Pools without signal


def equal_rewards(noise: float = 0.0):
    """Log-probs of 100 pairs at policy = reference, with lengths 1 to 100 and optional noise."""
    tokens = torch.arange(1, 101)
    policy, reference = with_rewards(torch.zeros(100), torch.zeros(100), tokens)
    return policy._replace(chosen=noise * torch.randn(100).double()), reference


@pytest.mark.parametrize("noise", [0.0, 1e-6, 1e-4])
def test_without_signal_the_hash_decides_with_a_warning(noise):
    policy, reference = equal_rewards(noise)
    decide = Selector(sage, Constant(0.4), reference, lambda step: 0.0)
    with pytest.warns(UserWarning, match="log-ratios of all 100 candidates are equal up to"):
        decision = decide.rank(policy, reference, 0.0)
    assert decision.rule == "hash"
    assert len(decision) == 40
    assert decision.signal <= 1e-3
    shortest = set(range(40))
    assert len(shortest & set(decision)) < 30  # ranked by length it would be all 40
    with pytest.warns(UserWarning, match="are equal up to rounding"):
        assert list(decide.rank(policy, reference, 0.0)) == list(decision)


def test_ranking_by_score_without_signal_keeps_the_shortest():
    policy, reference = equal_rewards()
    decision = selector(keep=Constant(0.4), reference=reference).rank(policy, reference, 0.0)
    assert decision.rule == "score"
    assert sorted(decision) == list(range(40))


def test_no_warning_with_signal_or_with_nothing_to_drop():
    policy, reference = equal_rewards()
    trained, _ = with_rewards(torch.linspace(-1, 1, 100), torch.zeros(100), torch.arange(1, 101))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decide = Selector(sage, Constant(1.0), reference, lambda step: 0.0)
        assert decide.rank(policy, reference, 0.0).rule == "score"
        decide = Selector(sage, Constant(0.4), reference, lambda step: 0.0)
        assert decide.rank(trained, reference, 0.0).rule == "score"


def test_a_common_shift_has_no_spread():
    policy, reference = with_rewards(torch.full((9,), 5.0), torch.full((9,), -5.0))
    assert log_ratio_spread(policy, reference) == pytest.approx(0.0, abs=1e-9)


# select


def test_select_measures_the_pool_and_ranks_it(still):
    pool = still.dataset.take(np.arange(0, 40, 2))
    policy = measure(still.model, pool)
    decision = selector(reference=policy).select(still.model, pool, step=7)
    assert decision.step == 7
    assert decision.pool.tolist() == pool.index.tolist()
    again = selector(reference=policy).rank(policy, policy, 0.0, 7, ids=pool.ids)
    assert list(decision) == list(again)


def test_select_passes_model_and_pool_to_any_measure():
    policy, reference = with_rewards([-1.0, -3.0], [0.0, 0.0])
    decide = selector(reference=reference, measure=lambda model, pool: policy)
    assert list(decide.select("any model", "any pool", step=0)) == [1]


def test_nothing_is_measured_if_nothing_can_be_dropped(still):
    decide = selector(
        keep=Constant(1.0),
        reference=still.selector.reference,
        measure=lambda model, pool: pytest.fail("measured"),
    )
    decision = decide.select(still.model, still.dataset.take(np.arange(10)), step=0)
    assert sorted(decision) == list(range(10))
    assert decision.rule == "all"


def test_a_partial_score():
    policy, reference = with_rewards([1.0, -1.0], [0.0, 0.0])
    score = partial(scores.sage, beta=1.0, length_norm="none")
    assert list(selector(score, reference=reference).rank(policy, reference, 0.0)) == [1]


def test_a_score_independent_of_logps_ranks_without_signal():
    policy, reference = equal_rewards()
    ratings = torch.rand(100, dtype=torch.float64)

    def judged(policy, reference):
        return ratings[policy.index]

    for score in (judged, scores.shortest, partial(scores.random, seed=3)):
        decide = Selector(score, Constant(0.1), reference, lambda step: 0.0)
        decision = decide.rank(policy, reference, 0.0)
        assert decision.rule == "score"
        assert set(decision) == set(score(policy, reference).topk(10).indices.tolist())


PRECISIONS = (torch.float32, torch.bfloat16, torch.float16)
DIFFER = "the reference was measured in {}, the policy in {}"


@pytest.fixture(scope="module")
def in_precision(still):
    """The same weights in three dtypes, and their log-probs."""
    models = {dtype: deepcopy(still.model).to(dtype) for dtype in PRECISIONS}
    return {dtype: (model, measure(model, still.dataset)) for dtype, model in models.items()}


def decided(reference, policy, pool) -> tuple[str, str]:
    """The rule by which half of a pool is selected, and all warnings."""
    decide = Selector(sage, Constant(0.5), reference, lambda step: 0.0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if isinstance(policy, torch.nn.Module):
            rule = decide.select(policy, pool, 0).rule
        else:
            rule = decide.rank(policy, reference, 0.0).rule
    return rule, " ".join(str(warning.message) for warning in caught)


@pytest.mark.parametrize("of_reference", PRECISIONS, ids=str)
@pytest.mark.parametrize("of_policy", PRECISIONS, ids=str)
def test_equal_weights_in_any_two_precisions_have_no_signal(
    in_precision, still, of_policy, of_reference
):
    pool = still.dataset.take(np.arange(50))
    policy, reference = in_precision[of_policy][0], in_precision[of_reference][1]
    rule, warned = decided(reference, policy, pool)
    assert rule == "hash"
    assert "are equal up to rounding" in warned
    differ = DIFFER.format(of_reference, of_policy)
    assert (differ in warned) is (of_reference != of_policy)
    # of log-probs from elsewhere the precision is not known, and rounding may rank: never silently
    rule, warned = decided(PairLogps(*reference), policy, pool)
    assert rule == "hash" or "precision in which the reference was measured is not known" in warned
    saved = [field.bfloat16() if field.is_floating_point() else field for field in reference]
    rule, warned = decided(PairLogps(*saved), policy, pool)
    assert rule == "hash" or "is not known" in warned


def test_autocast_is_a_precision_of_its_own(in_precision, still):
    pool, model = still.dataset.take(np.arange(50)), in_precision[torch.float32][0]
    mixed = Reader(mixed_precision=torch.bfloat16)(model, still.dataset)
    assert mixed.precision == torch.bfloat16
    rule, warned = decided(mixed, model, pool)
    assert rule == "hash"
    assert DIFFER.format(torch.bfloat16, torch.float32) in warned


def test_a_store_knows_the_precision_of_its_reference(in_precision, still, tmp_path):
    model, pool = in_precision[torch.bfloat16][0], still.dataset.take(np.arange(50))
    store = ReferenceStore(model, still.dataset, folder=tmp_path)
    store.fill()
    by_name = ReferenceStore(None, still.dataset, folder=tmp_path, identity=store.identity)
    for reference in (store, by_name):
        assert reference.take([0]).precision == torch.bfloat16
        rule, warned = decided(reference, in_precision[torch.float32][0], pool)
        assert rule == "hash"
        assert DIFFER.format(torch.bfloat16, torch.float32) in warned


def test_a_signal_ranks_in_any_precision_and_warns_only_if_they_differ():
    policy, reference = with_rewards(torch.linspace(-1, 1, 100), torch.zeros(100))
    for dtype in PRECISIONS:
        sides = reference.measured_in(dtype), policy.measured_in(dtype)
        assert decided(*sides, None) == ("score", "")
    rule, warned = decided(
        reference.measured_in(torch.float16), sides[1].measured_in(torch.float32), None
    )
    assert rule == "score"
    assert DIFFER.format(torch.float16, torch.float32) in warned
    assert decided(reference, policy, None) == ("score", "")  # unknown, but far above any rounding


def test_a_known_precision_or_a_floor_answers_the_warning():
    policy, reference = with_rewards(torch.linspace(-0.01, 0.01, 100), torch.zeros(100))
    assert "policy and reference was measured is not known" in decided(reference, policy, None)[1]
    known = [logps.measured_in(torch.float32) for logps in (reference, policy)]
    assert decided(*known, None) == ("score", "")
    decide = Selector(sage, Constant(0.5), reference, lambda step: 0.0, noise_floor=0.3)
    with pytest.warns(UserWarning, match="are equal up to rounding"):
        assert decide.rank(policy, reference, 0.0).rule == "hash"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_not_signal_in_any_precision(dtype, still):
    """With equal weights and two batch sizes, the log-ratios consist of rounding alone."""
    model = deepcopy(still.model).to(dtype)
    decide = Selector(
        sage, Constant(0.4), measure(model, still.dataset), lambda step: 0.0,
        Reader(max_batch_tokens=100),
    )  # fmt: skip
    with pytest.warns(UserWarning, match="are equal up to rounding"):
        assert decide.select(model, still.dataset.take(np.arange(50)), 0).rule == "hash"


def test_a_numpy_step_breaks_ties_like_a_python_int():
    policy, reference = equal_rewards()
    decide = selector(lambda p, r: torch.zeros(100), reference=reference).rank
    assert list(decide(policy, reference, 0.0, 3)) == list(
        decide(policy, reference, 0.0, np.int64(3))
    )
    assert list(decide(policy, reference, 0.0, 3)) != list(decide(policy, reference, 0.0, 4))


def test_a_selection_does_not_keep_the_autograd_graph():
    policy, reference = with_rewards([1.0, -1.0], [0.0, 0.0])
    policy.chosen.requires_grad_()
    decision = selector(reference=reference).rank(policy, reference, 0.0)
    assert not decision.policy.chosen.requires_grad


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_logps_that_are_not_finite_are_refused(bad):
    policy, reference = with_rewards([1.0, bad], [0.0, 0.0])
    with pytest.raises(ValueError, match="the policy's log-probs of row 1 are not finite"):
        selector(reference=reference).rank(policy, reference, 0.0)


def test_a_pool_with_a_repeated_row_is_refused():
    policy, reference = with_rewards([1.0, 2.0], [0.0, 0.0])
    repeated = policy._replace(index=torch.tensor([1, 1]))
    with pytest.raises(ValueError, match=r"got 2 rows \(1 distinct\)"):
        selector(reference=reference).rank(repeated, reference, 0.0)


def test_an_empty_pool_gives_an_empty_selection():
    policy, reference = with_rewards([], [])
    assert "kept 0 of 0" in repr(selector(reference=reference).rank(policy, reference, 0.0))
