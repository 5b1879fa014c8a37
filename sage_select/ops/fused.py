"""`Logits` computed by the Triton kernels; logits never leave the chip."""

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
except ImportError:  # Triton before 3.4 has no descriptors, so kernels use pointers
    TensorDescriptor = None

# Triton decides when it decorates the kernels; TRITON_INTERPRET may have changed since then
INTERPRETED = not isinstance(sum_exp_kernel, triton.JITFunction)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_SLOPES = 1 << 27  # entries of a block of slopes in the backward pass
TARGET_ROWS = 64  # rows per program of target_logits_kernel
PRODUCT_SHAPE = (1024, 4096)  # logits per matrix-library product: 16 MB of fp32, in the L2 cache


@dataclass(frozen=True)
class FusedLogits(Logits):
    """Logits computed in tiles; the program that computes a tile also sums its exponentials."""

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
        """Prepare a head for the kernels, or refuse it; there is no fallback to another path.

        Raises:
            ValueError: If the tensors are on a CPU and Triton's interpreter is off.
            TypeError: If hidden and weight are not both in fp32, both in fp16 or both in bf16.
        """
        if not hidden_NH.is_cuda and not INTERPRETED:
            raise ValueError(
                f'token_logps: impl="fused" runs on a GPU, but these tensors are on '
                f'{hidden_NH.device}; use impl="chunked", or set TRITON_INTERPRET=1 before the '
                "first call to run the kernels in Triton's interpreter"
            )
        if hidden_NH.dtype != weight_VH.dtype or hidden_NH.dtype not in DTYPES:
            raise TypeError(
                'token_logps: impl="fused" needs hidden and weight both in float32, float16 or '
                f'bfloat16, got {hidden_NH.dtype} and {weight_VH.dtype}; use impl="chunked"'
            )
        # the kernels take a stride for rows, and assume that a row's entries are adjacent
        if hidden_NH.stride(-1) != 1:
            hidden_NH = hidden_NH.contiguous()
        if weight_VH.stride(-1) != 1:
            weight_VH = weight_VH.contiguous()
        bias_V = None if bias_V is None else bias_V.contiguous()
        return cls(hidden_NH, weight_VH, bias_V, softcap, temperature, tiling_of(weight_VH))

    def of_targets(self, target_N: Tensor) -> Tensor:
        """[N], the logit of each token's target; 0 if the target is in another shard."""
        logit_N = self._new(len(self.hidden_NH))
        if len(self.weight_VH) == 0:  # an empty shard has no row to read
            return logit_N.zero_()
        tiles = {name: x for name, x in self._tiles().items() if name in _TARGET_OPTIONS}
        results = {"target_N": target_N, "logit_N": logit_N, "ROWS": TARGET_ROWS}
        self._run(
            target_logits_kernel,
            cdiv(len(logit_N), TARGET_ROWS),
            self._head() | tiles | results,
        )
        return logit_N

    def sum_exp(self, anchor_N: Tensor, target_N: Tensor) -> tuple[Tensor, None]:
        """[N], sum_j exp(z_j - anchor), summed within tiles, within parts, then over parts."""
        # None: target_logits_kernel multiplies on tensor cores too, so its error cancels as it is
        if self.tiling.library:
            return self._sum_exp_of_products(anchor_N), None
        return self._folded(anchor_N)[0], None

    def around_maximum(self) -> tuple[Tensor, Tensor]:
        """[N], the largest logit, always finite, and [N], sum_j exp(z_j - largest)."""
        sum_N, maximum_N = self._folded(None)
        return maximum_N, sum_N

    def blocks(self) -> Iterator[slice]:
        """Yield the slices of the vocabulary whose slopes are stored at one time."""
        vocabulary, columns = len(self.weight_VH), self.tiling.columns
        # bounds both the slopes [N, B] and the fp32 gradient of the weight [B, H] before rounding,
        # which may have half as many entries
        height = max(len(self.hidden_NH), 2 * self.weight_VH.shape[1])
        width = columns * max(1, MAX_SLOPES // columns // height)
        for start in range(0, vocabulary, width):
            yield slice(start, min(start + width, vocabulary))

    def slopes(self, block: slice, target_N: Tensor, grad_N: Tensor, logsumexp_N: Tensor) -> Tensor:
        """[N, B], grad_i d log p_i / d (hidden_i . weight_j), in the weight's dtype."""
        rows, columns = self.tiling.rows, self.tiling.columns
        tokens, width = len(self.hidden_NH), block.stop - block.start
        slope_NB = self._new(tokens, width, dtype=self.weight_VH.dtype)
        self._run(
            slope_kernel,
            cdiv(tokens, rows) * cdiv(width, columns),
            self._head(block)
            | self._tiles(block)
            | {
                "target_N": target_N - block.start,  # relative to the block's first column
                "grad_N": grad_N,
                "logsumexp_N": logsumexp_N,
                "slope_NB": slope_NB,
                "slope_stride": width,
            },
        )
        return slope_NB

    def _folded(self, anchor_N: Tensor | None) -> tuple[Tensor, Tensor]:
        """[N], the sum around the anchor, or around each row's maximum if there is no anchor; and
        [N], that maximum, which is not written if there is an anchor.
        """
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
        totals = {"sum_N": sum_N, "maximum_N": maximum_N, "N": tokens, "S": parts, "ROWS": 128}
        self._run(fold_kernel, cdiv(tokens, 128), results | totals)
        return sum_N, maximum_N

    def _sum_exp_of_products(self, anchor_N: Tensor) -> Tensor:
        """[N], the same sum, from logits computed by the matrix library."""
        tokens, (vocabulary, hidden) = len(self.hidden_NH), self.weight_VH.shape
        rows, columns = PRODUCT_SHAPE
        sum_N, buffer = torch.zeros_like(anchor_N), self._new(rows * columns)
        for first in range(0, tokens, rows):
            chunk_NH = self.hidden_NH[first : first + rows]
            chunk = slice(first, first + len(chunk_NH))
            if len(chunk_NH) < rows:
                # padded to one shape: for another the library may choose another kernel, and the
                # bits of a row would depend on the number of tokens
                chunk_NH = torch.cat([chunk_NH, chunk_NH.new_zeros(rows - len(chunk_NH), hidden)])
            for start in range(0, vocabulary, columns):
                block = slice(start, min(start + columns, vocabulary))
                with precision("highest"):
                    width = block.stop - start
                    logits_NB = buffer[: rows * width].view(rows, width)
                    product(chunk_NH, self.weight_VH[block].T, logits_NB)
                head = self._head(block)
                self._run(
                    tile_kernel,
                    chunk.stop - chunk.start,
                    {name: head[name] for name in _TILE_OPTIONS}
                    | {
                        "logits_NB": logits_NB,
                        "anchor_N": anchor_N[chunk],
                        "sum_N": sum_N[chunk],
                        "COLUMNS": 1024,
                    },
                )
        return sum_N

    def _head(self, block: slice = slice(None)) -> dict[str, Any]:
        """Arguments of every kernel: operands, sizes, and the options of the head."""
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
        """Arguments of the kernels that multiply: the tiling, and descriptors of the operands."""
        tiling, weight_BH = self.tiling, self.weight_VH[block]
        operands = {"hidden": self.hidden_NH, "weight": weight_BH}
        described = tiling.descriptors and all(map(_supports_descriptor, operands.values()))
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
        if programs:  # 0 if there are no tokens
            device = self.hidden_NH.device
            # Triton launches on the current device, which may not be the tensors' device
            with torch.cuda.device(device) if self.hidden_NH.is_cuda else nullcontext():
                kernel[(programs,)](**arguments)


_TARGET_OPTIONS = ("EVEN", "INTERPRETED", "DEPTH", "num_stages")
_TILE_OPTIONS = ("bias_V", "V", "softcap", "inverse_temperature", "HAS_BIAS", "HAS_SOFTCAP")


def _supports_descriptor(x: Tensor) -> bool:
    """Return whether the tensor memory accelerator can load a tensor: it needs 16-byte steps."""
    aligned = x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0
    return TensorDescriptor is not None and aligned and x.numel() > 0
