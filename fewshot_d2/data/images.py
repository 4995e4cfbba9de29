"""Training images without supports, for systems that learn the base classes as a closed set (RepMet spec 1.7).

Such an image is an ``Episode`` of all base classes with no supports, so the mapper and the loader are those of
episodes, and novel labels are kept out by the same removal.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from .episodes import Episode, EpisodeFactory


class TrainingImages:
    """All training images there are: ``images[t]`` is the mapped image ``t``, for any t >= 0.

    An epoch takes at most ``per_class`` images a class; each image is charged to that of its classes which has the
    fewest so far. Every epoch is drawn anew, from the seed and its number alone.
    """

    def __init__(
        self,
        factory: EpisodeFactory,
        mapper: Callable[[Episode], dict[str, Any]],
        *,
        per_class: int,
        seed: int,
    ):
        """Collect the images that have an instance.

        Args:
            factory: of base classes only. mapper: maps an ``Episode`` without supports.
            per_class: images a class in an epoch; 0 = all images.

        Raises:
            ValueError: no image has an instance, or ``per_class`` is negative.
        """
        if per_class < 0:
            raise ValueError(f"FEWSHOT.IMAGES_PER_CLASS must be at least 0, got {per_class}")
        self.factory, self.mapper, self.per_class, self.seed = factory, mapper, per_class, seed
        index = factory.query_index
        self.class_ids = index.class_ids
        self.images = [i for i in range(len(index.dicts)) if index.classes_in(i)]
        if not self.images:
            raise ValueError(
                "training needs at least one image with a non-crowd instance of a base class, got none in "
                f"{len(index.dicts)} images"
            )
        self._starts, self._epoch = [0], (-1, np.empty(0, dtype=np.int64))

    def __getitem__(self, number: int) -> dict[str, Any]:
        return self.mapper(self.sample(number))

    def sample(self, number: int) -> Episode:
        """Draw image ``number``; the result depends on the seed and the number alone."""
        epoch = self.epoch_of(number)
        image_index = int(self._draw(epoch)[number - self._starts[epoch]])
        return self.factory.build(
            image_index, tuple(self.class_ids), [], key=(self.seed, number), episode_id=number
        )

    def epoch_of(self, number: int) -> int:
        """The epoch that image ``number`` belongs to."""
        # Epochs differ in length, so the earlier ones are drawn once to know where they end.
        while self._starts[-1] <= number:
            self._starts.append(self._starts[-1] + len(self._draw(len(self._starts) - 1)))
        return int(np.searchsorted(self._starts, number, side="right")) - 1

    def _draw(self, epoch: int) -> np.ndarray:
        if epoch != self._epoch[0]:
            order = np.random.default_rng((self.seed, epoch, 4)).permutation(self.images)
            self._epoch = epoch, order if not self.per_class else self._balanced(order)
        return self._epoch[1]

    def _balanced(self, order: np.ndarray) -> np.ndarray:
        counts = dict.fromkeys(self.class_ids, 0)
        chosen = []
        for image_index in order.tolist():
            rarest = min(self.factory.query_index.classes_in(image_index), key=counts.__getitem__)
            if counts[rarest] < self.per_class:
                counts[rarest] += 1
                chosen.append(image_index)
        return np.array(chosen, dtype=np.int64)
