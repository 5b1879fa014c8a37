import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# set before any import: a model that is not on disk is an error at once, not after retries
os.environ.setdefault("HF_HUB_OFFLINE", "1")

if not torch.cuda.is_available():
    # set before the kernels are compiled: without a GPU they run in Triton's interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")

settings.register_profile("default", deadline=None, print_blob=True)
settings.load_profile("default")

ROOT = Path(__file__).parents[1]


def launched(
    *command: object,
    processes: int | None = None,
    fails: bool = False,
    cwd: Path = ROOT,
    **environment: str,
) -> subprocess.CompletedProcess[str]:
    """Run a script to its end, alone or under torchrun with this many processes.

    The calling test fails unless the exit code agrees with `fails`.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    done = subprocess.run(
        [sys.executable, *(launcher if processes else []), *map(str, command)],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=500,
        check=False,
    )
    assert (done.returncode != 0) is fails, done.stderr[-3000:]
    return done


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory) -> Path:
    """A temporary cache, so that tests neither read nor fill the user's."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["SAGE_SELECT_CACHE"] = str(folder)
    return folder


@pytest.fixture(scope="session")
def data() -> Path:
    """Folder of real data, which is not part of the project; see the README."""
    folder = os.environ.get("SAGE_SELECT_DATA")
    if not folder:
        pytest.skip("SAGE_SELECT_DATA is not set; set it to a folder of real data")
    return Path(folder)


@pytest.fixture
def world():
    """A fresh copy of the demo's policy with pairs made from its samples, before a small run."""
    from worlds import arithmetic_world

    return arithmetic_world()


@pytest.fixture(scope="session")
def still():
    """A world shared by all tests that do not train."""
    from worlds import arithmetic_world

    return arithmetic_world()


@pytest.fixture(scope="session")
def pairs():
    """A few pairs for small models."""
    from small_models import few_pairs

    return few_pairs()


@pytest.fixture(scope="session")
def stories(data):
    """A small trained Llama and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = data / "models" / "stories260K"
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
