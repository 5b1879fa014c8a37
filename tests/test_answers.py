"""Answers of users' functions are held against what they were asked for, and odd calls refused."""

from copy import deepcopy
from dataclasses import dataclass, replace

import numpy as np
import polars as pl
import pytest
import torch
from strategies import pair_logps, with_rewards
from torch import nn

from sage_select import (
    Constant,
    Linear,
    PairLogps,
    PreferenceDataset,
    Selection,
    SelectiveLoader,
    Selector,
    ShuffledLoader,
    Timeline,
    Training,
    fit,
    measure,
    nca,
    plan_pools,
    sage,
    update,
)
from sage_select.metrics import preference_metrics
from sage_select.models.sequences import as_pair_logps
from sage_select.references.logp_tables import read_reference

ROWS = np.array([7, 2, 9, 4, 0, 30, 12, 5])


@pytest.fixture(scope="module")
def pairs() -> PreferenceDataset:
    from arithmetic import build_tokenizer

    rows = [{"prompt": f"{i}+1?", "chosen": "1" * (1 + i % 3), "rejected": "2"} for i in range(40)]
    return PreferenceDataset.from_records(rows, tokenizer=build_tokenizer(), max_length=12)


def true_logps(pool: PreferenceDataset) -> PairLogps:
    chosen, rejected = -0.5 - pool.index, -40.0 + pool.index / 3
    return pair_logps(pool.index, chosen, rejected, pool.chosen_tokens, pool.rejected_tokens)


def selecting(pairs, *, keep=Constant(0.5), score=sage, **options) -> Selector:  # noqa: B008
    flat = true_logps(pairs)._replace(chosen=torch.full((40,), -9.0).double())
    defaults = {"reference": flat, "progress": lambda step: 0.0}
    return Selector(score, keep, **defaults | options)


def answering(change):
    """A measure whose answer is changed by a function of it."""
    return lambda model, pool: change(true_logps(pool))


def shuffled(logps: PairLogps) -> PairLogps:
    return logps.take(logps.index.flip(0))


# The measure

