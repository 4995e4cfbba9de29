"""Keys of the classifier of RepMet's metric learning (its paper 4.1): MODEL.DML and FEWSHOT.CLASSIFY."""

from detectron2.config import CfgNode as CN


def add_classification_config(cfg: CN) -> None:
    """Add MODEL.DML and FEWSHOT.CLASSIFY, in place."""
    cfg.MODEL.DML = CN()
    # A classification model of "torchvision" or "timm" (an extra); its last layer is removed.
    cfg.MODEL.DML.LIBRARY = "torchvision"
    cfg.MODEL.DML.BACKBONE = "inception_v3"
    # State dict of the whole model, a local file or "". The paper does not say whether it starts from ImageNet.
    cfg.MODEL.DML.WEIGHTS = ""
    # N, the classes of FEWSHOT.CLASSIFY.TRAIN, and representatives a class (paper 4.1: K = 3).
    cfg.MODEL.DML.NUM_CLASSES = 102
    cfg.MODEL.DML.NUM_MODES = 3
    # Widths of the two layers of the embedding module (paper 4.1).
    cfg.MODEL.DML.HIDDEN_DIM = 2048
    cfg.MODEL.DML.EMBEDDING_DIM = 1024
    # Width of a mode (paper 4.1), and alpha of eq. 4 in squared distances (not stated; that of the detector's code).
    cfg.MODEL.DML.SIGMA = 0.5
    cfg.MODEL.DML.MARGIN = 0.5
    # Of the cross-entropy of eq. 5 and of eq. 4. The paper has both, a known PyTorch re-implementation (0.0, 1.0).
    cfg.MODEL.DML.LOSS_WEIGHTS = (1.0, 1.0)

    cfg.FEWSHOT.CLASSIFY = CN()
    # "omniglot:A-B:C-D" (characters A to B - 1, drawers C to D - 1), a registered data set (crops of its boxes) or
    # a folder of class folders, which is below DETECTRON2_DATASETS if relative. Empty TEST: no evaluation.
    cfg.FEWSHOT.CLASSIFY.TRAIN = ""
    cfg.FEWSHOT.CLASSIFY.TEST = ""
    # Side in pixels of the squares that images are resized to; INPUT.RANDOM_FLIP flips them in training.
    cfg.FEWSHOT.CLASSIFY.IMAGE_SIZE = 299
    # Classes of a batch and images of each (paper 4.1: M = 12, D = 4); SOLVER.IMS_PER_BATCH is a multiple of M x D.
    cfg.FEWSHOT.CLASSIFY.CLASSES_PER_BATCH = 12
    cfg.FEWSHOT.CLASSIFY.EXAMPLES_PER_CLASS = 4
