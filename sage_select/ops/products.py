"""Matrix products that are summed and kept in fp32 or wider, whatever their factors."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

# products of half-precision factors may have an fp32 result, on CUDA; sums of them, since 2.10
WIDENS = TorchVersion(torch.__version__) >= "2.10"


def wide(dtype: torch.dtype) -> torch.dtype:
    """fp32, or fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


def takes_half(*factors: Tensor) -> bool:
    """Whether half-precision factors are multiplied as they are; elsewhere they are widened."""
    dtypes = {x.dtype for x in factors}
    half = dtypes in ({torch.float16}, {torch.bfloat16})
    return WIDENS and half and all(x.is_cuda for x in factors)


def product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a @ b."""
    if takes_half(a, b):
        return torch.mm(a, b, out_dtype=torch.float32, out=out)
    a = a.to(wide(a.dtype))
    return torch.mm(a, b.to(a.dtype), out=out)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b."""
    if takes_half(a, b):
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


@contextmanager
def precision(name: str) -> Iterator[None]:
    """fp32 products at this precision inside, and as the process has it afterwards."""
    flags: list[Any] = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
    try:
        allowed, before = torch.get_float32_matmul_precision(), []
    except RuntimeError:  # it was set by the newer flags, which may differ from each other
        allowed, before = None, [flag.fp32_precision for flag in flags]
    if allowed == name:
        yield
        return
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        if allowed is not None:
            torch.set_float32_matmul_precision(allowed)
        for flag, setting in zip(flags, before, strict=False):
            flag.fp32_precision = setting
