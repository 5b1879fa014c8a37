"""Files of a run: damaged ones are named and never used, planted ones run no code.

Paths are literal, one process writes at a time, and a full disk leaves no half-written file.
"""

import os
import pickle
import random
import shutil
import subprocess
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint import state_dict_saver
from torch.distributed.checkpoint.state_dict import get_state_dict
from typer.testing import CliRunner

from sage_select import SageConfig, Selection, SelectionLog
from sage_select.app.cli.main import app
from sage_select.app.jobs import _write_config, _write_table
from sage_select.data.exports import ENDINGS, write_pairs
from sage_select.data.sources import read_records
from sage_select.references.logp_tables import has_column
from sage_select.selecting import log as log_module
from sage_select.selecting.tables import flips_of_logs
from sage_select.system.files import checksum_path, content_checksum, user_path, written_whole
from sage_select.system.ledger import Ledger, Work, append_costs, read_costs
from sage_select.system.settings import ConfigError
from sage_select.training.checkpoints import (
    drop_old,
    load_newest,
    read_best,
    save_best,
    save_checkpoint,
)
from sage_select.training.run_folder import RunFolder
from sage_select.training.sharding import load_best


def state(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A small model and its optimizer after two updates."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1 * seed)
    for _ in range(2):
        model(torch.ones(1, 8)).square().sum().backward()
        optimizer.step()
    return model, optimizer


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.flatten() for parameter in model.parameters()])


@pytest.fixture
def run(tmp_path) -> Path:
    """A folder with checkpoints of steps 5 and 10."""
    for step in (5, 10):
        save_checkpoint(tmp_path / "run", step, *state(step), {"step": step, "steps": [{}] * 9})
    return tmp_path / "run"


def resumed(folder: Path) -> int | None:
    """Resume, check that everything comes from one checkpoint, and return its step."""
    model, optimizer = state(1)
    found = load_newest(folder, model, optimizer)
    if found is None:
        return None
    expected, moments = state(found["step"])
    assert torch.equal(weights(model), weights(expected))
    for ours, theirs in zip(optimizer.state.values(), moments.state.values(), strict=True):
        assert torch.equal(ours["exp_avg"], theirs["exp_avg"])
    assert optimizer.param_groups[0]["lr"] == moments.param_groups[0]["lr"]
    return found["step"]


def flipped(path: Path, draw: random.Random) -> None:
    """Flip a random bit of a file."""
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def cut(path: Path, draw: random.Random) -> None:
    os.truncate(path, draw.randrange(path.stat().st_size))


def overwritten(path: Path, draw: random.Random) -> None:
    """Replace up to 64 bytes of a file, each by another one."""
    content = bytearray(path.read_bytes())
    start = draw.randrange(len(content))
    content[start : start + 64] = bytes(byte ^ 255 for byte in content[start : start + 64])
    path.write_bytes(content)


def lost(path: Path, draw: random.Random) -> None:
    path.unlink()


FILES = [".metadata", "__0_0.distcp", "run.pt", "rng-0.pt", "checksums.txt"]


DAMAGE = [
    (name, damage)
    for name in FILES
    for damage in (flipped, cut, overwritten, lost)
    # a checkpoint without checksums is one of an older version
    if (name, damage) != ("checksums.txt", lost)
]


@pytest.mark.parametrize(("name", "damage"), DAMAGE)
def test_a_damaged_checkpoint_is_named_and_an_older_one_taken(name, damage, run):
    newest, draw = run / "checkpoint-00000010", random.Random(name)
    assert resumed(run) == 10
    content = (newest / name).read_bytes()
    for _ in range(6 if damage is flipped else 2):
        damage(newest / name, draw)
        with pytest.warns(UserWarning, match="checkpoint-00000010 cannot be read, trying an older"):
            assert resumed(run) == 5
        (newest / name).write_bytes(content)
    assert resumed(run) == 10


