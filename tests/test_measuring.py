import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
)
from worlds import naive_response_logps

from sage_select import PreferenceDataset, measure, measuring, nca
from sage_select.measuring import pair_logps

SMALL = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
CONFIGS = {
    "qwen2": Qwen2Config(**SMALL, tie_word_embeddings=True),
    "llama": LlamaConfig(**SMALL),
    "mistral, sliding window": MistralConfig(**SMALL, sliding_window=8),
    "gemma2, softcap": Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=3.0),
    "cohere, logit scale": CohereConfig(**SMALL, logit_scale=0.25),
    "granite, logit scaling": GraniteConfig(**SMALL, logits_scaling=4.0),
    "gpt2": GPT2Config(vocab_size=40, n_embd=32, n_layer=2, n_head=4, n_positions=128,
                       bos_token_id=1, eos_token_id=1),
}  # fmt: skip


@pytest.fixture(scope="module")
def pairs() -> PreferenceDataset:
    from arithmetic import build_tokenizer

    rows = [
        {"prompt": "7+3?", "chosen": "7+3=10", "rejected": "7+3=4,4+4=8"},
        {"prompt": "1+2*3-4+5?", "chosen": "1+2=3,3*3=9", "rejected": "1"},
        {"prompt": "7+3?", "chosen": "7+3=10", "rejected": "9"},
        {"prompt": "12*12-5?", "chosen": "1", "rejected": "12*12=1,1-5=9," * 3},
    ]
    return PreferenceDataset.from_records(rows, tokenizer=build_tokenizer(), max_length=100)


def small_model(name: str):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name])
    with torch.no_grad():  # livelier than at birth: log-probs that differ
        for parameter in model.parameters():
            parameter.mul_(3.0 if parameter.dim() > 1 else 1.0)
    return model.eval()


def naive(model, pairs) -> list[float]:
    return [naive_response_logps(model, s.tokens, s.response_start) for s in pairs.sequences()]


@pytest.mark.parametrize("impl", ["chunked", "reference"])
@pytest.mark.parametrize("name", CONFIGS)
def test_against_the_model_s_own_logits(name, impl, pairs):
    model = small_model(name)
    found = measure(model, pairs, impl=impl, max_batch_tokens=100)
    expected = naive(model, pairs)
    assert torch.cat([found.chosen, found.rejected]).tolist() == pytest.approx(expected, abs=2e-4)
    assert found.chosen.dtype == torch.float64
    assert found.index.tolist() == pairs.index.tolist()
    assert found.chosen_tokens.tolist() == pairs.chosen_tokens.tolist()


def test_a_real_model_pair_by_pair(data, stories):
    model, tokenizer = stories
    pairs = PreferenceDataset.read(
        data / "pairs" / "gsm8k_verified.parquet", tokenizer=tokenizer, max_length=512
    ).take(np.arange(0, 60, 5))
    found = measure(model, pairs)
    expected = naive(model, pairs)
    # sums of up to 400 fp32 log-probs, about 1,000 nats
    assert torch.cat([found.chosen, found.rejected]).tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("budget", [1, 40, 10_000])
def test_the_budget_changes_rounding_only(budget, pairs):
    model = small_model("qwen2")
    expected, found = measure(model, pairs), measure(model, pairs, max_batch_tokens=budget)
    assert torch.allclose(found.chosen, expected.chosen, atol=1e-5)


def test_the_order_of_rows_changes_not_one_bit(still):
    pool, order = still.dataset.take(np.arange(40)), np.random.default_rng(0).permutation(40)
    straight = measure(still.model, pool, max_batch_tokens=400)
    shuffled = measure(still.model, still.dataset.take(order), max_batch_tokens=400)
    assert all(map(torch.equal, shuffled.take(np.arange(40)), straight))


def test_the_host_is_left_as_it_was(pairs):
    model = small_model("llama").train()
    model.model.layers[0].eval()
    model.model.layers[1].mlp.requires_grad_(False)
    naming = {name: module.training for name, module in model.named_modules()}
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].tolist()  # noqa: NPY002
    measure(model, pairs)
    assert {name: module.training for name, module in model.named_modules()} == naming
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.random.get_state()[1].tolist() == numpy_state  # noqa: NPY002
    assert bool((model.lm_head.weight.grad == 1).all())
    assert not model.model.layers[1].mlp.up_proj.weight.requires_grad
    assert model.model.layers[0].mlp.up_proj.weight.requires_grad
    assert not model.lm_head._forward_pre_hooks


def test_dropout_is_off(pairs):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL, attention_dropout=0.9)).train()
    assert torch.equal(measure(model, pairs).chosen, measure(model, pairs).chosen)


def test_the_mode_comes_back_after_an_error(pairs):
    model = small_model("llama").train()
    model.model.norm.weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match=rf"pair {pairs.ids[0]} \(row 0\) has log-probs nan"):
        measure(model, pairs)
    assert model.training
    assert not model.lm_head._forward_pre_hooks


