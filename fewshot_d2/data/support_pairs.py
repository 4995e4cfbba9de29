"""Pairs of examples of base classes, for pre-training what encodes supports.

A pair is drawn as in an episode: one example out of the supports, the other out of the queries, so a detector first
learns on cheap crops what it must recognise in whole scenes.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache

import numpy as np
from detectron2.utils import comm
from torch.utils.data import IterableDataset

from ..structures import Support, SupportSet
from .episodes import TrainingEpisodes, worker_place
from .index import InstanceIndex, same_images

# Pixels that a process keeps, its workers together: crops are small, and every class is drawn again and again.
_CACHED_BYTES = 256 << 20
_Crop = Callable[[InstanceIndex, int, int], Support]


class SupportPairs(IterableDataset):
    """Endless steps of two support sets: the same K classes with one example each, and with another."""

    def __init__(self, episodes: TrainingEpisodes, num_classes: int):
        """Take the classes, indices and mapper of the training episodes; K is ``num_classes`` or all there are.

        Raises:
            ValueError: fewer than two classes have two examples, which leaves nothing to tell apart.
        """
        self.episodes = episodes
        factory = episodes.factory
        self._as_queries = same_images(factory.support_index, factory.query_index)
        # Of a class in one image only, an example would be paired with itself.
        self.class_ids = [c for c in episodes.class_ids if self._has_others(c)]
        self.num_classes = min(num_classes, len(self.class_ids))
        if self.num_classes < 2:
            raise ValueError(
                "FEWSHOT.PRETRAIN must have at least 2 base classes with examples in two images, "
                f"got {self.num_classes}"
            )
        # Workers that are spawned could not ask for it.
        self.rank, self.world_size = comm.get_rank(), comm.get_world_size()

    def __iter__(self) -> Iterator[tuple[SupportSet, SupportSet]]:
        worker, num_workers = worker_place()
        kept_bytes = 3 * self.episodes.mapper.support_crop.size**2 * num_workers
        cached = lru_cache(maxsize=max(_CACHED_BYTES // kept_bytes, 1))(self._crop)

        def copied(*place: InstanceIndex | int) -> Support:
            # A worker moves what it sends into shared memory, an open file each: never the cached one.
            crop = cached(*place)
            return replace(crop, image=crop.image.clone())

        for own_step in itertools.count(worker, num_workers):
            yield self.pair(own_step * self.world_size + self.rank, copied)

    def pair(self, number: int, crop: _Crop | None = None) -> tuple[SupportSet, SupportSet]:
        """Draw pair ``number``; the result depends on the seed and the number alone."""
        factory, crop = self.episodes.factory, crop or self._crop
        rng = np.random.default_rng((self.episodes.seed, number, 3))
        classes = rng.choice(self.class_ids, self.num_classes, replace=False).tolist()
        examples: list[list[Support]] = []
        others: list[list[Support]] = []
        for class_id in classes:
            ((image, position),) = factory.support_index.draw_support(rng, class_id, 1)
            own = self._as_queries.get(image, ())
            (other,) = factory.query_index.draw_support(rng, class_id, 1, own)
            examples.append([crop(factory.support_index, image, position)])
            others.append([crop(factory.query_index, *other)])
        names = [factory.names[c] for c in classes]
        return SupportSet(classes, names, examples), SupportSet(classes, names, others)

    def _has_others(self, class_id: int) -> bool:
        """Whether each image among a class's supports has another one among its queries."""
        factory = self.episodes.factory
        queries = set(factory.query_index.images_with(class_id))
        own = (self._as_queries.get(i, ()) for i in factory.support_index.images_with(class_id))
        return all(len(queries.intersection(images)) < len(queries) for images in own)

    def _crop(self, index: InstanceIndex, image_index: int, position: int) -> Support:
        mapper, record = self.episodes.mapper, index.dicts[image_index]
        return mapper.support_crop(mapper.boxed(record, record["annotations"][position]))
