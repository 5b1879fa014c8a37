"""Spoiled, foreign and missing files of the token cache are named and made again."""

import json
import os
import random
import shutil
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from arithmetic import build_tokenizer
from sage_select import PreferenceDataset
from sage_select.data.cache_files import read_table
from sage_select.data.token_cache import evict_tokens
from sage_select.references.eviction import evict, stored_references
from sage_select.references.parts import PartWriter, read_parts, write_description
from sage_select.system.files import SpoiledFile

ROWS = [
    {"prompt": f"{i}+1?", "chosen": f"{i}+1={i + 1}", "rejected": f"{i}+1=0", "note": f"n{i}"}
    for i in range(40)
]


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture
def read(tokenizer, tmp_path):
    """Read a file of pairs; return tokens and annotations, and the warnings."""
    source = tmp_path / "pairs.jsonl"
    source.write_text("\n".join(map(json.dumps, ROWS)))

    def reading(cache=tmp_path / "cache", **options):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            pairs = PreferenceDataset.read(
                source, tokenizer=tokenizer, max_length=64, cache=cache, **options
            )
            tokens = [s.tokens.tolist() for s in pairs.sequences()]
            return (tokens, pairs.annotations.rows()), "\n".join(str(w.message) for w in caught)

    return reading


def spoil(path, bit):
    content = bytearray(path.read_bytes())
    content[bit // 8 % len(content)] ^= 1 << bit % 8
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-40])


def empty(path):
    path.write_bytes(b"")


def garbage(path):
    path.write_bytes(b"[" * 100_000)


def loop(path):
    path.unlink()
    path.symlink_to(path.name)


def pipe(path):
    path.unlink()
    os.mkfifo(path)


def folder(path):
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("ending", ["arrow", "json"])
@pytest.mark.parametrize("fault", [truncate, empty, garbage, loop, pipe, folder])
def test_what_is_no_file_of_the_cache_is_named_and_made_again(fault, ending, read, tmp_path):
    expected, _ = read()
    (path,) = (tmp_path / "cache").glob(f"*.{ending}")
    fault(path)
    actual, said = read()
    assert actual == expected
    assert path.name in said
    if fault is not folder:  # which is the user's, and stays
        assert read() == (expected, "")


@pytest.mark.parametrize("ending", ["arrow", "json"])
def test_every_flipped_bit_is_named_and_the_file_made_again(ending, read, tmp_path):
    expected, said = read()
    assert not said
    (path,) = (tmp_path / "cache").glob(f"*.{ending}")
    size, lots = 8 * path.stat().st_size, random.Random(0)
    # the ends hold magic bytes, the footer and the checksum itself
    bits = [0, 9, size - 1, size - 20, size - 130, *(lots.randrange(size) for _ in range(20))]
    for bit in bits:
        spoil(path, bit)
        actual, said = read()
        assert actual == expected
        assert f"{path} is spoiled and is made again" in said


def test_a_good_file_in_the_place_of_another_is_refused(read, tmp_path):
    read()
    (path,) = (tmp_path / "cache").glob("*.arrow")
    other = path.with_name(f"{'0' * 32}.arrow")
    shutil.copy(path, other)
    assert read_table(path).num_rows == 40
    with pytest.raises(SpoiledFile, match=other.name):
        read_table(other)


def test_tokens_stay_usable_when_the_cache_is_deleted_or_no_folder(read, tmp_path):
    expected, _ = read()
    (tmp_path / "file").write_text("the user's")
    for cache in (tmp_path / "file", tmp_path / "file" / "below"):
        actual, said = read(cache=cache)
        assert actual == expected
        assert "tokens stay in memory" in said
    shutil.rmtree(tmp_path / "cache")
    assert read() == (expected, "")


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder nobody can write")
def test_tokens_stay_in_memory_on_a_read_only_file_system(read):
    expected, _ = read()
    actual, said = read(cache="/proc/self")
    assert actual == expected
    assert "tokens stay in memory, because /proc/self cannot be written" in said


