"""Every YAML is built at its real size, trained one step and run, on small images."""

from pathlib import Path

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from factories import ROOT, random_query, random_support_set

from fewshot_d2 import add_fewshot_config, load_config
from fewshot_d2.engine.solver import build_optimizer

# Classifiers and searches are no detectors; test_dml_classifier.py and test_region_search.py run theirs.
CONFIGS = sorted(
    p
    for p in (ROOT / "configs").rglob("*.yaml")
    if not p.name.startswith("Base") and p.parent.name not in ("dml", "retrieval")
)
# Weights are no part of the checkout, and without them the gradients of a deep network with frozen norms are huge;
# proposals and detections are fewer to save time.
SMALL = [
    *("MODEL.DEVICE", "cpu", "MODEL.TORCHVISION.WEIGHTS", "", "MODEL.TIMM.WEIGHTS", ""),
    *("SOLVER.CLIP_GLOBAL_NORM", 1.0, "INPUT.MIN_SIZE_TEST", 64, "INPUT.MAX_SIZE_TEST", 64),
    *("MODEL.RPN.POST_NMS_TOPK_TRAIN", 20, "MODEL.RPN.POST_NMS_TOPK_TEST", 20),
    *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 20, "TEST.DETECTIONS_PER_IMAGE", 5),
    # Objects are much smaller than OS2D's anchors, and random features all alike.
    *("MODEL.OS2D.IMAGE_SIZE", 64, "MODEL.OS2D.IOU_THRESHOLDS", (0.001, 0.0001)),
    *("MODEL.OS2D.REMAP_THRESHOLDS", (0.001, 0.0001), "MODEL.OS2D.MARGINS", (1.0, 0.5)),
]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_config_trains_and_runs(path: Path, rng):
    cfg = load_config(str(path), SMALL)
    cfg.FEWSHOT.SUPPORT.SIZE = min(cfg.FEWSHOT.SUPPORT.SIZE, 64)
    torch.manual_seed(0)
    model = build_model(cfg).train()
    optimizer = build_optimizer(cfg, model)
    before = [p.detach().clone() for p in model.parameters()]
    query = random_query(rng, random_support_set(rng))
    is_closed_set = cfg.FEWSHOT.TRAIN_ON == "base_images"
    trained = {k: v for k, v in query.items() if k != "support" or not is_closed_set}
    with EventStorage(0):
        losses = model([trained])
    sum(losses.values()).backward()
    assert losses and all(name.startswith("loss_") for name in losses)
    assert all(torch.isfinite(loss) for loss in losses.values())
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients and all(torch.isfinite(g).all() for g in gradients)
    optimizer.step()
    moved = [not torch.equal(old, p) for old, p in zip(before, model.parameters(), strict=True)]
    assert any(moved) and all(torch.isfinite(p).all() for p in model.parameters())
    with torch.no_grad():
        instances = model.eval()([query])[0]["instances"]
    assert instances.image_size == (64, 64)
    assert {"pred_boxes", "scores", "pred_classes"} <= set(instances.get_fields())
    assert instances.has("pred_masks") == cfg.MODEL.MASK_ON


def test_there_are_configs():
    names = {path.stem for path in CONFIGS}
    for split in range(1, 5):
        assert {f"R_50_coco_s{split}", f"R_50_coco_s{split}_5shot", f"coco482_s{split}"} <= names


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("FEWSHOT.TEST.SIDES", ("novle",)),
        ("FEWSHOT.TEST.BASELINES", ("random",)),
        ("FEWSHOT.TEST.PROTOCOL", "closed"),
        ("FEWSHOT.RESIZE_RULE", "papr"),
        ("INPUT.RANDOM_FLIP", "vertical"),
        ("SOLVER.CLIP_GRADIENTS.ENABLED", True),
        ("TEST.PRECISE_BN.ENABLED", True),
        ("SOLVER.BIAS_LR_FACTOR", 2.0),
        ("SOLVER.WEIGHT_DECAY_BIAS", 0.1),
        ("FEWSHOT.SUPPORT.SIZE", 100),
        ("FEWSHOT.PRETRAIN.MAX_ITER", -1),
        ("FEWSHOT.PRETRAIN.NUM_CLASSES", 1),
        ("FEWSHOT.PRETRAIN.TEMPERATURE", -0.1),
        ("FEWSHOT.PRETRAIN.IMS_PER_BATCH", 0),
        ("FEWSHOT.PRETRAIN.TASK", "crops"),
        # Without novel classes.
        ("FEWSHOT.EXCLUDE_NOVEL_IMAGES", True),
    ],
)
def test_values_that_would_fail_late_or_do_nothing_are_refused(key, value):
    with pytest.raises(ValueError, match=key):
        load_config("", [key, value])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_data_sets_of_a_config_are_registered(path: Path):
    cfg = load_config(str(path))
    own = {row[0] for row in cfg.FEWSHOT.REGISTER}
    names = {*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST, *cfg.FEWSHOT.SUPPORT.DATASETS_TEST}
    names |= {cfg.FEWSHOT.SUPPORT.DATASET_TRAIN} - {""}
    assert names <= own | set(DatasetCatalog.list())
    # Rank lists name their data sets themselves.
    assert names or cfg.FEWSHOT.TRAIN_ON == "rank_lists"


def test_unknown_key_fails(tmp_path):
    path = tmp_path / "typo.yaml"
    path.write_text("FEWSHOT:\n  NUM_WAY: 2\n")
    cfg = get_cfg()
    add_fewshot_config(cfg)
    with pytest.raises(KeyError, match="NUM_WAY"):
        cfg.merge_from_file(str(path))
