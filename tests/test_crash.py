import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


@pytest.mark.slow
def test_a_run_that_was_killed_ends_like_one_that_was_not(tmp_path):
    """SIGKILL at random moments, and in the middle of scoring, log and checkpoint writes."""
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
    whole, *killed = json.loads(done.stdout.splitlines()[-1])
    for result in killed:
        for what in ("weights", "kept", "metrics", "evaluations"):
            assert result[what] == whole[what], (result["trial"], what)
    for place in ("scoring", "log write", "checkpoint write"):
        assert all(r["kills"] == 1 for r in killed if r["trial"].startswith(place))
    assert sum(r["kills"] for r in killed if r["trial"].startswith("random")) >= 6
