"""Tests of the reference store: nothing is measured twice, and every change is measured."""

import os
import shutil
import signal
import subprocess
import sys
import time
from copy import deepcopy
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from store_worker import NEVER, fill

from sage_select import PreferenceDataset, Reader, ReferenceStore, measure
from sage_select.data.token_cache import evict_tokens
from sage_select.models import measuring, reader
from sage_select.models.fingerprints import model_digest
from sage_select.references import parts as parts_on_disk
from sage_select.references.eviction import evict, stored_references
from sage_select.references.logp_tables import read_reference
from sage_select.system import files

TESTS = Path(__file__).parent


@pytest.fixture
def forwards(monkeypatch):
    """The sequences that went through a model, without those of the packing trial."""
    forwarded, lay_out = [], measuring.lay_out

    def recording(sequences, *, packed):
        forwarded.extend(sequences)
        return lay_out(sequences, packed=packed)

    monkeypatch.setattr(measuring, "lay_out", recording)
    monkeypatch.setattr(reader, "packs_exactly", lambda *args: True)  # the trial forwards, too
    return forwarded


def equal(left, right) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def test_a_store_is_measured_once(still, forwards, tmp_path):
    first = ReferenceStore(still.model, still.dataset, folder=tmp_path)
    assert len(first) == 0
    assert len(first.missing()) == len(still.dataset)
    assert first.fill() == len(forwards) > 0
    expected = measure(still.model, still.dataset)
    forwards.clear()
    for opened in (first, ReferenceStore(deepcopy(still.model), still.dataset, folder=tmp_path)):
        assert opened.fill() == 0
        assert equal(opened.take(still.dataset.index), expected)
        assert equal(opened.take([7, 3]), expected.take([7, 3]))
    assert forwards == []


def test_rows_are_measured_when_first_requested(still, forwards, tmp_path):
    reference = ReferenceStore(still.model, still.dataset, folder=tmp_path)
    reference.take([3, 1])
    assert 0 < len(forwards) <= 4  # two pairs, which may share a response
    missing = len(reference.missing())
    assert 0 < missing <= len(still.dataset) - 2
    assert reference.fill() > 0
    assert len(reference.missing()) == 0


def test_a_selector_accepts_a_store_as_reference(still, tmp_path):
    from dataclasses import replace

    reference = ReferenceStore(still.model, still.dataset, folder=tmp_path)
    policy = deepcopy(still.model)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.01)
    pool = still.dataset.take(still.timeline.plan.pools[1])
    expected = still.selector.select(policy, pool, 6)
    selection = replace(still.selector, reference=reference).select(policy, pool, 6)
    assert selection.indices.tolist() == expected.indices.tolist()


def demo_pairs(still, **options):
    from worlds import arithmetic_pairs

    rows = list(arithmetic_pairs())
    return PreferenceDataset.from_records(rows, tokenizer=still.tokenizer, **options)


def first_word(model):
    return next(model.parameters()).data.view(torch.int32)[0, 0]


