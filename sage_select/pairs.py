"""The words of the library: what a model thinks of some pairs, and what was decided about them."""

from collections.abc import Callable
from math import inf
from typing import Any, NamedTuple, Protocol

import numpy.typing as npt
import torch
from torch import Tensor

from sage_select.arrays import Float64Array, checked_rows

NOISE_FLOOR = 1e-3
"""Nats of a log-ratio below which two models count as alike in fp32: the rounding of long sums is
smaller, a few training steps move more."""


def noise_floor(precision: torch.dtype) -> float:
    """The same for another precision of the forward pass: 1e-3 nats in fp32, 0.2 in bfloat16.

    Measured: equal weights in two batchings differ by 5 units in the last place of the dtype for
    responses of 300 tokens, and by the root of the length more for longer ones.

    Example:
        >>> noise_floor(torch.float32), round(noise_floor(torch.bfloat16), 1)
        (0.001, 0.2)
    """
    return max(NOISE_FLOOR, 25 * torch.finfo(precision).eps)


CHOSEN, REJECTED = "chosen_logps", "rejected_logps"
REFERENCE = "ref_"
"""Names of log-prob columns in every table and file, with the prefix of those under the reference:
TRL's own names."""


class PairLogps(NamedTuple):
    """What one model thinks of P pairs. Every field has shape [P].

    Log-probabilities are natural (nats), summed over the response's tokens; the token counts are
    those of the very tokens that were summed, after truncation and with the end token counted.

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
        """L of Eq. 8: response tokens of both sides together, int64 [P]."""
        return self.chosen_tokens + self.rejected_tokens

    def take(self, index: npt.ArrayLike | Tensor) -> "PairLogps":
        """The pairs with these dataset rows, in the order asked for.

        Raises:
            KeyError: If a row was never measured.
            ValueError: If a row stands here more than once.
        """
        given = index.numpy(force=True) if isinstance(index, Tensor) else index
        wanted = torch.from_numpy(checked_rows(given, "PairLogps.take")).to(self.index.device)
        rows = _positions(self.index, wanted)
        return PairLogps(*(field[rows] for field in self))

    def to(self, device: torch.device | str) -> "PairLogps":
        """The same on another device."""
        return PairLogps(*(field.to(device) for field in self))

    def columns(self, prefix: str = "") -> dict[str, Float64Array]:
        """The log-probs as columns of a table, under the names that all tables use.

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
        """The pairs of all parts, one after the other."""
        return cls(*(torch.cat(fields) for fields in zip(*parts, strict=True)))


def _positions(index: Tensor, wanted: Tensor) -> Tensor:
    """Where each wanted row stands in `index`."""
    size = len(index)
    if len(wanted) == 0:
        return wanted
    inside = int(wanted.min()) >= 0 and int(wanted.max()) < size
    if inside and torch.equal(index, torch.arange(size, device=index.device)):
        return wanted  # the usual case: the whole dataset, in row order
    order = index.argsort()
    ascending = index[order]
    if bool((ascending.diff() == 0).any()):
        twice = ascending[:-1][ascending.diff() == 0][0].item()
        raise ValueError(f"PairLogps.take: row {twice} stands in these log-probs more than once")
    found = torch.searchsorted(ascending, wanted).clamp(max=max(size - 1, 0))
    missing = wanted[ascending[found] != wanted] if size else wanted
    if len(missing):
        raise KeyError(
            f"PairLogps.take: {len(missing)} of {len(wanted)} rows were never measured, "
            f"the first is row {missing[0].item()}; measure them before selecting "
            f"(these log-probs cover {size} rows)"
        )
    return order[found]


class Rewards(NamedTuple):
    """The implicit rewards of P pairs, float [P] each (Eq. 1)."""

    chosen: Tensor
    rejected: Tensor

    @property
    def margin(self) -> Tensor:
        """The argument of the sigmoid in the DPO loss, r_w - r_l (Eq. 2)."""
        return self.chosen - self.rejected


def rewards(policy: PairLogps, reference: PairLogps, *, beta: float = 0.1) -> Rewards:
    """Implicit rewards r(x, y) = beta * log(policy(y | x) / reference(y | x))  (Eq. 1).

    Args:
        policy: Log-probs under the policy.
        reference: Log-probs of the same pairs, in the same order, under the reference.
        beta: Temperature, > 0.

    Raises:
        ValueError: If beta is not positive, or the two do not describe the same pairs.
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
    # a comparison is a graph break for the compiler and a device sync; indices live on the CPU
    if not torch.compiler.is_compiling() and not torch.equal(policy.index, reference.index):
        raise ValueError(
            "rewards: policy and reference list their pairs in different order; "
            "align them with reference.take(policy.index)"
        )
    return Rewards(
        chosen=beta * (policy.chosen - reference.chosen.to(policy.chosen)),
        rejected=beta * (policy.rejected - reference.rejected.to(policy.rejected)),
    )


Score = Callable[[PairLogps, PairLogps], Tensor]
"""`(policy, reference) -> [P]`: pairs with higher scores are kept first."""

Loss = Callable[[PairLogps, PairLogps], Tensor]
"""`(policy, reference) -> [P]`: what a pair is trained on. The same type as a score."""

Schedule = Callable[[float], Any]
"""`progress in [0, 1] -> value`: a keep ratio, or a tuple of shares, one per stratum."""

Progress = Callable[[int], float]
"""`optimizer step -> progress in [0, 1]`."""


class Reference(Protocol):
    """Anything that knows the reference log-probs of pairs: a `PairLogps`, or a store."""

    def take(self, index: npt.ArrayLike, /) -> PairLogps:
        """The log-probs of these dataset rows, in the order asked for."""
        ...
