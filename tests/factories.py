"""Small models, supports and batches for tests."""

from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances
from torch import nn

from fewshot_d2 import Support, SupportSet
from fewshot_d2.engine.setup import load_config

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "configs/siamese_mask_rcnn/scenes_glyphs.yaml"
# Narrow layers: fast to build and to run, the same code.
TINY_OVERRIDES = [
    *("MODEL.FPN.OUT_CHANNELS", 8, "MODEL.MATCH.CHANNELS", 12, "MODEL.RPN.CONV_DIMS", [8]),
    *("MODEL.ROI_BOX_HEAD.FC_DIM", 16, "MODEL.ROI_MASK_HEAD.CONV_DIM", 8),
    *("INPUT.MAX_SIZE_TRAIN", 64, "INPUT.MAX_SIZE_TEST", 64, "FEWSHOT.SUPPORT.SIZE", 32),
    *("MODEL.DEVICE", "cpu", "DATALOADER.NUM_WORKERS", 0),
]


def tiny_config(*overrides: object) -> CfgNode:
    """The demo's config with narrow layers and 64-pixel images."""
    return load_config(str(TINY), [*TINY_OVERRIDES, *overrides])


def tiny_model(*overrides: object, seed: int = 0) -> nn.Module:
    """A seeded random model in inference mode."""
    torch.manual_seed(seed)
    return build_model(tiny_config(*overrides)).eval()


def random_support(rng: torch.Generator, size: tuple[int, int] = (30, 24)) -> Support:
    """A random picture as an example."""
    return Support(torch.randint(0, 256, (3, *size), generator=rng, dtype=torch.uint8))


def random_support_set(rng: torch.Generator, ways: int = 2, shots: int = 1) -> SupportSet:
    """K classes with ids 10, 20, ... and S random examples each."""
    return SupportSet(
        class_ids=[10 * (k + 1) for k in range(ways)],
        class_names=[f"class {k}" for k in range(ways)],
        examples=[[random_support(rng) for _ in range(shots)] for _ in range(ways)],
    )


def random_query(rng: torch.Generator, support: SupportSet, *, side: int = 64) -> dict:
    """A query with one rectangular instance for each class of ``support``."""
    ways = len(support)
    corner = torch.randint(2, side // 2, (ways, 2), generator=rng).float()
    boxes = torch.cat([corner, corner + side // 3], dim=1)
    masks = torch.zeros(ways, side, side, dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes.int().tolist(), strict=True):
        mask[y0:y1, x0:x1] = True
    instances = Instances((side, side))
    instances.gt_boxes = Boxes(boxes)
    instances.gt_classes = torch.arange(ways)
    instances.gt_masks = BitMasks(masks)
    return {
        "image": torch.randint(0, 256, (3, side, side), generator=rng, dtype=torch.uint8),
        "height": side,
        "width": side,
        "image_id": 1,
        "file_name": "random.png",
        "episode_id": 0,
        "instances": instances,
        "support": support,
    }
