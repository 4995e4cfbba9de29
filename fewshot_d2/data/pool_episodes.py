"""A sample pool as training episodes: what self-paced training reads (SPIL, paper algorithm 1).

An episode's class 0 is the instance of the query, class 1 that of another one, which counts as absent. Annotations
of the data sets are removed before anything is indexed: boxes come from the rank lists and the pseudo labels alone.
"""

from collections.abc import Callable
from typing import Any

from detectron2.structures import BoxMode

from .episodes import Episode
from .index import InstanceIndex
from .rank_lists import RankLists
from .sample_pool import Place, SamplePool
from .typed_json import XYXY


class PoolEpisodes:
    """All training episodes of a stage: ``episodes[t]`` is the mapped sample ``t`` of the pool, for any t >= 0."""

    def __init__(
        self,
        pool: SamplePool,
        rank_lists: RankLists,
        query_index: InstanceIndex,
        index: InstanceIndex,
        mapper: Callable[[Episode], dict[str, Any]],
        *,
        with_negatives: bool,
    ):
        """Take the pool of a stage.

        Args:
            query_index, index: of the two data sets, whose images alone are read.
            with_negatives: whether episodes have class 1 (contrastive training).

        Raises:
            ValueError: a rank list has an image or box that the data sets have not.
        """
        rank_lists.check(query_index, index)
        self.pool, self.mapper, self.with_negatives = pool, mapper, with_negatives
        self.rank_lists, self._indices = rank_lists, {True: query_index, False: index}
        # Queries are to this data set what images and classes are to others.
        self.images = list(range(len(pool)))
        self.class_ids = [row.query_id for row in rank_lists]

    def __getitem__(self, number: int) -> dict[str, Any]:
        return self.mapper(self.sample(number))

    def sample(self, number: int) -> Episode:
        """Draw episode ``number``; the result depends on the seed, the stage and the number alone."""
        drawn = self.pool.sample(number)
        rows, supports, weights = [drawn.query_row], [drawn.positives], [drawn.target.weight]
        if self.with_negatives and drawn.negative_row is not None:
            rows.append(drawn.negative_row)
            supports.append(drawn.negatives)
            weights.append(1.0)
        ids = tuple(self.rank_lists.lists[row].query_id for row in rows)
        target = drawn.target
        record = self._record(target.is_query, target.image_id)
        return Episode(
            query={**record, "annotations": [_annotation(box) for box in target.boxes]},
            class_ids=ids,
            class_names=tuple(map(str, ids)),
            contiguous_ids=tuple(range(len(rows))),
            supports=tuple(tuple(map(self._example, places)) for places in supports),
            key=(self.pool.seed, self.pool.stage, number),
            episode_id=number,
            weights=tuple(weights),
        )

    def _example(self, place: Place) -> tuple[dict, dict]:
        return self._record(place.is_query, place.image_id), _annotation(place.box)

    def _record(self, is_query: bool, image_id: int) -> dict:
        index = self._indices[is_query]
        return index.dicts[index.image_index(image_id)]


def _annotation(box: XYXY) -> dict[str, Any]:
    """Ground truth of class 0."""
    return {"bbox": list(box), "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0}
