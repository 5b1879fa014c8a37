"""The Triton kernels as `Logits`: logits that never leave the chip."""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Self

import torch
import triton
from torch import Tensor
from triton import cdiv

from sage_select.ops.kernels import (
    fold_kernel,
    slope_kernel,
    sum_exp_kernel,
    target_logits_kernel,
    tile_kernel,
)
from sage_select.ops.logits import Logits
from sage_select.ops.products import precision, product
from sage_select.ops.tilings import Tiling, tiling_of

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # before Triton 3.4
    TensorDescriptor = None

# as it was when the kernels were made, whatever the environment says by now
INTERPRETED = not isinstance(sum_exp_kernel, triton.JITFunction)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SLOPES = 1 << 27  # alive at a time in backward
TARGETS = 64  # rows whose targets' logits are made at once
PRODUCT = (1024, 4096)  # rows and columns of a library's product: 16 MB of fp32, in the L2 cache


@dataclass(frozen=True)
class FusedLogits(Logits):
    """Tiles of logits, each made and folded by one program."""

    tiling: Tiling

    @classmethod
    def of(
        cls,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        softcap: float | None,
        temperature: float,
    ) -> Self:
        """Refuses what the kernels cannot do; nothing else is run instead.

        Raises:
            ValueError: If the tensors are on a CPU, and there is no interpreter.
            TypeError: If hidden and weight are not both in fp32, fp16 or bf16.
        """
        if not hidden_NH.is_cuda and not INTERPRETED:
            raise ValueError(
                f'token_logps: impl="fused" runs on a GPU, and these tensors are on '
                f'{hidden_NH.device}; use impl="chunked", or set TRITON_INTERPRET=1 before the '
                "first call to try the kernels in Triton's interpreter"
            )
        if hidden_NH.dtype != weight_VH.dtype or hidden_NH.dtype not in DTYPES:
            raise TypeError(
                'token_logps: impl="fused" takes hidden and weight both in float32, float16 or '
                f'bfloat16, got {hidden_NH.dtype} and {weight_VH.dtype}; use impl="chunked"'
            )
        if hidden_NH.stride(-1) != 1:
            hidden_NH = hidden_NH.contiguous()
        if weight_VH.stride(-1) != 1:
            weight_VH = weight_VH.contiguous()
        bias_V = None if bias_V is None else bias_V.contiguous()
        return cls(hidden_NH, weight_VH, bias_V, softcap, temperature, tiling_of(weight_VH))

    def of_targets(self, target_N: Tensor) -> Tensor:
        """[N], each token's logit of its target; 0 where that is none of the columns."""
        logit_N = self._new(len(self.hidden_NH))
        if len(self.weight_VH) == 0:  # of a shard
            return logit_N.zero_()
        tiles = {name: x for name, x in self._tiles().items() if name in _OF_TARGETS}
        self._run(
            target_logits_kernel,
            cdiv(len(logit_N), TARGETS),
            self._head() | tiles | {"target_N": target_N, "logit_N": logit_N, "ROWS": TARGETS},
        )
        return logit_N

    def sum_exp(self, anchor_N: Tensor, target_N: Tensor) -> tuple[Tensor, None]:
        """[N], sum_j exp(z_j - anchor): in tiles, then in parts, then over parts."""
        if self.tiling.library:
            return self._sum_exp_of_products(anchor_N), None
        return self._folded(anchor_N)[0], None

    def around_maximum(self) -> tuple[Tensor, Tensor]:
        """[N] the largest logit, finite also where a bias rules all out; [N] the sum around it."""
        sum_N, maximum_N = self._folded(None)
        return maximum_N, sum_N

    def blocks(self) -> Iterator[slice]:
        """The vocabulary in blocks of which all slopes are written down."""
        vocabulary, columns = len(self.weight_VH), self.tiling.columns
        # as many slopes, and half as many entries of the weight's gradient before they are rounded
        tall = max(len(self.hidden_NH), 2 * self.weight_VH.shape[1])
        width = columns * max(1, SLOPES // columns // tall)
        for start in range(0, vocabulary, width):
            yield slice(start, min(start + width, vocabulary))

    def slopes(self, block: slice, target_N: Tensor, grad_N: Tensor, logsumexp_N: Tensor) -> Tensor:
        """[N, B], grad_i d log p_i / d (hidden_i . weight_j), in the dtype of the weight."""
        rows, columns = self.tiling.rows, self.tiling.columns
        tokens, width = len(self.hidden_NH), block.stop - block.start
        slope_NB = self._new(tokens, width, dtype=self.weight_VH.dtype)
        self._run(
            slope_kernel,
            cdiv(tokens, rows) * cdiv(width, columns),
            self._head(block)
            | self._tiles(block)
            | {
                "target_N": target_N - block.start,
                "grad_N": grad_N,
                "logsumexp_N": logsumexp_N,
                "slope_NB": slope_NB,
                "slope_stride": width,
            },
        )
        return slope_NB

    def _folded(self, anchor_N: Tensor | None) -> tuple[Tensor, Tensor]:
        """[N] the sum around the anchor, or around each row's maximum; [N] the maximum, if so."""
        tokens, tiling = len(self.hidden_NH), self.tiling
        parts = cdiv(len(self.weight_VH), tiling.part)
        anchored = anchor_N is not None
        results = {
            "ANCHORED": anchored,
            "anchor_N": anchor_N,
            "sum_SN": self._new(parts, tokens),
            "maximum_SN": None if anchored else self._new(parts, tokens),
        }
        sum_N, maximum_N = self._new(tokens), self._new(tokens)
        self._run(
            sum_exp_kernel,
            cdiv(tokens, tiling.rows) * parts,
            self._head() | self._tiles() | results | {"PART": tiling.part},
        )
        whole = {"sum_N": sum_N, "maximum_N": maximum_N, "N": tokens, "S": parts, "ROWS": 128}
        self._run(fold_kernel, cdiv(tokens, 128), results | whole)
        return sum_N, maximum_N

    def _sum_exp_of_products(self, anchor_N: Tensor) -> Tensor:
        """The same from products of the matrix library: of one shape, that it take one kernel."""
        tokens, (vocabulary, hidden) = len(self.hidden_NH), self.weight_VH.shape
        rows, columns = PRODUCT
        sum_N, buffer = torch.zeros_like(anchor_N), self._new(rows * columns)
        for first in range(0, tokens, rows):
            some_NH = self.hidden_NH[first : first + rows]
            some = slice(first, first + len(some_NH))
            if len(some_NH) < rows:
                some_NH = torch.cat([some_NH, some_NH.new_zeros(rows - len(some_NH), hidden)])
            for start in range(0, vocabulary, columns):
                block = slice(start, min(start + columns, vocabulary))
                with precision("highest"):
                    width = block.stop - start
                    logits_NB = buffer[: rows * width].view(rows, width)
                    product(some_NH, self.weight_VH[block].T, logits_NB)
                head = self._head(block)
                self._run(
                    tile_kernel,
                    some.stop - some.start,
                    {name: head[name] for name in _OF_TILES}
                    | {
                        "logits_NB": logits_NB,
                        "anchor_N": anchor_N[some],
                        "sum_N": sum_N[some],
                        "COLUMNS": 1024,
                    },
                )
        return sum_N

    def _head(self, block: slice = slice(None)) -> dict[str, Any]:
        """What every kernel takes: operands, sizes, and what becomes of products."""
        weight_BH = self.weight_VH[block]
        return {
            "hidden": self.hidden_NH,
            "weight": weight_BH,
            "bias_V": None if self.bias_V is None else self.bias_V[block],
            "N": len(self.hidden_NH),
            "V": len(weight_BH),
            "H": weight_BH.shape[1],
            "hidden_stride": self.hidden_NH.stride(0),
            "weight_stride": weight_BH.stride(0),
            "softcap": self.softcap or 1.0,
            "inverse_temperature": 1 / self.temperature,
            "HAS_BIAS": self.bias_V is not None,
            "HAS_SOFTCAP": self.softcap is not None,
        }

    def _tiles(self, block: slice = slice(None)) -> dict[str, Any]:
        """What kernels take that multiply: the tiling, and descriptors of the operands."""
        tiling, weight_BH = self.tiling, self.weight_VH[block]
        operands = {"hidden": self.hidden_NH, "weight": weight_BH}
        described = tiling.descriptors and all(map(_describable, operands.values()))
        options: dict[str, Any] = {
            "DESCRIPTORS": described,
            "EVEN": weight_BH.shape[1] % tiling.depth == 0,
            "INTERPRETED": INTERPRETED,
            "ROWS": tiling.rows,
            "COLUMNS": tiling.columns,
            "DEPTH": tiling.depth,
            "GROUP": tiling.group,
            "num_warps": tiling.warps,
            "num_stages": tiling.stages,
        }
        if described:
            heights = {"hidden": tiling.rows, "weight": tiling.columns}
            for name, x in operands.items():
                options[name] = TensorDescriptor.from_tensor(x, [heights[name], tiling.depth])
        return options

    def _new(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.hidden_NH.new_empty(shape, dtype=dtype)

    def _run(self, kernel: Any, programs: int, arguments: dict[str, Any]) -> None:
        if programs:  # no tokens, no programs
            device = self.hidden_NH.device
            with torch.cuda.device(device) if self.hidden_NH.is_cuda else nullcontext():
                kernel[(programs,)](**arguments)


_OF_TARGETS = ("EVEN", "INTERPRETED", "DEPTH", "num_stages")
_OF_TILES = ("bias_V", "V", "softcap", "inverse_temperature", "HAS_BIAS", "HAS_SOFTCAP")


def _describable(x: Tensor) -> bool:
    """Whether the tensor memory accelerator can load it: it wants multiples of 16 bytes."""
    whole = x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0
    return TensorDescriptor is not None and whole and x.numel() > 0