CHANGES = {
    "a non-persistent buffer": lambda model: model.model.rotary_emb.to(torch.bfloat16),
    "one bit of one weight": lambda model: first_word(model).add_(1),
    "dtype": lambda model: model.to(torch.bfloat16),
    "a model setting": lambda model: setattr(model.config, "rms_norm_eps", 1e-5),
    "attention": lambda model: model.set_attn_implementation("eager"),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_model_is_a_new_reference(change, still, tmp_path):
    model = deepcopy(still.model)
    ReferenceStore(model, still.dataset, folder=tmp_path).fill()
    CHANGES[change](model)
    assert len(ReferenceStore(model, still.dataset, folder=tmp_path)) == 0


def test_the_digest_covers_every_weight(still):
    model = deepcopy(still.model)
    digests = {model_digest(model)}
    for tensor in model.state_dict().values():
        tensor.view(-1)[-1:].add_(1)
        digests.add(model_digest(model))
    distinct = len({tensor.data_ptr() for tensor in model.state_dict().values()})  # some are tied
    assert len(digests) >= 1 + distinct


def test_mixed_precision_and_head_are_part_of_the_identity(still, tmp_path):
    options = [{}, {"mixed_precision": torch.bfloat16}, {"impl": "reference"}]
    stores = [
        ReferenceStore(still.model, still.dataset, folder=tmp_path, reader=Reader(**o))
        for o in options
    ]
    assert len({reference.identity for reference in stores}) == 3
    chunked = ReferenceStore(
        still.model, still.dataset, folder=tmp_path, reader=Reader(impl="chunked")
    )
    assert chunked.identity == stores[0].identity  # "auto" resolves to "chunked" on the CPU


def test_a_new_max_length_measures_only_the_sequences_it_changes(still, forwards, tmp_path):
    full, cut = demo_pairs(still, max_length=64), demo_pairs(still, max_length=16)
    ReferenceStore(still.model, full, folder=tmp_path).fill()
    changed = {s.tokens.tobytes() for s in cut.sequences()} - {
        s.tokens.tobytes() for s in full.sequences()
    }
    forwards.clear()
    reference = ReferenceStore(still.model, cut, folder=tmp_path)
    assert reference.fill() == len(changed) > 0
    assert {s.tokens.tobytes() for s in forwards} == changed
    logps = reference.take(cut.index)
    torch.testing.assert_close(logps.chosen, measure(still.model, cut).chosen)


def test_a_template_changed_by_one_byte_measures_everything_again(
    data, forwards, stories, tmp_path
):
    from transformers import AutoTokenizer

    model, _ = stories
    tokenizer = AutoTokenizer.from_pretrained(data / "models" / "stories260K")
    rows = [
        {
            "prompt": [{"role": "user", "content": f"Tell a story of {i} cats."}],
            "chosen": [{"role": "assistant", "content": f"Once there were {i} cats."}],
            "rejected": [{"role": "assistant", "content": "No."}],
        }
        for i in range(3)
    ]
    template = "{% for m in messages %}# {{ m.content }}\n{% endfor %}"
    counts = []
    for text in (template, template, template.replace("#", "+")):
        tokenizer.chat_template = text
        pairs = PreferenceDataset.from_records(rows, tokenizer=tokenizer, max_length=64)
        counts.append(ReferenceStore(model, pairs, folder=tmp_path).fill())
    assert counts == [6, 0, 6]


def test_a_peft_policy_is_measured_without_its_adapters(still, forwards, tmp_path):
    peft = pytest.importorskip("peft")
    base = ReferenceStore(still.model, still.dataset, folder=tmp_path)
    lora = peft.LoraConfig(target_modules="all-linear", r=4)
    policy = peft.get_peft_model(deepcopy(still.model), lora)
    for name, parameter in policy.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    with pytest.warns(UserWarning, match="adapters are trained already"):
        reference = ReferenceStore(policy, still.dataset, folder=tmp_path)
    assert reference.identity == base.identity
    assert reference.fill() > 0
    assert base.fill() == 0
    expected = measure(still.model, still.dataset)
    assert equal(base.take(still.dataset.index), expected)
    assert not torch.allclose(measure(policy, still.dataset).chosen, expected.chosen)


def adapted(still, **options):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(target_modules="all-linear", r=2, **options)
    return peft.get_peft_model(deepcopy(still.model), lora)


@pytest.mark.filterwarnings("error:ReferenceStore")
def test_adapters_that_change_nothing_yet_need_no_warning(still, tmp_path):
    ReferenceStore(adapted(still), still.dataset, folder=tmp_path)


def merged(still):
    policy = adapted(still)
    policy.merge_adapter()
    return policy


def added_by_transformers(still):
    peft = pytest.importorskip("peft")
    policy = deepcopy(still.model)
    policy.add_adapter(peft.LoraConfig(target_modules="all-linear", r=2))
    return policy


NOT_THE_BASE_MODEL = {
    "adapters of transformers' own": added_by_transformers,
    "the adapters are merged": merged,
    "init_lora_weights='pissa' changes": lambda still: adapted(still, init_lora_weights="pissa"),
    "the adapters train biases": lambda still: adapted(still, bias="lora_only"),
}


@pytest.mark.parametrize("message", NOT_THE_BASE_MODEL)
def test_adapters_that_cannot_be_disabled_are_refused(message, still, tmp_path):
    policy = NOT_THE_BASE_MODEL[message](still)
    with pytest.raises(ValueError, match=message):
        ReferenceStore(policy, still.dataset, folder=tmp_path)


def test_a_trained_model_cannot_fill_the_store(world, tmp_path):
    reference = ReferenceStore(world.model, world.dataset, folder=tmp_path)
    reference.fill([0, 1])
    with torch.no_grad():
        next(world.model.parameters()).add_(0.1)
    assert len(reference.take([0, 1]).index) == 2
    with pytest.raises(ValueError, match=r"weights, .* have changed since the store was opened"):
        reference.take([2])


def test_a_store_without_a_model(still, tmp_path):
    first = ReferenceStore(still.model, still.dataset, folder=tmp_path)
    first.fill([4, 5])
    without_model = ReferenceStore(None, still.dataset, folder=tmp_path, identity=first.identity)
    assert equal(without_model.take([5, 4]), first.take([5, 4]))
    with pytest.raises(ValueError, match="there is no model to measure them with"):
        without_model.take([6])
    with pytest.raises(FileNotFoundError, match=f"has no reference other; it has {first.identity}"):
        ReferenceStore(None, still.dataset, folder=tmp_path, identity="other")
    with pytest.raises(ValueError, match="pass either a model or the identity"):
        ReferenceStore(None, still.dataset, folder=tmp_path)


def test_a_log_prob_that_is_not_finite_is_not_stored(still, tmp_path):
    model = deepcopy(still.model)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("inf"))
    reference = ReferenceStore(model, still.dataset, folder=tmp_path)
    with pytest.raises(ValueError, match=r"a response of pair \w+ \(row \d+\) has log-prob nan"):
        reference.fill()
    assert len(ReferenceStore(model, still.dataset, folder=tmp_path)) == 0