def test_damage_of_every_checkpoint_ends_with_the_reason(run):
    for checkpoint in run.iterdir():
        flipped(checkpoint / "rng-0.pt", random.Random(0))
    with (
        pytest.warns(UserWarning, match="cannot be read"),
        pytest.raises(ValueError, match=r"none of the 2 checkpoints .* content of rng-0\.pt"),
    ):
        resumed(run)


def test_a_checkpoint_of_an_older_version_is_read_without_a_warning(run):
    (run / "checkpoint-00000010" / "checksums.txt").unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resumed(run) == 10


class Payload:
    """An object that makes a folder when it is unpickled."""

    def __init__(self, call: Callable[..., object], *arguments: object) -> None:
        self.call = call, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


def planted(folder: Path, name: str, payload: object) -> None:
    """Replace a file of a checkpoint by one that runs code, with the checksum of that file."""
    path = folder / name
    if name == ".metadata":
        path.write_bytes(pickle.dumps(payload))
    elif name == "__0_0.distcp":  # a value that is no tensor, such as a learning rate
        model, moments = get_state_dict(*state(10))
        moments["param_groups"][0]["lr"] = payload
        values = {"model": model, "optimizer": moments}
        state_dict_saver.save(values, checkpoint_id=folder, no_dist=True)
    else:
        torch.save({"cpu": payload, "step": payload, "model": payload}, path)
    files = [file for file in folder.iterdir() if file.name != "checksums.txt"]
    lines = [f"{content_checksum(file)}  {file.name}\n" for file in sorted(files)]
    (folder / "checksums.txt").write_text("".join(lines))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("call", [os.mkdir, os.system, exec])
@pytest.mark.parametrize("name", FILES[:-1])
def test_no_code_of_a_planted_checkpoint_runs(name, call, run, tmp_path):
    mark = tmp_path / "mark"
    argument = {os.mkdir: str(mark), os.system: f"mkdir {mark}"}.get(
        call, f"import os; os.mkdir({str(mark)!r})"
    )
    planted(run / "checkpoint-00000010", name, Payload(call, argument))
    resumed(run)
    assert not mark.exists()


def test_no_code_of_planted_best_weights_runs(tmp_path):
    torch.save({"model": Payload(os.mkdir, str(tmp_path / "mark"))}, tmp_path / "best.pt")
    with pytest.raises(OSError, match=r"load_best: .*best\.pt cannot be read"):
        load_best(state(1)[0], tmp_path)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("damage", [flipped, cut, overwritten])
@pytest.mark.parametrize("name", ["best.pt", "best.pt.crc32"])
def test_damaged_best_weights_are_named(name, damage, tmp_path):
    folder, draw = RunFolder(tmp_path), random.Random(name)
    save_best(folder, dict(state(2)[0].state_dict()), {"step": 2})
    save_best(folder, dict(state(3)[0].state_dict()), {"step": 3})
    model, content = state(1)[0], (tmp_path / name).read_bytes()
    assert load_best(model, tmp_path) == {"step": 3}
    for _ in range(8):
        damage(tmp_path / name, draw)
        try:
            assert read_best(folder)["evaluation"] == {"step": 3}  # damage beyond the checksum
            assert name == "best.pt.crc32"
        except OSError as error:
            assert "best.pt cannot be read" in str(error)  # noqa: PT017
        (tmp_path / name).write_bytes(content)


def test_a_replaced_file_is_whole_before_and_after_the_replacement(tmp_path):
    """A kill between the new checksum and the new content leaves the old content, which counts."""
    path = tmp_path / "file"
    for content in ("old", "new"):
        with written_whole(path, checked=True) as partial:
            partial.write_text(content)
    path.write_text("old")
    assert log_module.read_checked(path) == b"old"
    path.write_text("other")
    with pytest.raises(OSError, match="file is spoiled"):
        log_module.read_checked(path)


# Paths


NAMES = ["lr=[1e-4]", "run*", "a?b", "{x,y}", "$HOME", "two words", "a#1%20", "line\nbreak",
         "日本-ñ", "-x", "[!a]", "a\\b", "'q\""]  # fmt: skip


