"""Log-probs and implicit rewards of pairs, and the signatures of scores, losses and schedules."""

from collections.abc import Callable
from math import inf
from typing import Any, NamedTuple, Protocol

import numpy.typing as npt
import torch
from torch import Tensor

from sage_select.arguments import positive
from sage_select.arrays import Float64Array, checked_rows

NOISE_FLOOR = 1e-3
"""Log-ratios below this many nats count as zero in fp32: rounding in long sums is smaller, and a
few training steps change them by more."""


HALF = torch.bfloat16
"""The coarsest dtype in which language models compute."""

MAX_LOGP = 1e-2
"""Nats by which rounding may put a summed log-prob above 0."""


def noise_floor(precision: torch.dtype) -> float:
    """Return the noise floor for a dtype of the forward pass: 1e-3 nats in fp32, 0.2 in bfloat16.

    Measured: equal weights in two different batchings differ by 5 units in the last place of the
    dtype for responses of 300 tokens, and the difference grows with the square root of the length.
    Integers and floats of one byte are storage of quantised weights; the pass itself computes in
    half precision.

    Example:
        >>> noise_floor(torch.float32), round(noise_floor(torch.bfloat16), 1)
        (0.001, 0.2)
    """
    quantised = not precision.is_floating_point or precision.itemsize < HALF.itemsize
    return max(NOISE_FLOOR, 25 * torch.finfo(HALF if quantised else precision).eps)


CHOSEN, REJECTED = "chosen_logps", "rejected_logps"
REFERENCE = "ref_"
"""Names of the log-prob columns in every table and file, and the prefix of those under the
reference, as in TRL."""


class _Fields(NamedTuple):
    """The fields of `PairLogps`, apart so that it can have attributes that are no fields."""

    index: Tensor  # type: ignore[assignment]  # int64: the pair's row in the dataset
    chosen: Tensor  # float64
    rejected: Tensor  # float64
    chosen_tokens: Tensor  # int64
    rejected_tokens: Tensor  # int64


