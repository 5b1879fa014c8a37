r"""Scores: the value of a pair for training the current policy. Higher is kept first.

Every score has the type `(policy, reference) -> float64 [P]`. Bind parameters such as beta with
`functools.partial`. A loss is a score, too: `losses.dpo` keeps the highest loss first.

Notation of Eq. 8: per response z in {chosen, rejected}, u_z = +r_w for the chosen and -r_l for
the rejected one, p_z = sigmoid(u_z) the confidence, g_z = 1 - p_z the gradient, and
h_z = p_z (1 - p_z) the curvature of -log sigmoid(u_z).
"""

from collections.abc import Callable
from math import log
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from sage_select.arguments import not_negative, seed_number
from sage_select.hashing import keyed_hash
from sage_select.pairs import PairLogps, rewards

LengthNorm = Literal["total", "sqrt", "none", "stratified"]


class _Confidence(NamedTuple):
    """Logits u_z of both responses, float64 [P] each; p_z = sigmoid(u_z) is the confidence."""

    chosen: Tensor
    rejected: Tensor


def sage(
    policy: PairLogps,
    reference: PairLogps,
    *,
    beta: float = 0.1,
    eps: float = 1e-6,
    length_norm: LengthNorm = "total",
) -> Tensor:
    """SAGE score: sum over both responses of g^2 / (h + eps), divided by length  (Eq. 8).

        s = (1 / L) * sum_z (1 - p_z)^2 / (p_z (1 - p_z) + eps)

    The score falls as the confidence p_z of either response rises, for every eps >= 0: it ranks by
    loss and length, and does not single out p = 0.5. At policy = reference, all p_z are 0.5, the
    score is 2 / (L (1 + 4 eps)), and the shortest pairs come first.

    Args:
        policy: Log-probs under the current policy, P pairs.
        reference: Log-probs of the same pairs under the reference.
        beta: Temperature of the implicit reward (Eq. 1), > 0.
        eps: Damping, >= 0; it limits the contribution of a response to 1 / eps.
        length_norm: "total" divides by the pair's response tokens L, as in the paper; "sqrt"
            divides by the square root of L; "none" does not divide (the ablation "without 1/L");
            "stratified" ranks within ten bins of similar length, and returns the rank as a
            fraction.

    Returns:
        float64 [P], computed in log space: finite for eps > 0 at any reward.

    Raises:
        ValueError: If a parameter is out of range, or a pair has no response tokens.

    Example:
        >>> pair = PairLogps(*torch.tensor([[0], [-30], [-20], [10], [10]]))
        >>> sage(pair, pair, eps=0.0)
        tensor([0.1000], dtype=torch.float64)
    """
    return log_sage(policy, reference, beta=beta, eps=eps, length_norm=length_norm).exp()


def log_sage(
    policy: PairLogps,
    reference: PairLogps,
    *,
    beta: float = 0.1,
    eps: float = 1e-6,
    length_norm: LengthNorm = "total",
) -> Tensor:
    """Logarithm of `sage`, for pairs whose scores underflow; with the same order and arguments.

    With q = 1 - p, g^2 / (h + eps) = 1 / (p/q + eps/q^2) = 1 / (e^u + eps (1 + e^u)^2), since
    p/q = e^u and 1/q = 1 + e^u. In this form nothing cancels, and every step is monotone in u.
    """
    eps = not_negative(eps, "sage: eps")
    log_eps = torch.tensor(log(eps) if eps > 0 else -torch.inf, dtype=torch.float64)
    # -2 * logsigmoid(-u) is log((1 + e^u)^2) without overflow
    log_terms = [
        -torch.logaddexp(u, log_eps.to(u.device) - 2 * logsigmoid(-u))
        for u in _confidence(policy, reference, beta)
    ]
    return _normalised(torch.logaddexp(*log_terms), policy, length_norm)


def without_gradient(
    policy: PairLogps,
    reference: PairLogps,
    *,
    beta: float = 0.1,
    eps: float = 1e-6,
    length_norm: LengthNorm = "total",
) -> Tensor:
    """Ablation "w/o g" of Table 2: (1 / L) * sum_z 1 / (h_z + eps). Lowest at p = 0.5."""
    eps = not_negative(eps, "without_gradient: eps")
    # log h = logsigmoid(u) + logsigmoid(-u) keeps the tails, where 1 - p rounds to 0
    terms = [
        1 / ((logsigmoid(u) + logsigmoid(-u)).exp() + eps)
        for u in _confidence(policy, reference, beta)
    ]
    return _normalised((terms[0] + terms[1]).log(), policy, length_norm).exp()


def without_curvature(
    policy: PairLogps,
    reference: PairLogps,
    *,
    beta: float = 0.1,
    length_norm: LengthNorm = "total",
) -> Tensor:
    """Ablation "w/o h" of Table 2: (1 / L) * sum_z g_z^2. To first order it ranks like SAGE."""
    log_terms = [2 * logsigmoid(-u) for u in _confidence(policy, reference, beta)]
    return _normalised(torch.logaddexp(*log_terms), policy, length_norm).exp()


