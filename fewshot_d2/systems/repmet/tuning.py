"""One episode's supports as training data for parts of RepMet (paper 5.2, spec 2.3)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from ...structures import SupportSet
from .supports import SupportImage

if TYPE_CHECKING:
    from .detector import RepMet

LAYERS = ("last_layer", "head", "all")


@dataclass
class LabelledRois:
    """The ROIs of one support picture.

    Attributes:
        proposals (Instances): with ``gt_boxes``, and ``gt_rows`` = class row, or -1 for background.
        inputs (Tensor[R, ...]): what the box head sees, or what it makes of it where it stays as it is.
    """

    proposals: Instances
    inputs: Tensor


class EpisodeTuner:
    """Losses of an episode's support pictures, one picture at a time, and the weights that they may change.

    What those weights cannot change is computed once. Norms and random choices are as in inference throughout.
    """

    def __init__(self, detector: "RepMet", support_set: SupportSet, layers: str):
        """Read the pictures.

        Args:
            detector: in inference mode.
            layers: "last_layer" = the last layer of the embedding, which is the box head's last linear one (with its
                norm) where there is none of its own (paper); "head" = box head and predictor; "all" = all that is
                trained on base classes.
        """
        if layers not in LAYERS:
            raise ValueError(f"FEWSHOT.FINETUNE.LAYERS must be one of {LAYERS}, got {layers!r}")
        self.detector, self.layers = detector, layers
        self.modules = tuned_modules(detector, layers)
        self.changes_description = detector.tunes_description(layers)
        self.pictures = detector.support_images([support_set])
        self._rois: list[LabelledRois] = []
        if layers != "all":
            with torch.no_grad():
                self._rois = [self._constant_rois(picture) for picture in self.pictures]

    def __len__(self) -> int:
        return len(self.pictures)

    def parameters(self) -> list[nn.Parameter]:
        """The detector's weights that are tuned."""
        found = {id(p): p for module in self.modules for p in module.parameters()}
        return [p for p in found.values() if p.requires_grad]

    def losses(self, number: int, episode: dict[str, Tensor]) -> dict[str, Tensor]:
        """Losses of picture ``number`` for the classes of ``episode`` (see ``episode_tensors``)."""
        losses: dict[str, Tensor] = {}
        if self.layers == "all":
            rois, losses = self._trained_rois(self.pictures[number])
        else:
            rois = self._rois[number]
        x = rois.inputs
        if self.changes_description:
            x = self.detector.roi_heads.describe(x)
        predictor = self.detector.predictor
        scores, deltas = predictor(x, episode)
        proposals, rows = rois.proposals, rois.proposals.gt_rows
        proposals.gt_classes = torch.where(rows < 0, predictor.background_label(scores), rows)
        return {**losses, **predictor.losses((scores, deltas), [proposals])}

    def _constant_rois(self, picture: SupportImage) -> LabelledRois:
        heads = self.detector.roi_heads
        maps, proposals = self.detector.propose(self.detector.support_batch([picture]))
        labelled = self._labelled(proposals, picture)
        inputs = heads.pool(maps, [labelled.proposal_boxes])
        return LabelledRois(
            labelled, inputs if self.changes_description else heads.describe(inputs)
        )

    def _trained_rois(self, picture: SupportImage) -> tuple[LabelledRois, dict[str, Tensor]]:
        detector = self.detector
        images = detector.support_batch([picture])
        maps = detector.backbone(images.tensor)
        generator = detector.proposal_generator.train()
        try:
            proposals, rpn_losses = generator(images, maps, [self._target(picture)])
        finally:
            generator.eval()
        labelled = self._labelled(proposals, picture)
        pooled = detector.roi_heads.pool(maps, [labelled.proposal_boxes])
        return LabelledRois(labelled, pooled), rpn_losses

    def _target(self, picture: SupportImage) -> Instances:
        target = Instances(picture.image.shape[1:])
        target.gt_boxes = Boxes(picture.boxes)
        target.gt_classes = torch.zeros_like(picture.rows)
        target.gt_rows = picture.rows
        return target.to(self.detector.device)

    def _labelled(self, proposals: list[Instances], picture: SupportImage) -> Instances:
        heads = self.detector.roi_heads
        (labelled,) = heads.label_and_sample_proposals(proposals, [self._target(picture)])
        # The heads know base classes only: their labels say no more than whether a ROI is on an example.
        labelled.gt_rows = torch.where(labelled.gt_classes == 0, labelled.gt_rows, -1)
        return labelled


def tuned_modules(detector: "RepMet", layers: str) -> list[nn.Module]:
    """The modules that ``layers`` names."""
    if layers == "all":
        return [detector]
    heads, predictor = detector.roi_heads, detector.predictor
    if layers == "head":
        return [*heads.description_layers.modules(), predictor]
    if predictor.last_layer is not None:
        return [predictor.last_layer]
    ordered = list(heads.description_layers.modules())
    linear = [i for i, m in enumerate(ordered) if isinstance(m, (nn.Linear, nn.Conv2d))]
    # With the norm that may follow it.
    return ordered[linear[-1] :]