WRONG_MEASURES = {
    "positions as rows": (
        lambda x: x._replace(index=torch.arange(8)), "these are positions in the pool"),
    "rows shifted by one": (
        lambda x: x._replace(index=x.index + 1), "that were not asked for, such as 1"),
    "a row twice": (
        lambda x: x._replace(index=torch.cat([x.index[:1], x.index[:7]])), "repeated rows"),
    "a row missing": (lambda x: x.take(x.index[1:]), "7 pairs for 8 rows: 1 missing, such as 7"),
    "everything twice": (lambda x: PairLogps.concatenate([x, x]), "16 pairs for 8 rows: repeated"),
    "no rows": (lambda x: x.take([]), "0 pairs for 8 rows"),
    "losses": (lambda x: x._replace(chosen=-x.chosen), "above 0 for 8 of 8 pairs: row 7 has 7.5"),
    "one log-prob above 0": (
        lambda x: x._replace(rejected=x.rejected.where(x.index != 4, 0.1)),
        "above 0 for 1 of 8 pairs: row 4"),
    "NaN": (lambda x: x._replace(chosen=x.chosen * torch.nan), "log-probs of row 7 are not finite"),
    "-inf": (lambda x: x._replace(rejected=x.rejected - torch.inf), "of row 7 are not finite"),
    "whole numbers": (lambda x: x._replace(chosen=x.chosen.long()), "chosen in torch.int64"),
    "a column": (lambda x: x._replace(chosen=x.chosen[:, None]), "of a PairLogps is [P]"),
    "all in columns": (lambda x: PairLogps(*(f[:, None] for f in x)), "of a PairLogps is [P]"),
    "a mean": (lambda x: x._replace(rejected=x.rejected.mean()), "of a PairLogps is [P]"),
    "other tokens": (
        lambda x: x._replace(chosen_tokens=x.chosen_tokens + 1),
        "chosen_tokens for row 7, and the pool has 2"),
    "values of other rows": (
        lambda x: shuffled(x)._replace(index=x.index),
        "chosen_tokens for row 7, and the pool has 2"),
    "arrays": (lambda x: PairLogps(*(f.numpy() for f in x)), "index as ndarray"),
    "without data": (lambda x: x.to("meta"), "index as meta"),
    "a tuple": (tuple, "returned tuple; return a PairLogps"),
    "nothing": (lambda x: None, "returned NoneType; return a PairLogps"),
    "half rows": (lambda x: x._replace(index=x.index + 0.5), "index in torch.float32"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_MEASURES)
def test_a_measure_that_answers_wrongly_is_refused(pairs, name):
    change, words = WRONG_MEASURES[name]
    decide = selecting(pairs, measure=answering(change))
    with pytest.raises((ValueError, TypeError)) as error:
        decide.select(None, pairs.take(ROWS), 0)
    assert words in str(error.value)
    assert "measure" in str(error.value) or "policy" in str(error.value)


RIGHT_MEASURES = {
    "another order": shuffled,
    "in the order of rows": lambda x: x.take(x.index.sort().values),
    "rounding above 0": lambda x: x._replace(chosen=x.chosen.clamp(max=-0.5) + 1e-9),
    "float32": lambda x: PairLogps(*(f.float() for f in x)),
    "with a graph": lambda x: x._replace(chosen=x.chosen.requires_grad_() * 1),
    "int32 rows": lambda x: x._replace(index=x.index.int(), chosen_tokens=x.chosen_tokens.int()),
}


@pytest.mark.parametrize("name", RIGHT_MEASURES)
def test_a_measure_may_answer_in_another_order_or_type(pairs, name):
    pool = pairs.take(ROWS)
    expected = selecting(pairs, measure=answering(lambda x: x)).select(None, pool, 3)
    decision = selecting(pairs, measure=answering(RIGHT_MEASURES[name])).select(None, pool, 3)
    assert list(decision) == list(expected)
    assert decision.pool.tolist() == decision.policy.index.tolist() == ROWS.tolist()
    assert np.allclose(decision.scores, expected.scores)
    assert decision.policy.chosen.dtype == torch.float64
    assert not decision.policy.chosen.requires_grad


def test_positions_that_look_like_rows_are_refused(pairs):
    """For a pool of rows 0 to P - 1, positions and rows in another order are the same numbers."""
    decide = selecting(pairs, measure=answering(lambda x: x._replace(index=torch.arange(4))))
    with pytest.raises(ValueError, match="positions in the pool"):
        decide.select(None, pairs.take([2, 0, 3, 1]), 0)


def test_a_measure_leaves_the_model_and_the_generators_as_they_were(pairs):
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    model[0].eval()

    def careless(model, pool):
        model.eval()
        torch.manual_seed(1)
        torch.set_grad_enabled(False)
        return true_logps(pool)

    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    selecting(pairs, measure=careless).select(model, pairs.take(ROWS), 0)
    assert [module.training for module in model.modules()] == [True, False, True]
    assert torch.is_grad_enabled()
    assert torch.equal(torch.rand(3), expected)


# The reference


@dataclass
class Answering:
    """A reference of the user's own, which changes what it looks up."""

    logps: PairLogps
    change: object

    def take(self, rows):
        return self.change(self.logps.take(rows))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x: x._replace(index=torch.arange(8)), "these are positions in the pool"),
        (lambda x: x.take(x.index[:7]), "7 pairs for 8 rows"),
        (lambda x: x._replace(chosen=-x.chosen), "above 0 for 8 of 8 pairs"),
        (lambda x: x._replace(chosen=x.chosen * torch.inf), "the reference's log-probs of row 7"),
        (lambda x: x._replace(chosen_tokens=x.chosen_tokens * 2), "different response tokens"),
        (lambda x: x.chosen, "returned Tensor; return a PairLogps"),
        (lambda x: None, "returned NoneType"),
    ],
)
def test_a_reference_that_answers_wrongly_is_refused(pairs, change, words):
    reference = Answering(selecting(pairs).reference, change)
    decide = selecting(pairs, measure=answering(lambda x: x), reference=reference)
    with pytest.raises((ValueError, TypeError)) as error:
        decide.select(None, pairs.take(ROWS), 0)
    assert words in str(error.value)
    assert "reference" in str(error.value)


def test_a_reference_may_answer_in_another_order(pairs):
    pool, reference = pairs.take(ROWS), Answering(selecting(pairs).reference, shuffled)
    decide = selecting(pairs, measure=answering(lambda x: x))
    expected = decide.select(None, pool, 0)
    assert list(replace(decide, reference=reference).select(None, pool, 0)) == list(expected)


