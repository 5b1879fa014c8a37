"""Tests of the command line, with the demo's policy and real files."""

import errno
import gzip
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import jinja2
import polars as pl
import pytest
import typer
import yaml
from conftest import ROOT, launched
from typer.testing import CliRunner
from worlds import arithmetic_pairs

from sage_select import PreferenceDataset, SageConfig, SelectionLog
from sage_select.app.cli import app
from sage_select.app.cli.output import reported
from sage_select.app.run import Run
from sage_select.data.exports import as_llamafactory, as_trl
from sage_select.data.records import checked_pair

BASE = ROOT / "examples" / "arithmetic_base"


@pytest.fixture
def config(tmp_path, monkeypatch) -> Path:
    """Configuration of a run on the demo's pairs, with a separate store."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SAGE_SELECT_CACHE", str(tmp_path / "cache"))
    write_pairs(tmp_path / "pairs.jsonl")
    description = {
        "model": {"name": str(BASE), "tokenizer": str(BASE / "tokenizer"), "dtype": "float32"},
        "data": {"path": "pairs.jsonl", "max_length": 64, "held_out": 0.1},
        "selection": {"mix_start": [0.6, 0.35, 0.05], "mix_end": [0.3, 0.4, 0.3],
                      "refresh_steps": 6},
        "training": {"epochs": 1, "batch_size": 4, "learning_rate": 1e-4},
        "folder": "run",
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(description))
    return tmp_path / "run.yaml"


def write_pairs(path, count=60):
    path.write_text("".join(json.dumps(row) + "\n" for row in arithmetic_pairs()[:count]))


def sage_select(*arguments, code=0):
    """Run a command in this process and check its exit code."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def json_of(*arguments):
    """Run a command with `--json` and return its parsed output."""
    return json.loads(sage_select(*arguments, "--json").stdout)


