"""Search for the fastest tiling of the fused kernels for a device and a head."""

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
    HOPPER._replace(columns=128, warps=4, stages=3),  # two programs fit on a multiprocessor
    HOPPER._replace(columns=128, warps=8),
    HOPPER._replace(descriptors=False, stages=3),
    AMPERE,
    AMPERE._replace(columns=256, warps=8, stages=3),
    AMPERE._replace(depth=64, warps=8, stages=3),
    HOPPER._replace(library=True),
]


def tune(hidden: Tensor, weight: Tensor) -> dict[Tiling, float]:
    """Time tilings on a head's forward pass, and store the fastest for this and later processes.

    The tiling changes the last bits of every log-prob. So nothing is tuned unless this is called,
    and to reproduce a run bit by bit you also need its file of tilings.

    Args:
        hidden: [N, H], on a GPU; use about as many tokens as in a batch, for instance 8,192.
        weight: [V, H].

    Returns:
        Milliseconds of each tiling that this device can run.

    Raises:
        ValueError: If the tensors are not on a GPU.
        RuntimeError: If no tiling runs on this device and gives the expected result.
    """
    if not hidden.is_cuda:
        raise ValueError(
            f"tune: times kernels on a GPU, but these tensors are on {hidden.device}; pass tensors "
            'on "cuda"'
        )
    logits = FusedLogits.of(hidden, weight, None, None, 1.0)
    target_N = torch.arange(len(hidden), device=hidden.device) % len(weight)
    anchor_N = logits.of_targets(target_N)
    expected_N, _ = logits.sum_exp(anchor_N, target_N)
    milliseconds: dict[Tiling, float] = {}
    for tiling in CANDIDATES:
        candidate = replace(logits, tiling=tiling)
        try:
            correct = torch.allclose(
                candidate.sum_exp(anchor_N, target_N)[0], expected_N, rtol=1e-4
            )
        except OutOfResources:  # too little shared memory on a smaller device
            continue
        # a fast tiling that the compiler got wrong must not win
        if correct:
            milliseconds[tiling] = do_bench(partial(candidate.sum_exp, anchor_N, target_N))
    if not milliseconds:
        raise RuntimeError(
            "tune: none of the tilings both runs on this device and reproduces the result of the "
            'tiling in use; use impl="chunked"'
        )
    keep_tiling(key_of(weight), min(milliseconds, key=milliseconds.__getitem__))
    return milliseconds