def selection() -> Selection:
    return Selection(np.arange(3), np.arange(3), np.full(3, np.nan), np.full(3, True), 0, 0.0,
                     rule="all")  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_paths_are_literal(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for neighbour in ("run1", "axb", "x", "1", "e"):  # what a pattern would find
        SelectionLog(neighbour).write(0, selection(), [*"xyz"])
    SelectionLog(name).write(0, selection(), [*"abc"])
    assert SelectionLog(name).read()["pair_id"].to_list() == [*"abc"]
    assert (tmp_path / name / "interval-000000.parquet").exists()
    save_checkpoint(name, 5, *state(5), {"step": 5})
    assert resumed(tmp_path / name) == 5
    with RunFolder(name).hold():
        assert (tmp_path / name / "lock").exists()


@pytest.mark.parametrize("name", NAMES[:6])
@pytest.mark.parametrize("ending", [".parquet", ".csv", ".jsonl"])
def test_tables_at_literal_paths(ending, name, tmp_path):
    table = pl.DataFrame({"pair_id": ["a"], "chosen_logps": [-1.0]})
    for neighbour in ("run1", "axb", "x", "1", "e"):
        (tmp_path / f"{neighbour}{ending}").write_bytes(b"damaged")
    path = tmp_path / f"{name}{ending}"
    if ending == ".jsonl":
        path.write_text(table.write_ndjson())
    else:
        _write_table(table, path)
    assert has_column(path, "chosen_logps")
    assert not has_column(path, "ref_chosen_logps")
    assert [*read_records(path)] == table.to_dicts()
    if ending in ENDINGS:
        pair = {"prompt": "p", "chosen": "c", "rejected": "r"}
        write_pairs(path, [pair], np.array([0]))
        assert [*read_records(path)] == [pair]


def test_the_home_folder_is_expanded_once(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "~"))
    monkeypatch.chdir(tmp_path)
    assert RunFolder("~/runs/x").path == tmp_path / "~" / "runs" / "x"
    assert SageConfig(folder="~/x").run_folder == tmp_path / "~" / "x"
    assert user_path("./~/x") == tmp_path / "~" / "x"  # as in a shell
    for path in ("~/x", "./~/x", "a/~/x", "~no-such-user/x", "x~"):
        assert user_path(user_path(path)) == user_path(path)
    assert user_path("a/~/x") == Path("a/~/x")
    assert user_path("~no-such-user/x") == tmp_path / "~no-such-user" / "x"


# The log


@pytest.mark.parametrize("damage", [flipped, cut, overwritten])
@pytest.mark.parametrize("ending", ["", ".crc32"])
def test_a_damaged_interval_is_named_and_skipped(ending, damage, tmp_path):
    log, draw = SelectionLog(tmp_path), random.Random(ending)
    for interval in range(3):
        log.write(interval, selection(), [*"abc"])
    path, before = tmp_path / f"interval-000001.parquet{ending}", log.read()
    content = path.read_bytes()
    for _ in range(15):
        damage(path, draw)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            table = log.read()
        if caught:
            assert "interval-000001.parquet cannot be read and is skipped" in str(caught[0].message)
            assert table.equals(before.filter(pl.col("interval") != 1))
        else:  # a blank behind the checksum
            assert ending
            assert table.equals(before)
        path.write_bytes(content)


def test_flips_name_the_intervals_that_cannot_be_compared(tmp_path):
    logs = [SelectionLog(tmp_path / name) for name in "ab"]
    for log in logs:
        for interval in range(3):
            log.write(interval, selection(), [*"abc"])
    flipped(tmp_path / "b" / "interval-000001.parquet", random.Random(0))
    with pytest.warns(UserWarning, match="interval-000001"):
        flips = flips_of_logs(*logs)
    assert flips["interval"].to_list() == [0, 1, 2]
    assert flips["kept"].to_list() == [3, None, 3]
    assert flips["flipped"].to_list() == [0, None, 0]


