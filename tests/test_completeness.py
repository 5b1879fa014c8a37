"""Every score and every loss has its case in the tests; `test_docs.py` holds the API page."""

import sys
from functools import partial
from inspect import signature
from types import SimpleNamespace

import cases
import pytest
import test_scores

from sage_select import SageConfig, losses, scores
from sage_select.app.loading import load_score


def functions(table) -> set:
    """The functions of a table of cases, whatever is bound to them."""
    return {case.func if isinstance(case, partial) else case for case in table.values()}


TABLES = [
    *((name, score, cases.SCORES) for name, score in scores.SCORES.items()),
    *((name, loss, cases.LOSSES) for name, loss in losses.LOSSES.items()),
]


@pytest.mark.parametrize(("name", "function", "table"), TABLES, ids=[row[0] for row in TABLES])
def test_its_laws_are_tested(name, function, table):
    assert function in functions(table), f"{name} has no row in tests/cases.py"


@pytest.mark.parametrize("name", scores.SCORES)
def test_its_values_are_tested(name):
    with_tests_of_their_own = {"sage", "random"}
    in_table = {score.__name__ for score, _ in test_scores.TABLE}
    assert name in in_table | with_tests_of_their_own, f"{name} has no row in TABLE"


@pytest.mark.parametrize("name", scores.SCORES)
def test_its_settings_are_reached_by_a_configuration(name):
    parameters = set(signature(scores.SCORES[name]).parameters) - {"policy", "reference"}
    score = load_score(SageConfig(selection={"score": name}))
    assert set(score.keywords) == parameters


def own_score(policy, reference, *, beta, keep_end=0.9):
    return policy.chosen * beta


def test_a_score_of_ones_own_keeps_its_defaults(monkeypatch):
    monkeypatch.setitem(sys.modules, "own", SimpleNamespace(own_score=own_score))
    score = load_score(SageConfig(selection={"score": "own:own_score"}, beta=0.3))
    assert score.keywords == {"beta": 0.3}


def test_a_new_score_without_a_case_is_noticed():
    assert len not in functions(cases.SCORES)
    assert functions({"bound": partial(len)}) == {len}
