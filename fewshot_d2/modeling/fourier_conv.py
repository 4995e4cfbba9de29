"""Convolution of large kernels in the frequency domain, tile by tile: inference in float32 on a CPU.

A 7x7 kernel costs 49 multiplications a pixel directly; here the maps are cut into overlapping tiles, each tile is
transformed, and what is left is one matrix product a frequency. Tiles have one size whatever the map's is, so the
kernel is transformed once. The error is that of float32, smaller than a direct sum's. R maps of C channels and size
H,W, O output channels, F frequencies of a tile.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# Side of a tile: new pixels and the overlap of 6 for a kernel of 7. Two tiles are just 600 pixels at stride 16.
TILE = 26
# Below it much of a tile is padding.
SMALLEST_MAP = 12


@dataclass(frozen=True)
class FourierKernel:
    """A kernel (O, C, k, k) in the frequency domain, conjugated: W = a + ib.

    Attributes:
        real, difference, total (Tensor[F, C, O]): a, b - a and a + b, for complex products by three real ones.
        side (int): k, odd.
    """

    real: Tensor
    difference: Tensor
    total: Tensor
    side: int

    @classmethod
    def of(cls, weight: Tensor) -> "FourierKernel":
        """Transform the weight (Tensor[O, C, k, k]) of a convolution.

        Raises:
            ValueError: the kernel is not square, has an even side or leaves no new pixel in a tile.
        """
        height, width = weight.shape[2:]
        if height != width or height % 2 == 0 or height > TILE:
            raise ValueError(
                f"kernel must be square with an odd side up to {TILE}, got {height}x{width}"
            )
        spectrum = torch.fft.rfft2(weight, s=(TILE, TILE)).conj().flatten(2).permute(2, 1, 0)
        real, imaginary = spectrum.real.contiguous(), spectrum.imag.contiguous()
        return cls(real, imaginary - real, imaginary + real, height)


def is_worth_transforming(maps: Tensor) -> bool:
    """Whether ``fourier_conv2d`` serves for maps (Tensor[R, C, H, W]) and is faster than the direct sum."""
    plain = maps.device.type == "cpu" and maps.dtype == torch.float32
    return plain and not torch.is_grad_enabled() and min(maps.shape[2:]) >= SMALLEST_MAP


def fourier_conv2d(maps: Tensor, kernel: FourierKernel, bias: Tensor | None = None) -> Tensor:
    """``F.conv2d`` with stride 1 and zero padding that keeps the size.

    Args:
        maps (Tensor[R, C, H, W]). bias (Tensor[O] or None).

    Returns:
        Tensor[R, O, H, W].
    """
    num_maps, _, height, width = maps.shape
    step, pad = TILE - kernel.side + 1, kernel.side // 2
    rows, columns = -(-height // step), -(-width // step)
    beyond = columns * step - width + pad, rows * step - height + pad
    maps = F.pad(maps, (pad, beyond[0], pad, beyond[1]))
    tiles = maps.unfold(2, TILE, step).unfold(3, TILE, step)
    spectrum = torch.view_as_real(torch.fft.rfft2(tiles))
    frequencies = TILE, TILE // 2 + 1
    # (R, C, rows, columns, y, x, 2) -> (2, F, tiles, C): one matrix a frequency.
    parts = spectrum.permute(6, 4, 5, 0, 2, 3, 1)
    real, imaginary = parts.reshape(2, frequencies[0] * frequencies[1], -1, maps.shape[1])
    del tiles, spectrum, parts
    product = _complex_product(real, imaginary, kernel)
    product = product.view(num_maps, rows, columns, -1, *frequencies)
    result = torch.fft.irfft2(product, s=(TILE, TILE))[..., :step, :step]
    result = result.permute(0, 3, 1, 4, 2, 5).reshape(num_maps, -1, rows * step, columns * step)
    result = result[:, :, :height, :width]
    return result if bias is None else result + bias[:, None, None]


def _complex_product(real: Tensor, imaginary: Tensor, kernel: FourierKernel) -> Tensor:
    """Complex[tiles, O, F] from the two parts (Tensor[F, tiles, C]) of the maps."""
    common = torch.bmm(real + imaginary, kernel.real)
    product = torch.stack(
        [
            common - torch.bmm(imaginary, kernel.total),
            common + torch.bmm(real, kernel.difference),
        ],
        dim=-1,
    )
    return torch.view_as_complex(product.permute(1, 2, 0, 3).contiguous())
