"""Every YAML is built at its real size, trained one step and run, on small images."""

from pathlib import Path

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from factories import ROOT, random_query, random_support_set

from fewshot_d2 import add_fewshot_config, load_config

CONFIGS = sorted(p for p in (ROOT / "configs").rglob("*.yaml") if not p.name.startswith("Base"))
# Weights are no part of the checkout; proposals and detections are fewer to save time.
SMALL = [
    *("MODEL.DEVICE", "cpu", "MODEL.TORCHVISION.WEIGHTS", "", "MODEL.TIMM.WEIGHTS", ""),
    *("MODEL.RPN.POST_NMS_TOPK_TRAIN", 20, "MODEL.RPN.POST_NMS_TOPK_TEST", 20),
    *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 20, "TEST.DETECTIONS_PER_IMAGE", 5),
]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_config_trains_and_runs(path: Path, rng):
    cfg = load_config(str(path), SMALL)
    cfg.FEWSHOT.SUPPORT.SIZE = min(cfg.FEWSHOT.SUPPORT.SIZE, 64)
    torch.manual_seed(0)
    model = build_model(cfg).train()
    query = random_query(rng, random_support_set(rng))
    with EventStorage(0):
        losses = model([query])
    sum(losses.values()).backward()
    assert losses and all(name.startswith("loss_") for name in losses)
    assert all(torch.isfinite(loss) for loss in losses.values())
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients and all(torch.isfinite(g).all() for g in gradients)
    with torch.no_grad():
        instances = model.eval()([query])[0]["instances"]
    assert instances.image_size == (64, 64)
    assert {"pred_boxes", "scores", "pred_classes"} <= set(instances.get_fields())
    assert instances.has("pred_masks") == cfg.MODEL.MASK_ON


def test_there_are_configs():
    names = {path.stem for path in CONFIGS}
    for split in range(1, 5):
        assert {f"R_50_coco_s{split}", f"R_50_coco_s{split}_5shot", f"coco482_s{split}"} <= names


def test_unknown_key_fails(tmp_path):
    path = tmp_path / "typo.yaml"
    path.write_text("FEWSHOT:\n  NUM_WAY: 2\n")
    cfg = get_cfg()
    add_fewshot_config(cfg)
    with pytest.raises(KeyError, match="NUM_WAY"):
        cfg.merge_from_file(str(path))
