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
from sage_select.training.micro_batches import dealt


@pytest.fixture(scope="module")
def pairs() -> PreferenceDataset:
    from arithmetic import build_tokenizer

    rows = [{"prompt": f"{i % 13}+{i // 13}?", "chosen": "1", "rejected": "2"} for i in range(100)]
    return PreferenceDataset.from_records(rows, tokenizer=build_tokenizer(), max_length=9)


class Policy:
    """A policy that only counts its updates; its log-probs depend on that count."""

    updates = 0

    def measure(self, pool: PreferenceDataset):
        chosen = torch.from_numpy(np.cos(pool.index * (1.0 + self.updates)) * 5)
        return pair_logps(pool.index, chosen, -chosen, pool.chosen_tokens, pool.rejected_tokens)


class Unmeasured:
    """As a store is that several processes have not filled yet."""

    def take(self, rows):
        raise ValueError("log-probs are missing")


def reference(size: int):
    zero, two = torch.zeros(size), torch.full((size,), 2)
    return pair_logps(range(size), zero, zero, two, two)


def build_loader(pairs, timeline, policy, *, seed=0, measured=None, **options) -> SelectiveLoader:
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
    batches = []
    for rows in loader:
        batches.append(rows.tolist())
        policy.updates += 1
    return batches


@given(timelines())
def test_each_interval_is_measured_after_exactly_the_steps_before_it(pairs, timeline):
    policy, measured = Policy(), []
    run(build_loader(pairs, timeline, policy, measured=measured), policy)
    expected = [
        (step, pool.tolist())
        for step, pool, kept in zip(
            timeline.first_step, timeline.plan.pools, timeline.kept_count, strict=True
        )
        if kept < len(pool)  # nothing is measured where nothing can be dropped
    ]
    assert [(updates, pool) for updates, pool in measured] == expected


@given(timelines())
def test_every_kept_pair_is_trained_exactly_once_in_whole_batches(pairs, timeline):
    policy, selections = Policy(), {}
    loader = build_loader(pairs, timeline, policy, on_select=selections.__setitem__)
    batches = run(loader, policy)
    assert len(batches) == len(loader) == timeline.total_steps
    assert {len(batch) for batch in batches[:-1]} <= {timeline.batch_size}
    kept = Counter(row for selection in selections.values() for row in selection)
    assert Counter(row for batch in batches for row in batch) == kept
    trained, carried = iter(row for batch in batches for row in batch), 0
    for k in sorted(selections):  # interval by interval, the rest of one before the next
        count = len(selections[k])
        assert sorted(next(trained) for _ in range(count)) == sorted(selections[k])
        carried += count


@given(timelines(), st.data())
@settings(max_examples=50)
def test_resuming_anywhere_repeats_and_loses_nothing(pairs, timeline, data):
    policy, measured = Policy(), []
    whole = run(build_loader(pairs, timeline, policy, measured=measured), policy)
    stop = data.draw(st.integers(0, len(whole)))

    first, policy = [], Policy()
    loader = build_loader(pairs, timeline, policy)
    state = loader.state_dict()
    for rows in loader:
        if len(first) == stop:
            break
        first.append(rows.tolist())
        policy.updates += 1
        state = loader.state_dict()

    again, rest = build_loader(pairs, timeline, policy, measured=(later := [])), []
    again.load_state_dict(state)
    rest = run(again, policy)
    assert first + rest == whole
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


def test_a_state_of_another_run_is_refused(pairs):
    plans = [plan_pools([0] * 100, Constant((1.0,)), 4, seed=seed) for seed in (0, 1)]
    state = build_loader(pairs, Timeline(plans[0], Constant(0.5), 8), Policy()).state_dict()
    for plan, keep, batch_size, seed in [
        (plans[1], 0.5, 8, 0),
        (plans[0], 0.6, 8, 0),
        (plans[0], 0.5, 4, 0),
        (plans[0], 0.5, 8, 1),
    ]:
        other = build_loader(pairs, Timeline(plan, Constant(keep), batch_size), Policy(), seed=seed)
        words = "belongs to another run" if batch_size == 8 else "takes 8 pairs per .* would be 4"
        with pytest.raises(ValueError, match=words):
            other.load_state_dict(state)


def test_a_host_that_fetches_ahead_gets_the_same_batches(pairs):
    timeline = Timeline(plan_pools([0] * 100, Constant((1.0,)), 4), Constant(0.5), 8)
    one_by_one = [rows.tolist() for rows in build_loader(pairs, timeline, Policy())]
    ahead = build_loader(pairs, timeline, Policy())
    assert [b.tolist() for batches in ahead.decided() for b in batches] == one_by_one
    assert ahead.step == len(ahead)


