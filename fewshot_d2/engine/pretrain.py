"""Pre-training for detectors that start without weights.

The papers start from a backbone trained to tell objects apart, without the novel classes. Where there are no such
weights, episodes alone leave a from-scratch detector at chance for long: it learns to find objects, but the few
comparisons of a scene do not teach what makes two of them alike. Here one step compares many base classes: pairs of
crops, which cost little; or, for detectors whose supports are whole pictures, all cells of scenes, because what is
learned on crops, of one size and without neighbours, does not carry over.
"""

import logging
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.engine import SimpleTrainer, hooks
from detectron2.modeling import build_model
from detectron2.solver import build_lr_scheduler
from detectron2.structures import Instances
from detectron2.utils import comm
from detectron2.utils.events import CommonMetricPrinter
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..data.episodes import TrainingEpisodes
from ..data.images import TrainingImages
from ..data.loaders import open_batches
from ..data.support_pairs import SupportPairs
from ..modeling.detector import FewShotDetector
from ..modeling.losses import support_contrast
from ..structures import SupportSet
from .hooks import SeedEachStep
from .solver import average_buffers, build_optimizer, distributed

logger = logging.getLogger(__name__)

# What torch's cross entropy leaves out.
IGNORED = -100
_PERIOD = 20
# Of the loss of background's cells, which are easy and many.
_BACKGROUND = 0.3


class SupportContrast(nn.Module):
    """Contrast on every tensor of a detector's ``contrast_features``; each level learns by itself."""

    def __init__(self, detector: FewShotDetector, temperature: float):
        """Take the detector whose encoding of supports is to be trained."""
        super().__init__()
        self.detector, self.temperature = detector, temperature

    def forward(self, pair: Sequence[SupportSet]) -> dict[str, Tensor]:
        """Losses of two support sets of the same K classes: {"loss_contrast_<level>": Tensor[]}."""
        features = self.detector.contrast_features(pair)
        return {
            f"loss_contrast_{level}": support_contrast(*tensor.chunk(2), self.temperature)
            for level, tensor in features.items()
        }


