"""Re-ranking rank lists by new vectors of the boxes that a detector found (SPIL, paper 5.3, spec 35).

Boxes are XYXY in pixels of the original image; D = numbers of a vector.
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from detectron2.config import CfgNode
from torch import Tensor

from ..data.dataset_mapper import read_image
from ..data.loaders import build_index
from ..data.rank_lists import RankList, RankLists
from ..evaluation.search_runs import Box
from ..retrieval.describer import build_describer
from ..retrieval.search import rerank
from .region_search import describe_boxes

logger = logging.getLogger(__name__)

# (data set, {image id: float[n, 4]}) -> {image id: float[n, D]}, without images that cannot be read.
Describe = Callable[[str, Mapping[int, Tensor]], Mapping[int, Tensor]]


def build_describe(cfg: CfgNode) -> Describe:
    """Describe boxes as the search of a config of configs/retrieval does; unreadable images are logged."""
    describer = build_describer(cfg)

    def describe(dataset: str, boxes: Mapping[int, Tensor]) -> dict[int, Tensor]:
        index = build_index(dataset, class_ids=())
        readable = {}
        for image_id, of_image in boxes.items():
            try:
                read_image(index.dicts[index.image_index(image_id)], "RGB")
            except ValueError as error:
                logger.error("Not described: %s", error)
            else:
                readable[image_id] = of_image
        return describe_boxes(cfg, index, readable, describer=describer)

    return describe


class BoxVectors:
    """Vectors of boxes; every image is read once, however many lists name it."""

    def __init__(self, describe: Describe, dataset: str, wanted: Iterable[tuple[int, Box]]):
        """Describe boxes.

        Args:
            describe: see ``Describe``. dataset: that has the images. wanted: (image id, box) pairs.
        """
        self._places: dict[int, dict[tuple[float, ...], int]] = {}
        for image_id, box in wanted:
            of_image = self._places.setdefault(image_id, {})
            of_image.setdefault(tuple(box), len(of_image))
        boxes = {i: torch.tensor(list(of_image)) for i, of_image in self._places.items()}
        self._vectors = describe(dataset, boxes)
        self.num_unread = len(boxes) - len(self._vectors)

    def __call__(self, image_id: int, box: Box) -> Tensor | None:
        """The vector (float[D]) of a box that was wanted; None if its image could not be read."""
        if image_id not in self._vectors:
            return None
        return self._vectors[image_id][self._places[image_id][tuple(box)]]


class Reranker:
    """Rank lists and the vectors of boxes in them."""

    def __init__(
        self,
        rank_lists: RankLists,
        found: Iterable[Sequence[Sequence[Box | None]]],
        describe: Describe,
    ):
        """Describe the queries and all boxes that will be asked for, in one pass over the images.

        Args:
            rank_lists: Q of them.
            found: for each run Q sequences with a box for each candidate; None = the search's own box is described.
            describe: see ``Describe``.
        """
        self._rank_lists = rank_lists
        wanted = (
            (candidate.image_id, box)
            for of_run in found
            for row, boxes in zip(rank_lists, of_run, strict=True)
            for candidate, box in zip(row.candidates, _filled(row, boxes), strict=True)
        )
        self._vectors = BoxVectors(describe, rank_lists.dataset, wanted)
        self._queries = BoxVectors(
            describe, rank_lists.query_dataset, ((row.image_id, row.box) for row in rank_lists)
        )

    @property
    def facts(self) -> dict[str, int]:
        """How many images could not be read."""
        return {
            "num_images_unread": self._vectors.num_unread,
            "num_query_images_unread": self._queries.num_unread,
        }

    def __call__(self, found: Sequence[Sequence[Box | None]]) -> list[RankList]:
        """The lists in the order of one run's boxes; candidates keep the search's boxes."""
        return [
            self._ordered(row, _filled(row, boxes))
            for row, boxes in zip(self._rank_lists, found, strict=True)
        ]

    def _ordered(self, row: RankList, boxes: Sequence[Box]) -> RankList:
        """One list; as it is if its query could not be read, unread candidates last."""
        query = self._queries(row.image_id, row.box)
        if query is None or not row.candidates:
            return row
        found = [self._vectors(c.image_id, b) for c, b in zip(row.candidates, boxes, strict=True)]
        # Nothing is less similar to the query than its opposite.
        vectors = torch.stack([-query if vector is None else vector for vector in found])
        return rerank([row], query[None], [vectors])[0]


def _filled(row: RankList, boxes: Sequence[Box | None]) -> list[Box]:
    pairs = zip(row.candidates, boxes, strict=True)
    return [candidate.box if box is None else box for candidate, box in pairs]