# The score, the schedule and progress


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (lambda p, r: p.chosen.mean(), "one value per pair, [8], got shape []"),
        (lambda p, r: p.chosen[:, None], "got shape [8, 1]"),
        (lambda p, r: p.chosen[:7], "got shape [7]"),
        (lambda p, r: p.chosen.where(p.index != 9, torch.nan),
         "NaN for 1 of 8 pairs, the first is row 9"),
        (lambda p, r: None, "the score returned NoneType"),
        (lambda p, r: ["a"] * 8, "the score returned list"),
        (lambda p, r: p.chosen + 1j, "the score returned torch.complex128"),
        (lambda p, r: p.chosen.to("meta"), "the score returned torch.float64"),
    ],
)  # fmt: skip
def test_a_score_that_answers_wrongly_is_refused(pairs, answer, words):
    decide = selecting(pairs, score=answer, measure=answering(lambda x: x))
    with pytest.raises((ValueError, TypeError)) as error:
        decide.select(None, pairs.take(ROWS), 0)
    assert words in str(error.value)


@pytest.mark.parametrize(
    "kind",
    [
        lambda x: x.numpy(),
        lambda x: x.tolist(),
        lambda x: x.long(),
        lambda x: x.float().requires_grad_(),
        lambda x: x - torch.where(x == x.min(), torch.inf, 0.0),
    ],
)
def test_scores_may_be_arrays_lists_whole_numbers_and_infinite(pairs, kind):
    decide = selecting(pairs, score=lambda p, r: kind(-p.chosen.round()), measure=true_measure)
    assert set(decide.select(None, pairs.take(ROWS), 0)) == {30, 12, 9, 7}


def true_measure(model, pool):
    return true_logps(pool)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda p, r: p.chosen.zero_(),
        lambda p, r: p.index.copy_(p.index.sort().values),
        lambda p, r: r.chosen.numpy().fill(1.0),
    ],
)
def test_a_score_that_changes_its_arguments_does_not_change_the_evidence(pairs, spoil):
    def spoiling(policy, reference):
        value = policy.chosen.clone()
        spoil(policy, reference)
        return value

    pool = pairs.take(ROWS)
    decide = selecting(pairs, score=spoiling, measure=true_measure)
    decision, expected = decide.select(None, pool, 0), true_logps(pool)
    assert all(map(torch.equal, decision.policy, expected))
    assert all(map(torch.equal, decision.reference, decide.reference.take(ROWS)))


@pytest.mark.parametrize("ratio", [1.5, -0.1, np.nan, (0.5,), None, "0.5", True])
def test_a_keep_schedule_that_answers_wrongly_is_refused(pairs, ratio):
    decide = selecting(pairs, keep=lambda progress: ratio, measure=true_measure)
    with pytest.raises(
        (ValueError, TypeError), match=r"Selector: the keep ratio of .* at progress 0"
    ):
        decide.select(None, pairs.take(ROWS), 0)


@pytest.mark.parametrize("progress", [1.5, -0.1, np.nan, "0.5", None, (0.0,)])
def test_a_progress_outside_its_range_is_refused(pairs, progress):
    decide = selecting(pairs, progress=lambda step: progress, measure=true_measure)
    with pytest.raises((ValueError, TypeError), match=r"Selector: progress\(4\) must "):
        decide.select(None, pairs.take(ROWS), 4)
    with pytest.raises((ValueError, TypeError), match=r"Selector\.rank: progress must "):
        decide.rank(true_logps(pairs), decide.reference, progress)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"keep": 0.5}, "keep must be a function, got 0.5; pass Constant(0.5)"),
        ({"keep": (1.0, 0.4)}, "pass Linear(1.0, 0.4)"),
        ({"keep": "linear"}, "such as Constant(0.5) or Linear(1.0, 0.4)"),
        ({"score": "sage"}, "got 'sage'; pass the function, sage_select.scores.sage"),
        ({"score": "sag"}, "pass a function (policy, reference) -> [P]"),
        ({"score": None}, "score must be a function, got None"),
        ({"progress": 0.5}, "progress must be a function, got 0.5; pass a function of the step"),
        ({"measure": "server"}, "measure must be a function, got 'server'"),
        ({"reference": np.zeros(3).tolist()}, "use measure(reference_model, dataset)"),
        ({"multiple": 0}, "Selector: multiple must be at least 1, got 0"),
        ({"multiple": 2.5}, "Selector: multiple must be a whole number, got 2.5"),
        ({"seed": "x"}, "Selector: seed must be a whole number, got 'x'"),
        ({"noise_floor": np.nan}, "Selector: noise_floor must be >= 0 and finite, got nan"),
        ({"noise_floor": "0"}, "Selector: noise_floor must be a number, got '0'"),
        ({"no_signal": None}, "no_signal must be hash or score, got None"),
        ({"skip_full": 1}, "Selector: skip_full must be True or False, got 1"),
    ],
)
def test_settings_of_a_selector_that_make_no_sense_are_refused(pairs, options, words):
    with pytest.raises((ValueError, TypeError)) as error:
        selecting(pairs, **options)
    assert words in str(error.value)