@pytest.mark.parametrize("taken", range(7))
def test_a_host_that_fetches_ahead_resumes_where_it_stood(pairs, taken):
    timeline = Timeline(plan_pools([0] * 100, Constant((1.0,)), 4), Constant(0.5), 8)
    whole = [rows.tolist() for rows in build_loader(pairs, timeline, Policy())]
    loader, seen = build_loader(pairs, timeline, Policy()), 0
    for batches in loader.decided():
        seen += len(batches)
        if seen > taken:  # killed somewhere in this list, all of which was fetched
            break
    loader.step = taken
    resumed = build_loader(pairs, timeline, Policy())
    resumed.load_state_dict(loader.state_dict())
    assert [rows.tolist() for rows in resumed] == whole[taken:]


@given(st.integers(1, 20), st.integers(1, 4), st.integers(1, 5))
def test_a_batch_is_dealt_once_and_in_as_many_passes_everywhere(size, world, micro):
    class Rank(Processes):
        rank = property(lambda self: self.group)
        size = property(lambda self: world)

    shares = [dealt(np.arange(size), Rank(rank), micro) for rank in range(world)]
    assert len({len(share) for share in shares}) == 1
    assert max(len(part.rows) for share in shares for part in share) <= micro
    trained = [part.rows for share in shares for part in share if part.share]
    assert sorted(np.concatenate(trained)) == [*range(size)]
    # weighted as the host weighs them, all passes of all processes make one mean over the batch
    total = sum(len(part.rows) * part.share for share in shares for part in share)
    assert total / world == pytest.approx(1)
    means = [sum(part.mean_share for part in share) / len(share) for share in shares]
    assert sum(means) / world == pytest.approx(1)


def test_a_state_of_another_selector_is_refused(pairs):
    timeline = Timeline(plan_pools([0] * 100, Constant((1.0,)), 4), Constant(0.5), 8)
    state = build_loader(pairs, timeline, Policy()).state_dict()
    for change in ({"seed": 1}, {"no_signal": "hash"}, {"score": sage}, {"noise_floor": 1.0}):
        other = build_loader(pairs, timeline, Policy())
        other = SelectiveLoader(replace(other.selector, **change), timeline, pairs, other.model)
        with pytest.raises(ValueError, match="this state belongs to another run"):
            other.load_state_dict(state)


def test_a_reference_that_was_measured_with_a_trained_policy_is_refused(pairs):
    timeline = Timeline(plan_pools([0] * 100, Constant((1.0,)), 4), Constant(0.5), 8)
    began = replace(
        build_loader(pairs, timeline, Policy()).selector, reference=Policy().measure(pairs)
    )

    def loader(selector, chosen: float):
        moved = began.reference._replace(chosen=began.reference.chosen * chosen)
        return SelectiveLoader(replace(selector, reference=moved), timeline, pairs, Policy())

    state = loader(began, 1.0).state_dict()
    loader(began, 1.05).load_state_dict(state)  # another device rounds otherwise
    with pytest.raises(
        ValueError, match=r"the reference is another .* of 25 pairs differ by 0\.15 nats of 3\.05"
    ):
        loader(began, 1.1).load_state_dict(state)
    # one that is not measured yet is compared with nothing, and neither is an older state
    for unknown in (began.reference.take([]), Unmeasured()):
        selector = replace(began, reference=unknown)
        SelectiveLoader(selector, timeline, pairs, Policy()).load_state_dict(state)
    del state["reference"]
    loader(began, 1.1).load_state_dict(state)


def test_a_plan_that_was_not_put_on_its_rows_is_refused(pairs):
    part = pairs.take(np.arange(50, 100))
    plan = plan_pools([0] * 50, Constant((1.0,)), 4)
    with pytest.raises(ValueError, match=r"plan\.on_rows\(rows\)"):
        build_loader(part, Timeline(plan, Constant(0.5), 8), Policy())
    build_loader(part, Timeline(plan.on_rows(part.index), Constant(0.5), 8), Policy())


def test_a_log_of_another_run_is_refused(pairs, tmp_path):
    for num_pools in (5, 2):
        timeline = Timeline(plan_pools([0] * 100, Constant((1.0,)), num_pools), Constant(0.5), 8)
        loader = build_loader(pairs, timeline, Policy(), log=SelectionLog(tmp_path))
        if num_pools == 5:
            list(loader)
    with pytest.raises(FileExistsError, match="holds the decisions of another run"):
        next(iter(loader))


def test_a_selector_that_keeps_another_share_is_refused(pairs):
    timeline = Timeline(plan_pools([0] * 100, Constant((1.0,)), 4), Constant(0.5), 8)
    selector = build_loader(pairs, timeline, Policy()).selector
    with pytest.raises(ValueError, match="they must agree, since totals are computed beforehand"):
        SelectiveLoader(replace(selector, keep=Constant(0.4)), timeline, pairs, Policy())


