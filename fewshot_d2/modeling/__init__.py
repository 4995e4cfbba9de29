"""Shared model parts. Importing it registers backbones, RPN and ROI heads in detectron2's registries."""

from . import (
    backbones,
    deformable,
    dml_classifier,
    fourier_conv,
    losses,
    matching,
    roi_heads,
    rpn,
    trunk_head,
)
from .detector import FewShotDetector, Pairs

__all__ = [
    "FewShotDetector",
    "Pairs",
    "backbones",
    "deformable",
    "dml_classifier",
    "fourier_conv",
    "losses",
    "matching",
    "roi_heads",
    "rpn",
    "trunk_head",
]