@pytest.mark.parametrize("step", ["1", -1, 1.5, None, True])
def test_a_step_is_a_whole_number(pairs, step):
    decide = selecting(pairs, measure=true_measure)
    with pytest.raises((ValueError, TypeError), match=r"Selector\.select: step must be"):
        decide.select(None, pairs.take(ROWS), step)
    with pytest.raises((ValueError, TypeError), match=r"Selector\.rank: step must be"):
        decide.rank(true_logps(pairs), decide.reference, 0.0, step)


def test_rank_takes_rewards_with_a_reference_of_zeros():
    policy, reference = with_rewards([3.0, -3.0], [0.0, 0.0])
    decide = Selector(sage, Constant(0.5), reference, lambda step: 0.0)
    assert list(decide.rank(policy, reference, 0.0)) == [1]


# A selector of the user's own


def run_of(pairs, change=lambda selection: selection, **options) -> SelectiveLoader:
    """A loader with a selector that is none of ours; its decisions are changed by a function."""
    timeline = Timeline(plan_pools([0] * 40, Constant((1.0,)), 2), Constant(0.5), 4)
    inner = selecting(pairs, measure=true_measure)

    class Own:
        keep, multiple, reference = timeline.keep, 1, inner.reference

        def select(self, model, pool, step, *, progress):
            return change(inner.select(model, pool, step, progress=progress))

    return SelectiveLoader(Own(), timeline, pairs, None, **options)


def test_a_selector_of_ones_own_runs_and_resumes(pairs):
    expected = [rows.tolist() for rows in run_of(pairs)]
    loader = run_of(pairs)
    first = [rows.tolist() for rows, _ in zip(loader, range(2), strict=False)]
    resumed = run_of(pairs)
    resumed.load_state_dict(loader.state_dict())
    assert first[:2] + [rows.tolist() for rows in resumed] == expected[: len(first)] + expected[3:]


def other_row(selection: Selection) -> Selection:
    outside = next(row for row in range(40) if row not in selection.pool)
    return replace(selection, indices=np.append(selection.indices[1:], outside))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (other_row, "which is not in the pool"),
        (lambda s: replace(s, indices=np.append(s.indices[1:], s.indices[-1])), "has a row twice"),
        (
            lambda s: replace(s, indices=s.indices[1:]),
            "plans to keep 10 of 20 pairs, but the selector kept 9",
        ),
        (lambda s: replace(s, pool=s.pool[::-1]), "Selection.pool has other rows than the pool"),
        (lambda s: replace(s, pool=np.arange(20)), "Selection.pool has other rows than the pool"),
        (lambda s: replace(s, kept=~s.kept), "must be bool [P] and mark the rows"),
        (lambda s: replace(s, kept=s.kept.astype(int)), "must be bool [P] and mark the rows"),
        (lambda s: replace(s, scores=s.scores[:3]), "Selection.scores must be [P] = [20]"),
        (lambda s: s.indices, "select returned ndarray"),
        (lambda s: None, "select returned NoneType"),
    ],
)
def test_a_selector_that_keeps_other_pairs_is_refused(pairs, change, words):
    with pytest.raises((ValueError, TypeError)) as error:
        next(iter(run_of(pairs, change)))
    assert words in str(error.value)
    assert "interval 0" in str(error.value)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda pairs: SelectiveLoader(sage, run_of(pairs).timeline, pairs, None), "no `select`"),
        (lambda pairs: SelectiveLoader(selecting(pairs), 3, pairs, None), "must be a Timeline"),
        (
            lambda pairs: SelectiveLoader(selecting(pairs), run_of(pairs).timeline, [1, 2], None),
            "dataset must be a PreferenceDataset",
        ),
        (lambda pairs: run_of(pairs, seed="x"), "SelectiveLoader: seed must be a whole number"),
        (lambda pairs: run_of(pairs, log="runs/log"), "log must be a SelectionLog"),
        (lambda pairs: run_of(pairs, on_select=3), "on_select must be a function"),
        (lambda pairs: ShuffledLoader(pairs, batch_size=2.5), "batch_size must be a whole number"),
        (lambda pairs: ShuffledLoader(pairs, batch_size=0), "batch_size must be at least 1, got 0"),
        (lambda pairs: ShuffledLoader(pairs, batch_size=1, epochs="3"), "epochs must be a whole"),
        (lambda pairs: ShuffledLoader(pairs, batch_size=1, seed=None), "seed must be a whole"),
        (lambda pairs: ShuffledLoader([1], batch_size=1), "pairs must be a PreferenceDataset"),
    ],
)
def test_arguments_of_loaders_that_make_no_sense_are_refused(pairs, call, words):
    with pytest.raises((ValueError, TypeError)) as error:
        call(pairs)
    assert words in str(error.value)


