"""Finding the fastest tiling of the fused kernels for a device and a head."""

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources
from triton.testing import do_bench

from sage_select.ops.fused import FusedLogits
from sage_select.ops.tilings import AMPERE, HOPPER, Tiling, keep_tiling, key_of

CANDIDATES = [
    HOPPER,
    HOPPER._replace(stages=3),
    HOPPER._replace(group=8),
    HOPPER._replace(group=32),
    HOPPER._replace(rows=256, columns=128),
    HOPPER._replace(columns=128, warps=4, stages=3),  # two programs on a multiprocessor
    HOPPER._replace(columns=128, warps=8),
    HOPPER._replace(descriptors=False, stages=3),
    AMPERE,
    AMPERE._replace(columns=256, warps=8, stages=3),
    AMPERE._replace(depth=64, warps=8, stages=3),
    HOPPER._replace(library=True),
]


def tune(hidden: Tensor, weight: Tensor) -> dict[Tiling, float]:
    """Time tilings on a head's forward pass and keep the fastest, here and in later processes.

    Another tiling is other last bits of every log-prob. So nothing is tuned unless this is called,
    and a run that is to repeat another needs its file of tilings, too.

    Args:
        hidden: [N, H], on a GPU; as many tokens as a batch has, say 8,192.
        weight: [V, H].

    Returns:
        Milliseconds of each tiling that this device can run.

    Raises:
        ValueError: If the tensors are not on a GPU.
    """
    if not hidden.is_cuda:
        raise ValueError(f"tune: times kernels on a GPU, and these tensors are on {hidden.device}")
    logits = FusedLogits.of(hidden, weight, None, None, 1.0)
    target_N = torch.arange(len(hidden), device=hidden.device) % len(weight)
    anchor_N = logits.of_targets(target_N)
    exact_N, _ = logits.sum_exp(anchor_N, target_N)
    found: dict[Tiling, float] = {}
    for tiling in CANDIDATES:
        some = replace(logits, tiling=tiling)
        try:
            right = torch.allclose(some.sum_exp(anchor_N, target_N)[0], exact_N, rtol=1e-4)
        except OutOfResources:  # of shared memory, on a smaller device
            continue
        if right:
            found[tiling] = do_bench(partial(some.sum_exp, anchor_N, target_N))
    if not found:
        raise RuntimeError("tune: no tiling runs on this device and gives what the table's gives")
    keep_tiling(key_of(weight), min(found, key=found.__getitem__))
    return found
