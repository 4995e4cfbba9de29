"""Keys of training patches and of the mining of hard ones (OS2D spec 1.14), for FEWSHOT.MAPPER "PatchMapper"."""

from detectron2.config import CfgNode as CN

# Names of PIL's filters, in lower case.
FILTERS = ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")


def add_patch_config(node: CN) -> None:
    """Add PATCHES and MINING to FEWSHOT, in place."""
    node.PATCHES = CN()
    # Side in pixels of the square that a patch is resized to.
    node.PATCHES.SIZE = 600
    # Ratio of width to height, and the scale relative to that of INPUT.*_TRAIN, are drawn between this and its inverse.
    node.PATCHES.ASPECT = 0.9
    node.PATCHES.SCALE = 0.7
    # Draws until a patch holds a share of at least COVER of some box; then the top left corner is taken.
    node.PATCHES.TRIES = 100
    node.PATCHES.COVER = 0.7
    # Boxes of which a patch holds less are no ground truth in it; below DIFFICULT they are "difficult" ones.
    node.PATCHES.GONE = 0.3
    node.PATCHES.DIFFICULT = 0.7
    # PIL filters of which each patch draws one.
    node.PATCHES.FILTERS = FILTERS
    node.MINING = CN()
    # Iterations between two searches for patches with a high loss; 0 = none. The model needs ``hard_patches``.
    node.MINING.PERIOD = 0
    # Training images that are searched, drawn anew each time (0 = all), ...
    node.MINING.IMAGES = 0
    # ... each at so many scales, between these factors of the one that INPUT.*_TRAIN gives, ...
    node.MINING.NUM_SCALES = 2
    node.MINING.SCALES = (0.5, 1.6)
    # ... for their own classes and so many others, drawn anew each time.
    node.MINING.NUM_CLASSES = 200
    # Patches of one image and kind that overlap a worse one more than NMS_IOU are dropped; KEPT are left.
    node.MINING.NMS_IOU = 0.5
    node.MINING.KEPT = 10


def check_patch_config(node: CN) -> None:
    """Refuse values of FEWSHOT that would fail late or do nothing.

    Raises:
        ValueError: names the key, what it must be and what it is.
    """
    for key, low, high in (
        ("PATCHES.ASPECT", 0.01, 1),
        ("PATCHES.SCALE", 0.01, 1),
        ("PATCHES.COVER", 0, 1),
        ("PATCHES.GONE", 0, node.PATCHES.DIFFICULT),
        ("PATCHES.DIFFICULT", 0, 1),
        ("MINING.NMS_IOU", 0, 1),
    ):
        part, name = key.split(".")
        if not low <= node[part][name] <= high:
            raise ValueError(
                f"FEWSHOT.{key} must be between {low} and {high}, got {node[part][name]}"
            )
    wrong = [name for name in node.PATCHES.FILTERS if name not in FILTERS]
    if wrong or not node.PATCHES.FILTERS:
        raise ValueError(
            f"FEWSHOT.PATCHES.FILTERS must be of {FILTERS}, got {node.PATCHES.FILTERS}"
        )
    scales = tuple(node.MINING.SCALES)
    if len(scales) != 2 or not 0 < scales[0] <= scales[1]:
        raise ValueError(f"FEWSHOT.MINING.SCALES must be two rising factors, got {scales}")
    if node.MINING.PERIOD < 0 or node.PATCHES.SIZE < 1:
        raise ValueError(
            "FEWSHOT.MINING.PERIOD must be at least 0 and PATCHES.SIZE at least 1, got "
            f"{node.MINING.PERIOD} and {node.PATCHES.SIZE}"
        )
    if node.MINING.PERIOD and node.MAPPER != "PatchMapper":
        raise ValueError(f"FEWSHOT.MINING needs FEWSHOT.MAPPER PatchMapper, got {node.MAPPER!r}")
    if node.MINING.PERIOD and node.TRAIN_ON != "episodes":
        raise ValueError(f"FEWSHOT.MINING needs TRAIN_ON episodes, got {node.TRAIN_ON!r}")