def test_plan(config):
    plan = json_of("plan", config)
    assert plan["rows_read"] == plan["pairs"] + plan["held_out"] + sum(plan["set_aside"].values())
    assert sum(interval["pairs"] for interval in plan["intervals"]) == plan["pairs"]
    assert sum(interval["kept"] for interval in plan["intervals"]) == plan["kept"]
    assert plan["steps"] == -(-plan["kept"] // 4) < plan["steps_without_selection"]
    assert plan["intervals"][0]["keep"] == 1.0
    assert plan["intervals"][-1]["keep"] == 0.4
    cost = plan["cost"]
    flops, tokens = cost["flops"], cost["tokens"]
    selected = flops["reference"] + flops["scoring"] + flops["training"]
    assert cost["relative"] == pytest.approx(selected / (flops["reference"] + flops["full"]))
    assert cost["break_even"] == pytest.approx(1 - flops["scoring"] / flops["full"])
    assert cost["keep"] == pytest.approx(plan["kept"] / plan["pairs"])
    assert tokens["training"] < tokens["full"]
    assert 0 < tokens["scoring"] < tokens["full"]  # the first pool is kept whole, unscored
    # scoring needs the forward pass only
    assert flops["scoring"] / tokens["scoring"] < flops["full"] / tokens["full"] / 2
    assert plan["parameters"] > 100_000
    scored = [interval["scored Mtok"] for interval in plan["intervals"]]
    assert scored[0] == 0
    assert sum(scored) == pytest.approx(tokens["scoring"] / 1e6)
    text = sage_select("plan", config).stdout
    for word in (
        "60 rows read",
        "intervals",
        "TFLOP needed",
        "saves compute below",
        plan["config"],
    ):
        assert word in text
    assert not (config.parent / "run").exists()  # planning writes nothing


def test_plan_needs_no_weights(config):
    plan = json_of("plan", config, "--set", "model.name=org/elsewhere")
    assert plan["parameters"] is None
    assert set(plan["cost"]["flops"].values()) == {None}
    assert plan["cost"]["tokens"]["full"] > 0


def test_score_then_select_from_its_table(config, tmp_path):
    scored = json_of("score", config, "--out", "scores.parquet")
    table = pl.read_parquet("scores.parquet")
    assert scored["pairs"] == table.height
    assert scored["accuracy"] == 0.5  # the policy is the reference
    moved = table.with_columns(pl.col("chosen_logps") - pl.int_range(pl.len()) * 3)
    moved.write_parquet("moved.parquet")
    chosen = json_of("select", config, "--keep", "0.5", "--policy-logps", "moved.parquet",
                  "--out", "kept.jsonl")  # fmt: skip
    assert chosen["rule"] == "score"
    decisions = pl.read_parquet(chosen["decisions"])
    assert chosen["kept"] == decisions["kept"].sum() == decisions.height // 2
    best = decisions.sort("score", descending=True).head(chosen["kept"])
    assert best["kept"].all()
    assert decisions["weight"].to_list() == [float(kept) for kept in decisions["kept"]]
    kept = [json.loads(line) for line in Path("kept.jsonl").read_text().splitlines()]
    source = [json.loads(line) for line in Path("pairs.jsonl").read_text().splitlines()]
    rows = decisions.filter("kept")["source_row"].to_list()
    assert sorted(map(json.dumps, kept)) == sorted(json.dumps(source[row]) for row in rows)


def test_select_scores_a_checkpoint_on_a_pool_of_the_plan(config, world):
    import torch

    with torch.no_grad():
        for parameter in world.model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    world.model.save_pretrained("checkpoint")
    chosen = json_of("select", config, "--interval", 1, "--policy", "checkpoint",
                  "--out", "kept.parquet", "--format", "trl")  # fmt: skip
    interval = json_of("plan", config)["intervals"][1]
    assert (chosen["candidates"], chosen["kept"]) == (interval["pairs"], interval["kept"])
    assert chosen["rule"] == "score"
    assert pl.read_parquet("kept.parquet").columns == ["prompt", "chosen", "rejected"]


@pytest.mark.parametrize("extension", [".jsonl", ".json", ".parquet"])
@pytest.mark.parametrize("format", ["same", "trl", "llamafactory"])
def test_written_datasets_read_back_as_the_same_pairs(format, extension, config, still):
    chosen = json_of(
        "select", config, "--keep", 0.5, "--out", f"out/kept{extension}", "--format", format
    )
    kept = pl.read_parquet(chosen["decisions"]).filter("kept")
    if format == "llamafactory":  # its prompts are messages, which need a chat template
        entry = json.loads(Path("out/dataset_info.json").read_text())["kept"]
        assert entry["file_name"] == f"kept{extension}"
        assert entry["ranking"] is True
        tokenizer = with_a_template(still.tokenizer)
    else:
        tokenizer = still.tokenizer
    written = PreferenceDataset.read(f"out/kept{extension}", tokenizer=tokenizer, max_length=64)
    assert len(written) == kept.height
    if format != "llamafactory":
        assert sorted(written.ids) == sorted(kept["pair_id"])


def with_a_template(tokenizer):
    from copy import deepcopy

    tokenizer = deepcopy(tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    return tokenizer


def test_records_for_trl_follow_its_rules():
    """The rules are those of TRL's data_utils."""
    datasets = pytest.importorskip("datasets")
    text = checked_pair({"chosen": "Sky? blue", "rejected": "Sky? red"})
    chat = checked_pair(
        {
            "conversations": [{"from": "human", "value": "Sky?"}],
            "chosen": {"from": "gpt", "value": "blue"},
            "rejected": {"from": "gpt", "value": "red"},
        }
    )
    for pair, kind in ((text, str), (chat, list)):
        (record,) = datasets.Dataset.from_list([as_trl(pair)])
        assert set(record) == {"prompt", "chosen", "rejected"}
        assert {type(value) for value in record.values()} == {kind}
    assert record["chosen"] == [{"role": "assistant", "content": "blue"}]


def test_llamafactory_records_round_trip(data):
    """LLaMA-Factory's demo file is unchanged after reading and writing."""
    rows = json.loads(gzip.decompress((data / "formats" / "dpo_en_demo.json.gz").read_bytes()))
    for row in rows:
        assert as_llamafactory(checked_pair(row)) == row


LLAMAFACTORY_REFUSED = {
    "a response of several messages": {
        "prompt": [{"role": "user", "content": "p"}],
        "chosen": [{"role": "assistant", "content": c} for c in "ab"],
        "rejected": [{"role": "assistant", "content": "c"}],
    },
    "a prompt that ends with an assistant message": {
        "prompt": [{"role": r, "content": "p"} for r in ("user", "assistant")],
        "chosen": [{"role": "assistant", "content": "a"}],
        "rejected": [{"role": "assistant", "content": "b"}],
    },
    "a message without text": {
        "prompt": [{"role": "user", "content": "p"}],
        "chosen": [{"role": "assistant", "tool_calls": [{"name": "f"}]}],
        "rejected": [{"role": "assistant", "content": "b"}],
    },
}


@pytest.mark.parametrize("reason", LLAMAFACTORY_REFUSED)
def test_records_that_llamafactory_cannot_express_are_refused(reason):
    with pytest.raises(ValueError, match=reason):
        as_llamafactory(checked_pair(LLAMAFACTORY_REFUSED[reason]))


def test_train_and_resume(config):
    done = json_of("train", config)
    log = SelectionLog("run/selection").read()
    assert done["steps"] == json_of("plan", config)["steps"] == -(-log["kept"].sum() // 4)
    assert done["last"]["loss"] < done["first"]["loss"]
    assert SageConfig.read("run/config.yaml", environment={}).folder == "run"
    for name in ("metrics.jsonl", "evaluations.jsonl", "best.pt", "model/model.safetensors"):
        assert (Path("run") / name).exists()
    check_costs(done["cost"], json_of("plan", config)["cost"]["flops"])
    sage_select("train", config, code=3)
    resumed = json_of("train", config, "--resume")
    assert resumed["last"] == done["last"]
    assert resumed["cost"]["phases"]["training"] == done["cost"]["phases"]["training"]
    refused = sage_select("train", config, "--resume", "--set", "beta=0.2", code=2)
    assert "beta was 0.1, is 0.2" in refused.stderr
    other = sage_select("train", config, "--resume", "--set", "training.epochs=2", code=2)
    assert "training.epochs was 1, is 2" in other.stderr


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fsdp2", "ddp"])
def test_train_on_two_processes(config, strategy):
    """Under torchrun, rank 0 alone prints and writes, and costs are those of both ranks."""
    command = ["--no-python", Path(sys.executable).with_name("sage-select"), "train", config]
    options = ["--json", "--quiet", "--set", f"training.strategy={strategy}"]
    done = launched(*command, *options, processes=2, cwd=config.parent)
    together = json.loads(done.stdout)
    assert done.stderr.count("rows read") == 1
    check_costs(together["cost"], json_of("plan", config)["cost"]["flops"])
    shutil.move("run", "together")
    alone = json_of("train", config)
    assert together["steps"] == alone["steps"]
    assert together["last"]["loss"] == pytest.approx(alone["last"]["loss"], abs=1e-3)
    assert json_of("flips", "run", "together")["flipped"] == 0
    resumed = json_of("train", config, "--resume", "--set", "folder=together")
    assert resumed["last"] == together["last"]


def check_costs(cost, forecast):
    """Compare forecast and actual costs, of the run and of each interval."""
    assert set(cost["phases"]) == {"reference", "scoring", "training", "evaluation"}
    for name, work in cost["phases"].items():
        assert work["forecast"] == forecast[name]
        if name == "training":  # the lengths of the kept pairs were not known
            assert 0.5 * work["forecast"] < work["needed"] < 1.2 * work["forecast"]
        else:
            assert work["needed"] == pytest.approx(work["forecast"])
        assert work["needed"] <= work["executed"]
        assert work["seconds"] > 0
    lines = [json.loads(line) for line in Path("run/costs.jsonl").read_text().splitlines()]
    for name, work in cost["phases"].items():
        parts = [line for line in lines if line["phase"] == name]
        assert sum(line["needed"] for line in parts) == pytest.approx(work["needed"])
    scored = {line["interval"] for line in lines if line["phase"] == "scoring" and line["tokens"]}
    trained = {line["interval"] for line in lines if line["phase"] == "training"}
    assert trained - scored == {0}  # its pool is kept whole


def test_custom_score_and_loss(config):
    Path("mine.py").write_text(
        "from sage_select.losses import dpo\n"
        "def shortest_chosen(policy, reference, *, seed=0):\n"
        "    return -policy.chosen_tokens.double()\n"
        "loss = dpo\n"
    )
    json_of("train", config, "--set", "selection.score=mine:shortest_chosen",
         "--set", "training.loss=mine:loss", "--quiet")  # fmt: skip
    log = SelectionLog("run/selection").read().filter(pl.col("interval") == 1)
    assert log["rule"].unique().to_list() == ["score"]
    assert log["score"].to_list() == [-float(n) for n in log["chosen_tokens"]]


def test_store(config):
    first, second = (json_of("store", "fill", config) for _ in range(2))
    assert first["sequences_measured"] > 0
    assert second["sequences_measured"] == 0
    listed = json_of("store", "list")
    assert [r["identity"] for r in listed["references"]] == [first["identity"]]
    assert listed["bytes"] > 0 < listed["token_bytes"]
    assert first["identity"] in sage_select("store", "list").stdout
    assert json_of("store", "evict", "--older-than", "1h")["references"] == []
    assert json_of("store", "evict", "--max-size", "1GB")["references"] == []
    assert json_of("store", "evict", "--identity", first["identity"])["bytes"] > 0
    assert json_of("store", "list")["references"] == []
    for file in Path("cache/tokens").iterdir():
        os.utime(file, (0, 0))
    assert json_of("store", "evict", "--tokens", "--older-than", "30d")["files"] > 0
    assert list(Path("cache/tokens").iterdir()) == []


def test_a_reference_of_another_model_and_from_a_file(config):
    json_of("score", config, "--out", "scores.csv", "--set", f"reference.model={BASE}",
         "--set", "reference.store=mystore")  # fmt: skip
    assert len(json_of("store", "list", "--store", "mystore")["references"]) == 1
    again = json_of(
        "score",
        config,
        "--out",
        "again.csv",
        "--set",
        "reference.file=scores.csv",
        "--set",
        "data.held_out=0",
    )  # the held-out pairs are not in that file
    assert again["pairs"] > 0


def test_doctor(config):
    result = json_of("doctor")
    assert result["fit"]
    assert {"python", "torch", "devices", "cache"} <= {f["about"] for f in result["findings"]}
    result = json_of("doctor", config)
    about = {finding["about"]: finding for finding in result["findings"]}
    assert about["data"]["message"].startswith("60 rows")
    assert about["model"]["verdict"] == about["memory"]["verdict"] == "ok"
    assert "0 of" in sage_select("doctor", config).stdout


FATAL = {
    "model.name=none/there": ("model", "cannot be loaded"),
    "model.device=cuda:99": ("device", "cannot be used here"),
    "model.dtype=float16": ("model", "overflow in training"),
    "data.path=none.jsonl": ("data and plan", "no file none.jsonl"),
    "strata.clarity=clearness": ("data and plan", "the data have no column 'clearness'"),
    "selection.score=nowhere:score": ("functions", "cannot be imported"),
    "model.chat_template=none.jinja": ("tokenizer", "there is no file none.jinja"),
    "folder=/proc/run": ("run folder", "/proc/run"),
    "folder=run.yaml": ("run folder", "run.yaml is a file"),
    "selection.score=json:dumps": ("functions", "json:dumps(policy, reference) fails"),
    "training.loss=builtins:len": ("functions", "builtins:len(policy, reference) fails"),
    "reference.file=none.parquet": ("reference", "no file none.parquet"),
    "reference.model=/none": ("reference", "there is no folder /none"),
    "reference.device=cuda:9": ("reference", "reference.device: 'cuda:9'"),
    "reference.store=/proc/store": ("reference", "/proc/store"),
    "model.name=tokenizer-only": ("model", "tokenizer-only has no weights"),
    "model.attention=flash_attention_2": ("model", "flash_attn is not installed"),
}


@pytest.mark.parametrize("change", FATAL)
def test_doctor_reports_settings_that_would_stop_a_run(change, config):
    shutil.copytree(BASE, "tokenizer-only", ignore=shutil.ignore_patterns("*.safetensors"))
    result = sage_select("doctor", config, "--set", change, "--json", code=4)
    about, words = FATAL[change]
    messages = [f["message"] for f in json.loads(result.stdout)["findings"]
                if (f["about"], f["verdict"]) == (about, "fail")]  # fmt: skip
    assert any(words in message for message in messages), result.stdout


WARNED = {
    "model.dtype=bfloat16": "rounds to no change in bfloat16 weights",
    "data.max_length=100000": "positions; longer pairs",
    "data.max_length=12": "cut at 12 tokens",
    "data.held_out=0": "no best weights will be saved",
    "training.learning_rate=50": "far too high to train",
    "selection.refresh_steps=100": "selection has no effect",
}


@pytest.mark.parametrize("change", WARNED)
def test_doctor_warns_about_settings_that_would_spoil_a_run(change, config):
    rate = ["--set", "training.learning_rate=1e-6"]
    result = json_of("doctor", config, *rate, "--set", change)
    assert result["fit"]
    assert any(WARNED[change] in f["message"] for f in result["findings"] if f["verdict"] == "warn")


def test_a_thorough_doctor_tries_the_largest_batch(config, data):
    findings = {f["about"]: f for f in json_of("doctor", config, "--thorough")["findings"]}
    assert "4 pairs of up to" in findings["largest batch"]["message"]
    other_tokenizer = data / "models" / "stories260K"
    result = sage_select(
        "doctor",
        config,
        "--thorough",
        "--json",
        "--set",
        f"model.tokenizer={other_tokenizer}",
        code=4,
    )
    findings = json.loads(result.stdout)["findings"]
    messages = [f["message"] for f in findings if f["verdict"] == "fail"]
    assert any("they do not match" in message for message in messages)
    assert any("outside the model's vocabulary" in message for message in messages)


def test_commands_without_a_plan_need_no_strata(config):
    no_column = ["--set", "strata.clarity=nowhere"]
    assert json_of("store", "fill", config, *no_column)["sequences_measured"] > 0
    assert json_of("score", config, "--out", "s.csv", *no_column)["pairs"] == 60
    assert json_of("select", config, "--keep", 0.5, "--out", "k.jsonl", *no_column)["kept"] == 27


def test_selecting_from_log_probs_loads_no_weights(config):
    json_of("score", config, "--out", "scores.csv")
    shutil.copytree(BASE, "tokenizer-only", ignore=shutil.ignore_patterns("*.safetensors"))
    chosen = json_of("select", config, "--interval", 1, "--policy-logps", "scores.csv",
                  "--out", "kept.jsonl", "--set", "model.name=tokenizer-only")  # fmt: skip
    assert chosen["kept"] > 0
    other = sage_select("select", config, "--keep", 0.5, "--policy-logps", "scores.csv", "--out",
                        "k.jsonl", "--set", "data.max_length=20", code=3)  # fmt: skip
    assert "tokenizer, template or max_length" in other.stderr


def test_an_unreadable_index_is_reported_before_the_scoring(config):
    Path("dataset_info.json").write_text("{")
    result = sage_select("select", config, "--keep", 0.5, "--out", "k.jsonl", "--policy", "/none",
                         "--format", "llamafactory", code=3)  # fmt: skip
    assert "dataset_info.json is not JSON" in result.stderr


def test_only_one_process_trains_in_a_folder(config):
    fcntl = pytest.importorskip("fcntl")
    Path("run").mkdir()
    with Path("run/lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert "another process is training in run" in sage_select("train", config, code=3).stderr
    assert "10 steps, from the start, in run" in sage_select("train", config, "--resume").stderr
    assert "resuming from step 10, in run" in sage_select("train", config, "--resume").stderr


def test_models_of_a_run_can_be_loaded(config):
    done = json_of("train", config, "--set", "training.evaluate_every=2")
    evaluations = [
        json.loads(line) for line in Path("run/evaluations.jsonl").read_text().splitlines()
    ]
    assert done["best"] == min(evaluations, key=lambda evaluation: evaluation["loss"])
    for name in ("model", "best-model"):
        scored = json_of("score", config, "--out", "s.csv", "--policy", f"run/{name}")
        assert scored["margin"] != 0
        assert {file.stat().st_mode & 0o444 for file in (Path("run") / name).iterdir()} == {0o444}


# wrong command lines: arguments, exit code, words on stderr

WRONG = [
    (["plan"], 2, "Missing argument"),
    (["plann"], 2, "No such command 'plann'"),
    (["plan", "CONFIG", "--sett", "x"], 2, "No such option"),
    (["plan", "none.yaml"], 3, "no file none.yaml"),
    (["plan", "CONFIG", "--set", "training.epochs"], 2, "give a name and a value"),
    (["plan", "CONFIG", "--set", "training.epoch=1"], 2, "did you mean 'epochs'?"),
    (["plan", "CONFIG", "--set", "training.epochs=0"], 2, "greater than or equal to 1, got 0"),
    (["plan", "CONFIG", "--set", "beta=["], 2, "--set beta: cannot be read"),
    (["plan", "CONFIG", "--set", "data.path=none.jsonl"], 3, "no file none.jsonl"),
    (["plan", "CONFIG", "--set", "data.path=null"], 2, "data.path is not set"),
    (["plan", "CONFIG", "--set", "model.tokenizer=none/there"], 3, "'none/there' cannot be loaded"),
    (["plan", "CONFIG", "--set", "strata.clarity=x"], 2, "the data have no column 'x'; they have"),
    (["plan", "CONFIG", "--set", "data.max_length=3"], 3, "none of the 60 rows can be used"),
    (["plan", "CONFIG", "--set", "data.on_bad=error", "--set", "data.max_length=8"], 3,
     "pass on_bad='set_aside'"),
    (["plan", "CONFIG", "--set", "selection.on_infeasible=error", "--set",
      "selection.mix_start=[0,0,1]"], 3, "the data cannot follow the mix"),
    (["plan", "CONFIG", "--set", "strata.by=stratum", "--set", "strata.stratum=clarity"], 2,
     "not a whole number from 0 to 2"),
    (["plan", "CONFIG", "--set", "training.epochs=zwei"], 2, "overrides (--set): training.epochs:"),
    (["plan", "CONFIG", "--set", "model={name: x, names: y}"], 2, "there is no setting 'names'"),
    (["plan", "."], 2, ".: cannot be read"),
    (["plan", "CONFIG", "--set", "selection.multiple=64"], 2, "64 is more than the"),
    (["plan", "CONFIG", "--set", "data.columns={promt: prompt}"], 3, "columns maps 'promt'"),
    (["plan", "CONFIG", "--set", "data.columns={prompt: query}"], 3, "columns names 'query'"),
    (["plan", "CONFIG", "--set", "model.tokenizer=null"], 3, "there is no tokenizer in"),
    (["plan", "CONFIG", "--set", "model.tokenizer=/none/here"], 3, "there is no folder /none/here"),
    (["plan", "CONFIG", "--set", "model.eos_token=<end>"], 2, "'<end>' is not a token of"),
    (["plan", "CONFIG", "--set", "strata.by=value", "--set", "strata.value=clarity"], 3,
     "in column 'clarity' (strata.value)"),
    (["score", "CONFIG"], 2, "Missing option '--out'"),
    (["score", "CONFIG", "--out", "/proc/x.csv"], 3, "out (--out) /proc/x.csv: cannot be written"),
    (["score", "CONFIG", "--out", "x.csv", "--policy", "run.yaml"], 3,
     "policy (--policy): run.yaml is a file; give the folder of a model"),
    (["score", "CONFIG", "--out", "x.csv", "--set", "reference.device=cuda:9"], 2,
     "reference.device: 'cuda:9' cannot be used here"),
    (["select", "CONFIG", "--out", "run.yaml/x.jsonl", "--keep", "1"], 3,
     "out (--out) run.yaml/x.jsonl: cannot be written"),
    (["score", "CONFIG", "--out", "x.txt"], 2, "must end in .parquet, .csv"),
    (["score", "CONFIG", "--out", "x.csv", "--interval", "99"], 2, "has intervals 0 to"),
    (["score", "CONFIG", "--out", "x.csv", "--policy", "none/there"], 3, "cannot be loaded"),
    (["select", "CONFIG", "--out", "x.jsonl"], 2, "give interval (--interval), for a pool"),
    (["select", "CONFIG", "--out", "x.jsonl", "--keep", "1.5"], 2, "(--keep) must be in (0, 1]"),
    (["select", "CONFIG", "--out", "x.txt", "--keep", "0.5"], 2, "must end in .jsonl"),
    (["select", "CONFIG", "--out", "x.jsonl", "--keep", "0.5", "--format", "csv"], 2,
     "'csv' is not one of"),
    (["select", "CONFIG", "--out", "x.jsonl", "--keep", "0.5", "--policy", "a",
      "--policy-logps", "b"], 2, "policy_logps (--policy-logps), not both"),
    (["select", "CONFIG", "--out", "x.jsonl", "--keep", "0.5", "--policy-logps", "b.parquet"], 3,
     "no file b.parquet"),
    (["train", "CONFIG", "--set", "folder=run.yaml"], 2, "folder: run.yaml is a file"),
    (["store", "list", "--store", "none"], 3, "--store none: there is no such folder"),
    (["train", "CONFIG", "--set", "model.name=none/there"], 3, "cannot be loaded"),
    (["train", "CONFIG", "--set", "model.device=gpu"], 2, "'gpu' cannot be used here"),
    (["train", "CONFIG", "--set", "training.loss=none:loss"], 2, "cannot be imported"),
    (["train", "CONFIG", "--set", "training.loss=json:dumpz"], 2, "has no function 'dumpz'"),
    (["plan", "CONFIG", "--set", "training.epochs='1'"], 2, "should be a whole number, got '1'"),
    (["plan", "CONFIG", "--set", "training.learning_rate=nan"], 2, "should be a number, got 'nan'"),
    (["plan", "CONFIG", "--set", "beta=" + "[" * 50], 2, "--set beta: cannot be read: it nests"),
    (["plan", "CONFIG", "--set", "." * 30 + "=1"], 2, "there is no setting ''"),
    (["plan", "CONFIG", "--set", "training.epochs.x=1"], 2, "there is no setting 'epochs.x'"),
    (["store", "evict"], 2, "give --identity, --older-than or --max-size"),
    (["store", "evict", "--older-than", "soon"], 2, "give a number and one of m, h, d, w"),
    (["store", "evict", "--max-size", "2 gigs"], 2, "give a number and one of B, kB, MB, GB"),
    (["store", "evict", "--identity", "none"], 3, "has no reference none"),
    (["store", "evict", "--tokens"], 2, "give a minimum age, as in --older-than 30d"),
    (["store", "fill", "CONFIG", "--set", "reference.file=x.csv"], 2, "nothing to measure"),
    (["doctor", "none.yaml"], 3, "no file none.yaml"),
    (["config", "show", "none.yaml"], 3, "no file none.yaml"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "code", "words"), WRONG, ids=[" ".join(w[0]) for w in WRONG])
def test_messages(arguments, code, words, config):
    arguments = [config if argument == "CONFIG" else argument for argument in arguments]
    result = sage_select(*arguments, code=code)
    assert words in " ".join(result.stderr.replace("│", " ").split())


class CheckpointException(Exception):
    """As torch.distributed's, which collects the errors of the ranks."""

    def __init__(self, failures):
        super().__init__("CheckpointException ranks:dict_keys([1])")
        self.failures = failures


def caused_by(cause):
    error = RuntimeError("the file could not be written")
    error.__cause__ = cause
    return error


FULL = OSError(errno.ENOSPC, "No space left on device", "run/checkpoint")
RAISED = {
    "No space left on device": FULL,
    "Disk quota exceeded": OSError(errno.EDQUOT, "Disk quota exceeded"),
    "No space left on device: 'run/checkpoint' (the file could not be written)": caused_by(FULL),
    "No space left on device: 'run/checkpoint' (CheckpointException": CheckpointException(
        {1: (FULL, None)}
    ),
    "something is nested too deeply": RecursionError("maximum recursion depth exceeded"),
    "can't decode byte 0xff": UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
    "OverflowError": OverflowError(),
    "division by zero": ZeroDivisionError("division by zero"),
    "unpack requires a buffer of 8 bytes": struct.error("unpack requires a buffer of 8 bytes"),
    "incorrect header check": zlib.error("Error -3: incorrect header check"),
    "no rows": pl.exceptions.ComputeError("no rows"),
    "'loop' is undefined": jinja2.UndefinedError("'loop' is undefined"),
    "invalid tokenizer.json": Exception("invalid tokenizer.json"),
    "the file ends early": EOFError("the file ends early"),
}


@pytest.mark.parametrize("words", RAISED)
def test_errors_of_the_input_are_messages(words, capsys):
    with pytest.raises(typer.Exit) as exit, reported():
        raise RAISED[words]
    assert exit.value.exit_code == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert words in line


BUGS = (AssertionError("x"), AttributeError("x"), RuntimeError("x"), caused_by(RuntimeError("x")))


@pytest.mark.parametrize("bug", BUGS)
def test_bugs_keep_their_traceback(bug):
    with pytest.raises(type(bug)) as raised, reported():
        raise bug
    assert raised.value is bug


def script(*arguments, cwd):
    """Run the console script, with SIGINT handled as on a terminal."""
    return subprocess.run(
        [Path(sys.executable).with_name("sage-select"), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=cwd,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


STRAY = ("statistics", "typing", "numbers", "torch", "numpy", "yaml", "pydantic", "tokenizers")


@pytest.mark.slow
def test_files_in_the_current_folder_are_not_imported_unasked(config):
    for name in STRAY:
        Path(f"{name}.py").write_text(f"open('ran-{name}', 'w').close()")
    Path("mine.py").write_text("open('ran-mine', 'w').close()\nfrom sage_select import sage\n")
    options = ["--out", "scores.csv", "--set", "selection.score=mine:sage"]
    done = script("score", config, *options, cwd=config.parent)
    assert done.returncode == 0, done.stderr
    assert list(Path().glob("ran-*")) == [Path("ran-mine")]


def test_a_file_that_an_installed_module_hides_is_named(config):
    Path("statistics.py").write_text("def loss(policy, reference): ...")
    done = sage_select("train", config, "--set", "training.loss=statistics:loss", code=2)
    assert "has no function 'loss'; if you mean another file, rename it" in done.stderr


SWALLOWS = """
import os, time
for _ in range({times}):
    try:
        os.kill(os.getpid(), 2)
        time.sleep(1)
    except BaseException:
        pass
time.sleep({seconds})
{last}
"""


@pytest.mark.slow
def test_an_interrupt_that_becomes_another_error_ends_the_command_as_one(config):
    broken = SWALLOWS.format(times=1, seconds=0, last="raise RuntimeError('broken')")
    Path("mine.py").write_text(broken)
    done = script("train", config, "--set", "selection.score=mine:score", cwd=config.parent)
    assert done.returncode == 130, done.stderr
    assert done.stderr.count("interrupted; finished work is kept") == 1


FINISHES = """
try:
    SIGINT
finally:
    time.sleep(1)  # longer than it takes to notice a lost interrupt
    open("finished", "w").close()
"""
INTERRUPTED = {
    "swallowed": SWALLOWS.format(times=1, seconds=60, last=""),
    "swallowed three times": SWALLOWS.format(times=3, seconds=60, last=""),
    "swallowed at the very end": SWALLOWS.format(times=1, seconds=0, last=""),
    "in a destructor": "import gc\nclass A:\n    def __del__(self): SIGINT\nA()\ntime.sleep(60)",
    "in a finally block": FINISHES,
    "as it should be": "SIGINT",
}


@pytest.mark.parametrize("where", INTERRUPTED)
def test_an_interrupt_always_ends_a_command(where, tmp_path):
    body = INTERRUPTED[where].replace("SIGINT", "os.kill(os.getpid(), 2), time.sleep(60)")
    (tmp_path / "mine.py").write_text(f"import os, time\n{body}")
    code = "from sage_select.app.cli.interrupts import interruptible\nwith interruptible():\n"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}    import mine"],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        cwd=tmp_path,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert done.returncode == 130, done.stderr
    assert done.stderr.count("interrupted; finished work is kept") == 1
    assert (tmp_path / "finished").exists() == ("finally" in where)


def test_errors_are_printed_as_json_too(config):
    result = sage_select("plan", config, "--set", "beta=0", "--json", code=2)
    assert "greater than 0" in json.loads(result.stdout)["error"]


def test_config_commands(config):
    assert SageConfig(**yaml.safe_load(sage_select("config", "paper").stdout)) == SageConfig.paper()
    assert "properties" in json.loads(sage_select("config", "schema").stdout)
    shown = sage_select("config", "show", config, "--set", "seed=5").stdout
    assert yaml.safe_load(shown)["seed"] == 5
    assert (
        shown.splitlines()[0] == "# " + json_of("config", "show", config, "--set", "seed=5")["hash"]
    )


@pytest.mark.parametrize(
    "command", ["", "plan", "score", "select", "train", "store", "doctor", "config"]
)
def test_help(command):
    text = sage_select(*command.split(), "--help").stdout
    assert "Usage:" in text
    assert len(text.splitlines()) > 8


def test_the_console_script_and_its_log(config, monkeypatch):
    """Its stdout has the JSON alone, and its stderr no redrawn bars."""
    script = Path(sys.executable).with_name("sage-select")
    done = subprocess.run(
        [script, "plan", config, "--json"], capture_output=True, text=True, timeout=200, check=True
    )
    assert json.loads(done.stdout)["steps"] > 0
    assert "\r" not in done.stderr


def test_a_log_file_receives_lines_not_bars(capsys, monkeypatch):
    from sage_select.system import progress_bars as progress

    monkeypatch.setattr(progress, "LINE_EVERY", 0.0)
    with progress.progress_bar(3, "scoring", "pairs") as bar:
        for _ in range(3):
            bar.update()
    written = capsys.readouterr().err
    assert "\r" not in written
    assert [line.split(":")[0] for line in written.splitlines()] == ["scoring"] * len(
        written.splitlines()
    )
    assert "3/3" in written
    monkeypatch.setattr(progress, "LINE_EVERY", 60.0)
    with progress.progress_bar(3, "scoring", "pairs") as bar:
        bar.update()
    assert capsys.readouterr().err == ""  # no line about a pass that ends within LINE_EVERY


def test_kept_pairs_are_written_in_training_order(config):
    """The order is seeded and not best first, since a trainer may not shuffle well."""
    contents = []
    for name, seed in (("one.jsonl", 0), ("two.jsonl", 0), ("three.jsonl", 1)):
        json_of("select", config, "--keep", 1.0, "--out", name, "--set", f"seed={seed}",
             "--set", "data.held_out=0")  # fmt: skip
        contents.append(Path(name).read_text().splitlines())
    assert contents[0] == contents[1] != contents[2]
    assert sorted(contents[0]) == sorted(contents[2])


def test_scoring_settings_reach_selection_and_training():
    config = SageConfig(scoring={"impl": "fused", "layout": "padded"})
    expected = {"impl": "fused", "layout": "padded"}
    run = Run(config, None, None)
    assert expected.items() <= vars(run.reader).items()
    assert run.training.reader is run.reader


def test_flips_between_a_run_and_itself(tmp_path):
    from test_loader import decision

    log = SelectionLog(tmp_path / "selection")
    log.write(0, decision([3, 2, 1], 2), [*"abc"])
    assert json_of("flips", tmp_path, tmp_path)["flipped"] == 0
    assert "0 of 2 kept pairs flipped" in sage_select("flips", tmp_path, tmp_path).stdout
    error = sage_select("flips", tmp_path, tmp_path / "none", code=3).stderr
    assert "there is no selection log in" in error
