from math import log

import pytest
import torch
from cases import LOSSES
from hypothesis import given
from hypothesis import strategies as st
from strategies import BETA, modest_rewards, pools, with_rewards
from torch.nn.functional import logsigmoid, softplus

from sage_select import dpo, nca, nca_responses
from sage_select.losses import response_weights


def slopes(loss, chosen=0.0, rejected=0.0) -> tuple[float, float]:
    """Derivatives of a loss with respect to the two rewards."""
    policy, reference = with_rewards(chosen, rejected)
    leaves = [policy.chosen.clone().requires_grad_(), policy.rejected.clone().requires_grad_()]
    loss(
        policy._replace(chosen=leaves[0], rejected=leaves[1]), reference, beta=BETA
    ).sum().backward()
    return leaves[0].grad.item() / BETA, leaves[1].grad.item() / BETA


def test_slopes_at_zero():
    assert slopes(nca) == pytest.approx((-0.25, 0.25))
    assert slopes(dpo) == pytest.approx((-0.5, 0.5))


def test_values_at_policy_equal_to_reference():
    assert nca(*with_rewards(0.0, 0.0)).item() == pytest.approx(2 * log(2))
    assert dpo(*with_rewards(0.0, 0.0)).item() == pytest.approx(log(2))


def test_nca_is_lowest_at_log_2():
    assert slopes(nca, chosen=log(2))[0] == pytest.approx(0.0, abs=1e-12)
    grid = torch.linspace(-5, 5, 1001)
    losses = nca(*with_rewards(grid, torch.zeros(1001)))
    assert grid[losses.argmin()].item() == pytest.approx(log(2), abs=0.01)


@given(modest_rewards, modest_rewards)
def test_nca_equals_nca_pair_of_other_libraries(chosen, rejected):
    # -logsigmoid(c) - 0.5 logsigmoid(-c) - 0.5 logsigmoid(-r), written with softplus
    c, r = torch.tensor([chosen, rejected], dtype=torch.float64)
    expected = softplus(-c) + 0.5 * softplus(c) + 0.5 * softplus(r)
    # softplus is linear above 20, with an error of 2e-9
    assert nca(*with_rewards(chosen, rejected)).item() == pytest.approx(expected.item(), rel=1e-8)


@given(pools())
def test_nca_responses_with_one_hot_weights_equals_the_pairwise_loss(pool):
    policy, reference = pool
    stacked = [torch.stack([x.chosen, x.rejected], dim=1) for x in pool]
    weights = torch.tensor([[1.0, 0.0]]).double().expand(len(policy.index), 2)
    assert torch.allclose(nca_responses(*stacked, weights), nca(policy, reference))


@given(st.integers(1, 4), st.integers(1, 6), st.integers(0, 2**31))
def test_nca_responses_equals_a_loop_over_equation_4(prompts, responses, seed):
    torch.manual_seed(seed)
    policy, reference = torch.randn(2, prompts, responses, dtype=torch.float64) * 50
    weights = torch.rand(prompts, responses, dtype=torch.float64).softmax(dim=1)
    for b, loss in enumerate(nca_responses(policy, reference, weights)):
        r = BETA * (policy[b] - reference[b])
        terms = [
            weights[b, i] * logsigmoid(r[i]) + logsigmoid(-r[i]) / responses
            for i in range(responses)
        ]
        assert loss.item() == pytest.approx(-sum(terms).item())


@pytest.mark.parametrize("name", LOSSES)
def test_gradients(name):
    policy, reference = with_rewards(torch.linspace(-3, 3, 5), torch.linspace(2, -2, 5))

    def loss(chosen, rejected):
        return LOSSES[name](policy._replace(chosen=chosen, rejected=rejected), reference)

    inputs = (policy.chosen.requires_grad_(), policy.rejected.requires_grad_())
    assert torch.autograd.gradcheck(loss, inputs)


def test_gradients_of_nca_responses():
    policy = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(3, 4, dtype=torch.float64).softmax(dim=1)
    assert torch.autograd.gradcheck(
        lambda logps: nca_responses(logps, torch.zeros(3, 4).double(), weights), (policy,)
    )


@pytest.mark.parametrize("name", LOSSES)
@given(st.floats(-1e5, 1e5), st.floats(-1e5, 1e5))
def test_finite_at_any_reward(name, chosen, rejected):
    assert LOSSES[name](*with_rewards(chosen, rejected)).isfinite().all()


def test_response_weights():
    scores = torch.tensor([[1.0, 3.0, 2.0], [4.0, 4.0, 4.0]])
    assert response_weights(scores)[0].tolist() == pytest.approx([0, 1, 0])
    assert response_weights(scores)[1].tolist() == pytest.approx([1 / 3] * 3)
    assert torch.allclose(response_weights(scores, alpha=2.0), (scores / 2).softmax(dim=1))