class ObjectClassification(nn.Module):
    """Tells base classes and background apart in every cell of each map.

    Cells are what is compared later: those between objects must look like no object, and those in the middle of one
    alike, wherever it lies. What has no label, as crowds and removed objects, is background. The classifiers, by
    cosines and one a map, are thrown away.
    """

    def __init__(self, detector: FewShotDetector, num_classes: int, temperature: float):
        """Take the detector whose maps are to be trained."""
        super().__init__()
        self.detector, self.temperature = detector, temperature
        shapes = detector.backbone.output_shape()
        # The last row is background.
        self.classifiers = nn.ParameterDict(
            {
                # Short vectors turn fast.
                level: nn.Parameter(0.05 * torch.randn(num_classes + 1, shapes[level].channels))
                for level in detector.object_levels
            }
        )

    def forward(self, batched_inputs: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Losses of the queries' cells: {"loss_object_<level>": Tensor[], "loss_background_<level>": Tensor[]}."""
        queries = self.detector.preprocess(batched_inputs)
        maps = self.detector.backbone(queries.tensor)
        objects = [x["instances"].to(self.detector.device) for x in batched_inputs]
        losses = {}
        for level, classifier in self.classifiers.items():
            size, background = maps[level].shape[2:], len(classifier) - 1
            stride = queries.tensor.shape[-1] / size[1]
            targets = torch.stack([cell_targets(o, size, stride, background) for o in objects])
            kept = targets != IGNORED
            features = F.normalize(maps[level].movedim(1, 3)[kept], dim=1)
            logits = features @ F.normalize(classifier, dim=1).T / self.temperature
            of_cells = F.cross_entropy(logits, targets[kept], reduction="none")
            is_background = targets[kept] == background
            losses[f"loss_object_{level}"] = _mean(of_cells[~is_background])
            losses[f"loss_background_{level}"] = _BACKGROUND * _mean(of_cells[is_background])
        return losses


def cell_targets(
    objects: Instances, size: tuple[int, int], stride: float, background: int
) -> Tensor:
    """What each cell of a map is to be classified as.

    An object has the cells whose centres lie in its middle, half of each side, or nearest to its centre if there are
    none; those of several objects are the smallest one's. The rest of an object is ignored, as are all of a difficult
    one (patches cut these, so that their middle may not be there) and cells outside the image. Others are background.

    Args:
        objects: with ``gt_boxes`` (XYXY in pixels of the network's image), ``gt_classes`` and, where there is one,
            ``gt_difficult``.
        size: rows and columns of the map. stride: pixels a cell. background: its class.

    Returns:
        int64 Tensor[rows, columns].
    """
    boxes, classes = objects.gt_boxes.tensor, objects.gt_classes
    if objects.has("gt_difficult"):
        classes = classes.masked_fill(objects.gt_difficult, IGNORED)
    order = objects.gt_boxes.area().argsort(stable=True)
    boxes, classes = boxes[order], classes[order]
    whole = boxes.new_ones(1, *size, dtype=torch.bool)
    is_middle = is_inside = whole.expand(len(boxes), -1, -1)
    is_outside = ~whole
    for axis in (0, 1):
        # Columns lie along the last axis, rows along the one before.
        centres = (torch.arange(size[1 - axis], device=boxes.device) + 0.5) * stride
        low, high = boxes[:, axis, None], boxes[:, axis + 2, None]
        distance, half = (centres - (low + high) / 2).abs(), (high - low) / 2
        middle = distance <= torch.maximum(half / 2, distance.amin(dim=1, keepdim=True))
        is_middle = is_middle & middle.unsqueeze(1 + axis)
        is_inside = is_inside & (distance <= half).unsqueeze(1 + axis)
        is_outside = is_outside | (centres >= objects.image_size[1 - axis])[None].unsqueeze(
            1 + axis
        )
    ignored = is_outside | is_inside.any(dim=0, keepdim=True)
    labels = torch.cat([classes, classes.new_tensor([IGNORED, background])])
    # The first that claims a cell has it.
    return labels[torch.cat([is_middle, ignored, whole]).int().argmax(dim=0)]


def _mean(losses: Tensor) -> Tensor:
    return losses.sum() / max(len(losses), 1)


def pretrain_detector(cfg: CfgNode, model: FewShotDetector, episodes: TrainingEpisodes) -> None:
    """Train a twin for FEWSHOT.PRETRAIN.MAX_ITER steps and load its weights into ``model``.

    The twin has living batch norms; in ``model`` they may be frozen, and then supports and queries, whose statistics
    differ, pass through the same function. Base classes only: objects come out of the training episodes. In several
    processes each compares its own, so the result depends on their number.

    Raises:
        ValueError: there is no episode of a data set's objects, as in classification and self-paced training, or too
            few classes.
    """
    if not hasattr(episodes, "factory"):
        raise ValueError(
            "FEWSHOT.PRETRAIN.MAX_ITER must be 0 for training on what is not made of a data set's objects, got "
            f"{cfg.FEWSHOT.PRETRAIN.MAX_ITER} for {type(episodes).__name__}"
        )
    schedule = pretraining_config(cfg)
    iterations = schedule.SOLVER.MAX_ITER
    logger.info("Pre-training on %s, %d steps", cfg.FEWSHOT.PRETRAIN.TASK, iterations)
    twin = build_model(schedule)
    twin.load_state_dict(model.state_dict(), strict=False)
    learner, loader = _TASKS[cfg.FEWSHOT.PRETRAIN.TASK](cfg, twin, episodes)
    optimizer = build_optimizer(schedule, learner)
    # The heads have no part in it.
    trainer = SimpleTrainer(distributed(learner, find_unused_parameters=True), loader, optimizer)
    trainer.register_hooks(
        [
            SeedEachStep(max(cfg.SEED, 0)),
            hooks.IterationTimer(),
            hooks.LRScheduler(optimizer, build_lr_scheduler(schedule, optimizer)),
        ]
    )
    if comm.is_main_process():
        printer = CommonMetricPrinter(iterations)
        trainer.register_hooks([hooks.PeriodicWriter([printer], period=_PERIOD)])
    trainer.train(0, iterations)
    average_buffers(twin)
    # What is left over are the batch norms' counts of batches; nothing may be missing.
    missing, _ = model.load_state_dict(twin.state_dict(), strict=False)
    if missing:
        raise ValueError(f"the pre-trained twin must have all weights, got none for {missing[:3]}")


def _pairs(
    cfg: CfgNode, twin: FewShotDetector, episodes: TrainingEpisodes
) -> tuple[nn.Module, Iterable]:
    pairs = SupportPairs(episodes, cfg.FEWSHOT.PRETRAIN.NUM_CLASSES)
    loader = DataLoader(pairs, batch_size=None, num_workers=cfg.DATALOADER.NUM_WORKERS)
    return SupportContrast(twin, cfg.FEWSHOT.PRETRAIN.TEMPERATURE), loader


def _objects(
    cfg: CfgNode, twin: FewShotDetector, episodes: TrainingEpisodes
) -> tuple[nn.Module, Iterable]:
    node = cfg.FEWSHOT.PRETRAIN
    images = TrainingImages(episodes.factory, episodes.mapper, per_class=0, seed=episodes.seed)
    if cfg.FEWSHOT.SPLIT != "all" and not cfg.FEWSHOT.EXCLUDE_NOVEL_IMAGES:
        logger.warning(
            "Pre-training learns novel objects as background, if there are any in the training images; "
            "FEWSHOT.EXCLUDE_NOVEL_IMAGES leaves these images out"
        )
    if len(images.class_ids) < 2:
        raise ValueError(
            f"FEWSHOT.PRETRAIN must have at least 2 base classes, got {len(images.class_ids)}"
        )
    loader = open_batches(
        images, start=0, batch_size=node.IMS_PER_BATCH, num_workers=cfg.DATALOADER.NUM_WORKERS
    )
    learner = ObjectClassification(twin, len(images.class_ids), node.TEMPERATURE)
    return learner.to(twin.device), loader


_TASKS = {"pairs": _pairs, "objects": _objects}


def pretraining_config(cfg: CfgNode) -> CfgNode:
    """The config with the schedule of FEWSHOT.PRETRAIN and nothing frozen; without mixed precision."""
    schedule, node = cfg.clone(), cfg.FEWSHOT.PRETRAIN
    schedule.defrost()
    for backbone in (schedule.MODEL.RESNETS, schedule.MODEL.TORCHVISION, schedule.MODEL.TIMM):
        backbone.NORM = "BN" if backbone.NORM == "FrozenBN" else backbone.NORM
    schedule.MODEL.BACKBONE.FREEZE_AT = 0
    schedule.SOLVER.update(
        OPTIMIZER="ADAMW",
        LR_SCHEDULER_NAME="WarmupCosineLR",
        MAX_ITER=node.MAX_ITER,
        BASE_LR=node.BASE_LR,
        WARMUP_ITERS=node.MAX_ITER // 5,
        BACKBONE_MULTIPLIER=1.0,
    )
    return schedule
