"""Log-probs and implicit rewards of pairs, and the signatures of scores, losses and schedules."""

from collections.abc import Callable
from math import inf
from typing import Any, NamedTuple, Protocol

import numpy.typing as npt
import torch
from torch import Tensor

from sage_select.arrays import Float64Array, checked_rows

NOISE_FLOOR = 1e-3
"""Log-ratios below this many nats count as zero in fp32: rounding in long sums is smaller, and a
few training steps change them by more."""


def noise_floor(precision: torch.dtype) -> float:
    """Return the noise floor for a dtype of the forward pass: 1e-3 nats in fp32, 0.2 in bfloat16.

    Measured: equal weights in two different batchings differ by 5 units in the last place of the
    dtype for responses of 300 tokens, and the difference grows with the square root of the length.

    Example:
        >>> noise_floor(torch.float32), round(noise_floor(torch.bfloat16), 1)
        (0.001, 0.2)
    """
    return max(NOISE_FLOOR, 25 * torch.finfo(precision).eps)


CHOSEN, REJECTED = "chosen_logps", "rejected_logps"
REFERENCE = "ref_"
"""Names of the log-prob columns in every table and file, and the prefix of those under the
reference, as in TRL."""


class PairLogps(NamedTuple):
    """Log-probs of P pairs under one model. Every field has shape [P].

    Log-probs are natural logarithms (nats), summed over the response's tokens. The token counts are
    those of exactly the tokens that were summed: after truncation, with the end token.

    Example:
        >>> policy = PairLogps(
        ...     index=torch.tensor([4, 9]),
        ...     chosen=torch.tensor([-11.0, -20.5], dtype=torch.float64),
        ...     rejected=torch.tensor([-12.0, -18.0], dtype=torch.float64),
        ...     chosen_tokens=torch.tensor([10, 21]),
        ...     rejected_tokens=torch.tensor([12, 20]),
        ... )
        >>> policy.take([9]).chosen.item()
        -20.5
    """

    index: Tensor  # type: ignore[assignment]  # int64: the pair's row in the dataset
    chosen: Tensor  # float64
    rejected: Tensor  # float64
    chosen_tokens: Tensor  # int64
    rejected_tokens: Tensor  # int64

    @property
    def tokens(self) -> Tensor:
        """Response tokens of both sides together, L in Eq. 8, int64 [P]."""
        return self.chosen_tokens + self.rejected_tokens

    def take(self, index: npt.ArrayLike | Tensor) -> "PairLogps":
        """Return the pairs with these dataset rows, in the order of `index`.

        Raises:
            KeyError: If a row was never measured.
            ValueError: If these log-probs contain a row more than once.
        """
        rows = index.numpy(force=True) if isinstance(index, Tensor) else index
        wanted = torch.from_numpy(checked_rows(rows, "PairLogps.take")).to(self.index.device)
        positions = _positions(self.index, wanted)
        return PairLogps(*(field[positions] for field in self))

    def to(self, device: torch.device | str) -> "PairLogps":
        """Return these log-probs on another device."""
        return PairLogps(*(field.to(device) for field in self))

    def columns(self, prefix: str = "") -> dict[str, Float64Array]:
        """Return the log-probs as table columns, under the names that all tables use.

        Args:
            prefix: `REFERENCE` for log-probs under the reference.

        Example:
            >>> logps = PairLogps(*(torch.zeros(1) for _ in range(5)))
            >>> list(logps.columns(REFERENCE))
            ['ref_chosen_logps', 'ref_rejected_logps']
        """
        return {
            prefix + CHOSEN: self.chosen.numpy(force=True),
            prefix + REJECTED: self.rejected.numpy(force=True),
        }

    @classmethod
    def concatenate(cls, parts: "list[PairLogps]") -> "PairLogps":
        """Join the pairs of all parts, in order."""
        return cls(*(torch.cat(fields) for fields in zip(*parts, strict=True)))


