"""Configs: the keys that all systems share, each system's own, and reading a YAML with them."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode as CN
from detectron2.config import get_cfg

from .classification_config import add_classification_config
from .data.config import add_data_config, check_data_config
from .patch_config import add_patch_config, check_patch_config
from .support_augmentation import SupportAugmentation
from .transforms import RESIZE_RULES

logger = logging.getLogger(__name__)

PROTOCOLS = ("present", "open", "single_target", "episodes")
REGION_SOURCES = ("salient", "proposals", "detections")
TRAINED_ON = ("episodes", "tuples", "base_images", "rank_lists")
SUPPORT_UNITS = ("boxes", "images")


def add_fewshot_config(cfg: CN) -> None:
    """Add every key of fewshot_d2 to a detectron2 config, in place."""
    from .systems import add_system_configs

    cfg.FEWSHOT = CN()
    _add_episodes(cfg.FEWSHOT)
    _add_self_paced(cfg.FEWSHOT)
    _add_retrieval(cfg.FEWSHOT)
    _add_support(cfg.FEWSHOT)
    add_patch_config(cfg.FEWSHOT)
    add_data_config(cfg.FEWSHOT)
    _add_pretraining(cfg.FEWSHOT)
    _add_evaluation(cfg.FEWSHOT)
    _add_benchmark(cfg.FEWSHOT)
    _add_fine_tuning(cfg.FEWSHOT)
    _add_backbones(cfg)
    add_classification_config(cfg)
    _add_solver(cfg)
    add_system_configs(cfg)


def load_config(config_file: str, overrides: Sequence[Any] = ()) -> CN:
    """Config of a YAML with our keys; CUDA falls back to the CPU where there is none."""
    cfg = get_cfg()
    add_fewshot_config(cfg)
    if config_file:
        cfg.merge_from_file(config_file)
    cfg.merge_from_list(list(overrides))
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        logger.warning("No CUDA device: MODEL.DEVICE is cpu")
        cfg.MODEL.DEVICE = "cpu"
        if cfg.SOLVER.AMP.ENABLED:
            logger.warning("Mixed precision needs CUDA: SOLVER.AMP.ENABLED is False")
            cfg.SOLVER.AMP.ENABLED = False
    check_config(cfg)
    return cfg


def check_config(cfg: CN) -> None:
    """Refuse values that would only fail, or do nothing, after hours.

    Raises:
        ValueError: names the key, what it must be and what it is.
    """
    test = cfg.FEWSHOT.TEST
    for key, values, allowed in (
        ("FEWSHOT.TEST.SIDES", test.SIDES, ("novel", "base", "all")),
        ("FEWSHOT.TEST.BASELINES", test.BASELINES, ("gt_shift", "detection_shift")),
        ("FEWSHOT.TEST.PROTOCOL", (test.PROTOCOL,), PROTOCOLS),
        ("FEWSHOT.BENCHMARK.SUPPORTS", (cfg.FEWSHOT.BENCHMARK.SUPPORTS,), SUPPORT_UNITS),
        ("FEWSHOT.RETRIEVAL.REGIONS", (cfg.FEWSHOT.RETRIEVAL.REGIONS,), REGION_SOURCES),
        ("FEWSHOT.TRAIN_ON", (cfg.FEWSHOT.TRAIN_ON,), TRAINED_ON),
        ("FEWSHOT.PRETRAIN.TASK", (cfg.FEWSHOT.PRETRAIN.TASK,), ("pairs", "objects")),
        ("MODEL.FPN.TOP_BLOCK", (cfg.MODEL.FPN.TOP_BLOCK,), ("maxpool", "conv")),
        ("FEWSHOT.RESIZE_RULE", (cfg.FEWSHOT.RESIZE_RULE,), RESIZE_RULES),
        ("INPUT.RANDOM_FLIP", (cfg.INPUT.RANDOM_FLIP,), ("none", "horizontal")),
        ("SOLVER.CLIP_GRADIENTS.ENABLED", (cfg.SOLVER.CLIP_GRADIENTS.ENABLED,), (False,)),
        ("INPUT.CROP.ENABLED", (cfg.INPUT.CROP.ENABLED,), (False,)),
        ("TEST.PRECISE_BN.ENABLED", (cfg.TEST.PRECISE_BN.ENABLED,), (False,)),
        ("SOLVER.BIAS_LR_FACTOR", (cfg.SOLVER.BIAS_LR_FACTOR,), (1.0, None)),
        ("SOLVER.WEIGHT_DECAY_BIAS", (cfg.SOLVER.WEIGHT_DECAY_BIAS,), (None,)),
    ):
        wrong = [value for value in values if value not in allowed]
        if wrong:
            raise ValueError(f"{key} must be of {allowed}, got {wrong[0]!r}")
    SupportAugmentation.from_cfg(cfg)
    check_patch_config(cfg.FEWSHOT)
    check_data_config(cfg)
    pretrain = cfg.FEWSHOT.PRETRAIN
    least_of = {
        "MAX_ITER": 0,
        "NUM_CLASSES": 2,
        "IMS_PER_BATCH": 1,
        "BASE_LR": 0,
        "TEMPERATURE": 1e-4,
    }
    for key, least in least_of.items():
        if pretrain[key] < least:
            raise ValueError(
                f"FEWSHOT.PRETRAIN.{key} must be at least {least}, got {pretrain[key]}"
            )
    if cfg.FEWSHOT.SUPPORT.SIZE % 32:
        raise ValueError(
            f"FEWSHOT.SUPPORT.SIZE must be a multiple of 32, got {cfg.FEWSHOT.SUPPORT.SIZE}"
        )


def _add_episodes(node: CN) -> None:
    # Data sets of one's own, each [name, json file, image folder]; relative paths are below
    # DETECTRON2_DATASETS. COCO and LVIS layouts; the names then go into DATASETS.TRAIN / TEST.
    node.REGISTER = []
    # Which classes are novel: "all" (none), "every_4th:i", "part:i/n", "novel:dog,cat,17" or "file:split.json".
    node.SPLIT = "all"
    # Leave images with a novel object out of training; otherwise it is background there.
    node.EXCLUDE_NOVEL_IMAGES = False
    # "episodes"; "tuples": NUM_SHOTS images and a query of one class (SILCO).
    # "base_images": the base classes as a closed set, without supports (RepMet), then
    # MODEL.ROI_HEADS.NUM_CLASSES is their number, and an epoch has IMAGES_PER_CLASS (0 = all images); "rank_lists":
    # what a search found for queries (SPIL), see SELF_PACED.
    node.TRAIN_ON = "episodes"
    node.IMAGES_PER_CLASS = 0
    # Classes of a training episode that occur in the query (fewer if the image has fewer) ...
    node.NUM_WAYS = 1
    # ... and classes that do not; 0 in the paper. More teach the detector to abstain.
    node.NUM_ABSENT_WAYS = 0
    # Support examples a class in training.
    node.NUM_SHOTS = 1
    # Name in EPISODIC_MAPPER_REGISTRY; "SuperpixelMapper" for co-attention, "PatchMapper" for patches.
    node.MAPPER = "EpisodicDatasetMapper"
    node.SUPERPIXELS = CN()
    # Where they are kept for good (below DETECTRON2_DATASETS if relative), and pixels of the shorter side that they
    # are computed on.
    node.SUPERPIXELS.FOLDER = "superpixels"
    node.SUPERPIXELS.SHORT_SIDE = 300
    # Parameters of Felzenszwalb's method (SPIL spec B3, item 27).
    node.SUPERPIXELS.SCALE = 100.0
    node.SUPERPIXELS.SIGMA = 0.5
    node.SUPERPIXELS.MIN_SIZE = 50
    # "paper": long side to INPUT.MAX_SIZE_*; "code": the original's min/max rule, which never shrinks to the minimum;
    # "shortest_edge": detectron2's; "stretch": both sides to INPUT.MAX_SIZE_*. Queries and supports.
    node.RESIZE_RULE = "paper"
    # (query, class) pairs that go through the heads at once in inference: bounds the memory.
    node.PAIRS_PER_CHUNK = 4


def _add_self_paced(node: CN) -> None:
    node.SELF_PACED = CN()
    # Rank-list file, of tools/make_rank_lists.py or of any other search. NUM_SHOTS are the positives of a query,
    # NUM_ABSENT_WAYS above 0 turns contrastive training on.
    node.SELF_PACED.RANK_LISTS = ""
    # Pseudo labels of the stage; set by the engine, empty = stage 0.
    node.SELF_PACED.LABELS = ""
    # Probability above which a found box is learned from in stage 1, 2, ... (paper: 0.99 - 0.1 (k - 1)); there is one
    # stage more, which learns from the queries alone and lasts as SOLVER says.
    node.SELF_PACED.THRESHOLDS = (0.99, 0.89, 0.79)
    # Iterations and steps of the learning rate in stages 1, 2, ...
    node.SELF_PACED.MAX_ITER = 10000
    node.SELF_PACED.STEPS = (7000,)
    # Images that the lists of two queries may share, of the shorter one, if they are to be each other's negatives:
    # finds queries of one instance where labels do not tell them. 1 where they do.
    node.SELF_PACED.MAX_SHARED = 0.05
    # Pixels of the original image that the shorter side of a box must have; candidates' shorter ones are left out.
    node.SELF_PACED.MIN_SIDE = 8.0
    # Boxes an image that are kept: 1 (instance search), or more where a class may occur several times.
    node.SELF_PACED.BOXES_PER_IMAGE = 1


def _add_retrieval(node: CN) -> None:
    # Instance search (SPIL spec B5, after DASR, whose constants are not published): tools/make_rank_lists.py.
    node.RETRIEVAL = CN()
    # "salient": what the backbone responds to, without classes; "proposals": of a GeneralizedRCNN or RepMet;
    # "detections": of the former's heads.
    node.RETRIEVAL.REGIONS = "salient"
    # Proposals or seeds of an image, at most, and the IoU with a better region that drops one. The whole image always
    # is a region.
    node.RETRIEVAL.NUM_REGIONS = 8
    node.RETRIEVAL.NMS_IOU = 0.5
    # Salient: seeds are peaks of the map LAST, whose excitation goes back to the map FINE. There a region is what
    # has at least a THRESHOLD of the maximum, after smoothing (sigma in cells).
    node.RETRIEVAL.LAST = "res5"
    node.RETRIEVAL.FINE = "res2"
    node.RETRIEVAL.THRESHOLDS = (0.2,)
    node.RETRIEVAL.SMOOTHING = 1.0
    # Maps whose mean over a region describes it; of several, the cosines are averaged.
    node.RETRIEVAL.LAYERS = ("res4",)
    # Power of that mean: 1, or more for the generalised mean of the positive part (GeM: 3).
    node.RETRIEVAL.POWER = 1.0
    # Longer side of regions that are cut out and described alone (OS2D: 240); 0 = by the maps of the whole image.
    node.RETRIEVAL.CROP_SIZE = 0
    # Of RetrievalDetector: meta-architecture that it detects with, and weights of one that was trained before.
    node.RETRIEVAL.DETECTOR = "GeneralizedRCNN"
    node.RETRIEVAL.DETECTOR_WEIGHTS = ""
    # Images in a rank list (paper: 128).
    node.RETRIEVAL.DEPTH = 128
    # "exact", or a factory string of faiss ("Flat", "IVF4096,PQ64"; extra "faiss"), whose inverted files look into
    # so many cells.
    node.RETRIEVAL.INDEX = "exact"
    node.RETRIEVAL.NUM_PROBES = 16


def _add_support(node: CN) -> None:
    node.SUPPORT = CN()
    # Where supports are drawn from; empty: from the data set of the queries.
    node.SUPPORT.DATASET_TRAIN = ""
    # One a name in DATASETS.TEST, or empty for all.
    node.SUPPORT.DATASETS_TEST = ()
    # "crop": the mapper cuts the example out; "image": whole image with its box; "whole": without any box, resized as
    # a query and not flipped with it (SILCO).
    node.SUPPORT.FORM = "crop"
    # Side of the support canvas in pixels, and the short side of the rules that have a minimum.
    node.SUPPORT.SIZE = 192
    node.SUPPORT.MIN_SIZE = 150
    # Pixels around the box in a square window that fills the canvas (SPIL: 16); -1 = the box alone, in its own shape.
    node.SUPPORT.CONTEXT = -1
    # Box of the example: "annotation", or "mask" = tight box of its mask (original code).
    node.SUPPORT.BOX = "annotation"
    # In testing, examples turned by these angles (of 90, 180, 270, counter-clockwise) and mirrored are shots too.
    node.SUPPORT.ROTATIONS = ()
    node.SUPPORT.MIRROR = False
    # In training, never draw a support out of the query image while another image has the class.
    # Evaluation plans never do.
    node.SUPPORT.EXCLUDE_QUERY = True


def _add_pretraining(node: CN) -> None:
    node.PRETRAIN = CN()
    # Steps with base classes before the first episode, without MODEL.WEIGHTS; 0 = none (paper: a backbone trained on
    # ImageNet without COCO's classes). AdamW with a cosine.
    node.PRETRAIN.MAX_ITER = 0
    # "pairs": contrast between crops. "objects": classification of objects' cells and background's, on every map.
    node.PRETRAIN.TASK = "pairs"
    # Classes that a process compares in a step, two crops of each.
    node.PRETRAIN.NUM_CLASSES = 64
    # Images of a step, in all processes, for objects.
    node.PRETRAIN.IMS_PER_BATCH = 24
    node.PRETRAIN.BASE_LR = 0.002
    # Divides the cosine similarities.
    node.PRETRAIN.TEMPERATURE = 0.1


def _add_evaluation(node: CN) -> None:
    node.TEST = CN()
    # Plan files to evaluate; empty: plans are made from the keys below and saved in OUTPUT_DIR/plans.
    node.TEST.PLANS = ()
    # "present": classes in the image only (paper). "open": all classes of the side in every image.
    # "single_target": cluttered Omniglot's own references, with mask IoU. "episodes": FEWSHOT.BENCHMARK.
    node.TEST.PROTOCOL = "present"
    # Sides of the split that are evaluated, of "novel", "base", "all".
    node.TEST.SIDES = ("novel", "base")
    node.TEST.NUM_SHOTS = 1
    # Draw the supports of a run once for all its queries, out of another data set (SUPPORT.DATASETS_TEST).
    node.TEST.FIXED_SUPPORTS = False
    # Open: whether images are searched that hold classes of other sides alone; those without any class always are.
    node.TEST.FOREIGN_IMAGES = True
    # Support draws; mean and 95 % interval are over these.
    node.TEST.NUM_RUNS = 5
    node.TEST.SEED = 0
    # Query images a plan has at most, chosen by the seed; 0 = all.
    node.TEST.MAX_IMAGES = 0
    # Score at which a detection counts as a false positive in the open protocol.
    node.TEST.PRESENCE_THRESHOLD = 0.5
    # Report VOC's average precision of boxes too, and whether a box's last row and column count as its own (+ 1).
    node.TEST.VOC = False
    node.TEST.VOC_PIXEL = True
    # Of "gt_shift", "detection_shift".
    node.TEST.BASELINES = ("gt_shift",)


def _add_benchmark(node: CN) -> None:
    node.BENCHMARK = CN()
    # Plan files of episodes; empty: plans are made from the keys below and saved in OUTPUT_DIR/plans.
    node.BENCHMARK.PLANS = ()
    # Classes an episode (m-way), examples a class (n-shot, a plan each), query images a class, episodes.
    node.BENCHMARK.WAYS = 5
    node.BENCHMARK.SHOTS = (1, 5, 10)
    node.BENCHMARK.QUERIES_PER_CLASS = 10
    node.BENCHMARK.EPISODES = 500
    # The original's.
    node.BENCHMARK.SEED = 9001
    # Shots are "boxes" (RepMet), or "images" in tuples: WAYS and QUERIES_PER_CLASS are 1 (SILCO).
    node.BENCHMARK.SUPPORTS = "boxes"
    # Boxes are compared in whole pixels of a square of this side (SILCO: 300); 0 = in pixels of the query.
    node.BENCHMARK.SQUARE = 0
    # Described queries that are kept for later episodes: bounds the memory. Of the order of 8 MB each for a large
    # model with 2000 proposals.
    node.BENCHMARK.KEPT_QUERIES = 1000
    # Episodes of each run that are drawn.
    node.BENCHMARK.PICTURES = 3
    # Each plan is run once for each of these: without and with fine-tuning on the episode's supports.
    node.BENCHMARK.FINE_TUNE = (False, True)


def _add_fine_tuning(node: CN) -> None:
    node.FINETUNE = CN()
    # "last_layer" of the embedding (paper), "head" (box head and predictor) or "all".
    node.FINETUNE.LAYERS = "last_layer"
    # SGD over the support pictures, one a step, ...
    node.FINETUNE.EPOCHS = 5
    node.FINETUNE.BASE_LR = 0.0005
    # ... at a constant rate.
    node.FINETUNE.MOMENTUM = 0.9
    node.FINETUNE.WEIGHT_DECAY = 0.0001


def _add_backbones(cfg: CN) -> None:
    # ReLU after the lateral and the output convolutions of the FPN, as the original code has it.
    cfg.MODEL.FPN.RELU = False
    # How the last level is made: "maxpool" of the one below, or "conv" of the bottom-up's last map (RepMet).
    cfg.MODEL.FPN.TOP_BLOCK = "maxpool"

    cfg.MODEL.DEFORMABLE = CN()
    # Blocks of the ResNet whose 3x3 convolution is deformable: "stage:all", "stage:last" or "stage:number" from 0.
    cfg.MODEL.DEFORMABLE.BLOCKS = ("res3:last", "res4:last", "res5:all")
    # Groups of channels with offsets of their own.
    cfg.MODEL.DEFORMABLE.GROUPS = 4

    cfg.MODEL.TORCHVISION = CN()
    # Any classification model of torchvision.models, its state dict (a local file or ""), ...
    cfg.MODEL.TORCHVISION.NAME = "mobilenet_v2"
    cfg.MODEL.TORCHVISION.WEIGHTS = ""
    # ... "BN" or "FrozenBN", and TensorFlow's padding (0 left/top, 1 right/bottom) of strided convolutions.
    cfg.MODEL.TORCHVISION.NORM = "FrozenBN"
    cfg.MODEL.TORCHVISION.TF_PADDING = False
    # Maps of build_torchvision_backbone, which has no FPN. BACKBONE.FREEZE_AT counts as in detectron2.
    cfg.MODEL.TORCHVISION.OUT_FEATURES = ("res4",)
    # Memory layout of weights and maps, on a CPU alone, where it is about twice as fast.
    cfg.MODEL.TORCHVISION.CHANNELS_LAST = False

    cfg.MODEL.TIMM = CN()
    # Any timm model that has features_only; needs the extra "timm".
    cfg.MODEL.TIMM.NAME = "resnet18"
    cfg.MODEL.TIMM.WEIGHTS = ""
    cfg.MODEL.TIMM.NORM = "FrozenBN"


def _add_solver(cfg: CN) -> None:
    # "SGD" or "ADAMW".
    cfg.SOLVER.OPTIMIZER = "SGD"
    # Learning rate of backbone.bottom_up, and of the layers of TorchvisionHead, relative to BASE_LR.
    cfg.SOLVER.BACKBONE_MULTIPLIER = 1.0
    # Iterations in which they keep their weights (paper 5.1: 1000).
    cfg.SOLVER.HEADS_ONLY_ITERS = 0
    # Clip the L2 norm over all gradients together; 0 = off. The original: 5.
    cfg.SOLVER.CLIP_GLOBAL_NORM = 0.0
