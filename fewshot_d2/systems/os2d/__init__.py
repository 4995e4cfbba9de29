"""OS2D (Osokin et al., "One-Stage One-Shot Object Detection by Matching Anchor Features", ECCV 2020).

Dense correlation of the query with class maps of 15 x 15 cells, a network that aligns the two at every place, and the
correlation resampled there as the score.
"""

from .config import add_config
from .detector import OS2D
from .matchers import AlignedMatcher, WindowMatcher

__all__ = ["OS2D", "AlignedMatcher", "WindowMatcher", "add_config"]
