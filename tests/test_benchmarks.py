"""The benchmarks run, at sizes too small for their figures to mean anything."""

import json

import numpy as np
import pytest
from test_examples import example


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
        "tokenizer alone", "first reading", "second reading", "all tokens read",
    }  # fmt: skip
    assert all(float(values[0].replace(",", "")) > 0 for values in rates.values())


@pytest.mark.slow
def test_the_benchmark_of_the_head():
    output = example("benchmarks/head.py", "--tokens", 64, "--hidden", 32, "--vocabulary", 5000,
                     "--repeats", 1, "--dtype", "bfloat16", "--backward")  # fmt: skip
    rows = {
        line[:30].strip(): [float(value.replace(",", "")) for value in line[30:].split()]
        for line in output.splitlines()[2:]
        if "not measured" not in line
    }
    _, _, *errors = rows["sage-select chunked"]
    assert errors[0] < 2e-5
    assert rows["log_softmax of all logits"][2] > 1e-3
    assert len(errors) == 2
    assert errors[1] < 5e-3


@pytest.mark.slow
def test_the_checks_and_times_of_the_fused_head(tmp_path, monkeypatch):
    """Runs all checks and times, as on a GPU, in Triton's interpreter."""
    pytest.importorskip("triton", reason="Triton is not installed, so there are no kernels")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    output = example("benchmarks/head_gpu.py", "--device", "cpu", "--out", tmp_path)
    assert output == (tmp_path / "head_gpu.md").read_text()
    rows = json.loads((tmp_path / "head_gpu.json").read_text())
    checks = [row for row in rows if "check" in row]
    assert len(checks) > 150
    assert all(row["passed"] for row in checks)
    assert f"{len(checks)} checks passed, 0 failed, 0 skipped" in output
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
    """The columns of each row that ends in an MFU, by the row's name."""
    lines = [line for line in output.splitlines() if line.endswith("%") and "threads" not in line]
    return {line[:30].strip(): line[30:].split() for line in lines}


@pytest.mark.slow
def test_the_benchmark_of_the_engine():
    output = example("benchmarks/engine.py", *TINY, "--no-trl")
    assert "TRL not measured: --no-trl" in output
    rows = rates(output)
    stored, both = rows["sage-select, reference stored"], rows["sage-select, both measured"]
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


@pytest.mark.slow
def test_the_comparison_with_the_tokens_of_trl():
    """It fails if a row is silently wrong here, or differs although TRL is right."""
    trl = pytest.importorskip("trl")
    if int(trl.__version__.split(".")[0]) < 1:
        pytest.skip("TRL ships chat templates since 1.0")
    names = ("qwen3", "gptoss", "phi3", "glm4moe", "idefics3", "nemotron_3_nano")
    output = example("benchmarks/trl_tokens.py", "--templates", *names)
    assert "6 templates x 15 shapes" in output
