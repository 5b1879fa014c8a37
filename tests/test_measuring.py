import re
from contextlib import suppress

import numpy as np
import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from small_models import CONFIGS, SMALL, UNPACKABLE, small_model
from transformers import AutoModelForCausalLM, LlamaConfig
from worlds import naive_response_logps

from sage_select import PreferenceDataset, Reader, measure, nca, pair_logps
from sage_select.models import attention, batches, measuring, trials
from sage_select.system import progress_bars


def naive_logps(model, pairs) -> list[float]:
    """Log-probs of all sequences from the model's own logits, one by one."""
    return [naive_response_logps(model, s.tokens, s.response_start) for s in pairs.sequences()]


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("name", CONFIGS)
def test_log_probs_equal_those_of_the_model_s_logits(name, layout, pairs):
    model = small_model(name)
    logps = measure(model, pairs, layout=layout, max_batch_tokens=100)
    expected = naive_logps(model, pairs)
    assert torch.cat([logps.chosen, logps.rejected]).tolist() == pytest.approx(expected, abs=2e-4)
    assert logps.chosen.dtype == torch.float64
    assert logps.index.tolist() == pairs.index.tolist()
    assert logps.chosen_tokens.tolist() == pairs.chosen_tokens.tolist()


def test_log_probs_of_a_real_model(data, stories):
    model, tokenizer = stories
    pairs = PreferenceDataset.read(
        data / "pairs" / "gsm8k_verified.parquet", tokenizer=tokenizer, max_length=512
    ).take(np.arange(0, 60, 5))
    logps = measure(model, pairs)
    expected = naive_logps(model, pairs)
    # sums of up to 400 fp32 log-probs, about 1,000 nats
    assert torch.cat([logps.chosen, logps.rejected]).tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("budget", [1, 40, 10_000])
def test_the_budget_changes_rounding_only(budget, pairs):
    model = small_model("qwen2")
    expected, logps = measure(model, pairs), measure(model, pairs, max_batch_tokens=budget)
    assert torch.allclose(logps.chosen, expected.chosen, atol=1e-5)


def test_the_order_of_rows_does_not_change_a_bit(still):
    pool, order = still.dataset.take(np.arange(40)), np.random.default_rng(0).permutation(40)
    in_order = measure(still.model, pool, max_batch_tokens=400)
    shuffled = measure(still.model, still.dataset.take(order), max_batch_tokens=400)
    assert all(map(torch.equal, shuffled.take(np.arange(40)), in_order))


def test_measuring_leaves_modes_gradients_and_random_state_unchanged(pairs):
    model = small_model("llama").train()
    model.model.layers[0].eval()
    model.model.layers[1].mlp.requires_grad_(False)
    modes = {name: module.training for name, module in model.named_modules()}
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].tolist()  # noqa: NPY002
    measure(model, pairs)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.random.get_state()[1].tolist() == numpy_state  # noqa: NPY002
    assert bool((model.lm_head.weight.grad == 1).all())
    assert not model.model.layers[1].mlp.up_proj.weight.requires_grad
    assert model.model.layers[0].mlp.up_proj.weight.requires_grad
    assert not model.lm_head._forward_pre_hooks


def test_a_log_shows_tokens_and_pairs_per_second(pairs, monkeypatch, capsys):
    monkeypatch.setattr(progress_bars, "LINE_EVERY", 0.0)
    measure(small_model("llama"), pairs, max_batch_tokens=40)
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(r"scoring: 100%.*tokens/s, [\d.e+]+ pairs/s", last)


def test_dropout_is_off(pairs):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL, attention_dropout=0.9)).train()
    assert torch.equal(measure(model, pairs).chosen, measure(model, pairs).chosen)


def test_the_mode_is_restored_after_an_error(pairs):
    model = small_model("llama").train()
    model.model.norm.weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match=rf"pair {pairs.ids[0]} \(row 0\) has log-probs nan"):
        measure(model, pairs)
    assert model.training
    assert not model.lm_head._forward_pre_hooks


def test_gradients_equal_those_of_the_model_s_logits(pairs):
    gradients = []
    for from_logits in (True, False):
        model = small_model("qwen2")
        if from_logits:
            sums = []
            for s in pairs.sequences():
                ids = torch.from_numpy(s.tokens.astype(np.int64))[None]
                logps = model(input_ids=ids).logits[0].double().log_softmax(-1)
                of_targets = logps[s.response_start - 1 : -1].gather(
                    -1, ids[0, s.response_start :, None]
                )
                sums.append(of_targets.sum())
            reference = measure(model, pairs)
            policy = reference._replace(
                chosen=torch.stack(sums[: len(pairs)]), rejected=torch.stack(sums[len(pairs) :])
            )
        else:
            reference = measure(model, pairs)
            policy = pair_logps(model, pairs)
        nca(policy, reference).mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], atol=1e-5), name