# A state to resume from

DAMAGED = [
    ({"step": None}, "its entry 'step' is None"),
    ({"step": -1}, "its entry 'step' is -1"),
    ({"step": 10**9}, "its entry 'step' is 1000000000"),
    ({"step": 2.0}, "its entry 'step' is 2.0"),
    ({"step": 2}, "remaining rows"),
    ({"batch_size": "4"}, "its entry 'batch_size' is '4'"),
    ({"scored": 9}, "its entry 'scored' is 9"),
    ({"scored": 0}, "remaining rows"),
    ({"rows": [10**6] * 6}, "row 1000000 is in none of the 1 pools"),
    ({"rows": [-1] * 6}, "row -1 is in none"),
    ({"rows": ["a"]}, "not row numbers"),
    ({"rows": [[1, 2], [3]]}, "not row numbers"),
    ({"rows": None}, "not row numbers"),
    ({"tokens_scored": -3}, "its entry 'tokens_scored' is -3"),
    ({"reference": "x"}, "its entry 'reference' is 'x'"),
    ({"reference": [1.0]}, "1 reference log-probs"),
    ({"parts": 3}, "its entry 'parts' is 3"),
]


@pytest.mark.parametrize(("change", "words"), DAMAGED, ids=[row[1] for row in DAMAGED])
def test_a_damaged_state_is_refused_and_changes_nothing(pairs, change, words):
    loader = run_of(pairs)
    next(iter(loader))
    state = loader.state_dict()
    before = loader.state_dict()
    with pytest.raises(ValueError, match="no state of the loader, or a damaged one") as error:
        loader.load_state_dict(state | change)
    assert words in str(error.value)
    assert loader.state_dict() == before


@pytest.mark.parametrize("name", ["run", "batch_size", "step", "scored", "rows", "tokens_scored"])
def test_a_state_without_an_entry_is_refused(pairs, name):
    loader = run_of(pairs)
    state = loader.state_dict()
    del state[name]
    with pytest.raises(ValueError, match=f"it has no entry '{name}'"):
        loader.load_state_dict(state)


@pytest.mark.parametrize("state", [None, [], "step", 3])
def test_something_else_than_a_state_is_refused(pairs, state):
    for loader in (run_of(pairs), ShuffledLoader(pairs, batch_size=4)):
        with pytest.raises(ValueError, match="no state of the loader"):
            loader.load_state_dict(state)
    with pytest.raises(ValueError, match="its entry 'step' is 11, not a whole number from 0 to 10"):
        loader.load_state_dict(loader.state_dict() | {"step": 11})


