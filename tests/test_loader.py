"""Tests of the loaders and of the selection log."""

from collections import Counter
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import pair_logps

from sage_select import (
    Constant,
    Linear,
    PreferenceDataset,
    Processes,
    Selection,
    SelectionLog,
    SelectiveLoader,
    Selector,
    ShuffledLoader,
    Timeline,
    plan_pools,
    sage,
)
from sage_select.selecting.log import SCHEMA_VERSION
from sage_select.selecting.tables import flips_of_logs
from sage_select.system.files import checksum_path
from sage_select.training.micro_batches import dealt


@pytest.fixture(scope="module")
def pairs() -> PreferenceDataset:
    from arithmetic import build_tokenizer

    rows = [{"prompt": f"{i % 13}+{i // 13}?", "chosen": "1", "rejected": "2"} for i in range(100)]
    return PreferenceDataset.from_records(rows, tokenizer=build_tokenizer(), max_length=9)


class Policy:
    """A policy that counts its updates, and whose log-probs depend only on that count."""

    updates = 0

    def measure(self, pool: PreferenceDataset):
        margin = torch.from_numpy(np.cos(pool.index * (1.0 + self.updates)) * 5)
        return pair_logps(
            pool.index, margin - 5, -margin - 5, pool.chosen_tokens, pool.rejected_tokens
        )


class Unmeasured:
    """A reference like a store that has not been filled: `take` raises."""

    def take(self, rows):
        raise ValueError("log-probs are missing")


def reference(size: int):
    zero, two = torch.zeros(size), torch.full((size,), 2)
    return pair_logps(range(size), zero, zero, two, two)


def build_loader(pairs, timeline, policy, *, seed=0, measured=None, **options) -> SelectiveLoader:
    """Build a loader; it appends updates and rows of each measured pool to `measured`."""

    def measure(model, pool):
        if measured is not None:
            measured.append((model.updates, pool.index.tolist()))
        return model.measure(pool)

    def score(policy, reference):
        return policy.chosen.double()

    selector = Selector(
        score, timeline.keep, reference(100), timeline.progress, measure, no_signal="score"
    )
    return SelectiveLoader(selector, timeline, pairs, policy, seed=seed, **options)


@st.composite
def timelines(draw) -> Timeline:
    size, copies = draw(st.integers(1, 100)), draw(st.integers(1, 3))
    num_pools = draw(st.integers(copies, min(12, size * copies)) if copies <= size * copies
                     else st.just(copies))  # fmt: skip
    plan = plan_pools(
        [0] * size,
        Constant((1.0,)),
        max(copies, num_pools),
        copies=copies,
        seed=draw(st.integers(0, 9)),
    )
    keep = Linear(draw(st.floats(0.05, 1)), draw(st.floats(0.05, 1)))
    return Timeline(plan, keep, batch_size=draw(st.integers(1, 20)))


def run(loader: SelectiveLoader, policy: Policy) -> list[list[int]]:
    """Pull all batches, with one update of the policy after each."""
    batches = []
    for rows in loader:
        batches.append(rows.tolist())
        policy.updates += 1
    return batches


@given(timelines())
def test_each_pool_is_measured_exactly_after_the_preceding_steps(pairs, timeline):
    policy, measured = Policy(), []
    run(build_loader(pairs, timeline, policy, measured=measured), policy)
    expected = [
        (step, pool.tolist())
        for step, pool, kept in zip(
            timeline.first_step, timeline.plan.pools, timeline.kept_count, strict=True
        )
        if kept < len(pool)  # nothing is measured if nothing can be dropped
    ]
    assert [(updates, pool) for updates, pool in measured] == expected


@given(timelines())
def test_every_kept_pair_is_trained_exactly_once_in_full_batches(pairs, timeline):
    policy, selections = Policy(), {}
    loader = build_loader(pairs, timeline, policy, on_select=selections.__setitem__)
    batches = run(loader, policy)
    assert len(batches) == len(loader) == timeline.total_steps
    assert {len(batch) for batch in batches[:-1]} <= {timeline.batch_size}
    kept = Counter(row for selection in selections.values() for row in selection)
    assert Counter(row for batch in batches for row in batch) == kept
    trained = iter(row for batch in batches for row in batch)
    for k in sorted(selections):  # in the order of intervals: the remainder before the next
        count = len(selections[k])
        assert sorted(next(trained) for _ in range(count)) == sorted(selections[k])


