"""Small models of many architectures, and a few pairs to measure with them."""

from copy import deepcopy

import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GptOssConfig,
    GraniteConfig,
    Lfm2Config,
    Llama4TextConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
)

from arithmetic import build_tokenizer
from sage_select import PreferenceDataset

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
EXPERTS = {"num_experts_per_tok": 2, "num_local_experts": 4}
GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 16, "sliding_window": 8}
CONFIGS = {
    "qwen2": Qwen2Config(**SMALL, tie_word_embeddings=True),
    "qwen2, some layers sliding": Qwen2Config(
        **SMALL, use_sliding_window=True, sliding_window=8, max_window_layers=1
    ),
    "qwen3": Qwen3Config(**SMALL, head_dim=8),
    "llama": LlamaConfig(**SMALL),
    "mistral, sliding window": MistralConfig(**SMALL, sliding_window=8),
    "gemma2, softcaps": Gemma2Config(
        **SMALL, **GEMMA, final_logit_softcapping=3.0, attn_logit_softcapping=2.0
    ),
    "gemma3": Gemma3TextConfig(
        **SMALL, **GEMMA, layer_types=["sliding_attention", "full_attention"]
    ),
    "phi": PhiConfig(**SMALL),
    "phi3, sliding window": Phi3Config(**SMALL, sliding_window=8),
    "mixtral": MixtralConfig(**SMALL, **EXPERTS),
    "qwen3 moe": Qwen3MoeConfig(
        **SMALL, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=8
    ),
    "cohere, logit scale": CohereConfig(**SMALL, logit_scale=0.25),
    "granite, logit scaling": GraniteConfig(**SMALL, logits_scaling=4.0),
    "gpt2": GPT2Config(vocab_size=40, n_embd=32, n_layer=2, n_head=4, n_positions=128,
                       bos_token_id=1, eos_token_id=1),
}  # fmt: skip
NEIGHBOURS = {
    "phi3, positions that scale": Phi3Config(
        **SMALL,
        original_max_position_embeddings=32,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "short_factor": [1.0] * 4,
            "long_factor": [4.0] * 4,
            "original_max_position_embeddings": 32,
        },
    ),
}
UNPACKABLE = {
    "bloom, positions by mask": BloomConfig(
        vocab_size=40, hidden_size=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=1
    ),
    "gpt-oss, sinks": GptOssConfig(**SMALL, **EXPERTS, head_dim=8, rope_parameters=None),
    "llama4, chunks by mask": Llama4TextConfig(
        **SMALL, head_dim=8, intermediate_size_mlp=48, num_local_experts=2, attention_chunk_size=8
    ),
    "lfm2, convolutions": Lfm2Config(**SMALL, layer_types=["conv", "full_attention"]),
    "qwen3 next, a state": Qwen3NextConfig(
        **SMALL,
        layer_types=["linear_attention", "full_attention"],
        head_dim=8,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    ),
    "mamba, a state": MambaConfig(
        vocab_size=40, hidden_size=32, num_hidden_layers=2, bos_token_id=1, eos_token_id=1
    ),
}


def small_model(name: str):
    """Return a model of a named configuration, in eval mode, with reproducible weights."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(deepcopy((CONFIGS | NEIGHBOURS | UNPACKABLE)[name]))
    # initial weights are small and biases zero: larger ones give log-probs that differ more
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter *= 3.0
            else:
                parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def few_pairs() -> PreferenceDataset:
    """Two pairs with the same prompt and chosen response, one with a short response, a long one."""
    rows = [
        {"prompt": "7+3?", "chosen": "7+3=10", "rejected": "7+3=4,4+4=8"},
        {"prompt": "1+2*3-4+5?", "chosen": "1+2=3,3*3=9", "rejected": "1"},
        {"prompt": "7+3?", "chosen": "7+3=10", "rejected": "9"},
        {"prompt": "12*12-5?", "chosen": "1", "rejected": "12*12=1,1-5=9," * 3},
    ]
    return PreferenceDataset.from_records(rows, tokenizer=build_tokenizer(), max_length=100)
