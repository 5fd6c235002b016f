"""FP8 numbers of DeepSeek-V3's training (arXiv:2412.19437, 3.3): blockwise scales, and products promoted to FP32.

Each tile of a matrix has its own scale, so an outlier costs only the precision of its tile. Tiles are 1 x 128 along the
summed dimension for activations and gradients, and 128 x 128 for weights. All numbers are E4M3. Activations that the
backward pass quantises again along the other dimension have scales that are powers of two: their dequantised values
are exact E4M3 numbers again, except those below the smallest number. Sums over 128 are multiplied by both scales and
added in FP32.

Devices in KERNELS use a tensor-core kernel. Others use a reference that sums in the same order, with the inner 128 also
in FP32 (Hopper's tensor cores keep about 14 bits there).

Legend: M rows and N columns of a product, K the summed dimension; m, k sides of a tile.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import ScalingType, pad, scaled_mm

SIDE = 128
TILE, BLOCK = (1, SIDE), (SIDE, SIDE)
"""Tiles of activations and gradients, and of weights."""
E4M3 = torch.float8_e4m3fn
_E4M3_MAX = torch.finfo(E4M3).max
_MIN_AMAX = 1e-12
"""Lower bound of a tile's largest magnitude, so that a tile of zeros has a scale too."""


class Quantised(NamedTuple):
    """A matrix in E4M3 [M, K] and the scales of its tiles, float32 [ceil(M / m), ceil(K / k)].

    A number is its E4M3 value times the scale of its tile.
    """

    data_MK: Tensor
    scale: Tensor
    tile: tuple[int, int]

    @property
    def transposed(self) -> "Quantised":
        """The transposed matrix, for square tiles only."""
        assert self.tile == BLOCK
        return Quantised(self.data_MK.T, self.scale.T, BLOCK)


def quantise(x_MK: Tensor, tile: tuple[int, int], *, power_of_two: bool = False) -> Quantised:
    """Quantise a matrix to E4M3 with scale = amax / 448 for each tile, rounded up to a power of two on request.

    Tiles at the edges may be smaller.

    Example: `dequantise(quantise(torch.randn(4, 256), TILE))`
    """
    (rows, columns), (m, k) = x_MK.shape, tile
    x = pad(x_MK.float(), (0, -columns % k, 0, -rows % m))
    x = x.view(x.shape[0] // m, m, x.shape[1] // k, k)
    amax = x.abs().amax(dim=(1, 3), keepdim=True).clamp_(min=_MIN_AMAX)
    inverse = (_E4M3_MAX / amax.double()).float()
    if power_of_two:
        mantissa, exponent = torch.frexp(inverse)  # mantissa in [1/2, 1)
        inverse = torch.ldexp(torch.ones_like(mantissa), exponent - 1)
    data = (x * inverse).clamp_(-_E4M3_MAX, _E4M3_MAX).to(E4M3).flatten(2, 3).flatten(0, 1)
    return Quantised(data[:rows, :columns], inverse.reciprocal_().squeeze(3).squeeze(1), tile)


def dequantise(x: Quantised) -> Tensor:
    """Return the matrix in float32 [M, K]."""
    rows, columns = x.data_MK.shape
    by_row = x.scale.repeat_interleave(x.tile[0], 0)[:rows]
    return x.data_MK.float().mul_(by_row.repeat_interleave(x.tile[1], 1)[:, :columns])


def matmul(a: Quantised, b: Quantised, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Compute a_MK @ b_NK^T, [M, N], for `a` in tiles of 1 x 128 and `b` in tiles or blocks.

    The reference returns float32, a kernel `dtype`.
    """
    device = a.data_MK.device
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    return KERNELS.get(capability, reference_matmul)(a, b, dtype)


def reference_matmul(a: Quantised, b: Quantised, _: torch.dtype = torch.float32) -> Tensor:
    """Compute float32 [M, N]: multiply each sum over 128 by its scales and add them, all in FP32."""
    a_MK, b_NK = a.data_MK.float(), b.data_MK.float()
    scale_b = b.scale.repeat_interleave(b.tile[0], 0)[: len(b_NK)]
    sums_MN = a_MK.new_zeros(len(a_MK), len(b_NK))
    for i, (part_a, part_b) in enumerate(zip(a_MK.split(SIDE, 1), b_NK.split(SIDE, 1), strict=True)):
        sums_MN.addcmul_((part_a @ part_b.T).mul_(a.scale[:, i, None]), scale_b[:, i])
    return sums_MN


def hopper_matmul(a: Quantised, b: Quantised, dtype: torch.dtype) -> Tensor:
    """Compute [M, N] in `dtype`, bfloat16 or float32, with cuBLAS.

    cuBLAS requires whole blocks along N and K, column-major scales, and a multiple of four blocks along K.
    """
    num_columns = len(b.data_MK)
    a_MK, b_NK = _pad_to_blocks(a.data_MK, rows=1), _pad_to_blocks(b.data_MK, rows=SIDE)
    if b.tile == BLOCK:
        recipe, scale_b = ScalingType.BlockWise128x128, pad(b.scale, (0, -b.scale.shape[1] % 4), value=1.0).T
    else:
        recipe = ScalingType.BlockWise1x128
        scale_b = pad(b.scale, (0, 0, 0, len(b_NK) - num_columns), value=1.0).T.contiguous().T
    operands = a_MK, b_NK.T, a.scale.T.contiguous().T, ScalingType.BlockWise1x128
    return scaled_mm(*operands, scale_b, recipe, output_dtype=dtype)[:, :num_columns]


def _pad_to_blocks(data_MK: Tensor, rows: int) -> Tensor:
    padding = (0, -data_MK.shape[1] % SIDE, 0, -len(data_MK) % rows)
    return pad(data_MK.view(torch.uint8), padding).contiguous().view(E4M3)


KERNELS: dict[tuple[int, int] | None, Callable[[Quantised, Quantised, torch.dtype], Tensor]] = {(9, 0): hopper_matmul}
"""Products by compute capability; other devices use the reference."""
