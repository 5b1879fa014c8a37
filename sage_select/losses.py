"""Training losses of preference pairs: `(policy, reference) -> [P]`, in nats, one per pair."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from sage_select.arguments import positive
from sage_select.pairs import PairLogps, rewards


def dpo(policy: PairLogps, reference: PairLogps, *, beta: float = 0.1) -> Tensor:
    """Direct preference optimisation: -log sigmoid(r_w - r_l)  (Eq. 2).

    Args:
        policy: Log-probs under the policy; gradients flow through them.
        reference: Log-probs of the same pairs under the reference.
        beta: Temperature of the implicit reward (Eq. 1), > 0.

    Returns:
        [P], log 2 at policy = reference.
    """
    return -logsigmoid(rewards(policy, reference, beta=beta).margin)


def nca(policy: PairLogps, reference: PairLogps, *, beta: float = 0.1) -> Tensor:
    """Noise-contrastive alignment of a pair, with one-hot weights  (Eq. 4 with K = 2, w = (1, 0)).

        -log sigmoid(r_w) - 0.5 log sigmoid(-r_w) - 0.5 log sigmoid(-r_l)

    Other libraries call this formula `nca_pair`. Its slopes at zero are (-1/4, +1/4), half of
    DPO's, and its minimum is at r_w = log 2, so the chosen response is not pushed up indefinitely.

    Args:
        policy: Log-probs under the policy; gradients flow through them.
        reference: Log-probs of the same pairs under the reference.
        beta: Temperature of the implicit reward (Eq. 1), > 0.

    Returns:
        [P], 2 log 2 at policy = reference.

    Example:
        >>> pair = PairLogps(*torch.tensor([[0], [-30.0], [-20.0], [10], [10]]))
        >>> nca(pair, pair)
        tensor([1.3863])
    """
    r = rewards(policy, reference, beta=beta)
    return -logsigmoid(r.chosen) - 0.5 * logsigmoid(-r.chosen) - 0.5 * logsigmoid(-r.rejected)


def nca_responses(
    policy: Tensor, reference: Tensor, weights: Tensor, *, beta: float = 0.1
) -> Tensor:
    """Noise-contrastive alignment of K responses to each of B prompts  (Eq. 4).

        -sum_i [ w_i log sigmoid(r_i) + (1 / K) log sigmoid(-r_i) ]

    The weights come from the data (see `response_weights`). Computed from the policy itself, as
    Eq. 3 is printed, they would contain no label of the better response.

    Args:
        policy: [B, K] summed log-probs under the policy; gradients flow through them.
        reference: [B, K] summed log-probs under the reference.
        weights: [B, K], >= 0, each row sums to 1.
        beta: Temperature of the implicit reward (Eq. 1), > 0.

    Returns:
        [B].

    Raises:
        ValueError: If shapes differ, beta is not positive, or weights are negative or do not sum
            to 1.

    Example:
        >>> logps = torch.zeros(1, 2)
        >>> nca_responses(logps, logps, torch.tensor([[1.0, 0.0]]))
        tensor([1.3863])
    """
    if not policy.shape == reference.shape == weights.shape or policy.dim() != 2:
        raise ValueError(
            "nca_responses: policy, reference and weights must all be [B, K], got "
            f"{list(policy.shape)}, {list(reference.shape)} and {list(weights.shape)}"
        )
    beta = positive(beta, "nca_responses: beta")
    total = weights.sum(dim=1)
    if not bool((weights >= 0).all()) or not torch.allclose(total, torch.ones_like(total)):
        raise ValueError("nca_responses: weights must be >= 0 and sum to 1 for each prompt")
    r = beta * (policy - reference)
    num_responses = policy.shape[1]
    return -(weights * logsigmoid(r) + logsigmoid(-r) / num_responses).sum(dim=1)


def response_weights(scores: Tensor, *, alpha: float | None = None) -> Tensor:
    """Weights of K responses from their scores in the dataset: softmax(score / alpha)  (Eq. 3).

    Args:
        scores: [B, K] ratings, rewards or judge scores; higher is better.
        alpha: Temperature, > 0, in units of the score; by default a thousandth of each row's range,
            which is nearly one-hot.

    Returns:
        [B, K], each row sums to 1. Equal scores get equal weights.

    Raises:
        ValueError: If alpha is not positive, or the scores are not finite or not [B, K].

    Example:
        >>> response_weights(torch.tensor([[1.0, 5.0, 3.0]])).tolist()
        [[0.0, 1.0, 0.0]]
    """
    alpha = None if alpha is None else positive(alpha, "response_weights: alpha")
    if scores.dim() != 2 or scores.shape[1] == 0 or not bool(scores.isfinite().all()):
        raise ValueError(
            f"response_weights: scores must be finite and [B, K], got {scores.tolist()}"
        )
    spread = scores.amax(dim=1, keepdim=True) - scores.amin(dim=1, keepdim=True)
    if alpha is None:
        # a row of equal scores has no spread; any temperature gives it equal weights
        temperature = torch.where(spread > 0, 1e-3 * spread, torch.ones_like(spread))
    else:
        temperature = torch.full_like(spread, alpha)
    # subtract the maximum before dividing, so that a small alpha cannot overflow to inf - inf
    return torch.softmax((scores - scores.amax(dim=1, keepdim=True)) / temperature, dim=1)


LOSSES: dict[str, Callable[..., Tensor]] = {"nca": nca, "dpo": dpo}
"""The pairwise losses by name, for configurations."""
