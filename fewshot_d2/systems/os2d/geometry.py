"""From parameters to places, boxes and corners (OS2D, paper 3; spec 1.6, 1.7 and 1.9).

Every place of the map has a frame of its own in which [-1, 1] is its anchor: 15 cells, or 240 pixels, around the centre
of its cell. Points of a class image are numbered column by column, as the channels of the correlation. R class images,
M points, n = H W places row by row.
"""

import torch
from torch import Tensor

# Cells a side of a class map, cells that pooling leaves out at each side, pixels of a cell, pixels of an anchor.
SIDE, BORDER, STRIDE = 15, 2, 16
ANCHOR = SIDE * STRIDE
# Matrices that the original inverts at once: if one of them is singular, all are changed.
_INVERTED_AT_ONCE, _DIAGONAL = 65535, 1e-5
# Determinants nearer to zero count as this: points are beyond any image then, but finite.
_LEAST_DETERMINANT = 1e-10
IDENTITY = {"none": (), "simple": (1.0, 0.0, 1.0, 0.0), "affine": (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)}


def template_points(device: torch.device) -> Tensor:
    """(u, v) of all cells of a class map, Tensor[225, 2] in [-1, 1]; number = column * 15 + row."""
    line = torch.linspace(-1, 1, SIDE, device=device)
    return torch.cartesian_prod(line, line)


def inner_points(device: torch.device) -> Tensor:
    """Numbers of the 121 cells that are pooled, int64[121]."""
    line = torch.arange(BORDER, SIDE - BORDER, device=device)
    return (line[:, None] * SIDE + line).flatten()


def to_matrices(parameters: Tensor, *, inverse: bool) -> Tensor:
    """Matrices that take points of the class image to the frame of each place.

    Args:
        parameters (Tensor[R, 4 or 6, n]): (sx, tx, sy, ty), or a, b, tx, c, d, ty.
        inverse: whether they lead the other way (V2).

    Returns:
        Tensor[R, 6, n]: a, b, tx, c, d, ty.
    """
    if parameters.shape[1] == 4:
        sx, tx, sy, ty = parameters.unbind(1)
        zero = torch.zeros_like(sx)
        parameters = torch.stack([sx, zero, tx, zero, sy, ty], dim=1)
    return _inverted(parameters) if inverse else parameters


def _inverted(matrices: Tensor) -> Tensor:
    """Upper rows of the inverses of [[a, b, tx], [c, d, ty], [0, 0, 1]], in closed form."""
    a, b, tx, c, d, ty = matrices.unbind(1)
    shift = _DIAGONAL * _is_changed(a * d - b * c)
    a, d, last = a + shift, d + shift, 1 + shift
    determinant = a * d - b * c
    tiny = determinant.abs() < _LEAST_DETERMINANT
    determinant = determinant.masked_fill(tiny, _LEAST_DETERMINANT)
    new_tx, new_ty = (b * ty - d * tx) / last, (c * tx - a * ty) / last
    return torch.stack([d, -b, new_tx, -c, a, new_ty], dim=1) / determinant[:, None]


def _is_changed(determinants: Tensor) -> Tensor:
    """1 for every matrix of a chunk with a singular one, else 0 (spec 1.6); in the order of class images and places."""
    singular = (determinants.detach() == 0).flatten()
    chunk = torch.arange(len(singular), device=singular.device) // _INVERTED_AT_ONCE
    any_of_chunk = torch.zeros_like(singular, dtype=determinants.dtype)
    any_of_chunk.index_add_(0, chunk, singular.to(determinants.dtype))
    return (any_of_chunk[chunk] > 0).to(determinants.dtype).view_as(determinants)


def centres(height: int, width: int, device: torch.device) -> Tensor:
    """(x, y) of the places in cells, Tensor[n, 2]: column + 0.5 and row + 0.5."""
    rows, columns = torch.meshgrid(
        torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij"
    )
    return torch.stack([columns.flatten(), rows.flatten()], dim=1) + 0.5


def sampled_places(matrices: Tensor, points: Tensor, size: tuple[int, int]) -> Tensor:
    """Where each place samples the map for each point.

    An index of the map is used where a coordinate is meant: the grid is half a cell off the centre and stretched by
    15/14, as in the original (spec 1.7).

    Args:
        matrices (Tensor[R, 6, n]). points (Tensor[M, 2]). size: (height, width) of the map.

    Returns:
        Tensor[R, M, n, 2]: (x, y), where -1 and 1 are the first and the last cell.
    """
    height, width = size
    # A map of one cell has one place to sample, whatever the number here is.
    last = matrices.new_tensor([max(width - 1, 1), max(height - 1, 1)])
    scale = SIDE / last
    offset = centres(height, width, matrices.device).to(matrices) * 2 / last - 1
    # (R, 3, n, 2): what u, v and 1 are multiplied by to give x and y.
    factors = matrices.unflatten(1, (2, 3)).permute(0, 2, 3, 1) * scale
    factors = torch.cat([factors[:, :2], factors[:, 2:] + offset], dim=1)
    homogeneous = torch.cat([points, torch.ones_like(points[:, :1])], dim=1).to(matrices)
    places = homogeneous.expand(len(matrices), -1, -1) @ factors.flatten(2)
    return places.unflatten(2, (-1, 2))


def to_boxes(matrices: Tensor, size: tuple[int, int]) -> Tensor:
    """The tight boxes around all points, in closed form: they are those of the corners of a parallelogram.

    Args:
        matrices (Tensor[R, 6, n]). size: (height, width) of the map.

    Returns:
        Tensor[R, n, 4]: XYXY, pixels, at least one pixel wide and high, not clipped.
    """
    a, b, tx, c, d, ty = (ANCHOR / 2 * matrices).unbind(1)
    place = STRIDE * centres(*size, matrices.device).to(matrices)
    centre = torch.stack([tx, ty], dim=-1) + place
    half = torch.stack([a.abs() + b.abs(), c.abs() + d.abs()], dim=-1)
    first, second = centre - half, centre + half
    second = torch.where(first + 1 > second, first.detach() + 1, second)
    return torch.cat([first, second], dim=-1)


def to_corners(matrices: Tensor, size: tuple[int, int]) -> Tensor:
    """Where the corners of the class image are found: top left, top right, bottom left, bottom right.

    Args:
        matrices (Tensor[..., 6]): of places. size: (height, width) of the map, or (n, 2) centres of the places.

    Returns:
        Tensor[..., 8]: x, y of each corner in pixels, without gradient.
    """
    corners = matrices.new_tensor([[-1, -1, 1], [1, -1, 1], [-1, 1, 1], [1, 1, 1]])
    place = centres(*size, matrices.device).to(matrices)
    local = torch.einsum("rpkn,mk->rnmp", matrices.detach().unflatten(1, (2, 3)), corners)
    return (ANCHOR / 2 * local + STRIDE * place[:, None]).flatten(2)


def anchors(size: tuple[int, int], device: torch.device) -> Tensor:
    """The receptive fields of the places (Tensor[n, 4], XYXY in pixels): 240 pixels wide and high."""
    place = STRIDE * centres(*size, device)
    return torch.cat([place - ANCHOR / 2, place + ANCHOR / 2], dim=1)