def test_gradients_are_those_of_the_model_s_own_logits(pairs):
    grads = []
    for own in (True, False):
        model = small_model("qwen2")
        if own:
            sums = []
            for s in pairs.sequences():
                ids = torch.from_numpy(s.tokens.astype(np.int64))[None]
                logps = model(input_ids=ids).logits[0].double().log_softmax(-1)
                picked = logps[s.response_start - 1 : -1].gather(
                    -1, ids[0, s.response_start :, None]
                )
                sums.append(picked.sum())
            reference = measure(model, pairs)
            policy = reference._replace(
                chosen=torch.stack(sums[: len(pairs)]), rejected=torch.stack(sums[len(pairs) :])
            )
        else:
            reference = measure(model, pairs)
            policy = pair_logps(model, pairs)
        nca(policy, reference).mean().backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    for name, grad in grads[0].items():
        assert torch.allclose(grad, grads[1][name], atol=1e-5), name


def test_mixed_precision_keeps_the_head_in_fp32(pairs):
    model = small_model("qwen2")
    exact, mixed = measure(model, pairs), measure(model, pairs, mixed_precision=torch.bfloat16)
    assert not torch.equal(exact.chosen, mixed.chosen)
    assert torch.allclose(exact.chosen, mixed.chosen, rtol=0.1)


def test_a_model_that_rescales_its_logits_in_its_own_way_is_refused(pairs):
    model = small_model("llama")
    forward = type(model).forward

    def scaled(*args, **kwargs):
        output = forward(model, *args, **kwargs)
        output.logits = output.logits * 0.5
        return output

    model.forward = scaled
    with pytest.raises(ValueError, match="changes its logits after the output head"):
        measure(model, pairs)


def test_a_model_without_a_head_is_refused(pairs):
    with pytest.raises(TypeError, match=r"has no output head \(get_output_embeddings\)"):
        measure(torch.nn.Linear(2, 2), pairs)


def test_tokens_of_another_model_are_refused(pairs):
    config = LlamaConfig(**SMALL | {"vocab_size": 5})
    with pytest.raises(ValueError, match="is outside the model's vocabulary of 5"):
        measure(AutoModelForCausalLM.from_config(config), pairs)


def test_sequences_beyond_the_model_s_positions_are_reported(pairs):
    config = LlamaConfig(**SMALL | {"max_position_embeddings": 8})
    with pytest.warns(UserWarning, match="longer than the 8 positions of LlamaForCausalLM"):
        measure(AutoModelForCausalLM.from_config(config), pairs)


def test_an_empty_pool(still):
    assert len(measure(still.model, still.dataset.take([])).index) == 0


def test_the_same_tokens_with_another_prompt_are_another_response():
    from arithmetic import build_tokenizer

    rows = [
        {"prompt": "1+", "chosen": "1=2", "rejected": "7"},
        {"prompt": "1+1", "chosen": "=2", "rejected": "7"},
    ]
    pairs = PreferenceDataset.from_records(rows, tokenizer=build_tokenizer(), max_length=64)
    one, other = pairs.sequences()[:2]
    assert one.tokens.tolist() == other.tokens.tolist()
    logps = measure(small_model("llama"), pairs)
    assert logps.chosen[0] < logps.chosen[1]  # which says one token less


@pytest.mark.parametrize("fits", [150, 90, 60])
def test_out_of_memory_halves_the_batches_and_loses_nothing(fits, pairs, monkeypatch):
    model = small_model("llama")
    expected = measure(model, pairs, max_batch_tokens=30)
    forward, sizes = measuring.response_logps, []

    def small_memory(model, sequences, **options):
        size = len(sequences) * max(len(s.tokens) for s in sequences)
        if size > fits:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        sizes.append(size)
        return forward(model, sequences, **options)

    monkeypatch.setattr(measuring, "response_logps", small_memory)
    with pytest.warns(UserWarning, match="going on with batches of"):
        found = measure(model, pairs, max_batch_tokens=10_000)
    torch.testing.assert_close(found.chosen, expected.chosen)
    torch.testing.assert_close(found.rejected, expected.rejected)
    assert max(sizes) <= fits


def test_a_sequence_that_does_not_fit_alone_is_named(pairs, monkeypatch):
    forward = measuring.response_logps

    def no_memory(model, sequences, **options):
        if len(sequences[0].tokens) > 40:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate")
        return forward(model, sequences, **options)

    monkeypatch.setattr(measuring, "response_logps", no_memory)
    with pytest.raises(MemoryError, match=r"a sequence of \d+ tokens does not fit in memory"):
        measure(small_model("llama"), pairs, max_batch_tokens=10)


def test_other_errors_are_not_taken_for_a_lack_of_memory(pairs, monkeypatch):
    def broken(*args, **options):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(measuring, "_check_head", lambda *args: None)
    monkeypatch.setattr(measuring, "response_logps", broken)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        measure(small_model("llama"), pairs)
