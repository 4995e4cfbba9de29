"""A second search with what the first stages found (SPIL, sections 4 and 5.4; spec B3, item 40)."""

import logging
from dataclasses import replace
from pathlib import Path

from detectron2.config import CfgNode

from ..data.loaders import pool_indices
from ..data.pseudo_labels import PseudoLabels
from ..data.query_expansion import found_instances
from ..data.rank_lists import RankList, RankLists
from ..retrieval import expand_queries
from .region_search import own_images, search_regions

logger = logging.getLogger(__name__)


def expand_rank_lists(
    cfg: CfgNode,
    rank_lists: RankLists,
    labels: PseudoLabels,
    *,
    number: int = 10,
    seed: int = 0,
    folder: str | Path,
) -> RankLists | None:
    """Search for confident instances of each query too, and join what they find with its list.

    Args:
        cfg: of configs/retrieval, the one that the lists were made with, for similarities must compare.
        rank_lists, labels, number, seed: of ``found_instances``.
        folder: keeps the regions of the data set that is searched, see ``describe_gallery``.

    Returns:
        The queries with FEWSHOT.RETRIEVAL.DEPTH candidates at most, the best of all their searches; their own images
        are in none. None off the main process.

    Raises:
        ValueError: the labels are of other lists or sure of nothing.
    """
    queries = found_instances(rank_lists, labels, number=number, seed=seed)
    num_new = sum(map(len, queries.values()))
    if not num_new:
        raise ValueError(
            f"labels must have boxes above their threshold {labels.threshold:g}, got none in {len(rank_lists)} lists"
        )
    logger.info("%d new queries for %d of %d lists", num_new, len(queries), len(rank_lists))
    found = search_regions(
        cfg,
        dataset=rank_lists.dataset,
        query_dataset=rank_lists.dataset,
        queries=[query for of_list in queries.values() for query in of_list],
        folder=folder,
    )
    if found is None:
        return None
    own = own_images(*pool_indices(rank_lists))
    images = {row.query_id: own[row.image_id] for row in rank_lists}
    # A new query whose image cannot be read any more has found nothing.
    of_id = {row.query_id: row for row in found}
    extra = {
        origin: [_without(of_id[q.query_id], images[origin]) for q in new if q.query_id in of_id]
        for origin, new in queries.items()
    }
    joined = expand_queries(
        rank_lists.lists, extra, depth=cfg.FEWSHOT.RETRIEVAL.DEPTH, skip_own_image=False
    )
    method = (
        f"{rank_lists.method}; expanded by {num_new} instances above {labels.threshold:g} of stage {labels.stage}, "
        f"at most {number} a query, seed {seed}, of the lists {rank_lists.sha256[:16]}"
    )
    return RankLists(rank_lists.dataset, rank_lists.query_dataset, method, joined)


def _without(row: RankList, image_ids: list[int]) -> RankList:
    return replace(row, candidates=tuple(c for c in row.candidates if c.image_id not in image_ids))
