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
        return _weight(self.module)

    @property
    def bias(self) -> Tensor | None:
        """Bias [V], or None; read on use, as the weight."""
        return _bias(self.module)


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
    layer = base_layer(module)
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


def base_layer(module: nn.Module) -> nn.Module:
    """Return the layer that adapters adapt, which may be several, or the module itself.

    Its weight is a parameter; that of an adapted layer may be computed, which fails outside the
    forward pass of a sharded model.
    """
    layer: nn.Module = _of_single_tokens(module)
    while isinstance(inner := getattr(layer, "base_layer", None), nn.Module):
        layer = _of_single_tokens(inner)
    return layer


def _of_single_tokens(module: nn.Module) -> nn.Module:
    """Return PEFT's layer of trainable tokens inside its wrapper, or the module itself."""
    layer: nn.Module = getattr(module, "token_adapter", module)
    return layer


def _weight(layer: Any) -> Tensor:
    """Weight of a layer with its active adapters."""
    layer = _of_single_tokens(layer)
    active = _active_adapters(layer)
    if active and _replaces_rows(layer):
        replaced: Tensor = layer.get_merged_weights(active)
        return replaced
    weight: Tensor = _weight(layer.base_layer) if hasattr(layer, "base_layer") else layer.weight
    for adapter in active:
        weight = weight + layer.get_delta_weight(adapter)
    return weight


def _bias(layer: Any) -> Tensor | None:
    """Bias of a layer with its active adapters."""
    layer = _of_single_tokens(layer)
    if not hasattr(layer, "base_layer"):
        bias: Tensor | None = getattr(layer, "bias", None)
        return bias
    active = _active_adapters(layer)
    if active and _replaces_rows(layer):
        return None  # PEFT's layer leaves the bias out
    bias = _bias(layer.base_layer)
    for adapter in active:
        added = getattr(layer.lora_B[adapter], "bias", None)  # LoraConfig(lora_bias=True)
        if added is not None:
            bias = (0 if bias is None else bias) + added * layer.scaling[adapter]
    return bias


def _replaces_rows(layer: Any) -> bool:
    """Return whether PEFT trains single tokens of this layer: rows that replace its own."""
    return hasattr(layer, "get_merged_weights")


def _active_adapters(module: nn.Module) -> list[str]:
    """Names of the active adapters that are not merged into this layer's own weight.

    Raises:
        TypeError: If the weight and bias of the layer with its adapters are not known. Adapters
            often do nothing before they are trained, so a comparison with the model's own logits
            may not notice.
    """
    layer: Any = module
    if not hasattr(layer, "active_adapters") or not hasattr(layer, "base_layer"):
        return []  # no layer of PEFT's
    if layer.disable_adapters or layer.merged:
        return []
    names: list[str] = list(layer.active_adapters)
    if _replaces_rows(layer):
        return [name for name in names if name in layer.token_indices]
    if not (hasattr(layer, "lora_A") and hasattr(layer, "get_delta_weight")):
        raise TypeError(
            f"measure: the output head is adapted by {type(layer).__module__}."
            f"{type(layer).__qualname__}, and only LoRA and trainable tokens are supported there; "
            "leave lm_head out of its target_modules"
        )
    active = [name for name in names if name in layer.lora_A]
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