class PairLogps(_Fields):
    """Log-probs of P pairs under one model. Every field has shape [P].

    Log-probs are natural logarithms (nats), summed over the response's tokens. The token counts are
    those of exactly the tokens that were summed: after truncation, with the end token.

    Attributes:
        precision: Dtype of the forward pass that measured them; None if unknown. A `Reader` and a
            `ReferenceStore` set it, `measured_in` does for log-probs from elsewhere.

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

    precision: torch.dtype | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"precision": self.precision}  # without the lookup table, which is made again

    @property
    def tokens(self) -> Tensor:
        """Response tokens of both sides together, L in Eq. 8, int64 [P]."""
        return self.chosen_tokens + self.rejected_tokens

    def measured_in(self, precision: torch.dtype | None) -> "PairLogps":
        """Return these log-probs with the dtype of the forward pass that measured them.

        The `Selector` compares it with the policy's, since rounding in half precision can look like
        a change in the policy.

        Raises:
            TypeError: If it is not a dtype, or None.

        Example:
            >>> logps = PairLogps(*(torch.zeros(1) for _ in range(5)))
            >>> logps.measured_in(torch.bfloat16).take([0]).precision
            torch.bfloat16
        """
        if precision is not None and not isinstance(precision, torch.dtype):
            raise TypeError(
                "PairLogps.measured_in: precision must be a dtype such as torch.bfloat16, or None, "
                f"got {precision!r}"
            )
        logps = PairLogps(*self)
        logps.precision = precision
        return logps

    def take(self, index: npt.ArrayLike | Tensor) -> "PairLogps":
        """Return the pairs with these dataset rows, in the order of `index`.

        Raises:
            KeyError: If a row was never measured.
            ValueError: If these log-probs contain a row more than once.
        """
        rows = index.numpy(force=True) if isinstance(index, Tensor) else index
        wanted = torch.from_numpy(checked_rows(rows, "PairLogps.take")).to(self.index.device)
        positions = self._positions(wanted)
        return PairLogps(*(field[positions] for field in self)).measured_in(self.precision)

    def to(self, device: torch.device | str) -> "PairLogps":
        """Return these log-probs on another device."""
        return PairLogps(*(field.to(device) for field in self)).measured_in(self.precision)

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
        """Join the pairs of all parts, in order; the precision is that of the coarsest part.

        Raises:
            ValueError: If there are no parts.
        """
        if not parts:
            raise ValueError("PairLogps.concatenate: there must be at least one part, got none")
        precisions = [part.precision for part in parts]
        known = [precision for precision in precisions if precision is not None]
        joined = cls(*(torch.cat(fields) for fields in zip(*parts, strict=True)))
        return joined.measured_in(max(known, key=noise_floor) if known == precisions else None)

    def _positions(self, wanted: Tensor) -> Tensor:
        """Position of each wanted row in `index`."""
        size, lookup = len(self.index), self._lookup()
        if lookup is None:  # the usual case: the whole dataset, in row order
            order, missing = wanted, wanted[(wanted < 0) | (wanted >= size)]
        else:
            positions, ascending = lookup
            # `size` stands for a row beyond the last; clamp it, and the comparison rejects it
            places = torch.searchsorted(ascending, wanted).clamp(max=size - 1)
            order, missing = positions[places], wanted[ascending[places] != wanted]
        if len(missing):
            raise KeyError(
                f"PairLogps.take: {len(missing)} of {len(wanted)} rows were never measured, "
                f"the first is row {missing[0].item()}; measure them before selecting "
                f"(these log-probs cover {size} rows)"
            )
        return order

    def _lookup(self) -> tuple[Tensor, Tensor] | None:
        """Return positions by ascending row, and the rows; None if row i is at position i.

        It is kept, since a table of N rows in each of a run's many calls would cost time, and
        memory, too: what is kept of each call would be allocated in the gaps that tables leave.
        """
        version = 0 if self.index.is_inference() else self.index._version
        kept: tuple[int, tuple[Tensor, Tensor] | None] | None = self.__dict__.get("_kept_lookup")
        if kept is None or kept[0] != version:  # the index was changed in place
            kept = version, _lookup_of(self.index)
            self.__dict__["_kept_lookup"] = kept
        return kept[1]


def _lookup_of(index: Tensor) -> tuple[Tensor, Tensor] | None:
    if torch.equal(index, torch.arange(len(index), device=index.device)):
        return None
    order = index.argsort()
    ascending = index[order]
    if bool((ascending.diff() == 0).any()):
        duplicate = ascending[:-1][ascending.diff() == 0][0].item()
        raise ValueError(
            f"PairLogps.take: these log-probs contain row {duplicate} more than once; "
            "measure or concatenate each row once"
        )
    return order, ascending


def storage_noise(logps: PairLogps) -> float:
    """Return the rounding, in nats, of log-probs that were saved in half precision; 0 otherwise.

    A sum of 300 nats is saved to within 1 nat in bfloat16, whatever it was measured in. Values that
    are all exact in a half precision were saved in it; fewer than 16 may be round by hand.

    Example:
        >>> sums = -torch.linspace(100.0, 300.0, 32, dtype=torch.float64)
        >>> counts = torch.full((32,), 200)
        >>> logps = PairLogps(torch.arange(32), sums, sums, counts, counts)
        >>> saved = logps._replace(chosen=sums.bfloat16(), rejected=sums.bfloat16())
        >>> storage_noise(logps), round(storage_noise(saved), 1)
        (0.0, 1.6)
    """
    values = torch.cat([logps.chosen, logps.rejected])
    for dtype in (torch.bfloat16, torch.float16):
        # a few first: values in full precision are then told at once
        for part in (values[:64], values):
            if not torch.equal(part.to(dtype).to(part.dtype), part):
                break
        else:
            if len(torch.unique(values)) < 16:
                return 0.0
            return torch.finfo(dtype).eps * float(values.double().square().mean().sqrt())
    return 0.0


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
    if not (isinstance(beta, float) and 0 < beta < inf):  # the usual case needs no call
        beta = positive(beta, "rewards: beta")
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
