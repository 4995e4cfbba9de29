"""A SILCO that is built in no time, and tuples that it can learn by heart."""

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from detectron2.structures import Boxes, Instances
from torch import nn

from fewshot_d2 import Support, SupportSet
from fewshot_d2.systems.silco import SILCO, SSDTrunk
from fewshot_d2.systems.silco.detector import Selection
from fewshot_d2.systems.silco.priors import PriorBoxes
from fewshot_d2.systems.silco.reweighting import FeatureReweighting
from fewshot_d2.systems.silco.similarity import SimilarityFusion
from fewshot_d2.transforms import ResizeByRule, SupportCrop

SIDE = 32
COLOURS = torch.tensor([[230, 30, 30], [30, 220, 30], [40, 40, 240], [230, 220, 30]])


class FewConvolutions(Backbone):
    """One map of 8 x 8 cells."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.ReLU()),
            *(nn.Conv2d(16, 24, 3, stride=2, padding=1), nn.ReLU()),
        )
        self._out_features, self._out_feature_channels = ["map"], {"map": 24}
        self._out_feature_strides = {"map": 4}

    def output_shape(self):
        return {"map": ShapeSpec(channels=24, stride=4)}

    def forward(self, images):
        return {"map": self.layers(images)}


def small_silco(scales: int = 2, seed: int = 0) -> SILCO:
    """One or two scales, a GCN of one block, without dropout."""
    torch.manual_seed(seed)
    backbone = SSDTrunk(FewConvolutions(), [(8, 24, 2)][: scales - 1])
    resize = ResizeByRule(max_size=SIDE, min_size=1, rule="stretch")
    fusions = {}
    for name, shape in backbone.output_shape().items():
        weights = FeatureReweighting(shape.channels, blocks=1, width=8, dropout=0.0)
        fusions[name] = SimilarityFusion(
            shape.channels,
            dropout=0.0,
            is_global=False,
            reweighting=weights,
            normalize_weights=False,
        )
    return SILCO(
        backbone=backbone,
        support_crop=SupportCrop(size=32, min_size=1, rule="stretch"),
        input_format="RGB",
        pixel_mean=[127.5] * 3,
        pixel_std=[64.0] * 3,
        pairs_per_chunk=4,
        fusions=fusions,
        priors=PriorBoxes(*([4, 8][:scales], [(10, 14), (14, 20)][:scales], [(2,), (2,)][:scales])),
        resize=resize,
        separate_trunks=False,
        match_iou=0.5,
        negative_ratio=3,
        selection=Selection(0.0, 200, 0.45),
    )


def awake(model: SILCO) -> SILCO:
    """Give the zero layers of a new model weights, without which supports change nothing."""
    with torch.no_grad():
        for fusion in model.fusions.values():
            nn.init.normal_(fusion.out.weight, std=0.5)
            nn.init.normal_(fusion.out.bias)
    return model


def coloured_image(rng: torch.Generator, colours: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise with a square of each colour, one in each half; the picture (uint8) and the boxes."""
    image = torch.randint(90, 160, (3, SIDE, SIDE), generator=rng, dtype=torch.uint8)
    boxes = []
    for half, colour in zip(torch.randperm(2, generator=rng).tolist(), colours, strict=False):
        x, y = (int(torch.randint(2, high, (), generator=rng)) for high in (4, 18))
        x += half * SIDE // 2
        image[:, y : y + 12, x : x + 12] = COLOURS[colour][:, None, None].to(torch.uint8)
        boxes.append([x, y, x + 12, y + 12])
    return image, torch.tensor(boxes, dtype=torch.float32)


def coloured_tuples(rng: torch.Generator) -> list[dict]:
    """Two queries of two colours, each searched for either: only the supports tell which."""
    queries = []
    for colours in ([0, 1], [2, 3]):
        image, boxes = coloured_image(rng, colours)
        for number, colour in enumerate(colours):
            other = (colour + 2) % 4
            shots = [Support(coloured_image(rng, [colour, other])[0]) for _ in range(2)]
            queries.append(
                {
                    "image": image,
                    "height": SIDE,
                    "width": SIDE,
                    "file_name": "coloured.png",
                    "support": SupportSet([colour + 1], [str(colour)], [shots]),
                    "instances": Instances(
                        (SIDE, SIDE),
                        gt_boxes=Boxes(boxes[number : number + 1]),
                        gt_classes=torch.zeros(1, dtype=torch.int64),
                    ),
                }
            )
    return queries