def gradient_slope(policy: PairLogps, reference: PairLogps, *, beta: float = 0.1) -> Tensor:
    """Norm of the NCA loss's gradient with respect to the two rewards (r_w, r_l).

        sqrt( (1.5 sigmoid(r_w) - 1)^2 + (0.5 sigmoid(r_l))^2 )

    This is a slope in reward space, not the norm of the parameter gradient.
    """
    r = rewards(_float64(policy), _float64(reference), beta=beta)
    return torch.hypot(1.5 * r.chosen.sigmoid() - 1, 0.5 * r.rejected.sigmoid())


def dpo_newton(policy: PairLogps, reference: PairLogps, *, beta: float = 0.1) -> Tensor:
    """Newton decrement of the DPO loss in its margin m: g^2 / h = exp(-m). Highest loss first."""
    return (-rewards(_float64(policy), _float64(reference), beta=beta).margin).exp()


def nca_newton(policy: PairLogps, reference: PairLogps, *, beta: float = 0.1) -> Tensor:
    """Diagonal Newton decrement of the pairwise NCA loss: the equivalent of Eq. 8 for that loss.

    (1 - 1.5 s_w)^2 / (1.5 s_w (1 - s_w)) + 0.5 s_l / (1 - s_l)  with  s = sigmoid(r).
    """
    r = rewards(_float64(policy), _float64(reference), beta=beta)
    chosen = r.chosen.sigmoid()
    curvature = 1.5 * (logsigmoid(r.chosen) + logsigmoid(-r.chosen)).exp()
    return (1 - 1.5 * chosen) ** 2 / curvature + 0.5 * r.rejected.exp()


def smallest_margin(policy: PairLogps, reference: PairLogps, *, beta: float = 0.1) -> Tensor:
    """-`|r_w - r_l|`: pairs nearest to the decision boundary first."""
    return -rewards(_float64(policy), _float64(reference), beta=beta).margin.abs()


def largest_margin(policy: PairLogps, reference: PairLogps, *, beta: float = 0.1) -> Tensor:
    """r_w - r_l: easiest pairs first."""
    return rewards(_float64(policy), _float64(reference), beta=beta).margin


def shortest(policy: PairLogps, reference: PairLogps) -> Tensor:
    """-L: fewest response tokens first, the order of SAGE at policy = reference."""
    del reference  # an argument of every score; lengths do not depend on it
    return -policy.tokens.double()


def random(policy: PairLogps, reference: PairLogps, *, seed: int = 0) -> Tensor:
    """Random number in [0, 1) per pair, a keyed hash of (seed, index): no generator, no state.

    A pair keeps its number for the whole run, so a run over several epochs trains on one random
    subset, like the paper's "Random" baseline.

    Example:
        >>> pairs = PairLogps(*(torch.arange(3) for _ in range(5)))
        >>> bool((random(pairs, pairs, seed=1) == random(pairs, pairs, seed=1)).all())
        True
    """
    del reference
    seed = seed_number(seed, "random: seed")
    words = keyed_hash(policy.index.numpy(force=True), "random", seed)
    upper_bits = words >> np.uint64(11)  # the 53 bits that a float64 in [0, 1) holds exactly
    return torch.from_numpy(upper_bits.astype(np.float64) / 2**53).to(policy.chosen.device)


def _float64(logps: PairLogps) -> PairLogps:
    return logps._replace(chosen=logps.chosen.double(), rejected=logps.rejected.double())


def _confidence(policy: PairLogps, reference: PairLogps, beta: float) -> _Confidence:
    """Return u_w = r_w and u_l = -r_l in float64: log-probs are sums over thousands of tokens."""
    r = rewards(_float64(policy), _float64(reference), beta=beta)
    return _Confidence(chosen=r.chosen, rejected=-r.rejected)


def _normalised(log_score: Tensor, policy: PairLogps, length_norm: LengthNorm) -> Tensor:
    """Apply `length_norm` to the logarithm of a score; "total" is the factor 1 / L of Eq. 8."""
    length = policy.tokens.to(log_score)
    if length_norm == "none":
        return log_score
    if length.numel() and not bool((length > 0).all()):
        row = policy.index[length <= 0][0].item()
        raise ValueError(f"score: pair {row} has no response tokens; drop such pairs from the pool")
    if length_norm == "total":
        return log_score - length.log()
    if length_norm == "sqrt":
        return log_score - length.log() / 2
    if length_norm == "stratified":
        return _rank_within_length(log_score, length).log()
    raise ValueError(
        f"score: length_norm must be total, sqrt, none or stratified, got {length_norm!r}"
    )


def _rank_within_length(score: Tensor, length: Tensor, bins: int = 10) -> Tensor:
    """Rank of each score among pairs of similar length, a fraction in (0, 1]; ties share it."""
    # bin edges are quantiles of the length, so that bins have similar numbers of pairs
    cuts = torch.arange(1, bins, device=length.device) * len(length) // bins
    edges = length.sort().values[cuts] if len(length) else length
    stratum = torch.searchsorted(edges, length)
    fraction = torch.empty_like(score)
    for b in range(bins):
        member = score[stratum == b]
        ascending = member.sort().values
        rank = torch.searchsorted(ascending, member, right=True)
        fraction[stratum == b] = rank.double() / max(len(member), 1)
    return fraction


SCORES: dict[str, Callable[..., Tensor]] = {
    score.__name__: score
    for score in (
        sage,
        without_gradient,
        without_curvature,
        gradient_slope,
        dpo_newton,
        nca_newton,
        smallest_margin,
        largest_margin,
        shortest,
        random,
    )
}
"""The scores by name, for configurations."""
