import pytest
from cases import SCHEDULES
from hypothesis import given
from hypothesis import strategies as st

from sage_select import Constant, Linear

progress = st.floats(0, 1)


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_are_hashable_comparable_and_printable(name):
    schedule = SCHEDULES[name]
    assert eval(repr(schedule), {"Constant": Constant, "Linear": Linear}) == schedule
    assert hash(schedule) == hash(eval(repr(schedule), {"Constant": Constant, "Linear": Linear}))


@given(st.floats(0, 1), st.floats(0, 1), progress)
def test_linear_is_exact_at_both_ends_and_stays_between_them(start, end, t):
    line = Linear(start, end)
    assert (line(0.0), line(1.0)) == (start, end)
    assert min(start, end) - 1e-15 <= line(t) <= max(start, end) + 1e-15


@given(progress)
def test_shares_sum_to_one(t):
    assert sum(SCHEDULES["shares"](t)) == pytest.approx(1)


def test_lists_become_tuples():
    assert Linear([1.0, 0.0], [0.0, 1.0]) == Linear((1.0, 0.0), (0.0, 1.0))
