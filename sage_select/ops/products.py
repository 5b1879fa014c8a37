"""Matrix products that accumulate and return fp32 or wider, whatever the dtype of their factors."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

# on CUDA, torch.mm of half-precision factors accepts out_dtype=float32; addmm does since 2.10
HAS_OUT_DTYPE = TorchVersion(torch.__version__) >= "2.10"


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return fp64 for fp64, and fp32 for everything else."""
    return torch.promote_types(dtype, torch.float32)


def takes_half(*factors: Tensor) -> bool:
    """Return whether factors are multiplied in half precision; otherwise they are widened first."""
    dtypes = {x.dtype for x in factors}
    half = dtypes in ({torch.float16}, {torch.bfloat16})
    return HAS_OUT_DTYPE and half and all(x.is_cuda for x in factors)


def product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """Return a @ b in fp32 or wider."""
    if takes_half(a, b):
        return torch.mm(a, b, out_dtype=torch.float32, out=out)
    a = a.to(wide(a.dtype))
    return torch.mm(a, b.to(a.dtype), out=out)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a @ b to `total`, in place."""
    if takes_half(a, b):
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


@contextmanager
def precision(name: str) -> Iterator[None]:
    """Set the precision of fp32 products inside, and restore the process's setting afterwards."""
    flags: list[Any] = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
    try:
        precision_before, flags_before = torch.get_float32_matmul_precision(), []
    except RuntimeError:
        # set through the newer flags, one per backend, which the older setting cannot express
        precision_before, flags_before = None, [flag.fp32_precision for flag in flags]
    if precision_before == name:
        yield
        return
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        if precision_before is not None:
            torch.set_float32_matmul_precision(precision_before)
        for flag, setting in zip(flags, flags_before, strict=False):
            flag.fp32_precision = setting