def test_mixed_precision_keeps_the_head_in_fp32(pairs):
    model = small_model("qwen2")
    exact, mixed = measure(model, pairs), measure(model, pairs, mixed_precision=torch.bfloat16)
    assert not torch.equal(exact.chosen, mixed.chosen)
    assert torch.allclose(exact.chosen, mixed.chosen, rtol=0.1)


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [(torch.float32, 0.5), (torch.float32, 1.01), (torch.bfloat16, 0.9), (torch.bfloat16, 1.1)],
)
def test_a_model_that_rescales_its_logits_in_an_unknown_way_is_refused(pairs, dtype, scale):
    model = small_model("llama").to(dtype)
    with torch.no_grad():  # logits of a trained model's size
        model.lm_head.weight.mul_(20)
    measure(model, pairs)
    forward = type(model).forward

    def scaled(*args, **kwargs):
        output = forward(model, *args, **kwargs)
        output.logits = output.logits * scale
        return output

    model.forward = scaled
    with pytest.raises(ValueError, match="changes its logits after the output head"):
        measure(model, pairs)


@pytest.mark.parametrize("name", UNPACKABLE)
def test_models_that_cannot_be_packed_are_padded_with_a_warning(name, pairs):
    model = small_model(name)
    with pytest.warns(UserWarning, match="are padded, not packed, which costs time: "):
        logps = measure(model, pairs)
    assert torch.cat([logps.chosen, logps.rejected]).tolist() == pytest.approx(
        naive_logps(model, pairs), abs=2e-4
    )
    with pytest.raises(ValueError, match=r"cannot be packed: .*; use layout='auto' or 'padded'"):
        measure(model, pairs, layout="packed")
    assert model.config._attn_implementation != attention.ATTENTION_NAME


def test_wrong_packing_is_detected(pairs, monkeypatch):
    """The classic mistake: attention that reaches back into the previous sequence."""
    packing_of = batches.Packing.of
    monkeypatch.setattr(
        batches.Packing, "of", lambda wholes, used: packing_of([np.arange(used)], used)
    )
    model = small_model("qwen2")
    with pytest.warns(UserWarning, match="changes the log-probs of others by"):
        logps = measure(model, pairs)
    assert logps.chosen.tolist() == pytest.approx(naive_logps(model, pairs)[: len(pairs)], abs=2e-4)


def test_longer_sequences_need_another_trial(pairs):
    """Windows and chunks affect only long sequences."""
    model = small_model("llama4, chunks by mask")
    short = pairs.take(pairs.index[pairs.sequence_lengths.reshape(2, -1).max(axis=0) < 16])
    assert 0 < len(short) < len(pairs)
    model.config.attention_chunk_size = model.model.config.attention_chunk_size = 44
    measure(model, short, layout="packed")
    model.config.attention_chunk_size = model.model.config.attention_chunk_size = 8
    with pytest.warns(UserWarning, match="differ from those of each alone by"):
        logps = measure(model, pairs)
    assert logps.chosen.tolist() == pytest.approx(naive_logps(model, pairs)[: len(pairs)], abs=2e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["lfm2, convolutions", "qwen3 next, a state"])
def test_a_leak_is_detected_in_any_precision(name, dtype, pairs):
    """A comparison of log-probs alone could take the leak for rounding."""
    with pytest.warns(UserWarning, match="changes the log-probs of others|forward pass fails on"):
        measure(small_model(name).to(dtype), pairs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["qwen2", "gemma3", "mixtral", "gemma2, softcaps"])
def test_correct_packing_is_not_refused_because_of_rounding(name, dtype, pairs):
    measure(small_model(name).to(dtype), pairs, layout="packed")


def test_log_probs_that_depend_on_their_neighbours_are_reported(pairs):
    model = small_model("phi3, positions that scale")
    with pytest.warns(UserWarning, match="depend on the other sequences of a batch"):
        measure(model, pairs)


