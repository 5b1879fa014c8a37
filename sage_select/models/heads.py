"""The output head of a causal language model, with the scale and softcap of its logits."""

from typing import Any, NamedTuple

from torch import Tensor, nn


class Head(NamedTuple):
    """The output head, and the scale and softcap that the model applies to its logits."""

    module: nn.Module
    softcap: float | None
    scale: float

    @property
    def weight(self) -> Tensor:
        """Weight [V, H], read on use: a sharded weight is whole only inside the forward pass."""
        layer: Any = getattr(self.module, "base_layer", self.module)
        weight: Tensor = layer.weight
        for adapter in _unmerged(self.module):
            weight = weight + self.module.get_delta_weight(adapter)  # type: ignore[operator]
        return weight

    @property
    def bias(self) -> Tensor | None:
        """Bias [V], or None."""
        bias: Tensor | None = getattr(self.module, "bias", None)
        return bias


def of_transformers(model: nn.Module) -> bool:
    """Return whether the model is from transformers, or wraps one that is, as PEFT does."""
    return hasattr(getattr(model, "config", None), "_attn_implementation")


def text_config(model: nn.Module) -> Any:
    """Configuration of a model's language part; None for a module without one."""
    settings: Any = getattr(model, "config", None)
    return settings.get_text_config() if of_transformers(model) else settings


def head_of(model: nn.Module) -> Head:
    """Return the head of a Hugging Face model, or of any module that calls its `lm_head`.

    Raises:
        TypeError: If there is none, or its weight is not a plain floating-point matrix.
    """
    find = getattr(model, "get_output_embeddings", None)
    module = find() if find is not None else getattr(model, "lm_head", None)
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"measure: {type(model).__name__} has no output head; pass a Hugging Face causal "
            "language model or a module whose forward calls its `lm_head`, or write your own "
            "measure for the Selector"
        )
    config = text_config(model)
    head = Head(
        module,
        softcap=getattr(config, "final_logit_softcapping", None),  # Gemma
        scale=(getattr(config, "logit_scale", None) or 1.0)  # Cohere
        / (getattr(config, "logits_scaling", None) or 1.0),  # Granite
    )
    layer = getattr(module, "base_layer", module)
    if not (isinstance(weight := getattr(layer, "weight", None), Tensor) and weight.dim() == 2):
        raise TypeError(
            f"measure: the output head of {type(model).__name__}, {type(layer).__name__}, has no "
            "weight of shape [V, H]"
        )
    # tensor classes of quantisers may claim a floating-point dtype
    foreign = type(weight).__module__.split(".")[0] != "torch"
    if foreign or not weight.is_floating_point():
        raise TypeError(
            f"measure: the weight of the output head is a {type(weight).__name__} of "
            f"{weight.dtype}; leave the head out of the "
            "quantisation (modules_to_not_convert=['lm_head'], llm_int8_skip_modules)"
        )
    return head


def _unmerged(module: nn.Module) -> list[str]:
    """Names of the active low-rank adapters to add to this layer's weight."""
    layer: Any = module
    if not hasattr(layer, "get_delta_weight") or layer.disable_adapters or layer.merged:
        return []
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    for name in active:
        if layer.use_dora.get(name) or getattr(layer, "lora_variant", {}).get(name) is not None:
            raise TypeError(
                f"measure: adapter {name!r} does more to the output head than add a low-rank "
                "product (such as DoRA); leave lm_head out of its target_modules"
            )
        if layer.training and getattr(dict(layer.lora_dropout.items()).get(name), "p", 0):
            raise TypeError(
                f"measure: adapter {name!r} applies dropout to inputs of the output head, which a "
                "weight cannot express; set lora_dropout=0, or leave lm_head out of its "
                "target_modules"
            )
    return active
