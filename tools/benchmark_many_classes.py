"""Cost of searching k classes in one image, relative to one class, and whether the results are equal.

Random weights: with a score threshold of 0 every pair yields DETECTIONS_PER_IMAGE boxes with masks, the worst case.
"""

import argparse
import time

import torch
from detectron2.modeling import build_model
from torch import nn

from fewshot_d2 import Support, SupportSet, load_config


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config-file", default="configs/siamese_mask_rcnn/R_50_coco_s1.yaml")
    parser.add_argument("--size", type=int, nargs=2, default=(1024, 1024), metavar=("H", "W"))
    parser.add_argument("--classes", type=int, nargs="+", default=(1, 2, 5, 10))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config overrides")
    return parser.parse_args()


def make_query(height: int, width: int, features) -> dict:
    """A random query with encoded supports."""
    image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
    return {"image": image, "height": height, "width": width, "support_features": features}


@torch.no_grad()
def calibrated(model: nn.Module) -> nn.Module:
    """Set batch-norm statistics from noise: activations of a random ResNet would explode, and no proposal survive."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    model.backbone.train()
    model.backbone(60 * torch.randn(1, 3, 256, 256))
    return model.eval()


@torch.no_grad()
def main() -> None:
    """Print seconds and ratios, then the largest difference to one class at a time."""
    args = parse()
    torch.manual_seed(0)
    overrides = ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0, "MODEL.RESNETS.NORM", "BN", *args.opts]
    cfg = load_config(args.config_file, overrides)
    model = calibrated(build_model(cfg))
    most = max(args.classes)
    shots = [[Support(torch.randint(0, 256, (3, 100, 80), dtype=torch.uint8))] for _ in range(most)]
    features = model.encode_support(
        [SupportSet(list(range(most)), [str(k) for k in range(most)], shots)]
    )
    query = make_query(*args.size, features)
    seconds = {k: [] for k in args.classes}
    model([query | {"support_features": features[[0]]}])
    # Rounds, not blocks: slow spells of the machine then hit every number of classes alike.
    for _ in range(args.repeats):
        for k in args.classes:
            start = time.perf_counter()
            model([query | {"support_features": features[range(k)]}])
            seconds[k].append(time.perf_counter() - start)
    print(
        f"{torch.get_num_threads()} threads, {args.size[0]}x{args.size[1]}, best of {args.repeats}"
    )
    one = min(seconds[args.classes[0]])
    for k in args.classes:
        best = min(seconds[k])
        print(
            f"{k:3d} classes {best:8.2f} s  ratio {best / one:5.2f}  bound {1 + 0.6 * (k - 1):5.2f}"
        )
    compare(model, query, features)


def compare(model, query: dict, features) -> None:
    """Print how far all classes together are from one class at a time."""
    together = model([query])[0]["instances"]
    scores = boxes = 0.0
    for k in range(len(features)):
        alone = model([query | {"support_features": features[[k]]}])[0]["instances"]
        of_class = together[together.pred_classes == k]
        assert len(alone) == len(of_class), "the number of detections must not change"
        scores = max(scores, (of_class.scores - alone.scores).abs().max().item())
        boxes = max(
            boxes, (of_class.pred_boxes.tensor - alone.pred_boxes.tensor).abs().max().item()
        )
    print(f"largest difference to one class at a time: scores {scores:.1e}, boxes {boxes:.1e} px")


if __name__ == "__main__":
    main()