def test_a_row_outside_the_dataset_is_refused(still, tmp_path):
    subset = ReferenceStore(still.model, still.dataset.take([2, 0]), folder=tmp_path)
    for row in (1, 5):  # between its rows, and after them
        with pytest.raises(KeyError, match=f"row {row} is not one of the 2 pairs of the store's"):
            subset.take([row])


# On disk


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["before", "in", "after"])
def test_a_store_killed_twice_equals_one_that_was_never_killed(
    moment, still, tmp_path, monkeypatch
):
    for name in ("WRITE_EVERY", "replace_durably"):  # `fill` changes them; restored after the test
        monkeypatch.setattr(parts_on_disk, name, getattr(parts_on_disk, name))
    killed, never_killed = tmp_path / "killed", tmp_path / "never-killed"
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent / "examples")])
    }
    sizes = []
    for _ in range(2):
        worker = [sys.executable, TESTS / "store_worker.py", killed, "3", moment]
        done = subprocess.run(worker, env=environment, timeout=300, check=False)
        assert done.returncode == -signal.SIGKILL
        sizes.append(stored_references(killed)[0].sequences)
    assert 0 < sizes[0] < sizes[1] < stored_total(still)
    fill(never_killed, NEVER, "")
    fill(killed, NEVER, "")
    entries = []
    for folder in (never_killed, killed):
        (reference,) = stored_references(folder)
        entries.append(parts_on_disk.read_parts(folder / reference.identity))
    expected, resumed = entries
    assert resumed.keys.tobytes() == expected.keys.tobytes()
    assert resumed.logps.tobytes() == expected.logps.tobytes()


def stored_total(still) -> int:
    return len({s.tokens.tobytes() for s in still.dataset.sequences()})


def test_many_parts_are_merged_into_one(still, tmp_path, monkeypatch):
    monkeypatch.setattr(parts_on_disk, "WRITE_EVERY", 0.0)
    monkeypatch.setattr(parts_on_disk, "MERGE_ABOVE", 3)
    options = {"folder": tmp_path, "reader": Reader(max_batch_tokens=256)}
    reference = ReferenceStore(still.model, still.dataset, **options)
    leftover = reference.folder / ".part-x.arrow.0.partial"
    leftover.parent.mkdir()
    leftover.write_bytes(b"truncated")
    os.utime(leftover, (0, 0))  # older than ABANDONED_AFTER
    reference.fill()
    assert len(list(reference.folder.glob("part-*"))) == 1
    assert not leftover.exists()
    monkeypatch.undo()
    assert ReferenceStore(still.model, still.dataset, folder=tmp_path).fill() == 0


