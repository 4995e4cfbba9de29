"""RepMet (Karlinsky et al., "Representative-based metric learning for classification and few-shot object detection").

A distance-metric head that drops into any GeneralizedRCNN, and the few-shot detector made of it.
The base classes are learned as a closed set, each with several representatives in an embedding space (paper 3);
at test time the supports of novel classes take their place (4.2). No part of training is episodic.
"""

from .config import add_config
from .detector import RepMet
from .metric import RepMetOutputLayers
from .predictors import LinearOutputLayers
from .roi_heads import NormedFCHead, RepMetRes5ROIHeads, RepMetROIHeads

__all__ = [
    "LinearOutputLayers",
    "NormedFCHead",
    "RepMet",
    "RepMetOutputLayers",
    "RepMetROIHeads",
    "RepMetRes5ROIHeads",
    "add_config",
]
