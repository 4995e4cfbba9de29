"""Training episodes: a pure function of (seed, number), so any number of workers sees the same ones.

Sampling follows spec section 2.2: images in shuffled order, the class uniform over the base classes of the image,
the support uniform over images with the class and then over its instances there.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from detectron2.utils import comm
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from .index import InstanceIndex, same_images
from .plans import EvaluationPlan, PlannedEpisode


@dataclass(frozen=True)
class Episode:
    """What the mapper turns into tensors.

    Attributes:
        query (dict): detectron2 dataset dict of the image that is searched.
        class_ids (tuple[int, ...]), class_names (tuple[str, ...]): the K classes, dataset category ids.
        contiguous_ids (tuple[int, ...]): the same classes as ``category_id`` of the query's annotations.
        supports (tuple): K tuples of (dataset dict, annotation) pairs, one a shot.
        key (tuple[int, ...]): seed of everything random in this episode.
        episode_id (int): its number in the plan or in the training stream.
        weights (tuple[float, ...]): how much each class's losses count in training; empty = 1 each.
        window (tuple[int, int, int, int] or None): the part of the query that training sees, XYXY in its pixels, which
            may leave the image; None = as the mapper draws it.
    """

    query: dict
    class_ids: tuple[int, ...]
    class_names: tuple[str, ...]
    contiguous_ids: tuple[int, ...]
    supports: tuple[tuple[tuple[dict, dict], ...], ...]
    key: tuple[int, ...]
    episode_id: int
    weights: tuple[float, ...] = ()
    window: tuple[int, int, int, int] | None = None


class EpisodeFactory:
    """Puts queries, classes and supports of two indices together; training and evaluation share it."""

    def __init__(
        self,
        query_index: InstanceIndex,
        support_index: InstanceIndex,
        *,
        names: dict[int, str],
        contiguous_ids: dict[int, int],
    ):
        """Store the indices.

        Args:
            query_index, support_index: may be one object.
            names: dataset category id -> name.
            contiguous_ids: dataset category id -> ``category_id`` in the query data set's dicts.
        """
        self.query_index = query_index
        self.support_index = support_index
        self.names = names
        self.contiguous_ids = contiguous_ids

    def build(
        self,
        image_index: int,
        class_ids: tuple[int, ...],
        supports: list[list[tuple[int, int]]],
        *,
        key: tuple[int, ...],
        episode_id: int,
    ) -> Episode:
        """Look up the dicts of (image index, annotation position) pairs."""
        return Episode(
            query=self.query_index.dicts[image_index],
            class_ids=class_ids,
            class_names=tuple(self.names[c] for c in class_ids),
            contiguous_ids=tuple(self.contiguous_ids[c] for c in class_ids),
            supports=tuple(tuple(self._support(*place) for place in shots) for shots in supports),
            key=key,
            episode_id=episode_id,
        )

    def _support(self, image_index: int, position: int) -> tuple[dict, dict]:
        record = self.support_index.dicts[image_index]
        return record, record["annotations"][position]


class EpochOrder:
    """Endless numbers -> items: each epoch goes once over the items, in an order of its own."""

    def __init__(self, items: Sequence[int], *seeds: int):
        """Take the items; the order of an epoch depends on its number and the seeds alone."""
        self.items, self.seeds = items, seeds
        # Numbers come mostly one after another, so one epoch is worth keeping.
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def __getitem__(self, number: int) -> int:
        epoch, position = divmod(number, len(self.items))
        if epoch != self._epoch:
            rng = np.random.default_rng((*self.seeds, epoch, 1))
            self._epoch, self._order = epoch, rng.permutation(self.items)
        return int(self._order[position])


class TrainingEpisodes:
    """All training episodes there are: ``episodes[t]`` is the mapped episode ``t``, for any t >= 0."""

    def __init__(
        self,
        factory: EpisodeFactory,
        mapper: Callable[[Episode], dict[str, Any]],
        *,
        num_ways: int,
        num_absent_ways: int,
        num_shots: int,
        seed: int,
        exclude_query: bool,
    ):
        """Collect the images that have a class to search for.

        Raises:
            ValueError: no image has an instance of a class that has supports.
        """
        self.factory, self.mapper = factory, mapper
        self.num_ways, self.num_absent_ways, self.num_shots = num_ways, num_absent_ways, num_shots
        self.seed = seed
        # Here, as files are looked up on the disk: once, not in every worker.
        self._excluded = (
            same_images(factory.query_index, factory.support_index) if exclude_query else {}
        )
        self.class_ids = sorted(
            set(factory.query_index.class_ids) & set(factory.support_index.class_ids)
        )
        usable = set(self.class_ids)
        self.images = [
            i
            for i in range(len(factory.query_index.dicts))
            if usable & set(factory.query_index.classes_in(i))
        ]
        if not self.images:
            raise ValueError(
                "training needs at least one image with a non-crowd instance of a base class that "
                f"also has supports, got none in {len(factory.query_index.dicts)} images"
            )
        self._order = EpochOrder(self.images, seed)

    def __getitem__(self, number: int) -> dict[str, Any]:
        return self.mapper(self.sample(number))

    def sample(self, number: int) -> Episode:
        """Draw episode ``number``; the result depends on the seed and the number alone."""
        image_index = self._order[number]
        rng = np.random.default_rng((self.seed, number, 0))
        return self._episode(rng, number, image_index, self._draw_classes(rng, image_index))

    def _episode(
        self,
        rng: np.random.Generator,
        number: int,
        image_index: int,
        classes: tuple[int, ...],
    ) -> Episode:
        exclude = self._excluded.get(image_index, ())
        supports = [
            self.factory.support_index.draw_support(rng, c, self.num_shots, exclude)
            for c in classes
        ]
        return self.factory.build(
            image_index, classes, supports, key=(self.seed, number), episode_id=number
        )

    def _draw_classes(self, rng: np.random.Generator, image_index: int) -> tuple[int, ...]:
        in_image = set(self.factory.query_index.classes_in(image_index))
        present = [c for c in self.class_ids if c in in_image]
        absent = [c for c in self.class_ids if c not in in_image]
        chosen = rng.permutation(present)[: self.num_ways]
        decoys = rng.permutation(absent)[: self.num_absent_ways] if self.num_absent_ways else []
        return tuple(int(c) for c in (*chosen, *decoys))


def worker_place() -> tuple[int, int]:
    """Number of this loader worker and of all of them: batch ``number`` is followed by ``number + all``."""
    worker = get_worker_info()
    return (worker.id, worker.num_workers) if worker else (0, 1)


class EpisodeStream(IterableDataset):
    """The endless stream of mapped episodes of one process, cut into batches before workers share them out.

    Global batch b holds the episodes start + b * G ... start + (b + 1) * G - 1, G = batch size of all processes;
    each process takes its part. Which worker maps a batch changes nothing in it.
    """

    def __init__(self, episodes: TrainingEpisodes, *, start: int, batch_size: int):
        """Remember this process's place; workers that are spawned could not ask for it.

        Args:
            start: number of the first episode. batch_size: queries a step in *this* process.
        """
        self.episodes, self.start, self.batch_size = episodes, start, batch_size
        self.rank, self.world_size = comm.get_rank(), comm.get_world_size()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in itertools.count(*worker_place()):
            begin = self.start + (batch * self.world_size + self.rank) * self.batch_size
            for number in range(begin, begin + self.batch_size):
                yield self.episodes[number]


class PlannedEpisodes(Dataset):
    """The episodes of an evaluation plan as a map-style data set of mapped query dicts.

    An image that cannot be read gives ``{"error": message, ...}`` instead of stopping the run.
    """

    def __init__(
        self,
        plan: EvaluationPlan,
        factory: EpisodeFactory,
        mapper: Callable[[Episode], dict[str, Any]],
        *,
        with_supports: bool = True,
    ):
        """Take a plan that was checked against the factory's indices.

        Args:
            with_supports: whether queries come with their supports.
        """
        self.plan, self.factory, self.mapper = plan, factory, mapper
        self.with_supports = with_supports

    def __len__(self) -> int:
        return len(self.plan.episodes)

    def __getitem__(self, index: int) -> dict[str, Any]:
        episode = self.episode(self.plan.episodes[index])
        if not self.with_supports:
            episode = replace(episode, supports=())
        try:
            return self.mapper(episode)
        except (OSError, ValueError) as error:
            return {"error": f"episode {episode.episode_id} of the plan: {error}"}

    def episode(self, planned: PlannedEpisode) -> Episode:
        """Look up one planned episode."""
        supports = [
            [self.factory.support_index.locate(annotation) for annotation in shots]
            for shots in planned.supports
        ]
        return self.factory.build(
            self.factory.query_index.image_index(planned.image_id),
            planned.class_ids,
            supports,
            key=(self.plan.seed, planned.id),
            episode_id=planned.id,
        )
