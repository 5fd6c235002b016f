"""FP8 numbers as DeepSeek-V3 trains in (arXiv:2412.19437, 3.3): blockwise scales, and products promoted to FP32.

A matrix is cut into tiles, each with a scale of its own, so that one outlier costs the precision of its tile only:
activations and gradients by 1 x 128 along what is summed over, weights by 128 x 128. All are E4M3. Scales of what is
cut anew in the backward pass, along the other side, are powers of two: dequantised values then are E4M3 numbers again,
shifted, and lose nothing the second time but what falls below the smallest number. Sums over 128 are multiplied by both
scales and added up in FP32.

On devices in KERNELS the product is a tensor-core kernel; on others a reference that sums in the same order, with the
inner 128 in FP32 as well (Hopper's tensor cores keep about 14 bits there).

Legend: M rows and N columns of a product, K what is summed over; m, k sides of a tile.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import ScalingType, pad, scaled_mm

SIDE = 128
TILE, BLOCK = (1, SIDE), (SIDE, SIDE)
"""What one scale covers: of activations and gradients, and of weights."""
E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max
SMALLEST_SPREAD = 1e-12
"""Tiles are scaled as if they held a number of this size at least: a tile of zeros has a scale too."""


class Quantised(NamedTuple):
    """A matrix in E4M3, and what a tile's numbers are multiplied with: data [M, K], scale float32 [M / m, K / k],
    rounded up."""

    data_MK: Tensor
    scale: Tensor
    tile: tuple[int, int]

    @property
    def transposed(self) -> "Quantised":
        """The transposed matrix, for square tiles only: of others the tiles would lie along the wrong side."""
        assert self.tile == BLOCK
        return Quantised(self.data_MK.T, self.scale.T, BLOCK)


def quantise(x_MK: Tensor, tile: tuple[int, int], *, power_of_two: bool = False) -> Quantised:
    """A matrix in E4M3 with a scale a tile, from the tile's largest magnitude: scale = amax / 448, by `power_of_two`
    rounded up to one. Tiles at the edge may be smaller."""
    (rows, columns), (m, k) = x_MK.shape, tile
    x = pad(x_MK.float(), (0, -columns % k, 0, -rows % m))
    x = x.view(x.shape[0] // m, m, x.shape[1] // k, k)
    amax = x.abs().amax(dim=(1, 3), keepdim=True).clamp_(min=SMALLEST_SPREAD)
    inverse = (LARGEST / amax.double()).float()
    if power_of_two:
        mantissa, exponent = torch.frexp(inverse)  # mantissa in [1/2, 1)
        inverse = torch.ldexp(torch.ones_like(mantissa), exponent - 1)
    data = (x * inverse).clamp_(-LARGEST, LARGEST).to(E4M3).flatten(2, 3).flatten(0, 1)
    return Quantised(data[:rows, :columns], inverse.reciprocal_().squeeze(3).squeeze(1), tile)


def dequantise(x: Quantised) -> Tensor:
    """float32 [M, K]."""
    rows, columns = x.data_MK.shape
    by_row = x.scale.repeat_interleave(x.tile[0], 0)[:rows]
    return x.data_MK.float().mul_(by_row.repeat_interleave(x.tile[1], 1)[:, :columns])


def matmul(a: Quantised, b: Quantised) -> Tensor:
    """a_MK @ b_NK^T, [M, N]: `a` in tiles of 1 x 128, `b` in tiles or blocks. float32 by the reference, bfloat16 by a
    kernel."""
    device = a.data_MK.device
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    return KERNELS.get(capability, reference_matmul)(a, b)


def reference_matmul(a: Quantised, b: Quantised) -> Tensor:
    """float32 [M, N]: each sum over 128 multiplied by its scales, then added to the others, all in FP32."""
    a_MK, b_NK = a.data_MK.float(), b.data_MK.float()
    scale_b = b.scale.repeat_interleave(b.tile[0], 0)[: len(b_NK)]
    sums_MN = a_MK.new_zeros(len(a_MK), len(b_NK))
    for i, (part_a, part_b) in enumerate(zip(a_MK.split(SIDE, 1), b_NK.split(SIDE, 1), strict=True)):
        sums_MN.addcmul_((part_a @ part_b.T).mul_(a.scale[:, i, None]), scale_b[:, i])
    return sums_MN


def hopper_matmul(a: Quantised, b: Quantised) -> Tensor:
    """bfloat16 [M, N] by cuBLAS, which wants N and K in whole blocks, scales by columns, and of blocks four at least
    along K."""
    num_columns = len(b.data_MK)
    a_MK, b_NK = _whole(a.data_MK, rows=1), _whole(b.data_MK, rows=SIDE)
    if b.tile == BLOCK:
        recipe, scale_b = ScalingType.BlockWise128x128, pad(b.scale, (0, -b.scale.shape[1] % 4), value=1.0).T
    else:
        recipe = ScalingType.BlockWise1x128
        scale_b = pad(b.scale, (0, 0, 0, len(b_NK) - num_columns), value=1.0).T.contiguous().T
    return scaled_mm(
        a_MK,
        b_NK.T,
        a.scale.T.contiguous().T,
        ScalingType.BlockWise1x128,
        scale_b,
        recipe,
        output_dtype=torch.bfloat16,
    )[:, :num_columns]


def _whole(data_MK: Tensor, rows: int) -> Tensor:
    return (
        pad(data_MK.view(torch.uint8), (0, -data_MK.shape[1] % SIDE, 0, -len(data_MK) % rows)).contiguous().view(E4M3)
    )


KERNELS: dict[tuple[int, int] | None, Callable[[Quantised, Quantised], Tensor]] = {(9, 0): hopper_matmul}
"""The product by compute capability; what isn't here takes the reference."""