@given(timelines(), st.data())
@settings(max_examples=50)
def test_resuming_at_any_step_repeats_and_loses_no_pair(pairs, timeline, data):
    policy, measured = Policy(), []
    expected = run(build_loader(pairs, timeline, policy, measured=measured), policy)
    stop = data.draw(st.integers(0, len(expected)))

    first, policy = [], Policy()
    loader = build_loader(pairs, timeline, policy)
    state = loader.state_dict()
    for rows in loader:
        if len(first) == stop:
            break
        first.append(rows.tolist())
        policy.updates += 1
        state = loader.state_dict()

    resumed = build_loader(pairs, timeline, policy, measured=(later := []))
    resumed.load_state_dict(state)
    rest = run(resumed, policy)
    assert first + rest == expected
    # what was scored before the stop is not scored again
    assert later == measured[len(measured) - len(later) :]
    assert all(updates >= stop for updates, _ in later)


def test_the_training_order_is_shuffled_and_seeded(pairs):
    timeline = Timeline(plan_pools([0] * 100, Constant((1.0,)), 2), Constant(1.0), 10)
    orders = [
        [row for batch in run(build_loader(pairs, timeline, p, seed=s), p) for row in batch]
        for p, s in ((Policy(), 0), (Policy(), 0), (Policy(), 1))
    ]
    assert orders[0] == orders[1] != orders[2]
    best_first = sorted(timeline.plan.pools[0], key=lambda row: -np.cos(row))
    assert orders[0][:50] != best_first


def test_a_state_from_different_settings_is_refused(pairs):
    plans = [plan_pools([0] * 100, Constant((1.0,)), 4, seed=seed) for seed in (0, 1)]
    state = build_loader(pairs, Timeline(plans[0], Constant(0.5), 8), Policy()).state_dict()
    for plan, keep, batch_size, seed in [
        (plans[1], 0.5, 8, 0),
        (plans[0], 0.6, 8, 0),
        (plans[0], 0.5, 4, 0),
        (plans[0], 0.5, 8, 1),
    ]:
        other = build_loader(pairs, Timeline(plan, Constant(keep), batch_size), Policy(), seed=seed)
        message = "belongs to another run" if batch_size == 8 else "takes 8 pairs per .* would be 4"
        with pytest.raises(ValueError, match=message):
            other.load_state_dict(state)


def test_a_host_that_fetches_ahead_gets_the_same_batches(pairs):
    timeline = Timeline(plan_pools([0] * 100, Constant((1.0,)), 4), Constant(0.5), 8)
    one_by_one = [rows.tolist() for rows in build_loader(pairs, timeline, Policy())]
    ahead = build_loader(pairs, timeline, Policy())
    assert [b.tolist() for batches in ahead.decided() for b in batches] == one_by_one
    assert ahead.step == len(ahead)


@pytest.mark.parametrize("taken", range(7))
def test_a_host_that_fetches_ahead_resumes_at_its_step(pairs, taken):
    timeline = Timeline(plan_pools([0] * 100, Constant((1.0,)), 4), Constant(0.5), 8)
    expected = [rows.tolist() for rows in build_loader(pairs, timeline, Policy())]
    loader, fetched = build_loader(pairs, timeline, Policy()), 0
    for batches in loader.decided():
        fetched += len(batches)
        if fetched > taken:  # killed within this list, all of which had been fetched
            break
    loader.step = taken
    resumed = build_loader(pairs, timeline, Policy())
    resumed.load_state_dict(loader.state_dict())
    assert [rows.tolist() for rows in resumed] == expected[taken:]


