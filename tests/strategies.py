"""Hypothesis strategies, and builders of log-probs."""

import numpy as np
import torch
from hypothesis import strategies as st

from sage_select import PairLogps

BETA = 0.1


def pair_logps(index, chosen, rejected, chosen_tokens, rejected_tokens) -> PairLogps:
    return PairLogps(
        index=torch.as_tensor(index, dtype=torch.int64),
        chosen=torch.as_tensor(chosen, dtype=torch.float64),
        rejected=torch.as_tensor(rejected, dtype=torch.float64),
        chosen_tokens=torch.as_tensor(chosen_tokens, dtype=torch.int64),
        rejected_tokens=torch.as_tensor(rejected_tokens, dtype=torch.int64),
    )


def with_rewards(chosen, rejected, tokens=10, index=None) -> tuple[PairLogps, PairLogps]:
    """Return a policy and a reference with these rewards at BETA."""
    chosen = torch.as_tensor(chosen, dtype=torch.float64).reshape(-1)
    rejected = torch.as_tensor(rejected, dtype=torch.float64).reshape(-1)
    size = len(chosen)
    index = range(size) if index is None else index
    length = torch.as_tensor(tokens).expand(size)
    zero = torch.zeros(size, dtype=torch.float64)
    policy = pair_logps(list(index), chosen / BETA, rejected / BETA, length, length)
    return policy, policy._replace(chosen=zero, rejected=zero)


@st.composite
def pools(draw, min_size: int = 1, max_size: int = 40) -> tuple[PairLogps, PairLogps]:
    """Policy and reference log-probs of a pool, with irregular lengths and row numbers."""
    size = draw(st.integers(min_size, max_size))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    spread = draw(st.sampled_from([0.01, 1.0, 30.0, 1000.0]))
    index = random.choice(10 * size, size, replace=False)
    tokens = random.integers(1, 3000, (2, size))
    logps = -random.exponential(1.0, (4, size)) * spread
    return (
        pair_logps(index, logps[0], logps[1], tokens[0], tokens[1]),
        pair_logps(index, logps[2], logps[3], tokens[0], tokens[1]),
    )


rewards = st.floats(-1e6, 1e6)
modest_rewards = st.floats(-30, 30)
dampings = st.one_of(st.just(0.0), st.floats(1e-300, 10.0))
