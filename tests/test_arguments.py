"""Every number and switch that a caller passes is checked, in Python and in configurations."""

from functools import partial
from inspect import signature
from math import inf, nan

import numpy as np
import pytest
import torch
from strategies import with_rewards

from sage_select import (
    Constant,
    Linear,
    Reader,
    SageConfig,
    ServerMeasure,
    Timeline,
    Training,
    measure,
    nca_responses,
    plan_pools,
    plan_run,
    strata_from_values,
)
from sage_select.losses import LOSSES, response_weights
from sage_select.scores import SCORES, log_sage
from sage_select.system import heartbeats
from sage_select.timeline import kept_count

ONE = Constant((1.0,))
PAIRS = with_rewards([1.0, 2.0], [0.0, 0.0])
PLAN = plan_pools([0] * 8, ONE, 2)
ZEROS, HALVES = torch.zeros(1, 2), torch.full((1, 2), 0.5)

NO_NUMBERS = ["1", b"1", True, np.True_, [1], (), {}, object()]
BAD = {
    "count": [0, -1, 2.5, 2.0, np.float64(2), nan, inf, 10**30, -(10**5000), *NO_NUMBERS],
    "index": [-1, 0.5, nan, 10**30, *NO_NUMBERS],
    "seed": [2.5, 0.0, nan, 2**63, -(2**63) - 1, 10**30, *NO_NUMBERS],
    "positive": [0, -1, nan, inf, -inf, np.float32(nan), 10**400, *NO_NUMBERS],
    "not negative": [-1, -1e-9, nan, inf, 10**400, *NO_NUMBERS],
    "share": [-0.1, 1.1, nan, inf, 40, *NO_NUMBERS],
    "finite": [nan, inf, -inf, 10**400, "1", b"1", True, np.True_, {}, object()],
    "switch": ["yes", "true", 1, 0, np.int64(1), nan, [True]],
}
GOOD = {
    "count": [2, np.int64(2), np.uint8(2), torch.tensor(2)],
    "index": [0, 1, np.int32(1)],
    "seed": [0, -7, 2**63 - 1, np.int64(5)],
    "positive": [1, 0.5, np.float32(0.5), np.int64(1), torch.tensor(0.5)],
    "not negative": [0, 0.5, np.float64(0.5)],
    "share": [0, 1, 0.5, np.float32(0.5)],
    "finite": [0, 1.0, np.float64(0.5)],
    "switch": [True, False, np.True_],
}

ARGUMENTS = [
    *((f"plan_run: {name}", "count", lambda x, name=name: plan_run([0] * 8, ONE, **{
        "batch_size": 2, "refresh_steps": 2, "epochs": 2, name: x}))
      for name in ("batch_size", "refresh_steps", "epochs")),
    ("plan_run: seed", "seed", lambda x: plan_run([0] * 8, ONE, batch_size=2, seed=x)),
    ("plan_pools: num_pools", "count", lambda x: plan_pools([0] * 8, ONE, x)),
    ("plan_pools: copies", "count", lambda x: plan_pools([0] * 8, ONE, 2, copies=x)),
    ("plan_pools: seed", "seed", lambda x: plan_pools([0] * 8, ONE, 2, seed=x)),
    ("kept_count: a keep ratio", "share", lambda x: kept_count(x, 8)),
    ("kept_count: size", "index", lambda x: kept_count(0.5, x)),
    ("kept_count: multiple", "count", lambda x: kept_count(0.5, 8, x)),
    ("kept_count: a keep ratio", "share", lambda x: Timeline(PLAN, lambda t: x, 2)),
    ("Timeline: batch_size", "count", lambda x: Timeline(PLAN, Constant(0.5), x)),
    ("Timeline: multiple", "count", lambda x: Timeline(PLAN, Constant(0.5), 2, x)),
    ("interval_at: step", "index", lambda x: Timeline(PLAN, Constant(0.5), 2).progress(x)),
    ("Constant: value", "finite", Constant),
    ("Constant: a share of value", "finite", lambda x: Constant((0.5, x))),
    ("Linear: start", "finite", lambda x: Linear(x, 0.4)),
    ("Linear: a share of end", "finite", lambda x: Linear((0.5, 0.5), [x, 1.0])),
    ("progress", "share", Linear(1.0, 0.4)),
    ("progress", "share", Constant(1.0)),
    ("strata_from_values: a share", "share", lambda x: strata_from_values([1.0], (x, 1 - x))
     if type(x) in (int, float, np.float32) else strata_from_values([1.0], (x, 0.5))),
    ("strata_from_values: seed", "seed", lambda x: strata_from_values([1.0], (1.0,), seed=x)),
    ("nca_responses: beta", "positive", lambda x: nca_responses(ZEROS, ZEROS, HALVES, beta=x)),
    ("response_weights: alpha", "positive", lambda x: response_weights(HALVES, alpha=x)),
    ("Reader: max_batch_tokens", "count", lambda x: Reader(max_batch_tokens=x)),
    ("Reader: show_progress", "switch", lambda x: Reader(show_progress=x)),
    *((f"ServerMeasure: {name}", kind,
       lambda x, name=name: ServerMeasure("http://host/v1", "policy", **{name: x}))
      for name, kind in {"check_responses": "index", "retries": "index", "concurrency": "count",
                         "timeout": "positive", "tolerance": "positive",
                         "show_progress": "switch"}.items()),
]  # fmt: skip
KINDS = {"beta": "positive", "eps": "not negative", "seed": "seed"}
for function in (*SCORES.values(), *LOSSES.values(), log_sage):
    ARGUMENTS += [
        (name, KINDS[name], lambda x, f=function, name=name: f(*PAIRS, **{name: x}))
        for name in signature(function).parameters
        if name in KINDS
    ]


