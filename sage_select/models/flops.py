"""FLOPs of a model: those that a pass over sequences needs, and those that a batch executes."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from sage_select.arrays import BoolArray, Int64Array
from sage_select.models.heads import text_config
from sage_select.system.ledger import Work


@dataclass(frozen=True)
class Shape:
    """Sizes that determine a model's FLOPs.

    Attributes:
        body: Weights that multiply each token, without embeddings and head; of a mixture of
            experts, those of the experts that a token is routed to.
        head: Weights of the output head.
        attention: Layers x heads x head size; 0 if the model's configuration does not say.
        trained: Share of the weights that have a gradient: small with low-rank adapters.
    """

    body: int
    head: int
    attention: int
    trained: float = 1.0

    @property
    def passes(self) -> float:
        """Cost of a forward and backward pass, in forward passes.

        Each product has one more for the gradient of its input and, if its weight is trained, one
        for the gradient of the weight.
        """
        return 2 + self.trained

    def forward(self, tokens: float, scored: float, squares: float) -> float:
        """FLOPs of a forward pass.

        Args:
            tokens: Tokens that go through the body.
            scored: Tokens at which the head is computed.
            squares: Sum of L (L + 1) / 2 over sequences of L tokens: the pairs of tokens that
                causal attention compares. Sliding windows are not deducted.
        """
        return 2 * self.body * tokens + 2 * self.head * scored + 4 * self.attention * squares

    def needed(
        self, starts: Int64Array, lengths: Int64Array, scored: Int64Array, first: BoolArray
    ) -> Work:
        """Work that a forward pass over sequences needs, however they are batched.

        Args:
            starts: [S], tokens of each prompt.
            lengths: [S], tokens of each sequence.
            scored: [S], scored tokens of each sequence.
            first: [S], False if a sequence before it has the same prompt.
        """
        inputs = lengths - 1  # a sequence's last token predicts nothing
        shared = np.where(first, 0, starts)  # counted with the first sequence of the prompt
        tokens = int((inputs - shared).sum())
        squares = float((_squares(inputs) - _squares(shared)).sum())
        return Work(needed=self.forward(tokens, int(scored.sum()), squares), tokens=tokens)

    def executed(self, tokens: int, scored: int, lengths: Int64Array) -> Work:
        """Work of a batch with this many tokens in the model, in sequences of these lengths."""
        squares = float(_squares(lengths).sum())
        return Work(executed=self.forward(tokens, scored, squares), executed_tokens=tokens)


def _squares(lengths: Int64Array) -> Int64Array:
    """Pairs of tokens that causal attention compares."""
    squares: Int64Array = lengths * (lengths + 1) // 2
    return squares


def shape_of(model: nn.Module) -> Shape:
    """Return the shape of a live model, or of one on the meta device."""
    config = text_config(model)
    output = getattr(model, "get_output_embeddings", lambda: getattr(model, "lm_head", None))()
    # embeddings are looked up, not multiplied, and the head is counted separately
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    excluded = {id(p) for m in (*embeddings, output) if m is not None for p in m.parameters()}
    routed = _share_of_experts(config)
    multiplied = {
        name: (parameter, routed if ".experts." in name else 1.0)
        for name, parameter in model.named_parameters()
        if parameter.dim() > 1 and id(parameter) not in excluded
    }
    body = sum(share * _weights(parameter) for parameter, share in multiplied.values())
    weight = getattr(output, "weight", None)
    head = 0 if weight is None else _weights(weight)
    trained = sum(s * _weights(p) for p, s in multiplied.values() if p.requires_grad)
    trained += head if weight is not None and weight.requires_grad else 0
    return Shape(round(body), head, _attention(config), trained / max(body + head, 1))


def _weights(parameter: torch.Tensor) -> int:
    """Number of weights in a parameter; 4-bit weights are stored two to a byte."""
    return parameter.numel() * (2 if parameter.dtype == torch.uint8 else 1)


def _share_of_experts(config: Any) -> float:
    """Share of the experts that a token is routed to; 1 without experts."""
    for name in ("num_local_experts", "num_experts", "n_routed_experts"):
        if count := getattr(config, name, None):
            used: int = getattr(config, "num_experts_per_tok", None) or count
            return used / int(count)
    return 1.0


def _attention(config: Any) -> int:
    """Layers x heads x head size, or 0 if the configuration lacks one of them."""
    layers = getattr(config, "num_hidden_layers", None)
    heads = getattr(config, "num_attention_heads", None)
    hidden = getattr(config, "hidden_size", None)
    if not (layers and heads and hidden):
        return 0
    return int(layers * heads * (getattr(config, "head_dim", None) or hidden // heads))
