import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import pair_logps, pools, with_rewards

from sage_select import PairLogps, Selection
from sage_select.hashing import hash_order, keyed_hash
from sage_select.metrics import preference_metrics
from sage_select.pairs import rewards


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