def kind_of(field: dict) -> str | None:
    """The kind of a setting's number, from its JSON schema; None if it is none."""
    options = {option["type"]: option for option in field.get("anyOf", [field]) if "type" in option}
    if "boolean" in options:
        return "switch"
    if "integer" in options:
        least = options["integer"]["minimum"]
        return "seed" if least < 0 else "count" if least else "index"
    if "number" in options:
        number = options["number"]
        if "maximum" in number:
            return "share"
        return "positive" if "exclusiveMinimum" in number else "not negative"
    return None


SCHEMA = SageConfig.model_json_schema()
SECTIONS = {"": SCHEMA} | {
    name: SCHEMA["$defs"][field["$ref"].rpartition("/")[2]]
    for name, field in SCHEMA["properties"].items()
    if "$ref" in field
}
SETTINGS = [
    (f"{section}.{name}".strip("."), kind, section, name)
    for section, fields in SECTIONS.items()
    for name, field in fields["properties"].items()
    if (kind := kind_of(field))
]
ARGUMENTS += [
    (dotted, kind, lambda x, s=s, n=n: SageConfig(**({s: {n: x}} if s else {n: x})))
    for dotted, kind, s, n in SETTINGS
]
ARGUMENTS += [
    (name, kind, lambda x, name=name: Training(**{name: x}))
    for dotted, kind, section, name in SETTINGS
    if name in Training.model_fields
]
CASES = [(f"{name} #{i}", name, kind, call) for i, (name, kind, call) in enumerate(ARGUMENTS)]


def test_every_number_of_a_configuration_is_tested():
    kinds = {name: kind for name, kind, _, _ in SETTINGS}
    assert len(kinds) > 20
    assert kinds["seed"] == "seed"
    assert kinds["data.limit"] == "count"
    assert kinds["data.num_workers"] == "index"
    assert kinds["training.learning_rate"] == "positive"
    assert kinds["training.compile_model"] == "switch"


@pytest.mark.parametrize(("case", "name", "kind", "call"), CASES, ids=[row[0] for row in CASES])
def test_bad_numbers_are_refused_by_name(case, name, kind, call):
    accepted = []
    for value in BAD[kind]:
        try:
            call(value)
        except (TypeError, ValueError) as error:
            message = str(error)
            assert name in message, message
            assert len(message) < 500
            if type(value) is str or (type(value) in (int, float) and abs(value) < 10**9):
                assert repr(value) in message, message
        else:
            accepted.append(value)
    assert accepted == []


@pytest.mark.parametrize(("case", "name", "kind", "call"), CASES, ids=[row[0] for row in CASES])
def test_good_numbers_are_accepted(case, name, kind, call):
    for value in GOOD[kind]:
        call(value)


@pytest.mark.parametrize("seconds", ["nan", "inf", "-1", "0", "", "10 minutes"])
def test_a_patience_that_is_no_number_of_seconds_is_refused(seconds, monkeypatch):
    monkeypatch.setenv("SAGE_SELECT_PATIENCE", seconds)
    with pytest.raises(
        ValueError, match=r"^SAGE_SELECT_PATIENCE must be a number of seconds, such"
    ):
        heartbeats.timeout()
    monkeypatch.setenv("SAGE_SELECT_PATIENCE", "6.5")
    assert heartbeats.timeout() == 6.5


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: plan_run([0], (1.0,), batch_size=1), "plan_run: mix must be a schedule, such as"),
        (lambda: plan_pools([0], 1.0, 1), "plan_pools: mix must be a schedule, such as Constant("),
        (lambda: plan_pools([0], lambda t: "1", 1), "the shares of the mix must be numbers, got"),
        (lambda: plan_pools([0], lambda t: None, 1), "the shares of the mix must be numbers, got"),
        (lambda: plan_run([0], ONE, batch_size=1, scope=["run"]), "scope must be run, epoch or"),
        (lambda: Timeline(PLAN, 0.5, 2), "keep must be a schedule, such as Constant(0.4)"),
        (lambda: Timeline([[0]], Constant(0.5), 2), "plan must be a Plan, as plan_run returns it"),
        (lambda: strata_from_values([1.0], 0.5), "shares must be a sequence with one share per"),
        (lambda: strata_from_values([1.0], ()), "shares must be a sequence with one share per"),
        (lambda: strata_from_values([[1.0]]), "values must be [N], got shape (1, 1)"),
        (
            lambda: plan_pools(np.array([2**63], np.uint64), ONE, 1),
            "strata must be numbered from 0",
        ),
        (lambda: Constant(()), "must have one share per stratum, got ()"),
        (partial(measure, torch.nn.Identity(), [{"chosen": "a"}]), "pool must be a Preference"),
        (partial(Reader(), torch.nn.Identity(), "pairs.jsonl"), "with PreferenceDataset.from_rec"),
    ],
)
def test_other_types_are_refused(call, words):
    with pytest.raises((TypeError, ValueError)) as error:
        call()
    assert words in str(error.value)
