"""Few-shot detection on detectron2: show it one or a few examples, and it finds and outlines all the others.

Importing the package registers its systems, mappers, backbones and data sets in detectron2's registries.
"""

from . import data, modeling, retrieval, systems
from .config import add_fewshot_config, load_config
from .inference.localization import localize_supports
from .predictor import FewShotPredictor
from .structures import Support, SupportFeatures, SupportSet

__version__ = "0.1.0"
__all__ = [
    "FewShotPredictor",
    "Support",
    "SupportFeatures",
    "SupportSet",
    "add_fewshot_config",
    "data",
    "load_config",
    "localize_supports",
    "modeling",
    "retrieval",
    "systems",
]