def _positions(index: Tensor, wanted: Tensor) -> Tensor:
    """Position of each wanted row in `index`."""
    size = len(index)
    if len(wanted) == 0:
        return wanted
    inside = int(wanted.min()) >= 0 and int(wanted.max()) < size
    if inside and torch.equal(index, torch.arange(size, device=index.device)):
        return wanted  # the usual case: the whole dataset, in row order
    order = index.argsort()
    ascending = index[order]
    if bool((ascending.diff() == 0).any()):
        duplicate = ascending[:-1][ascending.diff() == 0][0].item()
        raise ValueError(
            f"PairLogps.take: these log-probs contain row {duplicate} more than once; "
            "measure or concatenate each row once"
        )
    # searchsorted gives `size` for a row beyond the last; clamp it, and the comparison rejects it
    places = torch.searchsorted(ascending, wanted).clamp(max=max(size - 1, 0))
    missing = wanted[ascending[places] != wanted] if size else wanted
    if len(missing):
        raise KeyError(
            f"PairLogps.take: {len(missing)} of {len(wanted)} rows were never measured, "
            f"the first is row {missing[0].item()}; measure them before selecting "
            f"(these log-probs cover {size} rows)"
        )
    return order[places]


class Rewards(NamedTuple):
    """Implicit rewards of P pairs, float [P] each (Eq. 1)."""

    chosen: Tensor
    rejected: Tensor

    @property
    def margin(self) -> Tensor:
        """Reward margin r_w - r_l, the argument of the sigmoid in the DPO loss (Eq. 2)."""
        return self.chosen - self.rejected


def rewards(policy: PairLogps, reference: PairLogps, *, beta: float = 0.1) -> Rewards:
    """Implicit rewards r(x, y) = beta * log(policy(y | x) / reference(y | x))  (Eq. 1).

    Args:
        policy: Log-probs under the policy.
        reference: Log-probs of the same pairs, in the same order, under the reference.
        beta: Temperature, > 0.

    Raises:
        ValueError: If beta is not positive, or policy and reference contain different pairs.
    """
    if not 0 < beta < inf:
        raise ValueError(f"rewards: beta must be positive and finite, got {beta}")
    for logps in (policy, reference):
        if {field.shape for field in logps} != {logps.index.shape} or logps.index.dim() != 1:
            raise ValueError(
                "rewards: every field of a PairLogps must be [P], got shapes "
                f"{[list(field.shape) for field in logps]}"
            )
    if policy.index.shape != reference.index.shape:
        raise ValueError(
            f"rewards: the policy has {len(policy.index)} pairs, the reference "
            f"{len(reference.index)}; align them with reference.take(policy.index)"
        )
    # torch.equal breaks a compiled graph; in eager mode it is cheap, since indices live on the CPU
    # and need no device sync
    if not torch.compiler.is_compiling() and not torch.equal(policy.index, reference.index):
        raise ValueError(
            "rewards: policy and reference list different pairs, or in a different order; "
            "align them with reference.take(policy.index)"
        )
    # .to(policy.chosen): to the policy's dtype and device
    return Rewards(
        chosen=beta * (policy.chosen - reference.chosen.to(policy.chosen)),
        rejected=beta * (policy.rejected - reference.rejected.to(policy.rejected)),
    )


Score = Callable[[PairLogps, PairLogps], Tensor]
"""`(policy, reference) -> [P]`: pairs with higher scores are kept first."""

Loss = Callable[[PairLogps, PairLogps], Tensor]
"""`(policy, reference) -> [P]`: the training loss of each pair. The same type as a score."""

Schedule = Callable[[float], Any]
"""`progress in [0, 1] -> value`: a keep ratio, or a tuple of shares, one per stratum."""

Progress = Callable[[int], float]
"""`optimizer step -> progress in [0, 1]`."""


class Reference(Protocol):
    """A source of reference log-probs: a `PairLogps`, or a store."""

    def take(self, index: npt.ArrayLike, /) -> PairLogps:
        """Return the log-probs of these dataset rows, in the order of `index`."""
        ...
