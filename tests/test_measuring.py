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
from sage_select.system import progress_bars as progress


def naive(model, pairs) -> list[float]:
    return [naive_response_logps(model, s.tokens, s.response_start) for s in pairs.sequences()]


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("name", CONFIGS)
def test_against_the_model_s_own_logits(name, layout, pairs):
    model = small_model(name)
    found = measure(model, pairs, layout=layout, max_batch_tokens=100)
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


def test_a_log_shows_tokens_and_pairs_per_second(pairs, monkeypatch, capsys):
    monkeypatch.setattr(progress, "LINE_EVERY", 0.0)
    measure(small_model("llama"), pairs, max_batch_tokens=40)
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(r"scoring: 100%.*tokens/s, [\d.e+]+ pairs/s", last)


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


@pytest.mark.parametrize("name", UNPACKABLE)
def test_what_cannot_be_packed_is_padded_and_said(name, pairs):
    model = small_model(name)
    with pytest.warns(UserWarning, match="are padded, not packed, which costs time: "):
        found = measure(model, pairs)
    assert torch.cat([found.chosen, found.rejected]).tolist() == pytest.approx(
        naive(model, pairs), abs=2e-4
    )
    with pytest.raises(ValueError, match=r"cannot be packed: .*; use layout='auto' or 'padded'"):
        measure(model, pairs, layout="packed")
    assert model.config._attn_implementation != attention.NAME


def test_packing_that_would_be_wrong_is_found_out(pairs, monkeypatch):
    """The classic mistake: attention that reaches back into the sequence before."""
    together = batches.Packing.of
    monkeypatch.setattr(
        batches.Packing, "of", lambda wholes, used: together([np.arange(used)], used)
    )
    model = small_model("qwen2")
    with pytest.warns(UserWarning, match="says changes the log-probs of others by"):
        found = measure(model, pairs)
    assert found.chosen.tolist() == pytest.approx(naive(model, pairs)[: len(pairs)], abs=2e-4)


def test_a_trial_holds_for_sequences_no_longer_than_its_own(pairs):
    """Windows and chunks show in long sequences alone."""
    model = small_model("llama4, chunks by mask")
    short = pairs.take(pairs.index[pairs.sequence_lengths.reshape(2, -1).max(axis=0) < 16])
    assert 0 < len(short) < len(pairs)
    model.config.attention_chunk_size = model.model.config.attention_chunk_size = 44
    measure(model, short, layout="packed")
    model.config.attention_chunk_size = model.model.config.attention_chunk_size = 8
    with pytest.warns(UserWarning, match="differ from those of each alone by"):
        found = measure(model, pairs)
    assert found.chosen.tolist() == pytest.approx(naive(model, pairs)[: len(pairs)], abs=2e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["lfm2, convolutions", "qwen3 next, a state"])
def test_a_leak_is_found_in_any_precision(name, dtype, pairs):
    """What rounding would hide from a comparison of log-probs."""
    with pytest.warns(UserWarning, match="says changes the log-probs of others|forward refuses"):
        measure(small_model(name).to(dtype), pairs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["qwen2", "gemma3", "mixtral", "gemma2, softcaps"])
def test_a_right_packing_is_not_refused_for_its_rounding(name, dtype, pairs):
    measure(small_model(name).to(dtype), pairs, layout="packed")


def test_log_probs_that_depend_on_their_neighbours_are_reported(pairs):
    model = small_model("phi3, positions that scale")
    with pytest.warns(UserWarning, match="depend on what stands beside a sequence"):
        measure(model, pairs)


def test_a_model_that_is_compiled_later_is_padded_from_then_on(pairs):
    model = small_model("qwen2")
    measure(model, pairs, layout="packed")
    model.base_model.compile(backend="eager")
    with pytest.warns(UserWarning, match="it is compiled"):
        measure(model, pairs)
    wrapped = torch.compile(small_model("qwen2"), backend="eager")
    assert torch.equal(measure(wrapped, pairs).chosen, measure(wrapped._orig_mod, pairs).chosen)
    compiled = []
    backend = lambda graph, _: compiled.append(graph) or graph.forward  # noqa: E731
    with Reader().updating(torch.compile(small_model("qwen2"), backend=backend), pairs):
        assert compiled == []  # a trial compiles nothing


def test_nothing_is_learnt_from_weights_that_are_not_finite(pairs):
    model = small_model("mamba, a state")
    weight = model.backbone.norm_f.weight
    whole = weight.detach().clone()
    weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="log-probs nan"):
        measure(model, pairs, layout="padded")
    with suppress(Exception):
        measure(model, pairs)
    weight.data.copy_(whole)
    with pytest.warns(UserWarning, match="are padded, not packed"):
        measure(model, pairs)


def test_whatever_a_model_raises_is_a_reason_to_pad(pairs, monkeypatch):
    def attend(*args, **options):
        raise AssertionError

    monkeypatch.setattr(attention, "attend", attend)
    with pytest.warns(UserWarning, match=r"its forward refuses them: AssertionError\(\)"):
        measure(small_model("qwen2"), pairs)


