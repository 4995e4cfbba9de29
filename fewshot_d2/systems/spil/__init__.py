"""SPIL (Hong et al., "Towards Accurate Localization by Instance Search", ACM MM 2021): correlation Mask R-CNN.

The detector is here (paper 3.1, 3.2). What it learns from, rank lists and the boxes that earlier stages found in
them, is ``data.sample_pool``; the stages themselves (3.3, algorithm 1) are ``engine.self_paced``.
"""

from .config import add_config
from .detector import SPIL
from .lookalikes import LookalikeRPN

__all__ = ["SPIL", "LookalikeRPN", "add_config"]
