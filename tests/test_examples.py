import difflib
import json
import shutil

import numpy as np
import polars as pl
import pytest
import torch
from conftest import ROOT, launched
from safetensors.torch import load_file

from sage_select.audit import SelectionLog, flips


def example(script: str, *arguments: object, threads: int = 1, world: int | None = None) -> str:
    path = ROOT / "examples" / script
    return launched(path, *arguments, processes=world, OMP_NUM_THREADS=str(threads)).stdout


def test_the_twins_differ_in_selection_alone():
    full, sage = (
        (ROOT / "examples" / name).read_text().splitlines()
        for name in ("plain_full.py", "plain_sage.py")
    )
    lines = list(difflib.unified_diff(full, sage, n=0, lineterm=""))[2:]
    removed = [line for line in lines if line.startswith("-")]
    assert len(removed) <= 12  # what the baseline does instead
    assert len(lines) <= 75


@pytest.mark.slow
def test_the_demo(tmp_path):
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
def test_sage_on_real_pairs_with_a_real_model(data, tmp_path):
    """End to end, then stopped after a checkpoint and resumed: the same bits and kept sets."""
    arguments = [
        "--pairs", data / "pairs" / "gsm8k_verified.parquet",
        "--model", data / "models" / "stories260K",
        "--max-length", 512, "--limit", 140, "--refresh-steps", 2, "--checkpoint-every", 3,
    ]  # fmt: skip
    output = example("plain_sage.py", *arguments, "--folder", tmp_path / "whole")
    assert "held-out accuracy" in output
    assert "held-out loss" in output
    resumed = tmp_path / "resumed"
    example("plain_sage.py", *arguments, "--folder", resumed)
    newest, middle = sorted(resumed.glob("checkpoint-*"), reverse=True)
    shutil.rmtree(newest)  # as after a kill between the two
    example("plain_sage.py", *arguments, "--folder", resumed, "--resume")
    states = [
        load_file(folder / "model" / "model.safetensors")
        for folder in (tmp_path / "whole", resumed)
    ]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    logs = [SelectionLog(folder / "selection").read() for folder in (tmp_path / "whole", resumed)]
    assert logs[0].equals(logs[1])
    assert middle.exists()


@pytest.mark.slow
def test_the_full_twin_and_a_file_with_judgments(data, tmp_path):
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
def test_sage_on_two_processes(tmp_path):
    """Under torchrun the policy is sharded, and what is kept and learnt is the same."""
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
    alone, together = (pl.read_ndjson(tmp_path / str(world) / "metrics.jsonl") for world in (1, 2))
    assert together["loss"].to_list() == pytest.approx(alone["loss"].to_list(), abs=1e-3)
    logs = [SelectionLog(tmp_path / str(world) / "selection") for world in (1, 2)]
    assert flips(*logs)["flipped"].sum() == 0
    models = [load_file(tmp_path / str(w) / "model" / "model.safetensors") for w in (1, 2)]
    assert models[0].keys() == models[1].keys()
    assert all(torch.allclose(models[0][n], models[1][n], atol=2e-3) for n in models[0])


@pytest.mark.slow
def test_the_planning_benchmark():
    output = example("benchmarks/plan_and_rank.py", "--pairs", 100_000, "--pool", 1000)
    assert "planning:" in output
    assert "ranking:" in output


@pytest.mark.slow
def test_the_reading_benchmark():
    output = example("benchmarks/read_pairs.py", "--rows", 3000)
    rates = {line[:24].strip(): line[24:].split() for line in output.splitlines()[2:6]}
    assert set(rates) == {
        "tokenizer alone", "first reading", "second reading", "all tokens looked at",
    }  # fmt: skip
    assert all(float(values[0].replace(",", "")) > 0 for values in rates.values())


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "backward"), [("float32", False), ("bfloat16", True)])
def test_the_benchmark_of_the_head(dtype, backward):
    output = example("benchmarks/head.py", "--tokens", 64, "--hidden", 32, "--vocabulary", 5000,
                     "--repeats", 1, "--dtype", dtype, *["--backward"] * backward)  # fmt: skip
    found = {
        line[:30].strip(): [float(value.replace(",", "")) for value in line[30:].split()]
        for line in output.splitlines()[2:]
        if "not measured" not in line
    }
    _, _, *errors = found["sage-select chunked"]
    assert errors[0] < 2e-5
    assert (found["log_softmax of all logits"][2] < 1e-3) is (dtype == "float32")
    assert len(errors) == 1 + backward
    if backward:
        assert errors[1] < 5e-3


@pytest.mark.slow
def test_the_checks_and_times_of_the_fused_head(tmp_path, monkeypatch):
    """All of them, as on a GPU, in Triton's interpreter."""
    pytest.importorskip("triton", reason="Triton is not installed, so there are no kernels")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    output = example("benchmarks/head_gpu.py", "--device", "cpu", "--out", tmp_path)
    assert output == (tmp_path / "head_gpu.md").read_text()
    rows = json.loads((tmp_path / "head_gpu.json").read_text())
    checks = [row for row in rows if "check" in row]
    assert len(checks) > 150
    assert all(row["passed"] for row in checks)
    assert f"{len(checks)} checks passed, 0 failed, 0 left out" in output
    tables = {}
    for row in rows:
        tables.setdefault(row.get("table"), {})[row.get("variant")] = row
    for name in ("forward", "forward and backward"):
        ours, naive = (tables[name][v] for v in ("sage-select fused", "log_softmax of all logits"))
        assert ours["max error"] < 5e-5 < 1e-3 < naive["max error"]
        assert ours["repeats"] == ours["alone"] == "yes"
        assert tables[name]["torch.mm"]["x mm"] == 1
    assert tables["forward and backward"]["sage-select fused"]["of gradient"] < 1e-2
    assert all(row["ms"] > 0 for row in tables["forward, by tiling"].values())
    (pair,) = [row for row in rows if "pair" in row]
    assert pair["loss"] == pytest.approx(2 * np.log(2), abs=1e-3)  # policy and reference agree


TINY = ["--shape", "tiny", "--part", 1, "--lengths", "demo", "--pairs", 5, "--rounds", 1]


def rates(output: str) -> dict[str, list[str]]:
    lines = [line for line in output.splitlines() if line.endswith("%") and "threads" not in line]
    return {line[:30].strip(): line[30:].split() for line in lines}


@pytest.mark.slow
def test_the_benchmark_of_the_engine():
    output = example("benchmarks/engine.py", *TINY, "--no-trl")
    assert "TRL not measured: --no-trl" in output
    found = rates(output)
    stored, both = found["sage-select, reference stored"], found["sage-select, both measured"]
    assert float(stored[0]) > float(both[0]) > 0
    assert float(both[3]) == pytest.approx(2 * float(stored[3]), abs=0.02)  # tokens


@pytest.mark.slow
def test_the_benchmark_of_the_engine_against_trl():
    pytest.importorskip(
        "trl", reason="trl is not installed, so there is no trainer to compare with"
    )
    output = example("benchmarks/engine.py", *TINY)
    assert [name for name in rates(output) if name.startswith("TRL")]
    assert float(output.split("largest difference:")[1].split()[0]) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["short", "long"])
def test_the_benchmark_of_the_engine_on_real_lengths(data, kind):
    output = example("benchmarks/engine.py", *TINY, "--lengths", kind, "--pairs", 2, "--no-trl")
    assert f"2 pairs, {kind}" in output
