"""Pre-training of what encodes supports, for detectors that start without weights.

The paper starts from a backbone trained to tell objects apart, without the novel classes (5.1). Where there are
no such weights, episodes alone leave a from-scratch detector at chance for long: it learns to find objects, but the few
comparisons of a scene do not teach what makes two of them alike. Here one step compares many classes, on crops that
cost little.
"""

import logging
from collections.abc import Sequence

from detectron2.config import CfgNode
from detectron2.engine import SimpleTrainer, hooks
from detectron2.modeling import build_model
from detectron2.solver import build_lr_scheduler
from detectron2.utils import comm
from detectron2.utils.events import CommonMetricPrinter
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..data.episodes import TrainingEpisodes
from ..data.support_pairs import SupportPairs
from ..modeling.detector import FewShotDetector
from ..modeling.losses import support_contrast
from ..structures import SupportSet
from .hooks import SeedEachStep
from .solver import average_buffers, build_optimizer, distributed

logger = logging.getLogger(__name__)

_PERIOD = 20


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


def pretrain_supports(cfg: CfgNode, model: FewShotDetector, episodes: TrainingEpisodes) -> None:
    """Train how a twin encodes supports for FEWSHOT.PRETRAIN.MAX_ITER steps and load its weights into ``model``.

    The twin has living batch norms; in ``model`` they may be frozen, and then supports and queries, whose statistics
    differ, pass through the same function. Base classes only: the pairs come out of the training episodes. In several
    processes each compares its own classes, so the result depends on their number.
    """
    schedule = pretraining_config(cfg)
    iterations = schedule.SOLVER.MAX_ITER
    logger.info("Pre-training on pairs of examples, %d steps", iterations)
    twin = build_model(schedule)
    twin.load_state_dict(model.state_dict(), strict=False)
    optimizer = build_optimizer(schedule, twin)
    loader = DataLoader(
        SupportPairs(episodes, cfg.FEWSHOT.PRETRAIN.NUM_CLASSES),
        batch_size=None,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
    )
    # The heads have no part in it.
    contrast = distributed(
        SupportContrast(twin, cfg.FEWSHOT.PRETRAIN.TEMPERATURE), find_unused_parameters=True
    )
    trainer = SimpleTrainer(contrast, loader, optimizer)
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
