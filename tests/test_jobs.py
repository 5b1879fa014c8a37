"""Everything that the terminal does, as one Python call each."""

import json
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
import torch
from conftest import ROOT
from worlds import arithmetic_pairs

from sage_select import SageConfig, SelectionLog, jobs, train
from sage_select.app import loading, run
from sage_select.system.settings import ConfigError
from sage_select.training.run_folder import RunFolder

BASE = ROOT / "examples" / "arithmetic_base"


@pytest.fixture
def config(tmp_path, monkeypatch) -> SageConfig:
    """A run on the demo's pairs, with a store of its own."""
    monkeypatch.setenv("SAGE_SELECT_CACHE", str(tmp_path / "cache"))
    lines = [json.dumps(row) + "\n" for row in arithmetic_pairs()[:60]]
    (tmp_path / "pairs.jsonl").write_text("".join(lines))
    return SageConfig(
        model={"name": str(BASE), "tokenizer": str(BASE / "tokenizer"), "dtype": "float32"},
        data={"path": str(tmp_path / "pairs.jsonl"), "max_length": 64, "held_out": 0.1},
        selection={"mix_start": (0.6, 0.35, 0.05), "mix_end": (0.3, 0.4, 0.3), "refresh_steps": 6},
        training={"epochs": 1, "batch_size": 4, "learning_rate": 1e-4, "checkpoint_every": 3},
        folder=str(tmp_path / "run"),
    )


def test_a_run_from_its_plan_to_its_end(config, tmp_path):
    plan = jobs.plan(config, show_progress=False)
    assert plan["run_folder"] == str(tmp_path / "run")
    assert {f.verdict for f in jobs.doctor(config, show_progress=False)} <= {"ok", "warn"}
    filled = jobs.fill(config, show_progress=False)
    assert filled["pairs"] == plan["pairs"] + plan["held_out"]
    assert jobs.fill(config, show_progress=False)["sequences_measured"] == 0
    heard = []
    result = train(config, show_progress=False, say=heard.append)
    assert "from the start" in heard[-1]
    assert len(result.history.steps) == plan["steps"]
    assert result.last["step"] == plan["steps"]
    assert result.best["loss"] <= result.first["loss"]
    assert (result.folder.best_model / "model.safetensors").exists()
    log = SelectionLog(result.folder.selection).read()
    assert log["kept"].sum() == plan["kept"]
    assert jobs.flips(result.folder.path, tmp_path / "run")["flipped"].sum() == 0
    with pytest.raises(FileExistsError, match="already has a run; pass resume=True"):
        train(config, show_progress=False)
    with pytest.raises(ConfigError, match="started with different settings: seed was 0, is 1"):
        train(config.replace(seed=1), resume=True, show_progress=False)
    result.folder.best.write_bytes(b"damaged")
    with pytest.warns(
        UserWarning, match=r"best\.pt cannot be used: .* from step \d+ on replace it"
    ):
        again = train(config, resume=True, show_progress=False)
    assert again.history.steps == result.history.steps
    assert again.best is None
    assert (result.folder.best_model / "model.safetensors").exists()  # as it was


def test_scores_and_selections(config, tmp_path):
    scores = jobs.score(config, out=tmp_path / "scores.parquet", show_progress=False)
    assert scores.table.equals(pl.read_parquet(tmp_path / "scores.parquet"))
    assert scores.metrics["accuracy"] == 0.5  # the policy is its own reference
    kept = jobs.select(config, keep=0.5, out=tmp_path / "kept.jsonl", show_progress=False)
    from_logps = jobs.select(
        config, keep=0.5, policy_logps=tmp_path / "scores.parquet", show_progress=False
    )
    assert list(kept) == list(from_logps)
    assert len((tmp_path / "kept.jsonl").read_text().splitlines()) == len(kept)
    assert jobs.decisions_path(tmp_path / "kept.jsonl").exists()
    of_interval = jobs.select(config, interval=1, show_progress=False)
    assert len(of_interval) < len(of_interval.pool)
    with pytest.raises(ConfigError, match="keep"):
        jobs.select(config, keep=0.0)
    with pytest.raises(ConfigError, match="one of same, trl, llamafactory, got 'csv'"):
        jobs.select(config, keep=0.5, out=tmp_path / "kept.jsonl", format="csv")
    with pytest.raises(ConfigError, match="the plan has intervals 0 to"):
        jobs.select(config, interval=99, show_progress=False)


def test_nothing_is_loaded_twice(config, monkeypatch):
    loaded = []

    def counted(kind, *args, **options):
        loaded.append(kind.__name__)
        return real(kind, *args, **options)

    real = loading._from_pretrained
    monkeypatch.setattr(loading, "_from_pretrained", counted)
    train(config, show_progress=False)
    assert loaded.count("AutoTokenizer") == loaded.count("AutoModelForCausalLM") == 1
    loaded.clear()
    jobs.doctor(config, show_progress=False)
    assert loaded.count("AutoTokenizer") == 1


def test_one_reader_for_policy_reference_and_updates(config):
    config = config.replace(
        scoring={"layout": "padded", "impl": "chunked", "max_batch_tokens": 500},
        training={"mixed_precision": "bfloat16", "batch_size": 4},
    )
    made = run.Run.prepare(config, show_progress=False)
    policy = made.load_policy()
    store = made.store(policy)
    loader = made.loader(policy, store)
    assert loader.selector.measure is store.reader is made.training.reader is made.reader
    assert made.reader.mixed_precision == torch.bfloat16


def test_checkpoints_are_known_by_their_names_alone(tmp_path):
    folder = RunFolder(tmp_path)
    others = ("checkpoint-00000005-backup", "checkpoint-00000007.partial", "checkpoint-best")
    for name in ("checkpoint-00000005", "checkpoint-00000010", *others):
        (tmp_path / name).mkdir()
    names = [path.name for path in folder.checkpoints()]
    assert names == ["checkpoint-00000010", "checkpoint-00000005"]
    assert folder.checkpoint(5) == folder.checkpoints()[-1]
    assert RunFolder(tmp_path / "none").checkpoints() == []


def test_one_process_trains_in_a_folder(tmp_path):
    hold = (
        "import sys; from sage_select.training.run_folder import RunFolder\n"
        "with RunFolder(sys.argv[1]).hold(): print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", hold, str(tmp_path)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(FileExistsError, match="another process is training in"):
            RunFolder(tmp_path).hold().__enter__()
        other.stdin.close()
    folder = RunFolder(tmp_path)
    with folder.hold(), folder.hold():  # the loop holds what the job holds already
        assert folder.lock.exists()
    with RunFolder(Path(tmp_path)).hold():
        pass
