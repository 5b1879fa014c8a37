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
from sage_select.models.attention import ATTENTION_NAME, packed_attention
from sage_select.models.batches import pack, pad
from sage_select.models.known import own_attention
from sage_select.models.sequences import DistinctSequences, distinct_sequences

prompts = st.lists(st.integers(0, 39), min_size=1, max_size=6)
responses = st.lists(st.integers(0, 39), min_size=1, max_size=6)


@st.composite
def batches(draw) -> list[TokenSequence]:
    """Sequences that may share a prompt, have a single response token, or be equal."""
    shared_prompts = draw(st.lists(prompts, min_size=1, max_size=3))
    prompt_and_response = st.tuples(st.sampled_from(shared_prompts), responses)
    drawn = draw(st.lists(prompt_and_response, min_size=1, max_size=7))
    return [TokenSequence(np.array(p + r, np.int32), len(p)) for p, r in drawn]


@given(batches())
def test_a_row_holds_each_distinct_prompt_once_and_each_response(sequences):
    batch = pack(sequences)
    prompt_lengths = {s.tokens[: s.response_start].tobytes(): s.response_start for s in sequences}
    used = sum(prompt_lengths.values())
    used += sum(len(s.tokens) - 1 - s.response_start for s in sequences)
    assert batch.inputs["input_ids"].shape == batch.inputs["position_ids"].shape == (1, used)


@pytest.mark.parametrize("lay_out", [pack, pad])
@given(sequences=batches())
def test_every_predicting_position_precedes_its_target(lay_out, sequences):
    batch = lay_out(sequences)
    row = batch.inputs["input_ids"].flatten()
    for s, (start, end) in zip(sequences, pairwise(batch.cu_seqlens.tolist()), strict=True):
        assert batch.targets[start:end].tolist() == s.tokens[s.response_start :].tolist()
        predicting = row[batch.predicts[start:end]]
        assert predicting.tolist() == s.tokens[s.response_start - 1 : -1].tolist()


@given(batches())
def test_attention_gathers_whole_sequences(sequences):
    batch = pack(sequences)
    row, positions = batch.inputs["input_ids"][0], batch.inputs["position_ids"][0]
    packing = batch.inputs["packing"]
    if packing.gather is None:
        assert packing.bounds[-1] == len(row)
    else:
        row, positions = row[packing.gather], positions[packing.gather]
        round_trip = batch.inputs["input_ids"][0][packing.gather][packing.scatter]
        assert torch.equal(round_trip, batch.inputs["input_ids"][0])
    gathered = sorted(row[start:end].tolist() for start, end in pairwise(packing.bounds))
    assert gathered == sorted(s.tokens[:-1].tolist() for s in sequences)
    for start, end in pairwise(packing.bounds):
        assert positions[start:end].tolist() == list(range(end - start))


@pytest.mark.parametrize("name", ["qwen2", "mistral, sliding window", "gemma2, softcaps"])
def test_packed_log_probs_equal_those_of_each_sequence_alone(name):
    model = small_model(name)

    @given(batches())
    def packed_equals_alone(sequences):
        packed = Reader(layout="packed").response_logps(model, sequences)
        alone = [naive_response_logps(model, s.tokens, s.response_start) for s in sequences]
        assert packed.tolist() == pytest.approx(alone, abs=2e-4)

    packed_equals_alone()


def four_sequences():
    """Three responses to one prompt, of 5, 17 and 1 tokens, and one to another."""
    generator = np.random.default_rng(0)
    prompt = generator.integers(0, 40, 9)
    return [
        TokenSequence(np.concatenate([prompt, generator.integers(0, 40, n)]).astype(np.int32), 9)
        for n in (5, 17, 1)
    ] + [TokenSequence(generator.integers(0, 40, 23).astype(np.int32), 3)]


def take_gradients(model):
    """Gradients by parameter name, which are cleared in the model."""
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return gradients


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", ["qwen2", "gemma2, softcaps", "mixtral"])
def test_packed_gradients_equal_padded_gradients(name, recompute, pairs):
    model = small_model(name).train()
    if recompute:
        checkpoint_activations(model)
    Reader(layout="padded").response_logps(model, pairs.sequences()).sum().backward()
    expected = take_gradients(model)
    with Reader(layout="packed").updating(model, pairs):
        Reader().response_logps(model, pairs.sequences()).sum().backward()
    packed = take_gradients(model)
    assert packed.keys() == expected.keys()
    for name, gradient in packed.items():
        assert torch.allclose(gradient, expected[name], atol=1e-4), name


