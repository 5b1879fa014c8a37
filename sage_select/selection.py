"""Selections: the decision about one pool, and the evidence for it."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from sage_select.arrays import BoolArray, Float64Array, Int64Array
from sage_select.pairs import PairLogps


@dataclass(frozen=True, eq=False)
class Selection:
    """The decision about one pool, and the evidence for it.

    `np.asarray(selection)`, `len(selection)` and iteration give the kept rows, best first.

    Attributes:
        indices: int64 [n], kept dataset rows, best first.
        pool: int64 [P], candidate rows.
        scores: float64 [P], aligned with pool; NaN if the pool was not scored.
        kept: bool [P], aligned with pool.
        step: Optimizer steps taken before this decision.
        progress: The run's progress in [0, 1] at this decision.
        rule: How the pool was ranked: "score"; "hash" if the rewards carried no signal; "all" if
            nothing could be dropped, so that the pool was not scored.
        signal: Spread of the log-ratios over the pool in nats; 0 at policy = reference.
        policy: The pool's log-probs under the policy, aligned with pool; None if not measured.
        reference: The pool's log-probs under the reference, or None.
    """

    indices: Int64Array
    pool: Int64Array
    scores: Float64Array
    kept: BoolArray
    step: int
    progress: float
    rule: str = "score"
    signal: float = float("nan")
    policy: PairLogps | None = None
    reference: PairLogps | None = None

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices.tolist())

    def __array__(
        self, dtype: npt.DTypeLike | None = None, copy: bool | None = None
    ) -> npt.NDArray[Any]:
        # a copy, so that writing to the array cannot change the selection
        return np.array(self.indices, dtype=dtype, copy=copy if copy is not None else True)

    @property
    def cut(self) -> float:
        """Lowest kept score; NaN if the pool was not ranked by score."""
        by_score = self.rule == "score" and len(self) > 0
        return float(self.scores[self.kept].min()) if by_score else float("nan")

    @property
    def dropped(self) -> Int64Array:
        """Candidates that were not kept, in pool order."""
        return self.pool[~self.kept]

    def __repr__(self) -> str:
        return (
            f"Selection(kept {len(self)} of {len(self.pool)} at step {self.step}, "
            f"progress {self.progress:.3f}, by {self.rule}, cut {self.cut:.4g})"
        )
