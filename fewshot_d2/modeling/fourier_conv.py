"""Convolution of large kernels in the frequency domain, tile by tile: inference in float32 on a CPU.

A 7x7 kernel costs 49 multiplications a pixel directly; here the maps are cut into overlapping tiles, each tile is
transformed, and what is left is one matrix product a frequency. Tiles have one size whatever the map's is, so the
kernel is transformed once. Transforms are matrix products too: tiles are small, and no axis has to be moved for them.
Letters: R maps, C and O channels, H,W their size, S side of a tile, s new pixels of it, T = tiles of all maps, F =
(S / 2 + 1) S frequencies, first those of y.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# Side of a tile: new pixels and the overlap of 6 for a kernel of 7. Two tiles are just 600 pixels at stride 16.
TILE = 26
_HALF = TILE // 2 + 1
# Below it much of a tile is padding.
SMALLEST_MAP = 12


@dataclass(frozen=True)
class FourierKernel:
    """A kernel (O, C, k, k) in the frequency domain, conjugated, W = a + ib, and what transforms maps.

    Attributes:
        real, difference, total (Tensor[F, C, O]): a, b - a and a + b, for complex products by three real ones.
        rows (Tensor[2 (S / 2 + 1), S]): transforms y; columns (two Tensor[2 S, S]): x, of real and imaginary parts.
        back_columns (Tensor[2 s, 2 S]), back_rows (Tensor[s, 2 (S / 2 + 1)]): back to the new pixels alone.
        side (int): k, odd.
    """

    real: Tensor
    difference: Tensor
    total: Tensor
    rows: Tensor
    columns: tuple[Tensor, Tensor]
    back_columns: Tensor
    back_rows: Tensor
    side: int

    @property
    def step(self) -> int:
        """New pixels s of a tile."""
        return TILE - self.side + 1

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
        # Half of the frequencies of y, all of x.
        spectrum = torch.fft.rfftn(weight, s=(TILE, TILE), dim=(3, 2)).conj()
        spectrum = spectrum.flatten(2).permute(2, 1, 0)
        real, imaginary = spectrum.real.contiguous(), spectrum.imag.contiguous()
        return cls(
            real,
            imaginary - real,
            imaginary + real,
            *_transforms(TILE - height + 1, weight),
            height,
        )


def _transforms(step: int, like: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor, Tensor]:
    """``rows``, ``columns``, ``back_columns`` and ``back_rows`` of a ``FourierKernel``."""
    unit = torch.eye(TILE, dtype=torch.float64)
    rows = torch.view_as_real(torch.fft.rfft(unit)).permute(1, 2, 0).flatten(0, 1)
    columns = torch.view_as_real(torch.fft.fft(unit)).permute(1, 2, 0)
    of_imaginary = torch.stack([-columns[:, 1], columns[:, 0]], dim=1)
    inverse = torch.view_as_real(torch.fft.ifft(unit).resolve_conj())[:, :step]
    # (kx, part) -> (part, x).
    from_real = inverse.permute(2, 1, 0)
    from_imaginary = torch.stack([-from_real[1], from_real[0]])
    back_columns = torch.stack([from_real, from_imaginary], dim=-1).flatten(2).flatten(0, 1)
    half = torch.eye(_HALF, dtype=torch.complex128)
    parts = [torch.fft.irfft(basis, n=TILE)[:, :step].T for basis in (half, 1j * half)]
    back_rows = torch.stack(parts, dim=-1).flatten(1)
    matrices = rows, columns.flatten(0, 1), of_imaginary.flatten(0, 1), back_columns, back_rows
    rows, first, second, back_columns, back_rows = (m.to(like).contiguous() for m in matrices)
    return rows, (first, second), back_columns, back_rows


def is_worth_transforming(maps: Tensor) -> bool:
    """Whether ``fourier_conv2d`` serves for maps (Tensor[R, C, H, W]) and is faster than the direct sum."""
    plain = maps.device.type == "cpu" and maps.dtype == torch.float32
    some = len(maps) > 0 and min(maps.shape[2:]) >= SMALLEST_MAP
    return plain and some and not torch.is_grad_enabled()


def fourier_conv2d(maps: Tensor, kernel: FourierKernel, bias: Tensor | None = None) -> Tensor:
    """``F.conv2d`` with stride 1 and zero padding that keeps the size.

    Args:
        maps (Tensor[R, C, H, W]). bias (Tensor[O] or None).

    Returns:
        Tensor[R, O, H, W].
    """
    num_maps, channels, height, width = maps.shape
    step = kernel.step
    down, across = -(-height // step), -(-width // step)
    spectrum = _spectrum(maps, kernel, down, across)
    product = _product(spectrum.view(_HALF * TILE, 2, -1, channels), kernel)
    del spectrum
    # Complex from kx to x for each ky, then from ky to y.
    product = kernel.back_columns @ product.view(_HALF, 2 * TILE, -1)
    pixels = kernel.back_rows @ product.view(2 * _HALF, -1)
    tiles = pixels.view(step * step, -1).T.contiguous()
    tiles = tiles.view(across, down, num_maps, -1, step, step).permute(2, 3, 1, 4, 0, 5)
    result = tiles.reshape(num_maps, -1, down * step, across * step)[:, :, :height, :width]
    return result if bias is None else result + bias[:, None, None]


def _spectrum(maps: Tensor, kernel: FourierKernel, down: int, across: int) -> Tensor:
    """The maps' tiles transformed, Tensor[F, 2, tiles across, tiles down, R C]: real and imaginary parts."""
    num_maps, channels, height, width = maps.shape
    step, pad, both = kernel.step, kernel.side // 2, num_maps * channels
    padded = maps.new_zeros(down * step + 2 * pad, across * step + 2 * pad, both)
    # One matrix is transposed in blocks, four axes would be moved number by number.
    pixels = maps.reshape(both, height * width).T.contiguous()
    padded[pad : pad + height, pad : pad + width] = pixels.view(height, width, both)
    # (down, S, W R C), a view in which tiles overlap.
    rows = padded.flatten(1).unfold(0, TILE, step).transpose(1, 2)
    of_rows = (kernel.rows @ rows).view(down * _HALF, 2, padded.shape[1], both)
    spectrum = maps.new_empty(_HALF, TILE, 2, across, down, both)
    for tile in range(across):
        real, imaginary = of_rows[:, :, tile * step : tile * step + TILE].unbind(1)
        first, second = (matrix.expand(len(real), -1, -1) for matrix in kernel.columns)
        of_tile = torch.baddbmm(torch.bmm(first, real), second, imaginary)
        spectrum[:, :, :, tile] = of_tile.view(down, _HALF, TILE, 2, both).permute(1, 2, 3, 0, 4)
    return spectrum


def _product(spectrum: Tensor, kernel: FourierKernel) -> Tensor:
    """Products with the kernel, Tensor[F, 2, T, O], of the spectrum (Tensor[F, 2, T, C])."""
    real, imaginary = spectrum.unbind(1)
    product = spectrum.new_empty(*spectrum.shape[:3], kernel.real.shape[2])
    common = torch.bmm(real + imaginary, kernel.real)
    torch.sub(common, torch.bmm(imaginary, kernel.total), out=product[:, 0])
    torch.add(common, torch.bmm(real, kernel.difference), out=product[:, 1])
    return product
