"""Test that a run killed at any moment and resumed ends like a run that was never killed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


@pytest.mark.slow
def test_a_killed_run_ends_like_one_that_was_never_killed(tmp_path):
    """Kill at random moments, and in the middle of scoring, log writes and checkpoint writes."""
    done = subprocess.run(
        [sys.executable, TESTS / "crash_worker.py", tmp_path, "--random-trials", "12"],
        env=os.environ
        | {
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent / "examples")]),
        },
        capture_output=True,
        text=True,
        timeout=540,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    expected, *killed = json.loads(done.stdout.splitlines()[-1])
    for result in killed:
        for output in ("weights", "kept", "metrics", "evaluations"):
            assert result[output] == expected[output], (result["trial"], output)
    for place in ("scoring", "log write", "checkpoint write"):
        assert all(r["kills"] == 1 for r in killed if r["trial"].startswith(place))
    # a random kill can come after the end of a run, so only half of them must hit
    assert sum(r["kills"] for r in killed if r["trial"].startswith("random")) >= 6