@given(st.integers(1, 20), st.integers(1, 4), st.integers(1, 5))
def test_a_batch_is_dealt_once_with_equal_passes_on_all_ranks(size, world, micro):
    class Rank(Processes):
        rank = property(lambda self: self.group)
        size = property(lambda self: world)

    shares = [dealt(np.arange(size), Rank(rank), micro) for rank in range(world)]
    assert len({len(share) for share in shares}) == 1
    assert max(len(part.rows) for share in shares for part in share) <= micro
    trained = [part.rows for share in shares for part in share if part.share]
    assert sorted(np.concatenate(trained)) == [*range(size)]
    # with the host's weights, the passes of all ranks sum to the mean over the batch
    total = sum(len(part.rows) * part.share for share in shares for part in share)
    assert total / world == pytest.approx(1)
    means = [sum(part.mean_share for part in share) / len(share) for share in shares]
    assert sum(means) / world == pytest.approx(1)


def test_a_state_of_a_changed_selector_is_refused(pairs):
    timeline = Timeline(plan_pools([0] * 100, Constant((1.0,)), 4), Constant(0.5), 8)
    state = build_loader(pairs, timeline, Policy()).state_dict()
    for change in ({"seed": 1}, {"no_signal": "hash"}, {"score": sage}, {"noise_floor": 1.0}):
        other = build_loader(pairs, timeline, Policy())
        other = SelectiveLoader(replace(other.selector, **change), timeline, pairs, other.model)
        with pytest.raises(ValueError, match="this state belongs to another run"):
            other.load_state_dict(state)


def test_a_trained_policy_is_refused_as_the_reference(pairs):
    timeline = Timeline(plan_pools([0] * 100, Constant((1.0,)), 4), Constant(0.5), 8)
    original = replace(
        build_loader(pairs, timeline, Policy()).selector, reference=Policy().measure(pairs)
    )

    def loader(selector, chosen: float):
        moved = original.reference._replace(chosen=original.reference.chosen * chosen)
        return SelectiveLoader(replace(selector, reference=moved), timeline, pairs, Policy())

    state = loader(original, 1.0).state_dict()
    loader(original, 1.05).load_state_dict(state)  # the rounding of another device
    with pytest.raises(
        ValueError,
        match=r"the reference is another .* of 25 pairs differ by 0\.27 nats .* size of 5\.00",
    ):
        loader(original, 1.1).load_state_dict(state)
    # no check for a reference that is not measured yet, and for a state of an older version
    for unmeasured in (original.reference.take([]), Unmeasured()):
        selector = replace(original, reference=unmeasured)
        SelectiveLoader(selector, timeline, pairs, Policy()).load_state_dict(state)
    del state["reference"]
    loader(original, 1.1).load_state_dict(state)


def test_a_plan_that_was_not_mapped_to_its_rows_is_refused(pairs):
    part = pairs.take(np.arange(50, 100))
    plan = plan_pools([0] * 50, Constant((1.0,)), 4)
    with pytest.raises(ValueError, match=r"plan\.on_rows\(rows\)"):
        build_loader(part, Timeline(plan, Constant(0.5), 8), Policy())
    build_loader(part, Timeline(plan.on_rows(part.index), Constant(0.5), 8), Policy())


def test_a_folder_with_the_log_of_another_run_is_refused(pairs, tmp_path):
    for num_pools in (5, 2):
        timeline = Timeline(plan_pools([0] * 100, Constant((1.0,)), num_pools), Constant(0.5), 8)
        loader = build_loader(pairs, timeline, Policy(), log=SelectionLog(tmp_path))
        if num_pools == 5:
            list(loader)
    with pytest.raises(FileExistsError, match="contains the decisions of another run"):
        next(iter(loader))


def test_selector_and_timeline_must_have_equal_schedules(pairs):
    timeline = Timeline(plan_pools([0] * 100, Constant((1.0,)), 4), Constant(0.5), 8)
    selector = build_loader(pairs, timeline, Policy()).selector
    with pytest.raises(ValueError, match="make them equal, because the timeline computes"):
        SelectiveLoader(replace(selector, keep=Constant(0.4)), timeline, pairs, Policy())


def test_a_plan_for_more_pairs_is_refused(pairs):
    timeline = Timeline(plan_pools([0] * 101, Constant((1.0,)), 4), Constant(0.5), 8)
    with pytest.raises(ValueError, match="contains row 100, which is not one of the 100 pairs"):
        build_loader(pairs, timeline, Policy())


