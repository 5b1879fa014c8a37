from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_models import small_model
from torch.utils.checkpoint import CheckpointError
from worlds import naive_response_logps

from sage_select import Reader, measure
from sage_select.adapters.plain import checkpoint_activations
from sage_select.data.pair_table import TokenSequence
from sage_select.models import attention
from sage_select.models.attention import NAME, packed_attention
from sage_select.models.batches import pack, pad
from sage_select.models.known import own_attention
from sage_select.models.sequences import DistinctSequences, distinct_sequences

prompts = st.lists(st.integers(0, 39), min_size=1, max_size=6)
responses = st.lists(st.integers(0, 39), min_size=1, max_size=6)


@st.composite
def batches(draw) -> list[TokenSequence]:
    """Sequences of which some share a prompt, have one token each, or are the same."""
    few = draw(st.lists(prompts, min_size=1, max_size=3))
    picked = draw(st.lists(st.tuples(st.sampled_from(few), responses), min_size=1, max_size=7))
    return [TokenSequence(np.array(p + r, np.int32), len(p)) for p, r in picked]


@given(batches())
def test_a_row_holds_each_prompt_once_and_each_response(sequences):
    batch = pack(sequences)
    distinct = {s.tokens[: s.response_start].tobytes(): s.response_start for s in sequences}
    used = sum(distinct.values()) + sum(len(s.tokens) - 1 - s.response_start for s in sequences)
    assert batch.inputs["input_ids"].shape == batch.inputs["position_ids"].shape == (1, used)


@pytest.mark.parametrize("lay_out", [pack, pad])
@given(sequences=batches())
def test_every_position_that_predicts_stands_before_its_target(lay_out, sequences):
    batch = lay_out(sequences)
    row = batch.inputs["input_ids"].flatten()
    for s, (start, end) in zip(sequences, pairwise(batch.cu_seqlens.tolist()), strict=True):
        assert batch.targets[start:end].tolist() == s.tokens[s.response_start :].tolist()
        predicting = row[batch.predicts[start:end]]
        assert predicting.tolist() == s.tokens[s.response_start - 1 : -1].tolist()


@given(batches())
def test_attention_finds_whole_sequences(sequences):
    batch = pack(sequences)
    row, positions = batch.inputs["input_ids"][0], batch.inputs["position_ids"][0]
    found = batch.inputs["packing"]
    if found.gather is None:
        assert found.bounds[-1] == len(row)
    else:
        row, positions = row[found.gather], positions[found.gather]
        there_and_back = batch.inputs["input_ids"][0][found.gather][found.scatter]
        assert torch.equal(there_and_back, batch.inputs["input_ids"][0])
    wholes = sorted(row[start:end].tolist() for start, end in pairwise(found.bounds))
    assert wholes == sorted(s.tokens[:-1].tolist() for s in sequences)
    for start, end in pairwise(found.bounds):
        assert positions[start:end].tolist() == list(range(end - start))


@pytest.mark.parametrize("name", ["qwen2", "mistral, sliding window", "gemma2, softcaps"])
def test_the_same_log_probs_as_one_by_one(name):
    model = small_model(name)

    @given(batches())
    def law(sequences):
        found = Reader(layout="packed").response_logps(model, sequences)
        alone = [naive_response_logps(model, s.tokens, s.response_start) for s in sequences]
        assert found.tolist() == pytest.approx(alone, abs=2e-4)

    law()


def some_sequences():
    random = np.random.default_rng(0)
    shared = random.integers(0, 40, 9)
    return [
        TokenSequence(np.concatenate([shared, random.integers(0, 40, n)]).astype(np.int32), 9)
        for n in (5, 17, 1)
    ] + [TokenSequence(random.integers(0, 40, 23).astype(np.int32), 3)]


def gradients(model):
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return grads


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", ["qwen2", "gemma2, softcaps", "mixtral"])
def test_gradients_are_those_of_padding(name, recompute, pairs):
    model = small_model(name).train()
    if recompute:
        checkpoint_activations(model)
    Reader(layout="padded").response_logps(model, pairs.sequences()).sum().backward()
    expected = gradients(model)
    with Reader(layout="packed").updating(model, pairs):
        Reader().response_logps(model, pairs.sequences()).sum().backward()
    found = gradients(model)
    assert found.keys() == expected.keys()
    for parameter, grad in found.items():
        assert torch.allclose(grad, expected[parameter], atol=1e-4), parameter


def test_recomputation_outside_the_packed_attention_cannot_pass_unnoticed():
    model = small_model("qwen2").train()
    checkpoint_activations(model)
    with pytest.raises(ValueError, match="put forward and backward inside `with updating"):
        Reader(layout="packed").response_logps(model, some_sequences())
    assert Reader().response_logps(model, some_sequences()).isfinite().all()  # padded
    with packed_attention(model):
        total = Reader().response_logps(model, some_sequences()).sum()
    with pytest.raises(CheckpointError, match="recomputation"):
        total.backward()  # not inside