def test_parts_can_be_merged_during_a_read(still, tmp_path, monkeypatch):
    """A merge by another process between listing and reading loses no entry and tears none."""
    monkeypatch.setattr(parts_on_disk, "MERGE_ABOVE", 1)
    folder = tmp_path / "reference"
    folder.mkdir()
    keys = np.frombuffer(np.random.default_rng(0).bytes(16 * 60), dtype="S16")
    values = np.arange(60.0)
    for start in range(0, 60, 10):
        parts_on_disk._write_part(
            folder, keys[start : start + 10], torch.from_numpy(values).numpy()[start : start + 10]
        )
        before = sorted(folder.glob("part-*"))
        read = parts_on_disk._read_part

        def merging_first(path, read=read):
            monkeypatch.setattr(parts_on_disk, "_read_part", read)
            parts_on_disk.merge_parts(folder)
            return read(path)

        monkeypatch.setattr(parts_on_disk, "_read_part", merging_first)
        entries = parts_on_disk.read_parts(folder)
        monkeypatch.setattr(parts_on_disk, "_read_part", read)
        written = start + 10
        assert entries.look_up(keys[:written]).tolist() == values[:written].tolist(), before
        assert np.isnan(entries.look_up(keys[written:])).all()


def test_a_key_in_two_parts_has_one_entry(tmp_path):
    keys = np.frombuffer(np.random.default_rng(0).bytes(16 * 3), dtype="S16")
    parts_on_disk._write_part(tmp_path, keys, np.array([-1.0, -2.0, -3.0]))
    parts_on_disk._write_part(tmp_path, keys[:2], np.array([-1.5, -1.5]))  # rounded differently
    entries = parts_on_disk.read_parts(tmp_path)
    assert len(entries.keys) == 3
    assert entries.look_up(keys).tolist() == [
        -1.5,
        -2.0,
        -3.0,
    ]  # the lowest, in any order of the parts


def test_a_reference_evicted_during_fill_can_be_filled_again(still, tmp_path, monkeypatch):
    monkeypatch.setattr(parts_on_disk, "WRITE_EVERY", 0.0)
    reference = ReferenceStore(
        still.model, still.dataset, folder=tmp_path, reader=Reader(max_batch_tokens=256)
    )
    write, parts = parts_on_disk._write_part, []

    def write_then_evict_once(folder, keys, logps):
        parts.append(write(folder, keys, logps))
        if len(parts) == 2:
            evict(tmp_path, identity=reference.identity)
        return parts[-1]

    monkeypatch.setattr(parts_on_disk, "_write_part", write_then_evict_once)
    reference.fill()
    assert 0 < len(reference.missing()) < len(still.dataset)
    assert reference.fill() > 0
    assert len(reference.missing()) == 0


@pytest.mark.parametrize("times", [1, 5])
@pytest.mark.parametrize("file", ["part-", "reference.json"])
def test_a_file_is_written_although_its_folder_is_evicted_meanwhile(
    file, times, still, tmp_path, monkeypatch
):
    """The folder disappears between the moment it is made and the moment it is written to."""
    reference = ReferenceStore(still.model, still.dataset, folder=tmp_path)
    real, evictions = parts_on_disk.partial_path, []
    module = parts_on_disk if file == "part-" else files

    def evict_first(path):
        if path.name.startswith(file) and len(evictions) < times:
            evictions.append(path)
            shutil.rmtree(path.parent)
        return real(path)

    monkeypatch.setattr(module, "partial_path", evict_first)
    reference.fill()
    assert len(evictions) == times
    assert len(reference.missing()) == 0


def test_log_probs_that_disappear_are_named(still, tmp_path, monkeypatch):
    reference = ReferenceStore(still.model, still.dataset, folder=tmp_path)
    write = parts_on_disk._write_part

    def write_then_evict(folder, keys, logps):
        path = write(folder, keys, logps)
        evict(tmp_path, identity=reference.identity)
        return path

    monkeypatch.setattr(parts_on_disk, "_write_part", write_then_evict)
    with pytest.raises(ValueError, match=r"2 of 2 pairs were measured, .* disappeared from"):
        reference.take([0, 1])