@given(st.integers(1, 100), st.integers(1, 20), st.integers(1, 3), st.data())
def test_the_baseline_trains_on_every_pair_and_resumes(pairs, size, batch_size, epochs, data):
    def fresh():
        return ShuffledLoader(pairs.take(np.arange(size)), batch_size=batch_size, epochs=epochs)

    expected = [rows.tolist() for rows in fresh()]
    assert len(expected) == len(fresh())
    assert Counter(row for batch in expected for row in batch) == dict.fromkeys(range(size), epochs)
    stop, loader = data.draw(st.integers(0, len(expected))), fresh()
    state = loader.state_dict() | {"step": stop}
    loader.load_state_dict(state)
    assert [rows.tolist() for rows in loader] == expected[stop:]


# The log


def test_a_decision_is_logged_before_its_first_batch(pairs, tmp_path):
    timeline = Timeline(plan_pools([0] * 100, Constant((1.0,)), 4), Linear(1.0, 0.4), 8)
    policy, log = Policy(), SelectionLog(tmp_path)
    loader = build_loader(pairs, timeline, policy, log=log)
    for _ in loader:
        assert log.read()["interval"].n_unique() == loader.interval + 1
        policy.updates += 1
    table = log.read()
    assert table.height == 100
    assert table.filter("kept")["interval"].value_counts().sort("interval")["count"].to_list() == [
        *timeline.kept_count
    ]
    assert table["step"].unique(maintain_order=True).to_list() == [*timeline.first_step]


def test_a_decision_can_be_reproduced_from_the_log(still, tmp_path):
    log, pool = SelectionLog(tmp_path), still.dataset.take(np.arange(30))
    model, decide = still.model, replace(still.selector, no_signal="score")
    decision = decide.select(model, pool, step=3, progress=0.5)
    log.write(0, decision, pool.ids)
    table = log.read()
    assert table["pair_id"].to_list() == pool.ids.tolist()
    names = ["row", "chosen_logps", "rejected_logps", "chosen_tokens", "rejected_tokens"]
    policy = pair_logps(*(table[name].to_list() for name in names))
    again = decide.rank(policy, decide.reference, 0.5, 3, ids=table["pair_id"].to_list())
    assert list(again) == list(decision)
    assert table.filter("kept").sort("rank")["row"].to_list() == list(decision)
    assert sorted(table["rank"]) == list(range(1, 31))


def selection(size=3, **options) -> Selection:
    return Selection(np.arange(size), np.arange(size), np.full(size, np.nan), np.full(size, True),
                     0, 0.0, rule="all", **options)  # fmt: skip


def test_a_truncated_file_is_skipped(tmp_path):
    log = SelectionLog(tmp_path)
    log.write(0, selection(), ["a", "b", "c"])
    log.write(1, selection(), ["a", "b", "c"])
    content = (tmp_path / "interval-000001.parquet").read_bytes()
    (tmp_path / "interval-000002.partial").write_bytes(content[:100])  # a crash during a write
    assert log.read()["interval"].to_list() == [0] * 3 + [1] * 3
    (tmp_path / "interval-000001.parquet").write_bytes(content[:-50])  # truncated by a failing disk
    with pytest.warns(UserWarning, match=r"interval-000001\.parquet cannot be read and is skipped"):
        assert log.read()["interval"].to_list() == [0] * 3


VERSION_1 = {
    "schema_version": pl.Int32, "run": pl.String, "interval": pl.Int32, "step": pl.Int64,
    "progress": pl.Float64, "pair_id": pl.String, "row": pl.Int64, "score": pl.Float64,
    "rank": pl.Int64, "kept": pl.Boolean, "rule": pl.String, "signal": pl.Float64,
    "policy_chosen": pl.Float64, "policy_rejected": pl.Float64, "reference_chosen": pl.Float64,
    "reference_rejected": pl.Float64, "chosen_tokens": pl.Int64, "rejected_tokens": pl.Int64,
}  # fmt: skip
"""The columns of version 1, as files that were written then have them."""


