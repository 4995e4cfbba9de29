"""Shared model parts. Importing it registers backbones, RPN and ROI heads in detectron2's registries."""

from . import backbones, losses, matching, roi_heads, rpn
from .detector import FewShotDetector, Pairs

__all__ = ["FewShotDetector", "Pairs", "backbones", "losses", "matching", "roi_heads", "rpn"]
