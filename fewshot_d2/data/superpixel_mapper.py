"""The mapper of co-attention (SPIL 3.2): queries come with superpixels, and without any mask of the data set."""

from typing import Any

from detectron2.config import CfgNode, configurable

from ..files import dataset_path
from .dataset_mapper import EPISODIC_MAPPER_REGISTRY, EpisodicDatasetMapper
from .episodes import Episode
from .superpixels import SuperpixelCache, resize_labels


@EPISODIC_MAPPER_REGISTRY.register()
class SuperpixelMapper(EpisodicDatasetMapper):
    """Adds ``superpixels`` (Tensor[H, W], int64, of the network's image) to training queries."""

    @configurable
    def __init__(self, *, superpixels: SuperpixelCache, **kwargs: Any):
        """Add to the mapper's arguments where superpixels are kept, which is for whole images."""
        super().__init__(**kwargs)
        if self.query_augmentation.moves_pixels:
            raise ValueError(
                "FEWSHOT.AUGMENT must have no crops and EXPAND 1 with the SuperpixelMapper, got "
                f"{self.query_augmentation.crops} and {self.query_augmentation.expand}"
            )
        self.superpixels = superpixels

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool) -> dict[str, Any]:
        """Read the keys."""
        node = cfg.FEWSHOT.SUPERPIXELS
        cache = SuperpixelCache(
            dataset_path(node.FOLDER),
            short_side=node.SHORT_SIDE,
            scale=node.SCALE,
            sigma=node.SIGMA,
            min_size=node.MIN_SIZE,
        )
        # Masks are made from superpixels: those of the data set must not be seen.
        return {**super().from_config(cfg, is_train), "with_masks": False, "superpixels": cache}

    def __call__(self, episode: Episode) -> dict[str, Any]:
        """Map one episode; see ``EpisodicDatasetMapper``."""
        result = super().__call__(episode)
        if self.is_train:
            labels = self.superpixels(episode.query["file_name"])
            shape = tuple(result["image"].shape[1:])
            result["superpixels"] = resize_labels(labels, shape, flip=self.flips(episode))
        return result
