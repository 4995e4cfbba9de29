"""Keys of SILCO."""

from detectron2.config import CfgNode


def add_config(cfg: CfgNode) -> None:
    """Add MODEL.SILCO; sections are those of the spec, and the defaults what it recommends."""
    node = cfg.MODEL.SILCO = CfgNode()
    _add_trunk(node)
    # How supports enhance the query's maps (A3, A5): "gap" (eq. 3), "image" (eq. 4 and 5) or "global" (eq. 6).
    node.SIMILARITY = "image"
    # Whether a GCN weights the supports (paper 3.2.3), for "image" alone; otherwise they count alike.
    node.REWEIGHTING = True
    # Divide by the sum of the weights (A5): maps are then as large with any number of shots. The original sums.
    node.NORMALIZE_WEIGHTS = False
    # 0: attention by scaled products (eq. 4). Else (ours) by cosines, divided by this, with theta and phi alike at
    # first: a cell then looks at what looks like it from the start, however small the maps' values. Where products are
    # flat, a comparison must be found by chance, which takes a training as long as the paper's. "gap" has no attention.
    node.TEMPERATURE = 0.0
    # Maps of the trunk that are enhanced and predicted on; without 5 there are the paper's five scales (A2).
    node.SOURCES = (0, 1, 2, 3, 4, 5)
    # Another trunk for supports (original code), or one for both (the author's later code).
    node.SEPARATE_TRUNKS = False
    # Of the output of the spatial similarity module (A3), and after the first layer of each adjacency net (A4).
    node.DROPOUT = 0.5
    node.REWEIGHTING_DROPOUT = 0.3
    # Blocks L of a GCN and its width nf (A4).
    node.REWEIGHTING_BLOCKS = 5
    node.REWEIGHTING_WIDTH = 96
    # IoU from which a prior is positive, and negatives that are learned for each positive (A6).
    node.MATCH_IOU = 0.5
    node.NEGATIVE_RATIO = 3
    # Scores above the threshold, the best of them before NMS, and the IoU of it (A6); all survivors are kept.
    node.SCORE_THRESH = 0.0
    node.PRE_NMS_TOPK = 200
    node.NMS_IOU = 0.45


def _add_trunk(node: CfgNode) -> None:
    # Layers after the bottom-up, each (channels between, channels, stride); those of stride 1 are not padded (A2).
    node.EXTRAS = ((256, 512, 2), (128, 256, 2), (128, 256, 1), (128, 256, 1))
    # Of the six maps, in pixels of the network's image: distance of two cells, size of the smaller square prior, with
    # one more for the larger of the last map, and the aspect ratios besides 1; each also stands for its inverse (A2).
    node.STEPS = (8, 16, 32, 64, 100, 300)
    node.SIZES = (30, 60, 111, 162, 213, 264, 315)
    node.ASPECT_RATIOS = ((2,), (2, 3), (2, 3), (2, 3), (2,), (2,))
