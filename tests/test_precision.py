"""Every system finds on a GPU and in half precision what it finds on a CPU in full; its gradients fit float16."""

import numpy as np
import pytest
import torch
from detectron2.structures import pairwise_iou
from detectron2.utils.events import EventStorage
from factories import random_query, random_support_set
from inference_cases import noise_picture, small_config, system_configs
from torch import nn

from fewshot_d2 import FewShotPredictor

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
# Retrieval looks where the features are strong, so with other digits elsewhere.
SYSTEMS = sorted({*system_configs()} - {"RetrievalDetector"})


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize(
    ("device", "precision"),
    [
        ("cpu", "bf16"),
        pytest.param("cuda", "fp32", marks=needs_cuda),
        pytest.param("cuda", "bf16", marks=needs_cuda),
        pytest.param("cuda", "amp", marks=needs_cuda),
    ],
)
def test_finds_what_a_cpu_finds_in_full_precision(system, device, precision, rng):
    cfg = small_config(system)
    # All candidates: near a tie, which of them is kept is chance.
    cfg.merge_from_list(
        [
            *("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0, "MODEL.ROI_HEADS.NMS_THRESH_TEST", 1.0),
            *("MODEL.RPN.NMS_THRESH", 1.0, "TEST.DETECTIONS_PER_IMAGE", 10000),
            *("MODEL.RPN.PRE_NMS_TOPK_TEST", 5000, "MODEL.RPN.POST_NMS_TOPK_TEST", 5000),
            *("INPUT.MIN_SIZE_TEST", 32, "INPUT.MAX_SIZE_TEST", 32),
            *("MODEL.SILCO.PRE_NMS_TOPK", 10000, "MODEL.SILCO.NMS_IOU", 1.0),
            *("MODEL.OS2D.PRE_NMS_TOPK", 0, "MODEL.OS2D.NMS_IOU", 1.0),
            *("MODEL.OS2D.IMAGE_SIZE", 128, "MODEL.OS2D.PYRAMID", (1.0,)),
        ]
    )
    support_set, image = random_support_set(rng), np.asarray(noise_picture((24, 32)))
    reference = FewShotPredictor(cfg)
    keep_sizes(reference, support_set, image)
    predictor = FewShotPredictor(cfg, device=device, precision=precision)
    predictor.model.load_state_dict(reference.model.state_dict())
    found = []
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for finder in (reference, predictor):
            finder.set_support(support_set)
            found.append(finder.predict(image))
    full, half = found
    overlaps = pairwise_iou(full.pred_boxes, half.pred_boxes)
    overlaps[full.pred_classes[:, None] != half.pred_classes] = 0
    # Boxes that end at the border of the image are alike: of those the one whose score is.
    differences = (full.scores[:, None] - half.scores).abs()
    difference = differences.masked_fill(overlaps <= 0.95, torch.inf).amin(dim=1)
    assert half.scores.dtype == half.pred_boxes.tensor.dtype == torch.float32
    assert len(full) == len(half) > 20
    assert full.scores.std() > 0.005, "scores that are all alike would show nothing"
    largest, mean = (0.01, 0.001) if precision == "fp32" else (0.1, 0.02)
    assert difference.max() <= largest and difference.mean() <= mean
    assert difference.max() > 0 or precision == "fp32", "half precision must make a difference"


def keep_sizes(predictor, support_set, image):
    """Random weights such that each layer's output is of size 1, and boxes stay where the anchors are."""
    torch.manual_seed(0)
    hooks = []

    def rescale(layer, _, output):
        size = output.std().clamp(min=1e-6) if output.numel() > 1 else 1.0
        layer.weight.data /= size
        return output / size

    for name, module in predictor.model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.normal_(module.weight)
            if name.endswith(("anchor_deltas", "bbox_pred")) or "regression_head" in name:
                nn.init.zeros_(module.weight)
            else:
                hooks.append(module.register_forward_hook(rescale))
    predictor.set_support(support_set)
    predictor.predict(image)
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])
def test_gradients_fit_float16(system, device, rng):
    """Scaled as GradScaler does it after some steps."""
    scale = 64.0
    predictor = FewShotPredictor(small_config(system), device=device)
    keep_sizes(predictor, random_support_set(rng), np.asarray(noise_picture((64, 64))))
    model = predictor.model.train()
    query = random_query(rng, random_support_set(rng))
    if predictor.cfg.FEWSHOT.TRAIN_ON == "base_images":
        del query["support"]
    with EventStorage(0), torch.autocast(device, torch.float16):
        losses = model([query])
    (scale * sum(losses.values())).backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    assert any(gradient.any() for gradient in gradients)
