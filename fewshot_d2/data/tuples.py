"""Tuples of common localization: a class, S support images of it and one query that has it too (SILCO paper 4.3).

A support is an image; of its instances the largest stands for it where a box is wanted after all. The query is none of
the supports. All draws depend on the seed and the tuple's number alone; the query is drawn first, so that tuples with
more shots have the query and the first supports of those with fewer.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from detectron2.structures import BoxMode

from .episodes import Episode, EpisodeFactory
from .index import InstanceIndex, same_images

logger = logging.getLogger(__name__)


class TupleSampler:
    """Draws tuples from the images of queries and of supports."""

    def __init__(
        self,
        query_index: InstanceIndex,
        support_index: InstanceIndex,
        class_ids: Iterable[int],
        *,
        shots: int,
    ):
        """Leave out the classes that have too few images, with a warning that names them.

        Args:
            query_index, support_index: one object, or indices of two data sets, which may share images.
            class_ids: the classes to draw from. shots: support images of a tuple.

        Raises:
            ValueError: no class has ``shots`` supports and a query, or a data set lists a file twice (whatever its
                classes), which could make it query and support of one tuple.
        """
        if shots < 1:
            raise ValueError(f"tuples must have at least 1 support image, got {shots}")
        for index in (query_index, support_index):
            _check_files(index)
        self._as_supports = same_images(query_index, support_index)
        self.query_index, self.support_index, self.shots = query_index, support_index, shots
        wanted = sorted(set(class_ids))
        self.class_ids = tuple(c for c in wanted if self._is_usable(c))
        few = [c for c in wanted if c not in set(self.class_ids)]
        if few:
            logger.warning(
                "%d of %d classes have too few images for %d supports and a query and are left out: %s",
                *(len(few), len(wanted), shots, few[:20]),
            )
        if not self.class_ids:
            raise ValueError(
                f"tuples must have a class with {shots} support images and another image as query, got none among "
                f"{len(wanted)} classes"
            )

    def draw_class(self, rng: np.random.Generator) -> int:
        """Uniform over the classes that are left."""
        return self.class_ids[int(rng.integers(len(self.class_ids)))]

    def draw(self, rng: np.random.Generator, class_id: int) -> tuple[int, list[tuple[int, int]]]:
        """The image index of the query and (image index, position) of each support, all of different images."""
        query = _drawn(rng, self.query_index.images_with(class_id), 1)[0]
        images = self.support_index.images_with(class_id)
        own = self._as_supports.get(query, ())
        # One more than needed: the query may be among them.
        number = min(self.shots + 1, len(images))
        chosen = [i for i in _drawn(rng, images, number) if i not in own][: self.shots]
        return query, [(i, largest_instance(self.support_index, i, class_id)) for i in chosen]

    def _is_usable(self, class_id: int) -> bool:
        queries = self.query_index.images_with(class_id)
        supports = self.support_index.images_with(class_id)
        if not queries or len(supports) < self.shots:
            return False
        if len(supports) > self.shots:
            return True
        shared = set(supports)
        return not any(shared.intersection(self._as_supports.get(query, ())) for query in queries)


def _check_files(index: InstanceIndex) -> None:
    """Raise a ``ValueError`` if a file is listed twice."""
    numbers: dict[str, int] = {}
    for number, file in enumerate(index.files):
        first = numbers.setdefault(file, number)
        if first != number:
            raise ValueError(
                f"a data set of tuples must list every file once, got {index.dicts[number]['file_name']} as images "
                f"{index.dicts[first]['image_id']} and {index.dicts[number]['image_id']}"
            )


def _drawn(rng: np.random.Generator, items: Sequence[int], number: int) -> list[int]:
    """The first ``number`` of a shuffle; the rest is not touched, as there may be many thousands.

    Only ``integers`` is used, whose stream is the same in every version of numpy.
    """
    moved: dict[int, int] = {}
    chosen = []
    for place in range(number):
        other = int(rng.integers(place, len(items)))
        chosen.append(items[moved.get(other, other)])
        moved[other] = moved.get(place, place)
    return chosen


def largest_instance(index: InstanceIndex, image_index: int, class_id: int) -> int:
    """Position of a class's largest box among the annotations of an image; the first of equal ones."""

    def area(position: int) -> float:
        annotation = index.dicts[image_index]["annotations"][position]
        box = BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYWH_ABS)
        return box[2] * box[3]

    return max(index.instances(image_index, class_id), key=area)


class TrainingTuples:
    """All training tuples there are, as episodes of one class: ``tuples[t]`` is the mapped tuple ``t``, for any t >= 0.

    The class is uniform over classes, however many images each has. Other classes in the query are not looked at.
    """

    def __init__(
        self,
        factory: EpisodeFactory,
        mapper: Callable[[Episode], dict[str, Any]],
        *,
        num_shots: int,
        seed: int,
    ):
        """Find the classes that have enough images; see ``TupleSampler``.

        Args:
            factory: of indices without novel classes. mapper: makes tensors. num_shots: supports. seed: of all draws.
        """
        self.factory, self.mapper, self.seed = factory, mapper, seed
        shared = set(factory.query_index.class_ids) & set(factory.support_index.class_ids)
        self.sampler = TupleSampler(
            factory.query_index, factory.support_index, shared, shots=num_shots
        )
        self.class_ids = list(self.sampler.class_ids)
        self.images = sorted(
            {i for c in self.class_ids for i in factory.query_index.images_with(c)}
        )

    def __getitem__(self, number: int) -> dict[str, Any]:
        return self.mapper(self.sample(number))

    def sample(self, number: int) -> Episode:
        """Draw tuple ``number``; the result depends on the seed and the number alone."""
        rng = np.random.default_rng((self.seed, number, 0))
        class_id = self.sampler.draw_class(rng)
        query, supports = self.sampler.draw(rng, class_id)
        return self.factory.build(
            query, (class_id,), [supports], key=(self.seed, number), episode_id=number
        )
