"""On every wrapper and host, two updates end with the weights of a plain loop in one process."""

import json
import sys

import pytest
from conftest import ROOT, launched

sys.path.insert(0, str(ROOT / "examples" / "benchmarks"))
from wrappers import HOSTS, ROWS  # the benchmark, which makes both sides

SCRIPT = ROOT / "examples" / "benchmarks" / "wrappers.py"
ROUNDING = {"SGD": 1e-5, "AdamW": 1e-4}
"""Largest difference, as a share of the largest change of a weight. A gradient of a wrong scale
shows in SGD, as a share of the order of 1."""
IN_BFLOAT16 = 1e-2  # SGD alone: AdamW turns rounding of gradients near zero into steps
PLAIN = ["fit", "update", "own loop"]
QUICK = ["DDP, static graph", "FSDP2, LoRA on the head"]


def table(folder, rows, hosts, optimizers) -> list[dict]:
    out = folder / "figures.jsonl"
    names = ("--rows", *rows, "--hosts", *hosts, "--optimizers", *optimizers)
    launched(SCRIPT, *names, "--out", out)
    return [json.loads(line) for line in out.read_text().splitlines()]


def check(lines: list[dict], hosts: list[str], expected: int) -> None:
    assert len(lines) == expected
    for line in lines:
        bf16 = ROWS[line["row"]].dtype is not None
        share = IN_BFLOAT16 if bf16 else ROUNDING[line["optimizer"]]
        assert line["moved"] > 1e-3
        for host in hosts:
            if isinstance(line[host], float):
                assert line[host] < share * line["moved"], (line["row"], line["optimizer"], host)


def test_a_static_graph_and_sharded_adapters_in_loops_of_ones_own(tmp_path):
    hosts = ["update", "own loop"]
    lines = table(tmp_path, QUICK, hosts, ["SGD"])
    check(lines, hosts, len(QUICK))
    assert all(isinstance(line[host], float) for line in lines for host in hosts)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_wrapper_on_every_host(tmp_path):
    lines = table(tmp_path, ROWS, HOSTS, ["SGD"])
    check(lines, list(HOSTS), len(ROWS))
    for line in lines:
        assert all(isinstance(line[host], float) for host in PLAIN), line["row"]
        unsynchronised = "static" in line["row"] and ROWS[line["row"]].passes > 1
        for host in ("Lightning", "TRL"):
            if unsynchronised:
                assert "records" in line[host]
                assert "static_graph out, or set" in line[host]
            else:
                assert not isinstance(line[host], str), line[host]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_kind_of_wrapper_with_adamw(tmp_path):
    rows = ["bare", "DDP", "DDP, static graph, one pass", "DDP, LoRA", "FSDP2"]
    check(table(tmp_path, rows, HOSTS, ["AdamW"]), list(HOSTS), len(rows))