def test_many_readers_fill_one_cache_at_once(read):
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: read()[0], range(8)))
    assert all(result == results[0] for result in results)
    assert read() == (results[0], "")


def test_a_killed_writer_leaves_nothing_that_is_read(read, tmp_path):
    expected, _ = read()
    cache = tmp_path / "cache"
    (path,) = cache.glob("*.arrow")
    partial = path.with_name(f".{path.name}.{'a' * 32}.partial")
    partial.write_bytes(path.read_bytes()[:100])
    path.unlink()
    assert read() == (expected, "")
    (cache / f"{'b' * 32}.arrow").mkdir()
    (cache / "notes.arrow").write_text("the user's")
    count, _ = evict_tokens(-1.0, cache)
    assert count == 3
    assert sorted(file.name for file in cache.iterdir()) == [f"{'b' * 32}.arrow", "notes.arrow"]


@pytest.mark.slow
def test_a_spoiled_chunk_is_made_again_by_workers(read, tmp_path):
    expected, _ = read()
    (path,) = (tmp_path / "cache").glob("*.arrow")
    spoil(path, 4000)
    actual, said = read(num_workers=1)
    assert actual == expected
    assert f"{path} is spoiled" in said
    assert read() == (expected, "")


# The reference store


@pytest.fixture
def store(tmp_path):
    """A store with one reference in two parts, in a folder of an odd name."""
    root = tmp_path / "a[1]* ü"
    reference = root / ("0" * 32)
    for seed in range(2):
        lots = np.random.default_rng(seed)
        with PartWriter(reference) as writer:
            writer.add(np.frombuffer(lots.bytes(16 * 20), "S16"), torch.from_numpy(lots.random(20)))
    write_description(reference, {"model": "small", "dtype": "torch.float32"})
    return root


@pytest.mark.filterwarnings("ignore:ReferenceStore")
@pytest.mark.parametrize("name", ["part-*.arrow", "reference.json", "reference.json.*"])
def test_no_flipped_bit_of_a_store_is_believed(name, store):
    (reference,) = store.iterdir()
    entries = read_parts(reference)
    logps = dict(zip(entries.keys.tolist(), entries.logps.tolist(), strict=True))
    (listed,) = stored_references(store)
    assert (listed.sequences, listed.description["model"]) == (40, "small")
    path, lots = sorted(reference.glob(name))[0], random.Random(0)
    good = path.read_bytes()
    for _ in range(25):
        # without the end of the line, which may as well be another blank
        spoil(path, lots.randrange(8 * len(good.rstrip())))
        with pytest.warns(UserWarning, match=r"is (corrupted|spoiled)") as caught:
            (spoiled,) = stored_references(store)
        assert any(".".join(path.name.split(".")[:2]) in str(w.message) for w in caught)
        left = read_parts(reference)
        assert len(left.keys) == (20 if path.suffix == ".arrow" else 40)
        assert all(logps[k] == x for k, x in zip(left.keys.tolist(), left.logps, strict=True))
        assert spoiled.description in ({}, listed.description)
        assert bool(spoiled.description) is (path.suffix == ".arrow")
        path.write_bytes(good)


@pytest.mark.parametrize("fault", [truncate, empty, garbage, pipe, folder])
def test_what_is_no_part_is_named_and_skipped(fault, store):
    (reference,) = store.iterdir()
    path = min(reference.glob("part-*"))
    fault(path)
    with pytest.warns(UserWarning, match=path.name):
        assert len(read_parts(reference).keys) == 20


def test_an_evicted_reference_leaves_the_files_of_the_user(store):
    (reference,) = store.iterdir()
    (reference / "part-copy.arrow").write_text("the user's")
    evict(store, identity=reference.name)
    assert [file.name for file in reference.iterdir()] == ["part-copy.arrow"]
