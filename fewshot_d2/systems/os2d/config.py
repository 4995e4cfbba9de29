"""Keys of OS2D."""

from detectron2.config import CfgNode


def add_config(cfg: CfgNode) -> None:
    """Add MODEL.OS2D."""
    node = cfg.MODEL.OS2D = CfgNode()
    # Map of the backbone, at stride 16.
    node.FEATURE = "res4"
    # "aligned": OS2D, or by TRANSFORM "none" the sliding window "square"; "window": the sliding window "target AR".
    node.MATCHER = "aligned"
    # "simple": scales and shifts (V1); "affine" (V2); "none": the identity. INVERSE: its direction is that of V2.
    node.TRANSFORM = "simple"
    node.INVERSE = False
    # Norms of TransformNet (V2) and of the backbone keep their statistics in training; their affines are trained.
    node.FREEZE_TRANSFORM_NORM = False
    node.FREEZE_BACKBONE_NORM = True
    # Square root of the area in pixels that class images are resized to, in their own shape.
    node.CLASS_SIZE = 240
    _add_training(node)
    _add_search(node)


def _add_training(node: CfgNode) -> None:
    # "ranked_list" or "contrastive" (spec 1.12), and margins of positives and negatives (contrastive: 1.0, 0.5).
    node.LOSS = "ranked_list"
    node.MARGINS = (0.6, 0.5)
    # Contrastive: hardest negatives that count, for each positive.
    node.NEGATIVES_PER_POSITIVE = 3
    # Of the negatives' loss and of the boxes' (V1: 0.2, V2: 0).
    node.NEGATIVE_WEIGHT = 1.0
    node.LOCALIZATION_WEIGHT = 0.2
    # IoU of an anchor with an object from which on it is positive, and below which it is negative ...
    node.IOU_THRESHOLDS = (0.5, 0.1)
    # ... and of a predicted box, which then decides for the scores (target remapping).
    node.REMAP_TARGETS = True
    node.REMAP_THRESHOLDS = (0.8, 0.4)
    # In training, round the sides of class images to multiples of so many pixels; 0: not. On CUDA each new size costs
    # plans of all convolutions, seconds at first, and the library forgets plans where there are hundreds of sizes.
    node.TRAIN_CLASS_STEP = 0
    # Side in pixels of the hard patches that are proposed.
    node.PATCH_SIZE = 600


def _add_search(node: CfgNode) -> None:
    # Pixels of an image's longer side on the level 1 of the pyramid (E of spec 1.1); 0: as the mapper gives it.
    node.IMAGE_SIZE = 0
    # Instead, scale queries so that objects as large as the exemplars (their median, in pixels of their own images)
    # have CLASS_SIZE. The longer side has at most MAX_IMAGE_SIZE pixels then, on the level 1.
    node.SCALE_BY_EXEMPLARS = False
    node.MAX_IMAGE_SIZE = 2000
    # Levels of the image pyramid, relative to the level 1 (spec 1.15: 0.5, 0.625, 0.8, 1, 1.2, 1.4, 1.6).
    node.PYRAMID = (1.0,)
    # Boxes with at most this score are left out.
    node.SCORE_THRESHOLD = float("-inf")
    # Boxes a class that NMS sees at most, the best ones; 0 = all (original).
    node.PRE_NMS_TOPK = 0
    node.NMS_IOU = 0.3
    # NMS in chunks of so many boxes, then of the survivors, and so on; 0 = at once. The original: 10000, which gives
    # other boxes where a class has more (spec 1.10).
    node.NMS_CHUNK = 0
