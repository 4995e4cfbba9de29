"""Keys of RepMet."""

from detectron2.config import CfgNode


def add_config(cfg: CfgNode) -> None:
    """Add MODEL.REPMET; the defaults are those of the original code (spec 7)."""
    node = cfg.MODEL.REPMET = CfgNode()
    # "representatives", "linear": a standard classifier whose last layer each episode trains (baseline-FT), or
    # "external": an embedding trained by triplets on a finished detector (baseline-DML-external).
    node.CLASSIFIER = "representatives"
    # Output of the linear embedding layer; 0 = none, the box head's features are the embedding (baseline-DML).
    node.EMBEDDING_DIM = 256
    # Representatives a class has in training.
    node.NUM_MODES = 5
    # Width of a mode, and the factor in front of the posteriors before the softmax.
    node.SIGMA = 0.5
    node.SCORE_SCALE = 15.0
    # "softmax" of the scaled posteriors (code), or "literal": minus the logarithm of the posterior (paper).
    node.CLASS_LOSS = "softmax"
    # Score of a detection: "softmax" as in training, or the "posterior" itself.
    node.SCORE = "softmax"
    # Margin in squared distance, or between distances where MARGIN_ON says "distance" (paper).
    node.MARGIN = 0.5
    node.MARGIN_ON = "squared_distance"
    # Weights of the class, margin and auxiliary linear classification loss; the paper has no third.
    node.LOSS_WEIGHTS = (1.0, 1.0, 1.0)
    # "all", or "predictor": embedding, representatives, classifier and boxes on a trained detector (MODEL.WEIGHTS), of
    # which everything else stays as it is.
    node.TRAINED = "all"
    # ROIs an image that the losses of the head see, the hardest ones by class and box loss.
    node.HARD_ROIS = 512
    # Clusters of embeddings replace the representatives: "none", "first_epoch" (before it) or "every_epoch".
    node.KMEANS = "none"
    # What of a support image becomes a representative: the proposal with the "best_iou" with the box, the clusters
    # of "all_iou" proposals, both from SUPPORT_IOU up, or the "gt_box" itself. Without such a proposal: the box.
    node.SUPPORT_ROIS = "best_iou"
    node.SUPPORT_IOU = 0.7
    # Least number of clusters a class; twice the shots if that is more.
    node.SUPPORT_MODES = 5
    # Whether the trained classes compete with those that are searched; they are never reported.
    node.KEEP_BASE = False
    # Gaussian Soft-NMS exp(-IoU^2 / sigma) after the hard one, 0 = off. The original: 0.6 in its regular test, off
    # in episodes.
    node.SOFT_NMS_SIGMA = 0.0
