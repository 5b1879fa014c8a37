"""The specification of the head in plain PyTorch. N tokens, H hidden, V vocabulary."""

import torch
from torch import Tensor


def token_logps_reference(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    target_N: Tensor,
    bias_V: Tensor | None,
    softcap: float | None,
    temperature: float,
) -> Tensor:
    """log_softmax(softcap(hidden @ weight.T + bias) / temperature) at the targets, in fp32+."""
    dtype = torch.promote_types(hidden_NH.dtype, torch.float32)
    logits_NV = hidden_NH.to(dtype) @ weight_VH.to(dtype).T
    if bias_V is not None:
        logits_NV = logits_NV + bias_V.to(dtype)
    if softcap is not None:
        logits_NV = softcap * torch.tanh(logits_NV / softcap)
    return (logits_NV / temperature).log_softmax(dim=-1).gather(-1, target_N[:, None]).squeeze(-1)
