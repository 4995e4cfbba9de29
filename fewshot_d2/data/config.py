"""Keys of ground truth and augmentation, beside those of ``fewshot_d2.config``."""

from detectron2.config import CfgNode as CN

from .augmentation import AugmentationRule
from .ground_truth import KEEP_ALL, GroundTruthFilter


def add_data_config(node: CN) -> None:
    """Add the keys to cfg.FEWSHOT, in place."""
    # What counts as ground truth in training and in PROTOCOL "episodes"; the rest is removed (SILCO spec A7).
    node.GROUND_TRUTH = CN()
    # Objects that VOC calls difficult.
    node.GROUND_TRUTH.KEEP_DIFFICULT = True
    # Least share of the image's area that a box has (SILCO: 0.001 on VOC, 0.1 on COCO).
    node.GROUND_TRUTH.MIN_AREA = 0.0
    # An image with so many boxes of a class has none of that class (SILCO: 30); 0 = any number.
    node.GROUND_TRUTH.MAX_BOXES = 0

    # SSD's augmentation of training queries; mirroring is INPUT.RANDOM_FLIP. Supports are not augmented.
    node.AUGMENT = CN()
    # Brightness, contrast, saturation, hue and order of the channels, each with probability 0.5.
    node.AUGMENT.PHOTOMETRIC = False
    # Largest side of the canvas that a query is put on, relative to its own, with probability 0.5; 1 = none (SSD: 4).
    node.AUGMENT.EXPAND = 1.0
    # Which crops there are, one is chosen each time: "none", "random" or the least IoU that some box has with the
    # crop (SSD: "none", 0.1, 0.3, 0.5, 0.7, 0.9, "random"). Empty: no crops.
    node.AUGMENT.CROPS = ()


def check_data_config(cfg: CN) -> None:
    """Refuse keys that would do nothing, and a filter that the evaluation would not know of.

    Raises:
        ValueError: names the key.
    """
    node = cfg.FEWSHOT
    if node.TRAIN_ON == "tuples" and (node.NUM_WAYS, node.NUM_ABSENT_WAYS) != (1, 0):
        raise ValueError(
            "FEWSHOT.NUM_WAYS must be 1 and NUM_ABSENT_WAYS 0 to train on tuples, got "
            f"{node.NUM_WAYS} and {node.NUM_ABSENT_WAYS}"
        )
    if node.EXCLUDE_NOVEL_IMAGES and (node.SPLIT == "all" or node.TRAIN_ON == "rank_lists"):
        raise ValueError(
            "FEWSHOT.EXCLUDE_NOVEL_IMAGES must be False without novel classes, and with rank lists, which know of no "
            f"class, got SPLIT {node.SPLIT!r} and TRAIN_ON {node.TRAIN_ON!r}"
        )
    AugmentationRule.from_cfg(cfg)
    is_filtered = GroundTruthFilter.from_cfg(cfg) != KEEP_ALL
    if is_filtered and cfg.DATASETS.TEST and cfg.FEWSHOT.TEST.PROTOCOL != "episodes":
        raise ValueError(
            'FEWSHOT.GROUND_TRUTH must be left as it is unless FEWSHOT.TEST.PROTOCOL is "episodes": other protocols '
            f"count every annotation; got {cfg.FEWSHOT.TEST.PROTOCOL!r}"
        )