def test_tokens_of_a_prompt_s_own_are_refused(pairs):
    tuned = get_peft_model(
        small_model("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    )
    for layout in ("auto", "padded"):
        with pytest.raises(TypeError, match="prompt tuning and others"):
            measure(tuned, pairs, layout=layout)


class Plain(torch.nn.Module):
    """No model of transformers: token ids in, logits out, an `lm_head` on the way."""

    def __init__(self):
        super().__init__()
        self.inner = small_model("llama")
        self.lm_head = self.inner.lm_head

    def forward(self, tokens):
        return self.inner(input_ids=tokens, use_cache=False).logits


def test_a_plain_module(pairs):
    model = Plain()
    with pytest.warns(UserWarning, match="it is no model of transformers"):
        found = measure(model, pairs)
    assert torch.equal(found.chosen, measure(model.inner, pairs, layout="padded").chosen)
    loss = nca(pair_logps(model, pairs), found).mean()
    loss.backward()
    assert model.inner.model.embed_tokens.weight.grad.abs().sum() > 0


class Int8Linear(torch.nn.Module):
    """Weights in a byte each and a scale per row, multiplied out when they are used."""

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
    whole, model = small_model("llama"), small_model("llama")
    quantise(model.model)
    found = measure(model, pairs, layout="packed")
    assert found.chosen.tolist() == pytest.approx(naive(model, pairs)[: len(pairs)], abs=2e-4)
    assert not torch.allclose(found.chosen, measure(whole, pairs).chosen, atol=1e-3)
    quantise(model)
    with pytest.raises(TypeError, match=r"torch\.int8; leave the head out of the quantisation"):
        measure(model, pairs)


def test_a_head_of_a_quantiser_s_own_tensors_is_refused(pairs):
    class Quantised(torch.Tensor):
        """Says that it is float, as those of torchao do."""

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
    found = measure(model, pairs, layout="packed")
    assert found.chosen.tolist() == pytest.approx(naive(model, pairs)[: len(pairs)], abs=2e-4)
    pair_logps(model, pairs).chosen.sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)


def test_an_adapter_of_the_head_that_is_off_or_merged(pairs):
    model = get_peft_model(small_model("llama"), LoraConfig(r=4, target_modules=["lm_head"]))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    on = measure(model, pairs)
    with model.disable_adapter():
        off = measure(model, pairs)
    assert torch.allclose(off.chosen, measure(small_model("llama"), pairs).chosen, atol=1e-5)
    assert not torch.allclose(on.chosen, off.chosen, atol=1e-2)
    model.merge_adapter()
    assert torch.allclose(measure(model, pairs).chosen, on.chosen, atol=1e-4)


@pytest.mark.parametrize("refused", [{"use_dora": True}, {"lora_dropout": 0.5}])
def test_an_adapter_of_the_head_that_is_no_sum_is_refused(refused, pairs):
    adapter = LoraConfig(r=4, target_modules=["lm_head"], **refused)
    model = get_peft_model(small_model("llama"), adapter).train()
    with pytest.raises(TypeError, match="leave lm_head out of its target_modules"):
        Reader(layout="padded").pair_logps(model, pairs)


def test_a_model_without_a_head_is_refused(pairs):
    with pytest.raises(TypeError, match="Linear has no output head; pass a Hugging Face causal"):
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


@pytest.mark.parametrize(
    ("layout", "fits"),
    [("padded", 150), ("padded", 60), ("packed", 80), ("packed", 60), ("packed", 48)],
)
def test_out_of_memory_halves_the_batches_and_loses_nothing(fits, layout, pairs, monkeypatch):
    model = small_model("llama")
    expected = measure(model, pairs, layout=layout, max_batch_tokens=30)
    forward, sizes = measuring.forward_logps, []

    def small_memory(model, batch, impl):
        size = batch.inputs["input_ids"].numel()
        if size > fits:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        sizes.append(size)
        return forward(model, batch, impl)

    monkeypatch.setattr(measuring, "forward_logps", small_memory)
    with pytest.warns(UserWarning, match="going on with batches of"):
        found = measure(model, pairs, layout=layout, max_batch_tokens=10_000)
    torch.testing.assert_close(found.chosen, expected.chosen)
    torch.testing.assert_close(found.rejected, expected.rejected)
    assert max(sizes) <= fits


def no_memory(*args, **options):
    raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate")


def test_a_sequence_that_does_not_fit_alone_is_named(pairs, monkeypatch):
    monkeypatch.setattr(measuring, "forward_logps", no_memory)
    with pytest.raises(MemoryError, match=r"a sequence of \d+ tokens does not fit in memory"):
        measure(small_model("llama"), pairs, max_batch_tokens=10)


def test_a_trial_for_which_memory_does_not_suffice_is_no_reason_to_stop(pairs, monkeypatch):
    model = small_model("llama")
    expected = measure(model, pairs, layout="padded")
    monkeypatch.setattr(trials, "_why_not_packed", no_memory)
    assert torch.equal(measure(small_model("llama"), pairs).chosen, expected.chosen)


def test_other_errors_are_not_taken_for_a_lack_of_memory(pairs, monkeypatch):
    def broken(*args, **options):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(measuring, "forward_logps", broken)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        measure(small_model("llama"), pairs)
