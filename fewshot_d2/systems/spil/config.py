"""Keys of SPIL."""

from detectron2.config import CfgNode


def add_config(cfg: CfgNode) -> None:
    """Add MODEL.SPIL; items are those of spec B3."""
    node = cfg.MODEL.SPIL = CfgNode()
    # "none": the mean over crop and shots as it is (paper eq. 3); "channel_mean": divided by the mean over its
    # channels, so that frozen norms behind the correlation see magnitudes like those before it (item 5); "batch_norm":
    # over the kernels of a step, channel by channel, which leaves what tells instances apart (SiamRPN++ has such a
    # norm before its correlation).
    node.KERNEL_NORM = "none"
    # What the box and mask heads pool: the "correlated" map like the RPN (paper), or the plain one of the "query"
    # (FSOD; item 2).
    node.ROI_FEATURES = "correlated"
    # Whether masks are made by co-attention (paper 3.2); no mask of a data set is then used. Needs a mapper that gives
    # superpixels.
    node.CO_ATTENTION = True
    # The map that co-attention compares, of the backbone as it was before training (item 23).
    node.ATTENTION_LAYER = "res4"
    # Superpixels whose mean attention is above it belong to the instance (paper 3.2).
    node.ATTENTION_THRESHOLD = 0.1
    # Background boxes with at least this share of look-alike pixels are left out; above 1 = none are (item 29).
    node.LOOKALIKE_COVERAGE = 0.5
