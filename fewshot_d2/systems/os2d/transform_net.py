"""TransformNet (OS2D appendix B.1; Rocco et al.): parameters of the alignment at every place of a correlation map."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...modeling.fourier_conv import FourierKernel, fourier_conv2d, is_worth_transforming
from ...modeling.matching import unit_vectors
from .geometry import IDENTITY, SIDE

_EPSILON = 1e-6


class TransformNet(nn.Module):
    """Three convolutions over the 225 correlations of a place and its surroundings; starts as the identity.

    Submodules have the names of the original release.
    """

    def __init__(self, *, form: str, is_norm_frozen: bool):
        """Choose the parameters.

        Args:
            form: "simple" (4 parameters) or "affine" (6). is_norm_frozen: batch norms keep their statistics in
                training (V2).
        """
        super().__init__()
        identity = torch.tensor(IDENTITY[form])
        self.is_norm_frozen = is_norm_frozen
        self.conv = nn.Sequential(
            nn.Conv2d(SIDE * SIDE, 128, 7, padding=3),
            nn.BatchNorm2d(128),
            nn.ReLU(inplace=True),
            nn.Conv2d(128, 64, 5, padding=2),
            nn.BatchNorm2d(64),
            nn.ReLU(inplace=True),
        )
        self.linear = nn.Conv2d(64, len(identity), 5, padding=2)
        nn.init.zeros_(self.linear.weight)
        self.linear.bias.data.copy_(identity)
        # (version of the weight, its address, kernel): derived from it, so no part of checkpoints.
        self._kernel: tuple[int, int, FourierKernel] | None = None

    def train(self, mode: bool = True) -> "TransformNet":
        """As of any module, but for frozen norms; the transformed kernel is of inference only."""
        self._kernel = None
        super().train(mode)
        if self.is_norm_frozen:
            for module in self.conv:
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return self

    def forward(self, correlation: Tensor) -> Tensor:
        """Correlation (Tensor[R, 225, H, W]) -> parameters (Tensor[R, 4 or 6, H, W])."""
        hidden = unit_vectors(F.relu(correlation), dim=1, epsilon=_EPSILON)
        return self.linear(self.conv[1:](self._first(hidden)))

    def _first(self, hidden: Tensor) -> Tensor:
        first = self.conv[0]
        if not is_worth_transforming(hidden):
            return first(hidden)
        key = first.weight._version, first.weight.data_ptr()
        if self._kernel is None or self._kernel[:2] != key:
            self._kernel = (*key, FourierKernel.of(first.weight))
        return fourier_conv2d(hidden, self._kernel[2], first.bias)