def test_a_plan_for_more_pairs_is_refused(pairs):
    timeline = Timeline(plan_pools([0] * 101, Constant((1.0,)), 4), Constant(0.5), 8)
    with pytest.raises(ValueError, match="deals row 100, which is not among the 100 pairs given"):
        build_loader(pairs, timeline, Policy())


@given(st.integers(1, 100), st.integers(1, 20), st.integers(1, 3), st.data())
def test_the_baseline_trains_everything_and_resumes(pairs, size, batch_size, epochs, data):
    def fresh():
        return ShuffledLoader(pairs.take(np.arange(size)), batch_size=batch_size, epochs=epochs)

    whole = [rows.tolist() for rows in fresh()]
    assert len(whole) == len(fresh())
    assert Counter(row for batch in whole for row in batch) == dict.fromkeys(range(size), epochs)
    stop, loader = data.draw(st.integers(0, len(whole))), fresh()
    state = loader.state_dict() | {"step": stop}
    loader.load_state_dict(state)
    assert [rows.tolist() for rows in loader] == whole[stop:]


# The log


def test_a_decision_is_on_disk_before_its_first_batch(pairs, tmp_path):
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


def test_the_log_holds_the_evidence_for_the_same_decision(still, tmp_path):
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


def test_a_partial_interval_is_passed_over(tmp_path):
    log = SelectionLog(tmp_path)
    log.write(0, selection(), ["a", "b", "c"])
    log.write(1, selection(), ["a", "b", "c"])
    whole = (tmp_path / "interval-000001.parquet").read_bytes()
    (tmp_path / "interval-000002.partial").write_bytes(whole[:100])  # a crash while writing
    assert log.read()["interval"].to_list() == [0] * 3 + [1] * 3
    (tmp_path / "interval-000001.parquet").write_bytes(whole[:-50])  # a disk that lost the end
    with pytest.warns(UserWarning, match=r"interval-000001\.parquet cannot be read"):
        assert log.read()["interval"].to_list() == [0] * 3


def test_a_log_of_a_later_version_is_refused(tmp_path):
    log = SelectionLog(tmp_path)
    log.write(0, selection(), ["a", "b", "c"])
    path = tmp_path / "interval-000000.parquet"
    pl.read_parquet(path).with_columns(schema_version=SCHEMA_VERSION + 1).write_parquet(path)
    with pytest.raises(
        ValueError, match="has schema version 3, this version of sage-select reads 1 to 2"
    ):
        log.read()


def test_what_was_not_scored_is_null(tmp_path):
    log = SelectionLog(tmp_path)
    log.write(0, selection(), ["a", "b", "c"])
    assert log.read()["score"].null_count() == log.read()["rank"].null_count() == 3


def decision(scores, count):
    order = np.argsort(-np.array(scores), kind="stable")
    kept = np.isin(np.arange(len(scores)), order[:count])
    pool = np.arange(len(scores))
    return Selection(order[:count], pool, np.array(scores, float), kept, step=0, progress=0.0)


def test_flips_between_two_runs_are_counted_and_placed(tmp_path):
    logs = [SelectionLog(tmp_path / name) for name in "ab"]
    for interval, (one, other) in enumerate([
        ([4, 3, 2, 1], [4, 3, 2, 1]),
        ([4, 2.02, 2, 1], [4, 1.99, 2, 1]),
        ([-1, -2, -2.02, -3], [-1, -2.03, -2.02, -3]),
    ]):  # fmt: skip
        for log, scores in zip(logs, (one, other), strict=True):
            log.write(interval, decision(scores, 2), [*"wxyz"])
    logs[0].write(3, decision([1, 2], 1), [*"wx"])  # the other run is not there yet
    found = flips_of_logs(*logs)
    assert found["interval"].to_list() == [0, 1, 2]
    assert found["flipped"].to_list() == [0, 1, 1]
    assert found["kept"].to_list() == [2, 2, 2]
    assert found["distance"][0] is None
    assert found["distance"][1] == pytest.approx(0.02 / 2.02)
    assert found["distance"][2] == pytest.approx(0.02 / 2)


def test_flips_between_runs_of_other_pairs_are_refused(tmp_path):
    logs = [SelectionLog(tmp_path / name) for name in "ab"]
    for log, ids in zip(logs, ("wx", "wy"), strict=True):
        log.write(0, decision([1, 2], 1), [*ids])
    with pytest.raises(ValueError, match="other candidates in interval 0"):
        flips_of_logs(*logs)
