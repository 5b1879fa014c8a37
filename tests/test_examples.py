import difflib
import json
import shutil

import numpy as np
import polars as pl
import pytest
import torch
from conftest import ROOT, launched
from safetensors.torch import load_file

from sage_select import SelectionLog
from sage_select.selecting.tables import flips_of_logs


def example(script: str, *arguments: object, threads: int = 1, world: int | None = None) -> str:
    """Run an example and return its output."""
    path = ROOT / "examples" / script
    return launched(path, *arguments, processes=world, OMP_NUM_THREADS=str(threads)).stdout


def test_the_twins_differ_only_in_selection():
    full, sage = (
        (ROOT / "examples" / name).read_text().splitlines()
        for name in ("plain_full.py", "plain_sage.py")
    )
    lines = list(difflib.unified_diff(full, sage, n=0, lineterm=""))[2:]
    removed = [line for line in lines if line.startswith("-")]
    assert len(removed) <= 12  # the baseline's loader, file name and docstring
    assert len(lines) <= 75


@pytest.mark.slow
def test_the_demo_reports_all_arms(tmp_path):
    output = example("demo.py", "--seeds", 2, "--problems", 150, "--pairs", 96,
                     "--test-problems", 50, "--refresh-steps", 2, "--folder", tmp_path)  # fmt: skip
    report = (tmp_path / "report.txt").read_text()
    assert report in output
    rows = {line[:23].strip(): line[23:].split() for line in report.splitlines()}
    pairs = {name: float(rows[name][-3]) for name in ("DPO (full)", "NCA (random)", "SAGE")}
    assert pairs["SAGE"] == pairs["NCA (random)"] < pairs["DPO (full)"] == 96
    for name in ("DPO (full)", "NCA (full)", "NCA (random)", "SAGE"):
        accuracy, plus_minus, half_width, gold = rows[name][:4]
        assert 0 <= float(accuracy) <= 1
        assert 0 <= float(gold) <= 1
        assert plus_minus == "±"
        assert float(half_width) >= 0
    assert SelectionLog(tmp_path / "seed-0" / "SAGE" / "selection").read().height == 96


@pytest.mark.slow
def test_a_resumed_example_repeats_its_bits(data, tmp_path):
    """On real pairs and a real model: a run resumed from a checkpoint ends with equal bits."""
    arguments = [
        "--pairs", data / "pairs" / "gsm8k_verified.parquet",
        "--model", data / "models" / "stories260K",
        "--max-length", 512, "--limit", 140, "--refresh-steps", 2, "--checkpoint-every", 3,
    ]  # fmt: skip
    uninterrupted = tmp_path / "uninterrupted"
    output = example("plain_sage.py", *arguments, "--folder", uninterrupted)
    assert "held-out accuracy" in output
    assert "held-out loss" in output
    resumed = tmp_path / "resumed"
    example("plain_sage.py", *arguments, "--folder", resumed)
    newest, middle = sorted(resumed.glob("checkpoint-*"), reverse=True)
    shutil.rmtree(newest)  # as if the run was killed after the older checkpoint
    example("plain_sage.py", *arguments, "--folder", resumed, "--resume")
    states = [
        load_file(folder / "model" / "model.safetensors") for folder in (uninterrupted, resumed)
    ]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    logs = [SelectionLog(folder / "selection").read() for folder in (uninterrupted, resumed)]
    assert logs[0].equals(logs[1])
    assert middle.exists()


@pytest.mark.slow
def test_both_twins_on_judged_pairs(data, tmp_path):
    from worlds import arithmetic_pairs

    from arithmetic import BASE

    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, arithmetic_pairs())))
    for script in ("plain_full.py", "plain_sage.py"):
        extra = ["--refresh-steps", 3] if script == "plain_sage.py" else []
        example(script, "--pairs", path, "--model", BASE, "--tokenizer", BASE / "tokenizer",
                "--max-length", 96, "--folder", tmp_path / script, *extra)  # fmt: skip
        metrics = pl.read_ndjson(tmp_path / script / "metrics.jsonl")
        assert np.isfinite(metrics["loss"].to_numpy()).all()


@pytest.mark.slow
def test_two_processes_repeat_the_run_of_one(tmp_path):
    """Under torchrun the policy is sharded; kept pairs are equal, and weights are close."""
    from worlds import arithmetic_pairs

    from arithmetic import BASE

    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, arithmetic_pairs()[:48])))
    outputs = [
        example(
            "plain_sage.py", "--pairs", path, "--model", BASE, "--tokenizer", BASE / "tokenizer",
            "--max-length", 64, "--batch-size", 4, "--micro-batch-size", 2, "--refresh-steps", 3,
            "--learning-rate", 1e-3, "--device", "cpu", "--folder", tmp_path / str(world),
            world=world if world > 1 else None,
        )
        for world in (1, 2)
    ]  # fmt: skip
    assert outputs[0].count("held-out loss") == outputs[1].count("held-out loss") == 1
    one, two = (pl.read_ndjson(tmp_path / str(world) / "metrics.jsonl") for world in (1, 2))
    assert two["loss"].to_list() == pytest.approx(one["loss"].to_list(), abs=1e-3)
    logs = [SelectionLog(tmp_path / str(world) / "selection") for world in (1, 2)]
    assert flips_of_logs(*logs)["flipped"].sum() == 0
    models = [load_file(tmp_path / str(w) / "model" / "model.safetensors") for w in (1, 2)]
    assert models[0].keys() == models[1].keys()
    assert all(torch.allclose(models[0][n], models[1][n], atol=2e-3) for n in models[0])