def test_the_command_line_names_intervals_that_cannot_be_compared(tmp_path):
    for name in "ab":
        SelectionLog(tmp_path / name / "selection").write(0, selection(), [*"abc"])
    overwritten(tmp_path / "a" / "selection" / "interval-000000.parquet", random.Random(0))
    result = CliRunner().invoke(app, ["flips", str(tmp_path / "a"), str(tmp_path / "b")])
    assert result.exit_code == 0
    assert "not compared, as a log cannot be read: intervals [0]" in result.output


def test_only_the_logs_own_files_are_read(tmp_path):
    log = SelectionLog(tmp_path)
    log.write(0, selection(), [*"abc"])
    content = (tmp_path / "interval-000000.parquet").read_bytes()
    del log
    left = tmp_path / f".interval-000000.parquet.{'0' * 32}.partial"  # by a killed run
    left.write_bytes(b"half")
    log = SelectionLog(tmp_path)
    log.write(0, selection(), [*"abc"])
    assert not left.exists()
    for name in ("interval-000000-copy.parquet", "interval-1.parquet", "interval-000001.parquet~"):
        (tmp_path / name).write_bytes(content)
    assert log.read().height == 3
    (tmp_path / "interval-000002.parquet").write_bytes(content)  # in another's place
    with pytest.warns(UserWarning, match=r"interval-000002.* skipped: it contains interval 0"):
        assert log.read().height == 3


def test_a_resumed_run_reads_one_file_of_its_log(tmp_path, monkeypatch):
    log, reads = SelectionLog(tmp_path), []
    for interval in range(5):
        log.write(interval, selection(), [*"abc"], run="r")
    real = log_module.read_checked
    monkeypatch.setattr(log_module, "read_checked", lambda path: reads.append(path) or real(path))
    SelectionLog(tmp_path).write(5, selection(), [*"abc"], run="r")
    assert len(reads) == 1
    with pytest.raises(FileExistsError, match="decisions of another run"):
        SelectionLog(tmp_path).write(6, selection(), [*"abc"], run="another")


def elsewhere(code: str, *arguments: object) -> subprocess.Popen[str]:
    """Run code in another process that says "ready" and waits for its input to be closed."""
    command = [sys.executable, "-c", code + "; print('ready', flush=True); sys.stdin.read()"]
    process = subprocess.Popen(
        [*command, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


LOCK = "import sys, fcntl; file = open(sys.argv[1], 'w'); fcntl.flock(file, fcntl.LOCK_EX)"


@pytest.mark.skipif(sys.platform == "win32", reason="no fcntl")
def test_one_process_writes_a_log_or_trains(tmp_path):
    log, folder = SelectionLog(tmp_path), RunFolder(tmp_path)
    with elsewhere(LOCK, tmp_path / "lock") as other:
        with pytest.raises(FileExistsError, match="another process is writing to"):
            log.write(0, selection(), [*"abc"])
        with pytest.raises(FileExistsError, match="another process is training in"):
            folder.hold().__enter__()
        other.kill()  # the lock goes with the process
    log.write(0, selection(), [*"abc"])
    SelectionLog(tmp_path).write(1, selection(), [*"abc"])  # the same process, as it resumes
    del log
    with folder.hold(), pytest.raises(FileExistsError, match="another process is training in"):
        RunFolder(tmp_path).hold().__enter__()  # another loop of the same process


# Costs and configuration


@pytest.mark.parametrize("damage", [flipped, cut, overwritten])
def test_damaged_costs_are_not_counted(damage, tmp_path):
    path, draw = tmp_path / "costs.jsonl", random.Random(0)
    for tokens in range(10):
        append_costs(path, Ledger(training=Work(needed=1e-7, tokens=2**tokens)), interval=tokens)
    content, whole = path.read_bytes(), 2**10 - 1
    for _ in range(40):
        damage(path, draw)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            tokens = read_costs(path).get("training", Work()).tokens
        lines = path.read_bytes().splitlines()
        if not caught:  # cut between two lines, or the same value in other letters
            assert tokens == 2 ** len(lines) - 1
        assert tokens <= whole
        path.write_bytes(content)
    assert read_costs(path)["training"].tokens == whole


@pytest.mark.parametrize("copied", [1, 2])
def test_copied_costs_are_not_counted(copied, tmp_path):
    path = tmp_path / "costs.jsonl"
    for interval in range(3):
        append_costs(path, Ledger(training=Work(tokens=5, seconds=0.25)), interval=interval)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines + lines[-copied:]))
    with pytest.warns(UserWarning, match=f"{copied} damaged or incomplete lines of .*costs"):
        assert read_costs(path)["training"].tokens == 15