def test_recomputation_outside_packed_attention_is_an_error():
    model = small_model("qwen2").train()
    checkpoint_activations(model)
    with pytest.raises(ValueError, match=r"forward and backward inside `with reader\.updating"):
        Reader(layout="packed").response_logps(model, four_sequences())
    assert Reader().response_logps(model, four_sequences()).isfinite().all()  # padded
    with packed_attention(model):
        total = Reader().response_logps(model, four_sequences()).sum()
    with pytest.raises(CheckpointError, match="recomputation"):
        total.backward()  # outside packed_attention


def test_the_attention_is_restored_after_an_error():
    model = small_model("qwen2")
    with suppress(KeyError), packed_attention(model):
        assert model.config._attn_implementation == ATTENTION_NAME
        raise KeyError
    assert model.config._attn_implementation == "sdpa"


def test_other_passes_work_inside_packed_attention(pairs):
    model = small_model("gemma2, softcaps")
    expected, tokens = measure(model, pairs, layout="padded"), pairs.sequences()
    with packed_attention(model), packed_attention(model):
        assert torch.equal(measure(model, pairs, layout="padded").chosen, expected.chosen)
        assert torch.allclose(measure(model, pairs).chosen, expected.chosen, atol=1e-4)
        with Reader().updating(model, pairs):
            padded = Reader(layout="padded").response_logps(model, tokens)
        assert torch.equal(padded, Reader(layout="padded").response_logps(model, tokens))
        assert model.config._attn_implementation == ATTENTION_NAME
        assert own_attention(model.config) == "eager"
    assert model.config._attn_implementation == own_attention(model.config) == "eager"


def test_threads_that_share_a_model(pairs):
    model = small_model("qwen2")
    expected = measure(model, pairs)
    with ThreadPoolExecutor(3) as threads:
        layouts = ["packed", "padded", "auto"] * 5
        results = list(threads.map(lambda layout: measure(model, pairs, layout=layout), layouts))
    assert all(torch.allclose(logps.chosen, expected.chosen, atol=1e-4) for logps in results)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", ["qwen2", "mistral, sliding window", "gemma2, softcaps"])
def test_attention_dropout_in_train_mode(name, pairs):
    model = small_model(name).train()
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    with torch.no_grad():
        first, second = (Reader(layout="packed").pair_logps(model, pairs).chosen for _ in range(2))
    assert not torch.allclose(first, second, atol=1e-3)


@given(batches(), st.integers(1, 40), st.booleans(), st.randoms())
def test_batches_fill_the_budget_in_any_order_of_rows(sequences, budget, packed, random):
    keys = []
    for _ in range(2):
        distinct = as_distinct(sequences)
        composed = list(distinct.batches(budget, packed=packed))
        assert sorted(place for batch in composed for place in batch) == list(range(len(distinct)))
        lay_out = pack if packed else pad
        for batch in composed:
            used = distinct.tokens(batch, packed=packed)
            assert used <= budget or len(batch) == 1
            input_tokens = lay_out(distinct.sequences(batch)).inputs["input_ids"].numel()
            assert input_tokens == used - len(batch)  # a sequence's last token is no input
        for batch, following in pairwise(composed):
            assert distinct.tokens([*batch, following[0]], packed=packed) > budget
        keys.append([distinct.keys[batch].tolist() for batch in composed])
        random.shuffle(sequences)
    assert keys[0] == keys[1]


def as_distinct(sequences: list[TokenSequence]) -> DistinctSequences:
    """Distinct sequences of a dataset in which each of these is both chosen and rejected."""

    class Pairs:
        sequence_lengths = np.array([len(s.tokens) for s in sequences] * 2)

        def __len__(self):
            return len(sequences)

        def sequences_at(self, places):
            return [sequences[place % len(sequences)] for place in places]

    return distinct_sequences(Pairs())


def documented_varlen(
    q, k, v, starts, _, longest, __, *, scale, window_size, enable_gqa, num_splits
):
    """`varlen_attn` as PyTorch documents it, computed token by token."""
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
def test_the_call_of_variable_length_attention(name, monkeypatch):
    """The call that is made on CUDA, with its documented semantics in place of the kernel."""
    model = small_model(name)
    expected = Reader(layout="packed").response_logps(model, four_sequences())
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", documented_varlen)
    monkeypatch.setattr(attention, "_varlen_fits", lambda query, value: True)
    attention._varlen_options.cache_clear()
    logps = Reader(layout="packed").response_logps(model, four_sequences())
    attention._varlen_options.cache_clear()
    assert torch.allclose(logps, expected, atol=1e-4)