def test_a_model_that_is_compiled_after_its_trial_is_padded(pairs):
    model = small_model("qwen2")
    measure(model, pairs, layout="packed")
    model.base_model.compile(backend="eager")
    with pytest.warns(UserWarning, match="it is compiled"):
        measure(model, pairs)
    wrapped = torch.compile(small_model("qwen2"), backend="eager")
    assert torch.equal(measure(wrapped, pairs).chosen, measure(wrapped._orig_mod, pairs).chosen)
    graphs = []
    backend = lambda graph, _: graphs.append(graph) or graph.forward  # noqa: E731
    with Reader().updating(torch.compile(small_model("qwen2"), backend=backend), pairs):
        assert graphs == []  # a trial compiles nothing


def test_a_trial_with_weights_that_are_not_finite_does_not_count(pairs):
    model = small_model("mamba, a state")
    weight = model.backbone.norm_f.weight
    finite_weight = weight.detach().clone()
    weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="log-probs nan"):
        measure(model, pairs, layout="padded")
    with suppress(Exception):
        measure(model, pairs)
    weight.data.copy_(finite_weight)
    with pytest.warns(UserWarning, match="are padded, not packed"):
        measure(model, pairs)


def test_any_error_of_a_packed_forward_pass_is_a_reason_to_pad(pairs, monkeypatch):
    def attend(*args, **options):
        raise AssertionError

    monkeypatch.setattr(attention, "attend", attend)
    with pytest.warns(UserWarning, match=r"its forward pass fails on them: AssertionError\(\)"):
        measure(small_model("qwen2"), pairs)


def test_prompt_tuning_is_refused(pairs):
    tuned = get_peft_model(
        small_model("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    )
    for layout in ("auto", "padded"):
        with pytest.raises(TypeError, match="prompt tuning and other methods that insert virtual"):
            measure(tuned, pairs, layout=layout)


class PlainModule(torch.nn.Module):
    """A model that is not from transformers: token ids in, logits out, calling its `lm_head`."""

    def __init__(self):
        super().__init__()
        self.inner = small_model("llama")
        self.lm_head = self.inner.lm_head

    def forward(self, tokens):
        return self.inner(input_ids=tokens, use_cache=False).logits


def test_a_plain_module(pairs):
    model = PlainModule()
    with pytest.warns(UserWarning, match="it is not a transformers model"):
        logps = measure(model, pairs)
    assert torch.equal(logps.chosen, measure(model.inner, pairs, layout="padded").chosen)
    loss = nca(pair_logps(model, pairs), logps).mean()
    loss.backward()
    assert model.inner.model.embed_tokens.weight.grad.abs().sum() > 0


class Int8Linear(torch.nn.Module):
    """A layer with int8 weights and a scale per row, dequantised in each forward pass."""

    def __init__(self, linear):
        super().__init__()
        self.scale = linear.weight.detach().abs().amax(dim=1, keepdim=True) / 127
        rounded = (linear.weight.detach() / self.scale).round().to(torch.int8)
        self.weight = torch.nn.Parameter(rounded, requires_grad=False)

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight * self.scale)


def quantise(module):
    for name, child in module.named_children():
        if isinstance(child, torch.nn.Linear):
            setattr(module, name, Int8Linear(child))
        else:
            quantise(child)


def test_a_quantised_body(pairs):
    unquantised, model = small_model("llama"), small_model("llama")
    quantise(model.model)
    logps = measure(model, pairs, layout="packed")
    assert logps.chosen.tolist() == pytest.approx(naive_logps(model, pairs)[: len(pairs)], abs=2e-4)
    assert not torch.allclose(logps.chosen, measure(unquantised, pairs).chosen, atol=1e-3)
    quantise(model)
    with pytest.raises(TypeError, match=r"torch\.int8; leave the head out of the quantisation"):
        measure(model, pairs)


def test_a_head_whose_weight_is_a_quantiser_s_tensor_is_refused(pairs):
    class Quantised(torch.Tensor):
        """A tensor that claims a floating-point dtype, as those of torchao do."""

    model = small_model("llama")
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.as_subclass(Quantised))
    with pytest.raises(TypeError, match=r"is a Quantised of torch\.float32; leave the head out"):
        measure(model, pairs)


@pytest.mark.parametrize(
    "adapter",
    [
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ],
)
def test_adapters(adapter, pairs):
    model = get_peft_model(small_model("llama"), LoraConfig(r=4, **adapter))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    model.eval()
    logps = measure(model, pairs, layout="packed")
    assert logps.chosen.tolist() == pytest.approx(naive_logps(model, pairs)[: len(pairs)], abs=2e-4)
    pair_logps(model, pairs).chosen.sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)


