"""The fault campaign in its short form: nothing passes without a word, nothing crashes."""

import sys

import pytest
from test_examples import example

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="faults.py needs os.fork")

FILES = ["token cache", "store", "checkpoint", "run files", "log", "exports"]
PROCESSES = ["kill", "full disk", "side by side", "odd paths"]
LIES = ["server", "functions"]


@pytest.mark.parametrize(
    ("kinds", "options"),
    [
        (FILES, ["--rounds", 1]),
        (LIES, ["--trials", *range(3, 140, 29)]),
        pytest.param(PROCESSES, ["--rounds", 2], marks=pytest.mark.slow),
        pytest.param(LIES, ["--trials", *range(0, 140, 12)], marks=pytest.mark.slow),
    ],
)
def test_no_fault_is_silent(kinds, options):
    output = example("benchmarks/faults.py", "--kinds", *kinds, *options, "--seed", 3)
    rows = [line for line in output.splitlines() if line[:1].isalpha()]
    counts = {row[:14].strip(): [int(number) for number in row[14:].split()] for row in rows}
    assert set(counts) == {*kinds, "all"}
    for trials, recovered, named, silent, crashed in counts.values():
        assert trials == recovered + named > 0
        assert silent == crashed == 0
