"""The sample pool of self-paced training (SPIL, paper algorithm 1): which image is learned on, with which examples.

Sample t of a stage is a pure function of (seed, stage, t), as a training episode is of (seed, t). Images are known by
their ids, boxes are XYXY in pixels of the original image. Departures from the paper, or what it leaves open, follow
spec B3 (17-19).
"""

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .episodes import EpochOrder
from .pseudo_labels import PseudoLabels, ScoredBox
from .rank_lists import RankList, RankLists
from .typed_json import XYXY

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Place:
    """An instance to crop as an example.

    Attributes:
        is_query (bool): whether its image is of the queries' data set, not of the searched one.
        image_id (int), box (XYXY): where it is.
    """

    is_query: bool
    image_id: int
    box: XYXY


@dataclass(frozen=True)
class Target:
    """An image to learn on.

    Attributes:
        is_query (bool), image_id (int): as of ``Place``.
        boxes (tuple[XYXY, ...]): its ground truth, best first.
        weight (float): omega of paper equation 1, the mean of how sure the boxes are; 1 for a query.
    """

    is_query: bool
    image_id: int
    boxes: tuple[XYXY, ...]
    weight: float

    @property
    def place(self) -> Place:
        """The best box as an example."""
        return Place(self.is_query, self.image_id, self.boxes[0])


@dataclass(frozen=True)
class PoolSample:
    """What the network learns from in one image of a step.

    Attributes:
        number (int): in the stream of samples. query_row (int): the rank list that ``target`` and positives are of.
        target (Target): the image to learn on.
        positives (tuple[Place, ...]): n examples of its instance.
        negatives (tuple[Place, ...]): n examples of the instance of another query, or none.
        negative_row (int | None): the rank list that the negatives are of.
    """

    number: int
    query_row: int
    target: Target
    positives: tuple[Place, ...]
    negatives: tuple[Place, ...]
    negative_row: int | None


@dataclass(frozen=True)
class _Row:
    """A query and the images of its list that examples are drawn from; they are learned on only if confident."""

    query: Target
    images: tuple[Target, ...]
    is_confident: bool


