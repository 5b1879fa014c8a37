import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import pair_logps, pools, with_rewards
from torch.utils._python_dispatch import TorchDispatchMode

from sage_select import PairLogps, Selection
from sage_select.hashing import hash_order, keyed_hash
from sage_select.metrics import preference_metrics
from sage_select.pairs import noise_floor, rewards, storage_noise
from sage_select.ranking import top


@given(pools(), st.randoms(use_true_random=False))
def test_take_looks_rows_up_by_index(pool, shuffler):
    policy, _ = pool
    wanted = policy.index.tolist()
    shuffler.shuffle(wanted)
    taken = policy.take(wanted[: len(wanted) // 2 + 1])
    values = dict(zip(policy.index.tolist(), policy.chosen.tolist(), strict=True))
    assert taken.chosen.tolist() == [values[row] for row in taken.index.tolist()]


@given(pools())
def test_concatenate_undoes_a_split(pool):
    policy, _ = pool
    halves = [PairLogps(*(x[s] for x in policy)) for s in (slice(0, 3), slice(3, None))]
    assert all(map(torch.equal, PairLogps.concatenate(halves), policy))


@pytest.mark.parametrize("index", [[0, 1, 2], [5, 3, 9]])
@pytest.mark.parametrize("wanted", [[3, 4], [-1], [10]])
def test_take_refuses_a_row_that_was_never_measured(index, wanted):
    with pytest.raises(KeyError, match="were never measured, the first is row"):
        pair_logps(index, [0, 0, 0], [0, 0, 0], [1, 1, 1], [1, 1, 1]).take(wanted)


def test_take_refuses_duplicate_rows():
    with pytest.raises(ValueError, match="these log-probs contain row 5 more than once"):
        pair_logps([5, 5], [0, 1], [0, 1], [1, 1], [1, 1]).take([5])


class Largest(TorchDispatchMode):
    """Records the elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.elements = max(self.elements, result.numel())
        return result


@pytest.mark.parametrize("order", ["rows", "reversed", "odd rows"])
def test_take_makes_no_table_of_all_rows_in_each_call(order):
    index = {"rows": torch.arange(9999), "reversed": torch.arange(9999).flip(0),
             "odd rows": 2 * torch.arange(9999) + 1}[order]  # fmt: skip
    zeros = torch.zeros(9999)
    logps = pair_logps(index, zeros - index, zeros, zeros + 1, zeros + 1)
    logps.take([5])
    with Largest() as largest:
        taken = logps.take([9, 5, 1])
    assert taken.index.tolist() == [9, 5, 1]
    assert taken.chosen.tolist() == [-9, -5, -1]
    assert largest.elements <= 3


def test_take_sees_an_index_that_was_changed_in_place():
    logps = pair_logps([0, 1, 2], [0, -1, -2], [0, 0, 0], [1, 1, 1], [1, 1, 1])
    assert logps.take([2]).chosen.tolist() == [-2]
    logps.index.copy_(torch.tensor([2, 1, 0]))
    assert logps.take([2]).chosen.tolist() == [0]
    with torch.inference_mode():
        assert PairLogps(*(x.clone() for x in logps)).take([2]).chosen.tolist() == [0]


def test_the_precision_is_no_field_and_is_kept():
    logps = with_rewards([1.0, 2.0], [0.0, 0.0])[0].measured_in(torch.bfloat16)
    assert len(logps) == len(tuple(logps)) == 5
    assert PairLogps(*logps).precision is None
    kept = [
        logps.take([1]), logps.to("cpu"), PairLogps.concatenate([logps, logps]),
        copy.copy(logps), copy.deepcopy(logps), pickle.loads(pickle.dumps(logps)),
    ]  # fmt: skip
    assert [x.precision for x in kept] == [torch.bfloat16] * len(kept)
    fine = logps.measured_in(torch.float32)
    assert PairLogps.concatenate([fine, logps]).precision == torch.bfloat16
    assert PairLogps.concatenate([fine, logps.measured_in(None)]).precision is None
    assert logps.precision == torch.bfloat16  # measured_in returned others


@pytest.mark.parametrize("precision", ["bfloat16", 16, np.float32])
def test_a_precision_is_a_dtype(precision):
    with pytest.raises(TypeError, match=r"such as torch\.bfloat16, or None, got"):
        with_rewards([1.0], [0.0])[0].measured_in(precision)


def test_quantised_weights_are_computed_in_half_precision():
    for dtype in (torch.uint8, torch.int8, torch.float8_e4m3fn):
        assert noise_floor(dtype) == noise_floor(torch.bfloat16)


@pytest.mark.parametrize(("dtype", "unit"), [(torch.bfloat16, 2**-7), (torch.float16, 2**-10)])
def test_values_that_were_saved_in_half_precision_are_told(dtype, unit):
    sums = -torch.linspace(100, 300, 50, dtype=torch.float64)
    exact = pair_logps(range(50), sums, sums, [9] * 50, [9] * 50)
    saved = exact._replace(chosen=sums.to(dtype).double(), rejected=sums.to(dtype).double())
    expected = unit * sums.square().mean().sqrt().item()
    assert storage_noise(saved) == pytest.approx(expected, rel=0.01)
    assert storage_noise(exact) == storage_noise(saved._replace(chosen=sums)) == 0
    assert storage_noise(saved.take([0, 1, 2])) == 0  # may be round by hand


def test_concatenate_needs_a_part():
    with pytest.raises(ValueError, match="there must be at least one part, got none"):
        PairLogps.concatenate([])


def test_ids_are_one_per_score():
    with pytest.raises(ValueError, match=r"2 scores need ids of shape \[2\], got \[3\]"):
        top(np.zeros(2), 1, ids=[1, 2, 3])


def test_rewards():
    r = rewards(*with_rewards([1.0], [-2.0]), beta=0.1)
    assert (r.chosen.item(), r.rejected.item(), r.margin.item()) == pytest.approx((1, -2, 3))


def test_rewards_refuse_pairs_in_a_different_order():
    policy, reference = with_rewards([1.0, 2.0], [0.0, 0.0])
    with pytest.raises(ValueError, match=r"align them with reference\.take\(policy\.index\)"):
        rewards(policy, reference.take([1, 0]))


def selection() -> Selection:
    kept = np.array([True, False, True])
    return Selection(
        np.array([12, 10]), np.array([10, 11, 12]), np.array([0.5, 0.1, 0.9]), kept, 3, 0.2
    )


def test_a_selection_behaves_like_its_indices():
    assert np.asarray(selection()).tolist() == list(selection()) == [12, 10]
    assert len(selection()) == 2
    assert selection().cut == 0.5
    assert selection().dropped.tolist() == [11]
    assert "kept 2 of 3 at step 3" in repr(selection())


def test_writing_to_the_array_does_not_change_the_selection():
    chosen = selection()
    np.asarray(chosen)[0] = 99
    assert list(chosen) == [12, 10]


def test_metrics():
    policy, reference = with_rewards([1.0, -1.0, 0.0], [0.0, 0.0, 0.0])
    metrics = preference_metrics(policy, reference)
    assert metrics["accuracy"] == pytest.approx((1 + 0 + 0.5) / 3)
    assert metrics["margin"] == pytest.approx(0.0, abs=1e-12)


def test_a_margin_within_rounding_noise_is_a_tie():
    policy, reference = with_rewards([1e-6, -1e-6, 1e-6, 0.5], [0.0, 0.0, 0.0, 0.0])
    assert preference_metrics(policy, reference)["accuracy"] == (3 * 0.5 + 1) / 4


# Keyed hashes

names = st.lists(st.text(st.characters(blacklist_characters="\0"), min_size=1), min_size=1)


@given(names, st.integers(), names)
def test_a_hash_depends_on_the_id_and_the_key_only(ids, seed, others):
    alone = [keyed_hash([name], "test", seed)[0] for name in ids]
    assert keyed_hash([*ids, *others], "test", seed)[: len(ids)].tolist() == alone


@given(st.lists(st.integers(-(2**62), 2**62), min_size=2, unique=True))
def test_different_ids_and_keys_give_different_hashes(ids):
    assert len(set(keyed_hash(ids, "a").tolist())) == len(ids)
    assert (keyed_hash(ids, "a") != keyed_hash(ids, "b")).all()


def test_hash_bits_are_balanced():
    bits = np.unpackbits(keyed_hash(np.arange(10_000), "bits").view(np.uint8)).reshape(-1, 64)
    assert np.abs(bits.mean(axis=0) - 0.5).max() < 0.03
    assert sorted(hash_order(np.arange(50), "order")) == list(range(50))


def test_hashes_refuse_ids_that_are_not_whole_numbers():
    with pytest.raises(TypeError, match="ids must be integers or strings"):
        keyed_hash([0.5])
