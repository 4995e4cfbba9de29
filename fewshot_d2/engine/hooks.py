"""Training hooks: reproducible randomness, heads-only warm-up, training pictures."""

from typing import Any

import torch
from detectron2.engine import HookBase
from detectron2.utils import comm
from torch import nn

from ..visualization import query_panel


class SeedEachStep(HookBase):
    """Seed torch from (seed, iteration, rank) before every step.

    Sampling of anchors and ROIs then depends on the step alone, so a resumed run draws what an uninterrupted one
    would have drawn.
    """

    def __init__(self, seed: int):
        """Keep the run's seed."""
        self.seed = seed

    def before_step(self) -> None:
        """Seed all generators of torch."""
        step = self.trainer.iter * comm.get_world_size() + comm.get_rank()
        # Steps of different seeds must not meet: 2**40 is more steps than any run has. torch takes 64 bits.
        torch.manual_seed((self.seed * 2**40 + step) % 2**64)


class HeadsOnlyWarmup(HookBase):
    """Keep the bottom-up's weights for the first iterations (paper 5.1: 1000 steps).

    The learning rate of its groups is zero there, and what the optimizer has gathered for them is dropped at the end.
    Turning gradients off instead would break DDP, which wants to know all parameters from the start. Statistics of
    batch norms that are not frozen move on.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, num_iters: int):
        """Take an optimizer with groups marked ``bottom_up``."""
        self.optimizer, self.num_iters = optimizer, num_iters

    def before_step(self) -> None:
        """Zero the rate that the scheduler has just set; at the end forget the momentum."""
        for group in self.optimizer.param_groups:
            if not group["bottom_up"]:
                continue
            if self.trainer.iter < self.num_iters:
                group["lr"] = 0.0
            elif self.trainer.iter == self.num_iters:
                for parameter in group["params"]:
                    self.optimizer.state.pop(parameter, None)


class TrainingPictures(HookBase):
    """Every VIS_PERIOD iterations draw fixed training episodes with what the model finds in them."""

    def __init__(
        self, cfg: Any, model: nn.Module, *, num_episodes: int = 3, threshold: float = 0.5
    ):
        """Nothing is read before the first picture is due."""
        self.cfg, self.model = cfg, model
        self.num_episodes, self.threshold = num_episodes, threshold
        self.queries: list[dict[str, Any]] = []

    def after_step(self) -> None:
        """Put the pictures into the event storage (TensorBoard)."""
        if (self.trainer.iter + 1) % self.cfg.VIS_PERIOD:
            return
        if not self.queries:
            episodes = self.trainer.data_loader.episodes
            self.queries = [episodes[number] for number in range(self.num_episodes)]
        self.model.eval()
        with torch.no_grad():
            outputs = [self.model([query])[0]["instances"].to("cpu") for query in self.queries]
        self.model.train()
        for number, (query, output) in enumerate(zip(self.queries, outputs, strict=True)):
            panel = query_panel(query, output, self.cfg.INPUT.FORMAT, threshold=self.threshold)
            self.trainer.storage.put_image(f"episode_{number}", panel.transpose(2, 0, 1))