class SamplePool:
    """All samples of a stage: ``sample(t)`` for any t >= 0; each epoch goes once over the queries.

    1. Examples of a query come from the confident images of its list. Where there are none, as in stage 0, they come
       from all its images, with the boxes of the search. Its own image never counts as one: the query stands for it.
    2. The query is learned on, or one of n drawn confident images, each with the same probability. The query's crop
       takes the place of the drawn one among the positives, so an image is never its own example.
    3. Examples are drawn without replacement. Fewer than n are drawn from with replacement, and with the query's crop
       among them unless the query is what is learned on. Only a query without any other image is its own example.
    4. Negatives are examples of one other query of another label, whose list shares few images. They too never come
       from the image that is learned on.
    """

    def __init__(
        self,
        rank_lists: RankLists,
        labels: PseudoLabels | None,
        *,
        num_positives: int = 5,
        seed: int,
        max_shared: float = 0.05,
        min_side: float = 8.0,
    ):
        """Sort the candidates once.

        Args:
            rank_lists: the queries and what was found for them.
            labels: of the stage to sample for; None for stage 0.
            num_positives: n of the paper. seed: of all draws.
            max_shared: common images / images of the shorter list, up to which two lists are of different instances.
            min_side: pixels; boxes with a shorter side are left out.

        Raises:
            ValueError: an argument is out of its range, the labels are of other rank lists, or the box of a query
                is too small.
        """
        if num_positives < 1 or seed < 0 or not 0 <= max_shared <= 1:
            raise ValueError(
                "num_positives must be at least 1, seed at least 0 and max_shared in [0, 1], got "
                f"{num_positives}, {seed} and {max_shared}"
            )
        if labels is not None:
            labels.check(rank_lists)
        self.num_positives, self.seed, self.min_side = num_positives, seed, min_side
        self.stage = 0 if labels is None else labels.stage
        self._is_one_set = rank_lists.dataset == rank_lists.query_dataset
        self._num_small = 0
        self._rows = [
            self._row(row, {} if labels is None else labels.confident(i))
            for i, row in enumerate(rank_lists)
        ]
        self._is_negative = _unlike(rank_lists, max_shared)
        self._order = EpochOrder(range(len(rank_lists)), seed, self.stage)
        self._warn()

    def __len__(self) -> int:
        return len(self._rows)

    def sample(self, number: int) -> PoolSample:
        """Draw sample ``number``; the result depends on the seed, the stage and the number alone."""
        # The last number keeps this apart from the order of queries (1) and from the mapper's flips (2).
        rng = np.random.default_rng((self.seed, self.stage, number, 7))
        query_row = self._order[number]
        row = self._rows[query_row]
        target, others = self._draw_target(rng, row)
        positives = self._draw(rng, others or [row.query])
        negatives, negative_row = self._draw_negatives(rng, query_row, target)
        return PoolSample(number, query_row, target, positives, negatives, negative_row)

    def _draw_target(self, rng: np.random.Generator, row: _Row) -> tuple[Target, Sequence[Target]]:
        """The image to learn on, and those that its examples come from (lines 4-8 of algorithm 1)."""
        if not row.is_confident:
            return row.query, row.images
        drawn = rng.permutation(len(row.images))[: self.num_positives]
        targets = [row.query, *(row.images[i] for i in drawn)]
        taken = int(rng.integers(len(targets)))
        targets[0], targets[taken] = targets[taken], targets[0]
        return targets[0], targets[1:]

    def _draw_negatives(
        self, rng: np.random.Generator, query_row: int, target: Target
    ) -> tuple[tuple[Place, ...], int | None]:
        others = np.flatnonzero(self._is_negative[query_row]).tolist()
        while others:
            other = others.pop(int(rng.integers(len(others))))
            row = self._rows[other]
            images = [image for image in row.images if not self._same_image(image, target)]
            if len(images) < self.num_positives and not self._same_image(row.query, target):
                images.append(row.query)
            # Another object of the very image that is learned on is no negative: it is there to be found.
            if images:
                return self._draw(rng, images), other
        return (), None

    def _draw(self, rng: np.random.Generator, images: Sequence[Target]) -> tuple[Place, ...]:
        if len(images) >= self.num_positives:
            drawn = rng.permutation(len(images))[: self.num_positives]
        else:
            drawn = rng.integers(len(images), size=self.num_positives)
        return tuple(images[i].place for i in drawn)

    def _row(self, row: RankList, confident: Mapping[int, tuple[ScoredBox, ...]]) -> _Row:
        if not self._is_large(row.box):
            raise ValueError(
                f"query {row.query_id}: the sides of its box must be at least {self.min_side} pixels, "
                f"got {list(row.box)}"
            )
        query = Target(True, row.image_id, (row.box,), 1.0)
        images = self._images(row, query, confident)
        if images:
            return _Row(query, images, is_confident=True)
        # Never learned on, so their scores do not matter; those of a search are no probabilities.
        searched = {i: (ScoredBox(c.box, 1.0),) for i, c in enumerate(row.candidates)}
        return _Row(query, self._images(row, query, searched), is_confident=False)

    def _images(
        self, row: RankList, query: Target, found: Mapping[int, tuple[ScoredBox, ...]]
    ) -> tuple[Target, ...]:
        """The candidates of a list that have large boxes, without the query's own image."""
        images = []
        for position, boxes in found.items():
            large = [box for box in boxes if self._is_large(box.box)]
            self._num_small += len(boxes) - len(large)
            if large:
                weight = sum(box.score for box in large) / len(large)
                image_id = row.candidates[position].image_id
                image = Target(False, image_id, tuple(box.box for box in large), weight)
                if not self._same_image(image, query):
                    images.append(image)
        return tuple(images)

    def _is_large(self, box: XYXY) -> bool:
        return min(box[2] - box[0], box[3] - box[1]) >= self.min_side

    def _same_image(self, one: Target, other: Target) -> bool:
        same_set = self._is_one_set or one.is_query == other.is_query
        return same_set and one.image_id == other.image_id

    def _warn(self) -> None:
        if self._num_small:
            logger.warning(
                "%d boxes of candidates have a side below %g pixels and are left out",
                *(self._num_small, self.min_side),
            )
        num_alone = int((~self._is_negative.any(axis=1)).sum())
        if num_alone:
            logger.warning(
                "%d of %d queries have no other query to take negatives from and go without: labels are the same "
                "or lists share too many images",
                *(num_alone, len(self)),
            )


def _unlike(rank_lists: RankLists, max_shared: float) -> np.ndarray:
    """Whether two queries are of different instances, as far as labels and lists can tell: bool [Q, Q]."""
    rows_of_image = defaultdict(list)
    for row, rank_list in enumerate(rank_lists):
        for candidate in rank_list.candidates:
            rows_of_image[candidate.image_id].append(row)
    common = np.zeros((len(rank_lists), len(rank_lists)), dtype=np.int32)
    for rows in rows_of_image.values():
        common[np.ix_(rows, rows)] += 1
    lengths = np.array([len(row.candidates) for row in rank_lists])
    # An empty list shares nothing.
    shorter = np.maximum(np.minimum.outer(lengths, lengths), 1)
    labels = np.array([row.label for row in rank_lists])
    return (labels[:, None] != labels) & (common / shorter <= max_shared)
