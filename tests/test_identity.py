"""Identity: two things have one name if and only if they decide the same."""

from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import torch

from sage_select import SageConfig, Training, nca
from sage_select.system.identity import describe


def weighted(policy, reference, *, beta, weights):
    return nca(policy, reference, beta=beta) * weights[policy.index]


def bound(weights):
    return partial(weighted, weights=weights)


@dataclass(frozen=True)
class Above:
    """A score of one's own, with a setting."""

    floor: float

    def __call__(self, policy, reference):
        return (reference.chosen - policy.chosen).clamp(min=self.floor)


ONE = torch.arange(2000, dtype=torch.float32)
OTHER = ONE.clone()
OTHER[1000] += 1  # in the middle, which printing leaves out
PAIRS = {
    "tensors": (ONE, OTHER),
    "bfloat16": (ONE.bfloat16(), OTHER.bfloat16() * 2),
    "arrays": (ONE.numpy(), OTHER.numpy()),
    "lists of tensors": ([ONE], [OTHER]),
    "dtypes": (ONE, ONE.double()),
    "shapes": (ONE, ONE[None]),
}


@pytest.mark.parametrize(("one", "other"), PAIRS.values(), ids=PAIRS)
def test_bound_arrays_are_identified_by_their_bytes(one, other):
    assert describe(bound(one)) != describe(bound(other))
    copied = [one[0].clone()] if isinstance(one, list) else one * 1
    assert describe(bound(one)) == describe(bound(copied))


def test_two_losses_whose_tensors_print_alike_are_two_runs():
    assert repr(ONE) == repr(OTHER)
    one, other = (Training(loss=bound(weights)).resume_settings() for weights in (ONE, OTHER))
    assert one != other
    assert {name for name in one if one[name] != other[name]} == {"loss"}


def test_scores_with_settings_of_their_own():
    assert describe(Above(1.0)) == describe(Above(1.0)) != describe(Above(2.0))
    assert describe(partial(sorted, key=len)) == "builtins.sorted(key=builtins.len)"
    assert describe(np.mean) == describe(np.mean)


def test_the_hash_of_a_run_does_not_change_with_the_version():
    """Run folders are named by it: another hash would begin a run anew instead of resuming it."""
    assert SageConfig.paper(model={"name": "m"}, data={"path": "d"}).hash == "e31c292b3c8d"
    assert SageConfig(scoring={"impl": "auto"}).hash == SageConfig().hash
    assert SageConfig(scoring={"impl": "fused"}).hash != SageConfig().hash


def test_what_a_run_does_not_depend_on_changes_neither_hash_nor_identity():
    free = {"micro_batch_size": 1, "evaluate_every": 7, "keep_checkpoints": 9, "best_by": "margin"}
    assert SageConfig(training=free).hash == SageConfig().hash
    assert Training(**free).resume_settings() == Training().resume_settings()
    assert SageConfig().differences(SageConfig(training=free)) == []
    assert SageConfig().differences(SageConfig(seed=1, scoring={"impl": "fused"})) == [
        "scoring.impl was 'auto', is 'fused'", "seed was 0, is 1",
    ]  # fmt: skip
