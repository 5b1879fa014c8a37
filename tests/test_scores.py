from math import exp, isfinite

import pytest
import torch
from cases import SCORES
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import BETA, dampings, modest_rewards, pools, rewards, with_rewards

from sage_select import log_sage, sage, scores


def sage_of(chosen, rejected, eps=1e-6, tokens=10) -> float:
    return sage(*with_rewards(chosen, rejected, tokens), beta=BETA, eps=eps).item()


def literal(u: float, eps: float) -> float:
    """Eq. 8 as printed, for one response."""
    p = 1 / (1 + exp(-u))
    return (1 - p) ** 2 / (p * (1 - p) + eps)


# The score falls as the confidence of a response rises; the whole selection relies on this.


@given(rewards, rewards, rewards, dampings)
def test_not_higher_for_a_more_confident_chosen_response(low, high, rejected, eps):
    low, high = sorted((low, high))
    assert sage_of(high, rejected, eps) <= sage_of(low, rejected, eps)


@given(rewards, rewards, rewards, dampings)
def test_not_lower_for_a_more_likely_rejected_response(low, high, chosen, eps):
    low, high = sorted((low, high))
    assert sage_of(chosen, high, eps) >= sage_of(chosen, low, eps)


@given(modest_rewards, modest_rewards, dampings)
def test_strictly_decreasing_within_float64_resolution(low, high, eps):
    low, high = sorted((low, high))
    assume(high - low > 0.1)
    extreme = 1e5  # a response so confident that it contributes nothing to the score
    assert sage_of(high, -extreme, eps) < sage_of(low, -extreme, eps)
    assert sage_of(extreme, low, eps) < sage_of(extreme, high, eps)


@given(rewards, rewards, st.floats(1e-300, 10.0))
def test_finite_and_not_negative_at_any_reward(chosen, rejected, eps):
    score = sage_of(chosen, rejected, eps)
    assert isfinite(score)
    assert score >= 0


@given(modest_rewards, modest_rewards)
def test_closed_form_without_damping(chosen, rejected):
    expected = (exp(-chosen) + exp(rejected)) / 20
    assert sage_of(chosen, rejected, eps=0.0) == pytest.approx(expected, rel=1e-12)


@given(st.floats(-15, 15), st.floats(-15, 15), st.floats(1e-9, 1.0))
def test_equals_the_printed_formula(chosen, rejected, eps):
    expected = (literal(chosen, eps) + literal(-rejected, eps)) / 20
    assert sage_of(chosen, rejected, eps) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("eps", [0.0, 1e-6, 0.25])
def test_value_at_policy_equal_to_reference(eps):
    assert sage_of(0.0, 0.0, eps, tokens=50) == pytest.approx(2 / (100 * (1 + 4 * eps)))


@given(modest_rewards, modest_rewards, st.integers(1, 10_000), st.integers(1, 10_000))
def test_not_higher_for_a_longer_pair(chosen, rejected, short, long):
    short, long = sorted((short, long))
    assert sage_of(chosen, rejected, tokens=long) <= sage_of(chosen, rejected, tokens=short)


@given(pools())
def test_log_sage_is_the_logarithm_of_sage(pool):
    assert torch.allclose(log_sage(*pool).exp(), sage(*pool))


def test_log_sage_ranks_pairs_whose_scores_underflow():
    policy, reference = with_rewards([1000.0, 2000.0], [-2000.0, -2000.0])
    assert sage(policy, reference).tolist() == [0.0, 0.0]
    first, second = log_sage(policy, reference).tolist()
    assert first > second


def test_damping_limits_the_contribution_of_a_response():
    assert sage_of(-1e5, -1e5, eps=1e-3, tokens=1) == pytest.approx(1e3 / 2)


# Every score


@pytest.mark.parametrize("name", SCORES)
@given(pools(), st.randoms(use_true_random=False))
def test_does_not_depend_on_the_order_of_rows(name, pool, shuffler):
    policy, reference = pool
    order = policy.index.tolist()
    shuffler.shuffle(order)
    expected = SCORES[name](policy, reference)
    shuffled = SCORES[name](policy.take(order), reference.take(order))
    restored = shuffled[[order.index(row) for row in policy.index.tolist()]]
    # undamped scores may be inf, and vectorised code may round differently by position
    assert torch.allclose(expected, restored, rtol=1e-12, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", SCORES)
@given(pool=pools())
def test_one_float64_per_pair(name, pool):
    score = SCORES[name](*pool)
    assert score.shape == pool[0].index.shape
    assert score.dtype == torch.float64
    assert not score.isnan().any()


TABLE = [  # at rewards (chosen, rejected) = (1, -1) and 20 tokens in total
    (scores.without_curvature, 2 * (1 - 0.7310585786) ** 2 / 20),
    (scores.without_gradient, 2 / (0.7310585786 * 0.2689414214 + 1e-6) / 20),
    (scores.gradient_slope, ((1.5 * 0.7310585786 - 1) ** 2 + (0.5 * 0.2689414214) ** 2) ** 0.5),
    (scores.dpo_newton, exp(-2)),
    (
        scores.nca_newton,
        (1 - 1.5 * 0.7310585786) ** 2 / (1.5 * 0.7310585786 * 0.2689414214) + 0.5 * exp(-1),
    ),
    (scores.smallest_margin, -2.0),
    (scores.largest_margin, 2.0),
    (scores.shortest, -20.0),
]


@pytest.mark.parametrize(("score", "value"), TABLE, ids=[row[0].__name__ for row in TABLE])
def test_values(score, value):
    assert score(*with_rewards(1.0, -1.0)).item() == pytest.approx(value, rel=1e-8)


@given(pools(min_size=2))
def test_gradient_slope_is_the_gradient_of_the_nca_loss(pool):
    from sage_select import nca

    policy, reference = pool
    chosen, rejected = (x.clone().requires_grad_() for x in (policy.chosen, policy.rejected))
    nca(policy._replace(chosen=chosen, rejected=rejected), reference).sum().backward()
    expected = torch.hypot(chosen.grad, rejected.grad) / BETA
    assert torch.allclose(scores.gradient_slope(policy, reference), expected, atol=1e-9)


def test_random_numbers_depend_on_the_row_and_the_seed_only():
    policy, reference = with_rewards(torch.zeros(1000), torch.zeros(1000))
    numbers = scores.random(policy, reference, seed=1)
    assert torch.equal(
        numbers.flip(0), scores.random(policy.take(range(999, -1, -1)), reference, seed=1)
    )
    assert not torch.equal(numbers, scores.random(policy, reference, seed=2))
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert abs(numbers.mean() - 0.5) < 0.05


def test_stratified_ranks_among_pairs_of_similar_length():
    tokens = torch.tensor([5] * 10 + [500] * 10)
    policy, reference = with_rewards(torch.arange(20.0), torch.zeros(20), tokens)
    best = sage(policy, reference, length_norm="stratified").topk(4).indices
    assert sorted(best.tolist()) == [0, 1, 10, 11]