def test_the_attention_comes_back_after_an_error():
    model = small_model("qwen2")
    with suppress(KeyError), packed_attention(model):
        assert model.config._attn_implementation == NAME
        raise KeyError
    assert model.config._attn_implementation == "sdpa"


def test_inside_everything_else_still_works(pairs):
    model = small_model("gemma2, softcaps")
    expected, tokens = measure(model, pairs, layout="padded"), pairs.sequences()
    with packed_attention(model), packed_attention(model):
        assert torch.equal(measure(model, pairs, layout="padded").chosen, expected.chosen)
        assert torch.allclose(measure(model, pairs).chosen, expected.chosen, atol=1e-4)
        with Reader().updating(model, pairs):
            padded = Reader(layout="padded").response_logps(model, tokens)
        assert torch.equal(padded, Reader(layout="padded").response_logps(model, tokens))
        assert model.config._attn_implementation == NAME
        assert own_attention(model.config) == "eager"
    assert model.config._attn_implementation == own_attention(model.config) == "eager"


def test_threads_that_share_a_model(pairs):
    model = small_model("qwen2")
    expected = measure(model, pairs)
    with ThreadPoolExecutor(3) as threads:
        layouts = ["packed", "padded", "auto"] * 5
        found = list(threads.map(lambda layout: measure(model, pairs, layout=layout), layouts))
    assert all(torch.allclose(logps.chosen, expected.chosen, atol=1e-4) for logps in found)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", ["qwen2", "mistral, sliding window", "gemma2, softcaps"])
def test_dropout_of_attention(name, pairs):
    model = small_model(name).train()
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    with torch.no_grad():
        one, other = (Reader(layout="packed").pair_logps(model, pairs).chosen for _ in range(2))
    assert not torch.allclose(one, other, atol=1e-3)


@given(batches(), st.integers(1, 40), st.booleans(), st.randoms())
def test_batches_are_full_within_the_budget_whatever_the_order(sequences, budget, packed, random):
    found = []
    for _ in range(2):
        distinct = in_pairs(sequences)
        composed = list(distinct.batches(budget, packed=packed))
        assert sorted(place for batch in composed for place in batch) == list(range(len(distinct)))
        lay_out = pack if packed else pad
        for batch in composed:
            used = distinct.tokens(batch, packed=packed)
            assert used <= budget or len(batch) == 1
            laid = lay_out(distinct.sequences(batch)).inputs["input_ids"].numel()
            assert laid == used - len(batch)  # a sequence's last token is not laid out
        for batch, after in pairwise(composed):
            assert distinct.tokens([*batch, after[0]], packed=packed) > budget
        found.append([distinct.keys[batch].tolist() for batch in composed])
        random.shuffle(sequences)
    assert found[0] == found[1]


def in_pairs(sequences: list[TokenSequence]) -> DistinctSequences:
    """The sequences as those of a dataset, each chosen and rejected."""

    class Few:
        sequence_lengths = np.array([len(s.tokens) for s in sequences] * 2)

        def __len__(self):
            return len(sequences)

        def sequences_at(self, places):
            return [sequences[place % len(sequences)] for place in places]

    return distinct_sequences(Few())


def documented_varlen(
    q, k, v, starts, _, longest, __, *, scale, window_size, enable_gqa, num_splits
):
    """What PyTorch says of `varlen_attn`, word by word and token by token."""
    assert num_splits == 1
    assert longest == int(starts.diff().max())
    assert starts.dtype == torch.int32
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    out = torch.empty_like(q)
    for start, end in pairwise(starts.tolist()):
        for i in range(start, end):
            left = start if window_size[0] < 0 else max(start, i - window_size[0])
            weights = torch.einsum("hd,lhd->hl", q[i], k[left : i + 1]).mul(scale).softmax(-1)
            out[i] = torch.einsum("hl,lhd->hd", weights, v[left : i + 1])
    return out


@pytest.mark.parametrize("name", ["qwen2", "mistral, sliding window"])
def test_the_call_for_sequences_of_various_lengths(name, monkeypatch):
    """The call that CUDA takes, held against what is documented of it; the kernel itself is not."""
    model = small_model(name)
    expected = Reader(layout="packed").response_logps(model, some_sequences())
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", documented_varlen)
    monkeypatch.setattr(attention, "_varlen_fits", lambda query, value: True)
    attention._varlen_options.cache_clear()
    found = Reader(layout="packed").response_logps(model, some_sequences())
    attention._varlen_options.cache_clear()
    assert torch.allclose(found, expected, atol=1e-4)