def test_costs_of_older_versions_are_counted(tmp_path):
    (tmp_path / "costs.jsonl").write_text('{"interval": 0, "phase": "scoring", "tokens": 7}\n')
    assert read_costs(tmp_path / "costs.jsonl") == {"scoring": Work(tokens=7)}


def test_the_configuration_of_a_run_is_written_once_and_replaced_if_it_is_damaged(tmp_path):
    folder, config = RunFolder(tmp_path), SageConfig(seed=3)
    _write_config(config, folder, resume=False)
    before = folder.config.stat()
    _write_config(config, folder, resume=True)
    assert folder.config.stat().st_mtime_ns == before.st_mtime_ns
    assert folder.config.stat().st_ino == before.st_ino
    with pytest.raises(ConfigError, match="seed was 3, is 4"):
        _write_config(config.replace(seed=4), folder, resume=True)
    for damage in (lambda path, _: path.write_text(""), flipped, cut, overwritten):
        damage(folder.config, random.Random(0))
        with pytest.raises(FileExistsError, match="already has a run"):
            _write_config(config, folder, resume=False)
        with pytest.warns(UserWarning, match=r"config\.yaml cannot be used and is written again"):
            _write_config(config, folder, resume=True)
        assert SageConfig.read(folder.config, environment={}) == config
    checksum_path(folder.config).unlink()  # of an older version
    _write_config(config, folder, resume=True)


# Full disks


