"""Adapters of the output head: log-probs and gradients of the model's own logits, or a refusal."""

import peft
import pytest
import torch
from small_models import small_model
from torch import Tensor

from sage_select import Reader, measure, pair_logps

BODY = ["q_proj"]
TOKENS = [3, 4, 5]


def lora(**options):
    return peft.LoraConfig(**{"r": 4, "target_modules": [*BODY, "lm_head"], **options})


def tokens(*modules: str):
    return peft.TrainableTokensConfig(token_indices=TOKENS, target_modules=list(modules))


ADAPTERS = {
    "low rank": lambda: lora(),
    "low rank, biases of adapted layers": lambda: lora(bias="lora_only"),
    "low rank, all biases": lambda: lora(bias="all"),
    "low rank with a bias": lambda: lora(lora_bias=True),
    "low rank, adaptive": lambda: peft.AdaLoraConfig(target_modules=["lm_head"], total_step=9),
    "low rank, its parameter": lambda: lora(
        target_modules=BODY, target_parameters=["lm_head.weight"]
    ),
    "head to save, all biases": lambda: lora(
        target_modules=BODY, modules_to_save=["lm_head"], bias="all"
    ),
    "tokens beside low rank": lambda: lora(target_modules=BODY, trainable_token_indices=TOKENS),
    "tokens of the embedding": lambda: tokens("embed_tokens"),
    "tokens of the head": lambda: tokens("lm_head"),
}


def own_logps(model, pairs) -> Tensor:
    """Log-probs of both sides by the model's own logits, float64 [2P]."""
    logps = []
    for s in pairs.sequences():
        input_ids = torch.as_tensor(s.tokens, dtype=torch.int64)[None]
        logits = model(input_ids=input_ids).logits[0].double()
        scored = logits.log_softmax(-1)[s.response_start - 1 : -1]
        logps.append(scored.gather(-1, input_ids[0, s.response_start :, None]).sum())
    return torch.stack(logps)


def gradients(model, logps: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    logps.sum().backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in trained.items()}


@pytest.mark.parametrize("head", ["llama", "qwen2", "phi"])  # untied; tied; with a bias
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_trained_adapter_of_the_head(adapter, head, pairs):
    torch.manual_seed(0)
    model = peft.get_peft_model(small_model(head), ADAPTERS[adapter]())
    reader = Reader(layout="padded")
    reader.pair_logps(model, pairs)  # read before it is trained, when it may change nothing yet
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    policy = reader.pair_logps(model, pairs)
    ours = torch.cat([policy.chosen, policy.rejected])
    expected = own_logps(model, pairs)
    assert ours.tolist() == pytest.approx(expected.tolist(), abs=1e-4)
    by_ours, by_own = gradients(model, ours), gradients(model, expected)
    for name, gradient in by_own.items():
        assert torch.allclose(by_ours[name], gradient, rtol=1e-3, atol=1e-4), name
    assert any(g.abs().sum() > 0 for g in by_ours.values())


@pytest.mark.parametrize(
    "adapter", ["low rank with a bias", "tokens of the embedding", "tokens beside low rank"]
)
def test_a_disabled_adapter_of_the_head_is_off(adapter, pairs):
    model = peft.get_peft_model(small_model("qwen2"), ADAPTERS[adapter]())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1
    enabled = measure(model, pairs).chosen
    with model.disable_adapter():
        disabled = measure(model, pairs).chosen
    bare = measure(small_model("qwen2"), pairs).chosen
    assert torch.allclose(disabled, bare, atol=1e-5)
    assert not torch.allclose(enabled, bare, atol=1e-2)


REFUSED = {
    "rescaled": peft.IA3Config(target_modules=["lm_head"], feedforward_modules=[]),
    "rotated": peft.OFTConfig(target_modules=["lm_head"]),
    "Hadamard products": peft.LoHaConfig(r=4, target_modules=["lm_head"]),
    "shared vectors": peft.VeraConfig(target_modules=["lm_head"]),
}


@pytest.mark.parametrize("config", REFUSED.values(), ids=REFUSED)
def test_other_adapters_of_the_head_are_refused(config, pairs):
    model = peft.get_peft_model(small_model("llama"), config)
    with pytest.raises(TypeError, match=r"head is adapted by peft.* leave lm_head out of its"):
        pair_logps(model, pairs)