def test_an_adapter_of_the_head_that_is_disabled_or_merged(pairs):
    model = get_peft_model(small_model("llama"), LoraConfig(r=4, target_modules=["lm_head"]))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    enabled = measure(model, pairs)
    with model.disable_adapter():
        disabled = measure(model, pairs)
    assert torch.allclose(disabled.chosen, measure(small_model("llama"), pairs).chosen, atol=1e-5)
    assert not torch.allclose(enabled.chosen, disabled.chosen, atol=1e-2)
    model.merge_adapter()
    assert torch.allclose(measure(model, pairs).chosen, enabled.chosen, atol=1e-4)


@pytest.mark.parametrize("option", [{"use_dora": True}, {"lora_dropout": 0.5}])
def test_an_adapter_of_the_head_that_is_not_a_low_rank_sum_is_refused(option, pairs):
    adapter = LoraConfig(r=4, target_modules=["lm_head"], **option)
    model = get_peft_model(small_model("llama"), adapter).train()
    with pytest.raises(TypeError, match="leave lm_head out of its target_modules"):
        Reader(layout="padded").pair_logps(model, pairs)


def test_a_model_without_a_head_is_refused(pairs):
    with pytest.raises(TypeError, match="Linear has no output head; pass a Hugging Face causal"):
        measure(torch.nn.Linear(2, 2), pairs)


def test_tokens_outside_the_vocabulary_are_refused(pairs):
    config = LlamaConfig(**SMALL | {"vocab_size": 5})
    with pytest.raises(ValueError, match="is outside the model's vocabulary of 5"):
        measure(AutoModelForCausalLM.from_config(config), pairs)


def test_sequences_beyond_the_model_s_positions_are_reported(pairs):
    config = LlamaConfig(**SMALL | {"max_position_embeddings": 8})
    with pytest.warns(UserWarning, match="longer than the 8 positions of LlamaForCausalLM"):
        measure(AutoModelForCausalLM.from_config(config), pairs)


def test_an_empty_pool(still):
    assert len(measure(still.model, still.dataset.take([])).index) == 0


def test_equal_tokens_with_a_longer_prompt_are_a_different_response():
    from arithmetic import build_tokenizer

    rows = [
        {"prompt": "1+", "chosen": "1=2", "rejected": "7"},
        {"prompt": "1+1", "chosen": "=2", "rejected": "7"},
    ]
    pairs = PreferenceDataset.from_records(rows, tokenizer=build_tokenizer(), max_length=64)
    first, second = pairs.sequences()[:2]
    assert first.tokens.tolist() == second.tokens.tolist()
    logps = measure(small_model("llama"), pairs)
    assert logps.chosen[0] < logps.chosen[1]  # whose response is one token shorter


@pytest.mark.parametrize(
    ("layout", "fits"),
    [("padded", 150), ("padded", 60), ("packed", 80), ("packed", 60), ("packed", 48)],
)
def test_out_of_memory_halves_the_batches_without_losing_pairs(fits, layout, pairs, monkeypatch):
    model = small_model("llama")
    expected = measure(model, pairs, layout=layout, max_batch_tokens=30)
    forward, sizes = measuring.forward_logps, []

    def limited_forward(model, batch, impl):
        size = batch.inputs["input_ids"].numel()
        if size > fits:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        sizes.append(size)
        return forward(model, batch, impl)

    monkeypatch.setattr(measuring, "forward_logps", limited_forward)
    with pytest.warns(UserWarning, match="continuing with batches of"):
        logps = measure(model, pairs, layout=layout, max_batch_tokens=10_000)
    torch.testing.assert_close(logps.chosen, expected.chosen)
    torch.testing.assert_close(logps.rejected, expected.rejected)
    assert max(sizes) <= fits


def raise_out_of_memory(*args, **options):
    raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate")


def test_a_single_sequence_that_does_not_fit_is_an_error(pairs, monkeypatch):
    monkeypatch.setattr(measuring, "forward_logps", raise_out_of_memory)
    with pytest.raises(MemoryError, match=r"a sequence of \d+ tokens does not fit in memory"):
        measure(small_model("llama"), pairs, max_batch_tokens=10)


def test_a_trial_that_runs_out_of_memory_leads_to_padding(pairs, monkeypatch):
    model = small_model("llama")
    expected = measure(model, pairs, layout="padded")
    monkeypatch.setattr(trials, "_reason_not_to_pack", raise_out_of_memory)
    assert torch.equal(measure(small_model("llama"), pairs).chosen, expected.chosen)


def test_other_runtime_errors_are_raised_unchanged(pairs, monkeypatch):
    def raise_other_error(*args, **options):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(measuring, "forward_logps", raise_other_error)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        measure(small_model("llama"), pairs)
