"""Pictures of how the boxes of candidates move from stage to stage (SPIL fig. 4)."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from ..data.dataset_mapper import read_image
from ..data.rank_lists import RankLists
from ..visualization.search import stages_panel
from .coco_scoring import GroundTruth
from .instance_search import candidate_ious
from .report_gallery import GalleryPicture, _jpeg
from .search_runs import NO_BOX, Box, SearchTruth

logger = logging.getLogger(__name__)

# Keeps the choice of pictures apart from everything else that is drawn from a seed.
_STREAM = 335


@dataclass(frozen=True, eq=False)
class ChosenQuery:
    """A query that is drawn.

    Attributes:
        number (int): its place in the rank lists. image (uint8[H, W, 3]): RGB, with the query.
        candidates: {position in the list: uint8[H, W, 3]}, best first; all of them are true.
    """

    number: int
    image: np.ndarray
    candidates: Mapping[int, np.ndarray]


class PictureReader:
    """Reads pictures of dataset dicts; counts those that cannot be read in ``num_unread``."""

    def __init__(self) -> None:
        self.num_unread = 0

    def __call__(self, record: dict[str, Any]) -> np.ndarray | None:
        """Read a picture, RGB uint8[H, W, 3]; None if it cannot be read, which is logged."""
        try:
            return read_image(record, "RGB")
        except ValueError as error:
            logger.error("Not drawn: %s", error)
            self.num_unread += 1
            return None


def choose_queries(
    rank_lists: RankLists,
    truth: SearchTruth,
    images: GroundTruth,
    query_images: GroundTruth,
    read: PictureReader,
    *,
    seed: int,
    num_queries: int,
    num_candidates: int = 7,
) -> list[ChosenQuery]:
    """Draw queries that have true candidates, and some of these; others stand for pictures that cannot be read.

    Args:
        rank_lists: what was found. truth: of them.
        images, query_images: of the data set that was searched and of the queries'.
        read: of pictures.
        seed: the same one gives the same pictures.
        num_queries: at most. num_candidates: of each, at most.
    """
    rng = np.random.default_rng((seed, _STREAM))
    chosen: list[ChosenQuery] = []
    for number in rng.permutation(len(rank_lists)).tolist():
        if len(chosen) == num_queries:
            break
        row = rank_lists.lists[number]
        image_ids = [c.image_id for c in row.candidates]
        true = [i for i in truth.counted(row) if len(truth.of_image(row, image_ids[i]))]
        order = rng.permutation(true).astype(int).tolist()
        query = read(query_images.images[row.image_id]) if order else None
        if query is None:
            continue
        pictures = ((i, read(images.images[image_ids[i]])) for i in order)
        readable = ((i, pixels) for i, pixels in pictures if pixels is not None)
        found = dict(sorted(islice(readable, num_candidates)))
        if found:
            chosen.append(ChosenQuery(number, query, found))
    return chosen


def draw_stages(
    chosen: ChosenQuery,
    rank_lists: RankLists,
    truth: SearchTruth,
    stages: Mapping[str, Sequence[Sequence[Box | None]]],
) -> GalleryPicture:
    """Draw the query first, in it its box, then its candidates with their boxes of every stage.

    Args:
        chosen: of these rank lists. truth: of them.
        stages: {name: a box or None for each candidate of each list}, in the order of time.
    """
    row = rank_lists.lists[chosen.number]
    places = {position: i for i, position in enumerate(truth.counted(row))}
    boxes_of = {name: boxes[chosen.number] for name, boxes in stages.items()}
    ious = {
        name: candidate_ious(truth.query(row, boxes), depth=len(places))
        for name, boxes in boxes_of.items()
    }
    images, tracks = [chosen.image], [np.full((len(stages), 4), np.nan)]
    captions, true = [f"query {row.query_id}"], [np.array([row.box], dtype=float)]
    for position, pixels in chosen.candidates.items():
        images.append(pixels)
        track = [boxes[position] for boxes in boxes_of.values()]
        tracks.append(np.array([NO_BOX if box is None else box for box in track], dtype=float))
        true.append(truth.of_image(row, row.candidates[position].image_id))
        values = (f"{values[places[position]]:.2f}" for values in ious.values())
        captions.append(f"{places[position] + 1}: IoU {' '.join(values)}")
    panel = stages_panel(images, tracks, list(stages), truth=true, captions=captions)
    caption = (
        f"Query {row.query_id} and true images of its list, with their rank and the IoU of "
        f"{', '.join(stages)}."
    )
    return GalleryPicture(_jpeg(panel), caption)
