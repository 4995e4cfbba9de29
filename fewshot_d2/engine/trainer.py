"""``EpisodicTrainer``: detectron2's trainer on episodes, with exact resumption and evaluation by plans."""

import logging
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import AMPTrainer, DefaultTrainer, SimpleTrainer
from detectron2.engine.train_loop import TrainerBase
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from torch import nn

from ..checkpoint import FewShotCheckpointer
from ..data.loaders import EpisodicTrainLoader
from ..modeling.detector import FewShotDetector
from .evaluate import evaluate
from .hooks import HeadsOnlyWarmup, SeedEachStep, TrainingPictures
from .patch_mining import HardPatchMining
from .pretrain import pretrain_detector
from .solver import build_optimizer, distributed

logger = logging.getLogger(__name__)


class EpisodicTrainer(DefaultTrainer):
    """DefaultTrainer with our loader, optimizer, checkpointer, hooks and evaluation."""

    def __init__(self, cfg: CfgNode):
        """Build everything that a run needs.

        DefaultTrainer's constructor is not used: it fixes the checkpointer and CUDA's form of DDP.
        """
        TrainerBase.__init__(self)
        if not logging.getLogger("detectron2").isEnabledFor(logging.INFO):
            setup_logger()
        cfg = DefaultTrainer.auto_scale_workers(cfg, comm.get_world_size())
        self.cfg, self.start_iter, self.max_iter = cfg, 0, cfg.SOLVER.MAX_ITER
        if _is_blind(cfg):
            logger.warning(
                "No weights: layers or norms are frozen before they have seen an image; give MODEL.WEIGHTS, set "
                "FEWSHOT.PRETRAIN.MAX_ITER, or, to train from scratch, the backbone's NORM to BN and FREEZE_AT to 0"
            )
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        loader = self.build_train_loader(cfg)
        make = AMPTrainer if cfg.SOLVER.AMP.ENABLED else SimpleTrainer
        has_idle = not getattr(model, "trains_all", True)
        wrapped = distributed(model, find_unused_parameters=has_idle)
        self._trainer = make(wrapped, loader, optimizer)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = FewShotCheckpointer(model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self))
        self.register_hooks(self.build_hooks())

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        """SOLVER.OPTIMIZER; see ``engine.solver``."""
        return build_optimizer(cfg, model)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> EpisodicTrainLoader:
        """Endless batches of training episodes."""
        return EpisodicTrainLoader(cfg)

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module, evaluators: Any = None) -> dict[str, Any]:
        """Evaluate on plans; see ``engine.evaluate``."""
        return evaluate(cfg, model)

    def train(self) -> Any:
        """Pre-train where FEWSHOT.PRETRAIN says so and there are no weights, then train on episodes."""
        if (
            self.start_iter == 0
            and self.cfg.FEWSHOT.PRETRAIN.MAX_ITER
            and not self.cfg.MODEL.WEIGHTS
        ):
            episodes = self._trainer.data_loader.episodes
            pretrain_detector(self.cfg, self.checkpointer.model, episodes)
        return super().train()

    def build_hooks(self) -> list[Any]:
        """detectron2's hooks and ours; ours come first so that the timer and writers see their work."""
        ours = [SeedEachStep(max(self.cfg.SEED, 0))]
        model, loader = self.checkpointer.model, self._trainer.data_loader
        if isinstance(model, FewShotDetector):
            ours += model.training_hooks(loader.episodes, loader.total_batch_size)
        if self.cfg.SOLVER.HEADS_ONLY_ITERS > 0:
            ours.append(HeadsOnlyWarmup(self.optimizer, self.cfg.SOLVER.HEADS_ONLY_ITERS))
        if self.cfg.FEWSHOT.MINING.PERIOD > 0:
            ours.append(HardPatchMining(self.cfg, model, loader))
        if self.cfg.VIS_PERIOD > 0 and comm.is_main_process():
            ours.append(TrainingPictures(self.cfg, model))
        return ours + super().build_hooks()

    def state_dict(self) -> dict[str, Any]:
        """Iteration and hooks, and the optimizer, which detectron2 v0.6 leaves out."""
        return {**super().state_dict(), "_trainer": self._trainer.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Undo ``state_dict``."""
        super().load_state_dict(dict(state_dict))
        self._trainer.load_state_dict(state_dict["_trainer"])


def _is_blind(cfg: CfgNode) -> bool:
    """Whether norms or layers of the backbone are frozen without weights or pre-training that would fill them."""
    if cfg.MODEL.WEIGHTS or cfg.FEWSHOT.PRETRAIN.MAX_ITER:
        return False
    backbone, freeze_at = cfg.MODEL.BACKBONE.NAME, cfg.MODEL.BACKBONE.FREEZE_AT
    if "timm" in backbone:  # does not know FREEZE_AT
        return not cfg.MODEL.TIMM.WEIGHTS and cfg.MODEL.TIMM.NORM == "FrozenBN"
    if "torchvision" in backbone:
        node = cfg.MODEL.TORCHVISION
        return not node.WEIGHTS and (freeze_at > 1 or node.NORM == "FrozenBN")
    return "resnet" in backbone and (freeze_at > 0 or cfg.MODEL.RESNETS.NORM == "FrozenBN")