def test_what_differs_from_a_state_is_named(pairs):
    from arithmetic import build_tokenizer

    rows = [{"prompt": f"{i}+1?", "chosen": "1" * (1 + i % 3), "rejected": "2"} for i in range(40)]
    shorter = PreferenceDataset.from_records(
        rows, tokenizer=build_tokenizer(), max_length=int(pairs.sequence_lengths.max()) - 1
    )
    assert shorter.ids.tolist() == pairs.ids.tolist()  # the same pairs, some with fewer tokens
    state = ShuffledLoader(pairs, batch_size=4).state_dict()
    cut = ShuffledLoader(shorter, batch_size=4)
    with pytest.raises(ValueError, match=r"differs in token counts; .* another max_length"):
        cut.load_state_dict(state)
    for options, words in (
        ({"epochs": 2}, "differs in epochs;"),
        ({"seed": 1}, "differs in seed of the loader;"),
    ):
        other = ShuffledLoader(pairs, batch_size=4, **options)
        with pytest.raises(ValueError, match=words):
            other.load_state_dict(state)
    timeline = run_of(pairs).timeline
    own = selecting(pairs, measure=true_measure)
    state = SelectiveLoader(own, timeline, pairs, None).state_dict()
    other_keep = Timeline(timeline.plan, Linear(0.5, 0.4), 4)
    for selector, path, options, words in (
        (replace(own, score=nca), timeline, {}, "differs in selector;"),
        (own, timeline, {"seed": 1}, "differs in seed of the loader;"),
        (replace(own, keep=other_keep.keep), other_keep, {}, "numbers of kept pairs, selector;"),
    ):
        loader = SelectiveLoader(selector, path, pairs, None, **options)
        with pytest.raises(ValueError, match=words):
            loader.load_state_dict(state)
    loader = SelectiveLoader(replace(own, score=nca), timeline, pairs, None)
    del state["parts"]  # as older versions saved it
    with pytest.raises(ValueError, match="the score or a seed differ"):
        loader.load_state_dict(state)
    SelectiveLoader(own, timeline, pairs, None).load_state_dict(state)


# The loss

WRONG_LOSSES = {
    "a mean": (lambda p, r, beta: nca(p, r).mean(), ValueError, "returned shape [] for 4 pairs"),
    "a sum in a list": (lambda p, r, beta: [1.0], TypeError, "returned list"),
    "a column": (lambda p, r, beta: nca(p, r)[:, None], ValueError, "returned shape [4, 1]"),
    "too few": (lambda p, r, beta: nca(p, r)[1:], ValueError, "returned shape [3] for 4 pairs"),
    "nothing": (lambda p, r, beta: None, TypeError, "returned NoneType"),
    "detached": (lambda p, r, beta: nca(p, r).detach(), ValueError, "has no gradient"),
    "of the reference": (lambda p, r, beta: r.chosen - r.rejected, ValueError, "has no gradient"),
    "whole numbers": (lambda p, r, beta: nca(p, r).long(), TypeError, "returned torch.int64"),
    "NaN": (lambda p, r, beta: nca(p, r) + torch.nan, FloatingPointError, "not finite"),
    "infinite": (lambda p, r, beta: nca(p, r) + torch.inf, FloatingPointError, "not finite"),
}


@pytest.mark.parametrize("name", WRONG_LOSSES)
def test_a_loss_that_answers_wrongly_makes_no_update(world, name):
    loss, kind, words = WRONG_LOSSES[name]
    before = [p.detach().clone() for p in world.model.parameters()]
    optimizer = torch.optim.SGD(world.model.parameters(), lr=1.0)
    batch, reference = world.dataset.take(range(4)), world.selector.reference
    with pytest.raises(kind) as error:
        update(world.model, optimizer, batch, reference, Training(loss=loss))
    assert words in str(error.value)
    assert all(map(torch.equal, before, world.model.parameters()))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x: x._replace(index=x.index + 1), "that were not asked for"),
        (lambda x: x._replace(rejected=-x.rejected), "above 0"),
        (lambda x: x._replace(rejected_tokens=x.rejected_tokens + 1), "rejected_tokens for row 3"),
        (lambda x: None, "returned NoneType"),
    ],
)
def test_a_reference_that_answers_wrongly_makes_no_update(world, change, words):
    reference = Answering(world.selector.reference, change)
    optimizer = torch.optim.SGD(world.model.parameters(), lr=1.0)
    with pytest.raises((ValueError, TypeError), match=r"update: reference\.take") as error:
        update(world.model, optimizer, world.dataset.take([3, 1]), reference)
    assert words in str(error.value)