def test_files_of_version_1_are_read_beside_newer_ones(tmp_path):
    log = SelectionLog(tmp_path)
    row = [1, "", 0, 0, 0.0, "a", 7, 0.5, 1, True, "score", 2.0, -1.0, -2.0, -3.0, -4.0, 5, 6]
    old_file = pl.DataFrame([row], schema=VERSION_1, orient="row")
    old_file.write_parquet(tmp_path / "interval-000000.parquet")
    log.write(1, selection(), ["a", "b", "c"])
    old, new = log.read().partition_by("interval")
    assert old.height == 1
    assert new.height == 3
    names = ("chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps")
    assert [old[name].item() for name in names] == [-1.0, -2.0, -3.0, -4.0]
    assert old.columns == new.columns == list(new.schema)


def test_a_column_that_an_older_file_lacks_is_null(tmp_path):
    log = SelectionLog(tmp_path)
    for interval in (0, 1):
        log.write(interval, selection(), ["a", "b", "c"])
    path = tmp_path / "interval-000000.parquet"
    pl.read_parquet(path).drop("rule").write_parquet(path)
    checksum_path(path).unlink()  # older versions wrote none
    assert log.read()["rule"].to_list() == [None] * 3 + ["all"] * 3


def test_the_docstring_of_the_log_names_every_column(tmp_path):
    for name in SelectionLog(tmp_path).read().columns:
        assert f"`{name}`" in SelectionLog.__doc__, name


def test_a_log_of_a_later_version_is_refused(tmp_path):
    log = SelectionLog(tmp_path)
    log.write(0, selection(), ["a", "b", "c"])
    path = tmp_path / "interval-000000.parquet"
    pl.read_parquet(path).with_columns(schema_version=SCHEMA_VERSION + 1).write_parquet(path)
    checksum_path(path).unlink()
    with pytest.raises(
        ValueError, match=f"version {SCHEMA_VERSION + 1}, .* reads 1 to {SCHEMA_VERSION}; update"
    ):
        log.read()


def test_score_and_rank_of_an_unscored_pool_are_null(tmp_path):
    log = SelectionLog(tmp_path)
    log.write(0, selection(), ["a", "b", "c"])
    assert log.read()["score"].null_count() == log.read()["rank"].null_count() == 3


def decision(scores, count):
    order = np.argsort(-np.array(scores), kind="stable")
    kept = np.isin(np.arange(len(scores)), order[:count])
    pool = np.arange(len(scores))
    return Selection(order[:count], pool, np.array(scores, float), kept, step=0, progress=0.0)


def test_flips_are_counted_with_their_distance_from_the_cut(tmp_path):
    logs = [SelectionLog(tmp_path / name) for name in "ab"]
    for interval, (one, other) in enumerate([
        ([4, 3, 2, 1], [4, 3, 2, 1]),
        ([4, 2.02, 2, 1], [4, 1.99, 2, 1]),
        ([-1, -2, -2.02, -3], [-1, -2.03, -2.02, -3]),
    ]):  # fmt: skip
        for log, scores in zip(logs, (one, other), strict=True):
            log.write(interval, decision(scores, 2), [*"wxyz"])
    logs[0].write(3, decision([1, 2], 1), [*"wx"])  # the other run has not reached this interval
    flips = flips_of_logs(*logs)
    assert flips["interval"].to_list() == [0, 1, 2]
    assert flips["flipped"].to_list() == [0, 1, 1]
    assert flips["kept"].to_list() == [2, 2, 2]
    assert flips["distance"][0] is None
    assert flips["distance"][1] == pytest.approx(0.02 / 2.02)
    assert flips["distance"][2] == pytest.approx(0.02 / 2)


def test_flips_of_runs_with_different_pairs_are_refused(tmp_path):
    logs = [SelectionLog(tmp_path / name) for name in "ab"]
    for log, ids in zip(logs, ("wx", "wy"), strict=True):
        log.write(0, decision([1, 2], 1), [*ids])
    with pytest.raises(ValueError, match="different candidates in interval 0"):
        flips_of_logs(*logs)
