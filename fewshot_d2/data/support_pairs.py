"""Pairs of examples of base classes, for pre-training what encodes supports.

A pair is drawn as in an episode: one example out of the supports, the other out of the queries, so a detector first
learns on cheap crops what it must recognise in whole scenes.
"""

import itertools
from collections.abc import Callable, Iterator
from functools import lru_cache

import numpy as np
from detectron2.utils import comm
from torch.utils.data import IterableDataset, get_worker_info

from ..structures import Support, SupportSet
from .episodes import TrainingEpisodes
from .index import InstanceIndex

# Crops kept in memory: they are small, and every class is drawn again and again.
_CACHED_BYTES = 256 << 20
_Crop = Callable[[InstanceIndex, int, int], Support]


class SupportPairs(IterableDataset):
    """Endless steps of two support sets: the same K classes with one example each, and with another."""

    def __init__(self, episodes: TrainingEpisodes, num_classes: int):
        """Take the classes, indices and mapper of the training episodes; K is ``num_classes`` or all there are.

        Raises:
            ValueError: fewer than two classes, which leaves nothing to tell apart.
        """
        self.episodes = episodes
        self.num_classes = min(num_classes, len(episodes.class_ids))
        if self.num_classes < 2:
            raise ValueError(
                f"pre-training must have at least 2 classes a step, got {self.num_classes}"
            )
        # Workers that are spawned could not ask for it.
        self.rank, self.world_size = comm.get_rank(), comm.get_world_size()

    def __iter__(self) -> Iterator[tuple[SupportSet, SupportSet]]:
        worker = get_worker_info()
        step, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        crop_bytes = 3 * self.episodes.mapper.support_crop.size**2
        crop = lru_cache(maxsize=_CACHED_BYTES // crop_bytes)(self._crop)
        for own_step in itertools.count(step, stride):
            yield self.pair(own_step * self.world_size + self.rank, crop)

    def pair(self, number: int, crop: _Crop | None = None) -> tuple[SupportSet, SupportSet]:
        """Draw pair ``number``; the result depends on the seed and the number alone."""
        factory, crop = self.episodes.factory, crop or self._crop
        rng = np.random.default_rng((self.episodes.seed, number, 3))
        classes = rng.choice(self.episodes.class_ids, self.num_classes, replace=False).tolist()
        same_set = factory.query_index.dicts is factory.support_index.dicts
        first, second = [], []
        for class_id in classes:
            ((image, position),) = factory.support_index.draw_support(rng, class_id, 1)
            exclude = (image,) if same_set else ()
            (other,) = factory.query_index.draw_support(rng, class_id, 1, exclude)
            first.append([crop(factory.support_index, image, position)])
            second.append([crop(factory.query_index, *other)])
        names = [factory.names[c] for c in classes]
        return SupportSet(classes, names, first), SupportSet(classes, names, second)

    def _crop(self, index: InstanceIndex, image_index: int, position: int) -> Support:
        record = index.dicts[image_index]
        return self.episodes.mapper.support(record, record["annotations"][position])
