"""Episodes: data sets, splits, index, plans, mapper and loaders. Nothing here imports a model."""

from . import datasets
from .dataset_mapper import EPISODIC_MAPPER_REGISTRY, EpisodicDatasetMapper
from .loaders import EpisodicTestLoader, EpisodicTrainLoader
from .patch_mapper import PatchMapper
from .superpixel_mapper import SuperpixelMapper

__all__ = [
    "EPISODIC_MAPPER_REGISTRY",
    "EpisodicDatasetMapper",
    "EpisodicTestLoader",
    "EpisodicTrainLoader",
    "PatchMapper",
    "SuperpixelMapper",
    "datasets",
]
