"""Metrics of a policy on preference pairs, as plain numbers for a log."""

import torch
from torch import Tensor

from sage_select.pairs import NOISE_FLOOR, PairLogps, rewards


def preference_metrics(
    policy: PairLogps, reference: PairLogps, *, beta: float = 0.1
) -> dict[str, float]:
    """Return the mean rewards, margin and accuracy over P pairs.

    Args:
        policy: Log-probs under the policy.
        reference: Log-probs of the same pairs, in the same order, under the reference.
        beta: Temperature of the implicit reward (Eq. 1).

    Returns:
        `reward_chosen`, `reward_rejected`, `margin`: means. `accuracy`: share of pairs with
        r_w > r_l; a difference within rounding noise is a tie and counts one half, so that
        accuracy is 0.5 at policy = reference. `likelihood_accuracy`: share of pairs whose chosen
        response has the higher mean log-prob per token under the policy alone, which is
        informative before training, too.

    Example:
        >>> pair = PairLogps(*torch.tensor([[0], [-30.0], [-20.0], [10], [5]]))
        >>> preference_metrics(pair, pair)["accuracy"]
        0.5
    """
    with torch.no_grad():
        r = rewards(policy, reference, beta=beta)
        per_token = policy.chosen / policy.chosen_tokens - policy.rejected / policy.rejected_tokens
        return {
            "reward_chosen": r.chosen.mean().item(),
            "reward_rejected": r.rejected.mean().item(),
            "margin": r.margin.mean().item(),
            "accuracy": _share_ahead(r.margin, noise=beta * NOISE_FLOOR),
            "likelihood_accuracy": _share_ahead(per_token, noise=0.0),
        }


def _share_ahead(difference: Tensor, *, noise: float) -> float:
    """Share of positive differences; those within the noise count one half."""
    sign = torch.where(difference.abs() <= noise, 0.0, difference.sign())
    return (sign / 2 + 0.5).double().mean().item()
