"""A start for backbones without ImageNet weights: tell the supports of base classes apart.

The paper pre-trains its backbone by classification (5.1). Trained from scratch, a detector first has to find out that
supports matter at all, which takes most of a short run. A few hundred steps on supports alone, two crops a class, give
the vectors that the matching compares; an image of a scene costs as much as many crops. Only base classes are seen.
"""

import logging
from collections.abc import Iterator

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.utils.logger import log_every_n_seconds
from torch import nn
from torch.utils.data import DataLoader, Dataset

from ..data.episodes import TrainingEpisodes
from ..modeling.losses import contrast_loss
from ..structures import SupportSet

logger = logging.getLogger(__name__)

_LOG_SECONDS = 20


class SupportPairs(Dataset):
    """Item t: two support sets of the same classes with one different crop a class; a function of (seed, t)."""

    def __init__(self, episodes: TrainingEpisodes, *, num_ways: int, length: int):
        """Take the classes that have two instances.

        Raises:
            ValueError: fewer than two such classes.
        """
        index = episodes.factory.support_index
        self.episodes, self.length = episodes, length
        self.class_ids = [
            c
            for c in episodes.class_ids
            if sum(len(index.instances(i, c)) for i in index.images_with(c)) > 1
        ]
        if len(self.class_ids) < 2:
            raise ValueError(
                "pre-training needs at least two classes with two instances each, got "
                f"{len(self.class_ids)} of {len(episodes.class_ids)} classes"
            )
        self.num_ways = min(num_ways, len(self.class_ids))

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, number: int) -> list[SupportSet]:
        if number >= self.length:
            raise IndexError(number)
        episodes = self.episodes
        rng = np.random.default_rng((episodes.seed, number, 3))
        chosen = rng.permutation(self.class_ids)[: self.num_ways]
        classes = tuple(int(c) for c in chosen)
        pairs = [episodes.factory.support_index.draw_support(rng, c, 2) for c in classes]
        key = (episodes.seed, number)
        return [
            episodes.mapper.support_set(
                episodes.factory.build(
                    0, classes, [[pair[half]] for pair in pairs], key=key, episode_id=number
                )
            )
            for half in (0, 1)
        ]


def pretrain(cfg: CfgNode, model: nn.Module, episodes: TrainingEpisodes) -> None:
    """Train ``model.encode_support`` for SOLVER.PRETRAIN_ITERS steps, in place.

    Every level's vectors of the two crops of a class should be nearer to each other than to any other class's.
    """
    length = cfg.SOLVER.PRETRAIN_ITERS
    data = SupportPairs(episodes, num_ways=cfg.SOLVER.PRETRAIN_WAYS, length=length)
    optimizer = torch.optim.AdamW(
        model.backbone.parameters(), cfg.SOLVER.BASE_LR, weight_decay=cfg.SOLVER.WEIGHT_DECAY
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, cfg.SOLVER.BASE_LR, total_steps=length
    )
    model.train()
    for number, sets in enumerate(_batches(data, cfg.DATALOADER.NUM_WORKERS)):
        features = model.encode_support(sets).tensors
        results = [contrast_loss(*vectors.chunk(2)) for vectors in features.values()]
        loss = torch.stack([result[0] for result in results]).mean()
        accuracy = torch.stack([result[1] for result in results]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        message = (
            f"Pre-training {number + 1} of {length}: loss {loss.item():.3f}, the right one of "
            f"{data.num_ways} supports is nearest in {100 * accuracy.item():.0f} %"
        )
        if number + 1 == length:
            logger.info(message)
        log_every_n_seconds(logging.INFO, message, _LOG_SECONDS, name=__name__)


def _batches(data: SupportPairs, num_workers: int) -> Iterator[list[SupportSet]]:
    return iter(DataLoader(data, batch_size=None, num_workers=num_workers))