def test_eviction_leaves_other_files_alone(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "a.tex").write_text("years of work")
    (tmp_path / "0123456789abcdef0123456789abcdef").mkdir()
    (tmp_path / "0123456789abcdef0123456789abcdef" / "notes").write_text("more")
    evict(tmp_path, unused_for=-1)
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["a.tex", "notes"]
    (tmp_path / "mine.json").write_text("{}")
    assert evict_tokens(-1, tmp_path) == (0, 0)


def test_a_corrupted_part_is_measured_again(still, tmp_path):
    reference = ReferenceStore(still.model, still.dataset, folder=tmp_path)
    reference.fill()
    (part,) = reference.folder.glob("part-*")
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)
    again = ReferenceStore(still.model, still.dataset, folder=tmp_path)
    with pytest.warns(UserWarning, match=r"is corrupted .* and is skipped"):
        assert len(again) == 0


def test_eviction(still, tmp_path):
    for scale in (1.0, 1.1, 1.2):
        model = deepcopy(still.model)
        with torch.no_grad():
            next(model.parameters()).mul_(scale)
        reference = ReferenceStore(model, still.dataset, folder=tmp_path)
        reference.fill()
    old, *_ = (r.identity for r in stored_references(tmp_path) if r.identity != reference.identity)
    for file in (tmp_path / old).iterdir():
        os.utime(file, (time.time() - 100,) * 2)
    assert [r.identity for r in evict(tmp_path, unused_for=50)] == [old]
    size = max(r.size for r in stored_references(tmp_path))
    os.utime(reference.folder / "reference.json", (time.time() + 9,) * 2)
    assert len(evict(tmp_path, max_size=size)) == 1
    (left,) = stored_references(tmp_path)
    assert left.identity == reference.identity
    assert left.description["dtype"] == "torch.float32"
    evict(tmp_path, identity=left.identity)
    assert stored_references(tmp_path) == []
    with pytest.raises(ValueError, match="has no reference"):
        evict(tmp_path, identity=left.identity)
    with pytest.raises(ValueError, match="nothing to delete was given; pass identity"):
        evict(tmp_path)


# Log-probs from a file


@pytest.mark.parametrize("ending", [".parquet", ".csv", ".jsonl"])
def test_log_probs_from_a_file(ending, still, tmp_path):
    expected = measure(still.model, still.dataset)
    table = pl.DataFrame(
        {
            "pair_id": still.dataset.ids[::-1],
            "ref_chosen_logps": expected.chosen.numpy()[::-1],
            "ref_rejected_logps": expected.rejected.numpy()[::-1],
        }
    )
    path = tmp_path / f"logps{ending}"
    {".parquet": table.write_parquet, ".csv": table.write_csv, ".jsonl": table.write_ndjson}[
        ending
    ](path)
    assert equal(read_reference(path, still.dataset), expected)


BAD_FILES = {
    "has no column 'ref_chosen_logps'": lambda table: table.drop("ref_chosen_logps"),
    "the chosen_tokens of pair": lambda table: table.with_columns(chosen_tokens=pl.lit(1)),
    "has no log-probs for pair": lambda table: table.head(3),
    "or not finite": lambda table: table.with_columns(ref_chosen_logps=pl.lit(float("nan"))),
    "has different log-probs for pair": lambda table: pl.concat(
        [table, table.with_columns(pl.col("ref_chosen_logps") - 1)]
    ),
    "that is above 0 or not finite": lambda table: table.with_columns(-pl.col("ref_chosen_logps")),
}


@pytest.mark.parametrize("message", BAD_FILES)
def test_bad_log_prob_files_are_refused(message, still, tmp_path):
    size = len(still.dataset)
    table = pl.DataFrame(
        {
            "pair_id": still.dataset.ids,
            "ref_chosen_logps": np.full(size, -1.0),
            "ref_rejected_logps": np.full(size, -2.0),
        }
    )
    BAD_FILES[message](table).write_parquet(tmp_path / "logps.parquet")
    with pytest.raises(ValueError, match=message):
        read_reference(tmp_path / "logps.parquet", still.dataset)


def test_a_missing_or_unknown_log_prob_file_is_refused(still, tmp_path):
    with pytest.raises(FileNotFoundError, match="no file"):
        read_reference(tmp_path / "logps.csv", still.dataset)
    with pytest.raises(ValueError, match="known endings are"):
        read_reference(tmp_path / "logps.txt", still.dataset)
