"""Small models, supports and batches for tests."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances
from PIL import Image
from torch import nn

from fewshot_d2 import Support, SupportSet, load_config
from fewshot_d2.data.coco_json import register_instances

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "configs/siamese_mask_rcnn/scenes_glyphs.yaml"
# Ids with holes; 11 is novel under "novel:b".
CATEGORIES = {5: "a", 11: "b", 12: "c", 90: "d"}
# Narrow layers: fast to build and to run, the same code.
TINY_OVERRIDES = [
    *("MODEL.FPN.OUT_CHANNELS", 8, "MODEL.MATCH.CHANNELS", 12, "MODEL.RPN.CONV_DIMS", [8]),
    *("MODEL.ROI_BOX_HEAD.FC_DIM", 16, "MODEL.ROI_MASK_HEAD.CONV_DIM", 8),
    *("INPUT.MAX_SIZE_TRAIN", 64, "INPUT.MAX_SIZE_TEST", 64, "FEWSHOT.SUPPORT.SIZE", 32),
    *("MODEL.DEVICE", "cpu", "DATALOADER.NUM_WORKERS", 0, "FEWSHOT.NUM_WAYS", 1),
    *("FEWSHOT.PRETRAIN.MAX_ITER", 0, "MODEL.RESNETS.NORM", "BN"),
]


def tiny_config(*overrides: object) -> CfgNode:
    """The demo's config with narrow layers and 64-pixel images."""
    return load_config(str(TINY), [*TINY_OVERRIDES, *overrides])


def tiny_model(*overrides: object, seed: int = 0) -> nn.Module:
    """A seeded random model in inference mode."""
    torch.manual_seed(seed)
    return build_model(tiny_config(*overrides)).eval()


# The same for RepMet; two base classes, as many as a random query has.
TINY_REPMET = ROOT / "configs/repmet/omniglot.yaml"
TINY_REPMET_OVERRIDES = [
    *("MODEL.FPN.OUT_CHANNELS", 8, "MODEL.RPN.CONV_DIMS", [8], "MODEL.ROI_BOX_HEAD.FC_DIM", 16),
    *(
        "MODEL.REPMET.EMBEDDING_DIM",
        6,
        "MODEL.REPMET.NUM_MODES",
        3,
        "MODEL.ROI_HEADS.NUM_CLASSES",
        2,
    ),
    *("MODEL.RPN.POST_NMS_TOPK_TRAIN", 20, "MODEL.RPN.POST_NMS_TOPK_TEST", 20),
    *("MODEL.REPMET.HARD_ROIS", 12, "INPUT.MAX_SIZE_TRAIN", 64, "INPUT.MAX_SIZE_TEST", 64),
    *("MODEL.DEVICE", "cpu", "DATALOADER.NUM_WORKERS", 0, "FEWSHOT.PRETRAIN.MAX_ITER", 0),
]


def tiny_repmet(*overrides: object, seed: int = 0) -> nn.Module:
    """A seeded random RepMet in inference mode."""
    torch.manual_seed(seed)
    cfg = load_config(str(TINY_REPMET), [*TINY_REPMET_OVERRIDES, *overrides])
    model = build_model(cfg).eval()
    # Scores of a new embedding are all alike; a larger one makes comparisons mean something.
    if isinstance(model.predictor.embedding, nn.Linear):
        nn.init.normal_(model.predictor.embedding.weight)
    return model


# SPIL on a small untrained trunk.
TINY_SPIL = ROOT / "configs/spil/flickrlogos27.yaml"
TINY_SPIL_OVERRIDES = [
    *("MODEL.TORCHVISION.WEIGHTS", "", "MODEL.DEVICE", "cpu", "DATALOADER.NUM_WORKERS", 0),
    # No kernel depends on others.
    *("MODEL.SPIL.KERNEL_NORM", "none"),
    *("MODEL.RPN.CONV_DIMS", [8], "MODEL.ROI_BOX_HEAD.FC_DIM", 16),
    *("MODEL.ROI_MASK_HEAD.CONV_DIM", 8, "MODEL.ANCHOR_GENERATOR.SIZES", [[16, 32]]),
    *("MODEL.RPN.POST_NMS_TOPK_TRAIN", 20, "MODEL.RPN.POST_NMS_TOPK_TEST", 10),
    *("INPUT.MIN_SIZE_TRAIN", (64,), "INPUT.MAX_SIZE_TRAIN", 64, "FEWSHOT.SUPPORT.SIZE", 32),
    *("INPUT.MIN_SIZE_TEST", 64, "INPUT.MAX_SIZE_TEST", 64, "FEWSHOT.SUPPORT.CONTEXT", 2),
]


def tiny_spil(*overrides: object, seed: int = 0) -> nn.Module:
    """A seeded random SPIL in training mode."""
    torch.manual_seed(seed)
    return build_model(load_config(str(TINY_SPIL), [*TINY_SPIL_OVERRIDES, *overrides])).train()


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
    cells = torch.arange(side) // 8
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
        # Squares of eight pixels.
        "superpixels": (cells[:, None] * side + cells).contiguous(),
        "support": support,
    }


@contextlib.contextmanager
def registered_set(name: str, folder: Path) -> Iterator[Path]:
    """Give the json and pictures of ``folder`` a name for as long as the context lasts."""
    register_instances(name, str(folder / "instances.json"), str(folder))
    try:
        yield folder
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def write_set(folder: Path, num_images: int = 12, seed: int = 0) -> None:
    """Pictures of 60x40 pixels; images 0 and 1 are empty or hold a crowd only."""
    rng = np.random.default_rng(seed)
    images, annotations = [], []
    for i in range(num_images):
        Image.fromarray(rng.integers(0, 255, (40, 60, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        images.append({"id": 100 + i, "file_name": f"{i}.png", "height": 40, "width": 60})
        for _ in range(0 if i == 0 else 4):
            x, y = int(rng.integers(0, 30)), int(rng.integers(0, 20))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": 100 + i,
                    "category_id": int(rng.choice(list(CATEGORIES))),
                    "bbox": [x, y, 20, 15],
                    "segmentation": [[x, y, x + 20, y, x + 20, y + 15, x, y + 15]],
                    "area": 300,
                    "iscrowd": int(i == 1),
                }
            )
    categories = [{"id": c, "name": name} for c, name in CATEGORIES.items()]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "instances.json").write_text(json.dumps(content))


def set_fixture(name: str, **options: Any) -> Any:
    """A fixture: a folder with a set of ``write_set``, which has a name for as long as a test lasts."""

    @pytest.fixture
    def folder(tmp_path: Path) -> Iterator[Path]:
        write_set(tmp_path, **options)
        with registered_set(name, tmp_path):
            yield tmp_path

    return folder
