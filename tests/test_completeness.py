"""Every score and every loss has its case in the tests; `test_docs.py` holds the API page."""

from functools import partial

import cases
import pytest

from sage_select import losses, scores


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


def test_a_new_score_without_a_case_is_noticed():
    assert len not in functions(cases.SCORES)
    assert functions({"bound": partial(len)}) == {len}