def evaluated(world, *, loss=nca, change=lambda logps: logps):
    """Evaluate twice and train in between; loss and reference are others for held-out pairs."""
    held_out = world.dataset.take([1, 8, 3])

    def honest_in_training(policy, reference, *, beta):
        held = 8 in policy.index.tolist()
        return loss(policy, reference, beta=beta) if held else nca(policy, reference, beta=beta)

    class Changing:
        def take(self, rows):
            logps = world.selector.reference.take(rows)
            return change(logps) if 8 in logps.index.tolist() else logps

    return fit(
        world.model,
        ShuffledLoader(world.dataset.take([0, 2, 4, 5]), batch_size=4),
        world.dataset,
        Changing(),
        Training(loss=honest_in_training, learning_rate=1e-3),
        held_out=held_out,
        show_progress=False,
    )


# of the right shape
ALLOWED_WITHOUT_GRADIENT = ("NaN", "infinite", "detached", "of the reference")


@pytest.mark.parametrize("name", [n for n in WRONG_LOSSES if n not in ALLOWED_WITHOUT_GRADIENT])
def test_a_loss_that_answers_wrongly_about_held_out_pairs_is_refused(world, name):
    loss, kind, words = WRONG_LOSSES[name]
    with pytest.raises(kind, match="train: evaluation: the loss") as error:
        evaluated(world, loss=loss)
    assert words.replace("for 4 pairs", "").replace("[4, 1]", "[3, 1]").replace("[3] ", "[2] ") in (
        str(error.value)
    )


@pytest.mark.parametrize("name", ["NaN", "infinite"])
def test_a_held_out_loss_that_is_not_finite_is_named_and_does_not_end_the_run(world, name):
    with pytest.warns(UserWarning, match="train: evaluation: the loss of row 1 is not finite"):
        history = evaluated(world, loss=WRONG_LOSSES[name][0])
    assert len(history.evaluations) == 2
    assert len(history.steps) == 1


WRONG_REFERENCES = [
    (lambda x: x._replace(index=x.index + 1), "that were not asked for"),
    (lambda x: x._replace(chosen=-x.chosen), "above 0"),
    (lambda x: x._replace(chosen=x.chosen * torch.nan), "of row 1 that are not finite"),
    (lambda x: x._replace(rejected=x.rejected - torch.inf), "of row 1 that are not finite"),
    (lambda x: x._replace(chosen_tokens=x.chosen_tokens + 1), "chosen_tokens for row 1"),
    (lambda x: x.chosen, "returned Tensor"),
    (lambda x: None, "returned NoneType"),
]


@pytest.mark.parametrize(("change", "words"), WRONG_REFERENCES)
def test_a_reference_that_answers_wrongly_about_held_out_pairs_is_refused(world, change, words):
    with pytest.raises(
        (ValueError, TypeError), match=r"train: evaluation: reference\.take"
    ) as error:
        evaluated(world, change=change)
    assert words in str(error.value)


def test_the_order_of_a_reference_does_not_change_metrics(world):
    expected, other = (evaluated(deepcopy(world), change=c) for c in (lambda x: x, shuffled))
    assert other.evaluations == expected.evaluations
    with torch.no_grad():  # otherwise all margins are 0
        for parameter in world.model.parameters():
            parameter *= 1.1
    batch, reference = world.dataset.take(range(24)), world.selector.reference
    true = reference.take(batch.index)
    accuracy = preference_metrics(measure(world.model, batch), true)["accuracy"]
    optimizer = torch.optim.SGD(world.model.parameters(), lr=1e-9)
    metrics = update(world.model, optimizer, batch, Answering(reference, shuffled))
    assert metrics["accuracy"] == accuracy


# Log-probs of sequences and of tables


@pytest.mark.parametrize("shape", [(39,), (41,), (80, 1), ()])
def test_log_probs_of_sequences_are_two_per_pair(pairs, shape):
    with pytest.raises(ValueError, match=r"40 pairs need log-probs of shape \[80\]"):
        as_pair_logps(pairs, torch.zeros(shape))


def test_columns_of_a_table_must_be_numbers(pairs, tmp_path):
    columns = {"pair_id": pairs.ids, "ref_chosen_logps": ["-1.5"] * 40}
    for text, words in (("-2.5", None), ("minus two", "'ref_rejected_logps' .* are no numbers")):
        path = tmp_path / "reference.jsonl"
        pl.DataFrame(columns | {"ref_rejected_logps": [text] * 40}).write_ndjson(path)
        if words is None:
            assert read_reference(path, pairs).rejected.tolist() == [-2.5] * 40
        else:
            with pytest.raises(ValueError, match=words):
                read_reference(path, pairs)