@contextmanager
def small_files(size: int) -> Iterator[None]:
    """Let the system refuse to write more than this many bytes to a file."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def write_log(folder: Path) -> None:
    size = 4000
    ids = [f"{zlib.crc32(b'%d' % i):08x}" for i in range(size)]
    whole = Selection(np.arange(size), np.arange(size), np.full(size, np.nan), np.full(size, True),
                      0, 0.0, rule="all")  # fmt: skip
    SelectionLog(folder).write(1, whole, ids)


def write_weights(path: Path) -> None:
    with written_whole(path) as partial:  # the library's error has no number
        save_file({"weight": torch.zeros(9000)}, partial)


WRITES = {
    "checkpoint-00000015": lambda folder: save_checkpoint(
        folder, 15, *state(15), {"step": 15, "steps": list(range(9000))}
    ),
    "best.pt": lambda folder: save_best(RunFolder(folder), {"a": torch.zeros(9000)}, {"step": 15}),
    "interval-000001.parquet": write_log,
    "metrics.jsonl": lambda folder: RunFolder(folder).write_lines(
        folder / "metrics.jsonl", [{"step": step} for step in range(9000)]
    ),
    "evaluations.jsonl": lambda folder: RunFolder(folder).append_line(
        folder / "evaluations.jsonl", {"step": [0] * 9000}
    ),
    "costs.jsonl": lambda folder: append_costs(
        folder / "costs.jsonl", Ledger({f"{i}": Work() for i in range(900)})
    ),
    "scores.parquet": lambda folder: _write_table(
        pl.DataFrame({"score": np.random.default_rng(0).random(9000)}), folder / "scores.parquet"
    ),
    "scores.csv": lambda folder: _write_table(
        pl.DataFrame({"score": np.arange(9000) / 7}), folder / "scores.csv"
    ),
    "model.safetensors": lambda folder: write_weights(folder / "model.safetensors"),
    "config.yaml": lambda folder: _write_config(
        SageConfig(data={"path": "x" * 30000}), RunFolder(folder), resume=False
    ),
}


@pytest.mark.parametrize("name", WRITES)
def test_a_full_disk_leaves_what_was_complete(name, run):
    save_best(RunFolder(run), dict(state(5)[0].state_dict()), {"step": 5})
    SelectionLog(run).write(0, selection(), [*"abc"])
    appended = {"evaluations.jsonl", "costs.jsonl"}  # their last line may be incomplete
    before = {path.name for path in run.iterdir()}
    with small_files(16384), pytest.raises(OSError, match=f"{name} cannot be written") as caught:
        WRITES[name](run)
    assert "free space" in str(caught.value)
    assert caught.value.errno is not None
    assert {path.name for path in run.iterdir()} - appended == before
    assert resumed(run) == 10
    assert read_best(RunFolder(run))["evaluation"] == {"step": 5}
    assert SelectionLog(run).read().height == 3
    WRITES[name](run)  # the same call when there is room again


def test_what_killed_runs_left_is_removed_and_nothing_else(run):
    mine = ["checkpoint-00000005-backup", "checkpoint-00000007.partial-kept", "notes.partial"]
    left = ["checkpoint-00000015.partial", "checkpoint-00000005.deleted"]
    for name in mine + left:
        shutil.copytree(run / "checkpoint-00000005", run / name)
    (run / f".best.pt.{'0' * 32}.partial").write_bytes(b"half")
    RunFolder(run).remove_left_behind()
    kept = ["checkpoint-00000005", "checkpoint-00000010"]
    assert sorted(path.name for path in run.iterdir()) == sorted(mine + kept)
    drop_old(run, 1, step=10)
    assert sorted(path.name for path in run.iterdir()) == sorted([*mine, "checkpoint-00000010"])


def test_damaged_checkpoints_do_not_count_as_kept(run):
    """Step 10 could not be read, and the run resumed from 5 with more frequent checkpoints."""
    save_checkpoint(run, 7, *state(7), {"step": 7})
    drop_old(run, 1, step=7)
    assert sorted(path.name for path in run.iterdir()) == [
        "checkpoint-00000007",
        "checkpoint-00000010",
    ]


TOGETHER = """
import os, sys, warnings
import torch
from sage_select import join, leave
from sage_select.training.checkpoints import load_newest, save_checkpoint
from test_integrity import flipped, state, weights
import random
from pathlib import Path
from sage_select.system.processes import Processes

join("cpu")
processes, folder = Processes.all(), Path(sys.argv[1])
for step in (5, 10):
    save_checkpoint(folder, step, *state(step), {"step": step})
newest = folder / "checkpoint-00000010"
if processes.rank == 0:
    names = sorted(path.name for path in newest.iterdir())
    assert {"rng-0.pt", "rng-1.pt", "__0_0.distcp"} < set(names), names
    flipped(newest / sys.argv[2], random.Random(0))
processes.barrier()
model, optimizer = state(1)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    found = load_newest(folder, model, optimizer)
assert found == {"step": 5}, found
assert torch.equal(weights(model), weights(state(5)[0]))
# a rank that cannot write stops all, with the reason, and nothing is left
if processes.rank == 1:
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
try:
    save_checkpoint(folder, 15, *state(15), {"step": 15})
except OSError as error:
    assert "checkpoint-00000015 cannot be written" in str(error), error
else:
    raise AssertionError("the write did not fail")
processes.barrier()
assert not list(folder.glob("checkpoint-00000015*"))
leave()
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rng-1.pt", ".metadata"])
def test_all_ranks_take_the_same_checkpoint_and_fail_together(name, tmp_path):
    (tmp_path / "worker.py").write_text(TOGETHER)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, "--standalone", tmp_path / "worker.py", tmp_path / "run", name],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
