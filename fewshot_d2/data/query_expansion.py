"""New queries out of the instances that a stage is sure of (SPIL, section 4): query expansion of few-shot detection."""

import numpy as np

from .pseudo_labels import PseudoLabels
from .rank_lists import RankList, RankLists


def found_instances(
    rank_lists: RankLists, labels: PseudoLabels, *, number: int = 10, seed: int = 0
) -> dict[int, tuple[RankList, ...]]:
    """Sample confident boxes of each query's candidates as further queries for the same instance.

    Args:
        rank_lists: that were searched. labels: what was found; of paper 5.4 those of stage 1.
        number: of a query, at most; all where there are fewer. seed: of the draw.

    Returns:
        {query id: new queries without candidates}, for the queries that have any. They are of the data set that was
        searched, have the label of their query, and ids of their own, 0, 1, ...

    Raises:
        ValueError: the labels are of other rank lists, or an argument is out of its range.
    """
    if number < 1 or seed < 0:
        raise ValueError(f"number must be at least 1 and seed at least 0, got {number} and {seed}")
    labels.check(rank_lists)
    found: dict[int, tuple[RankList, ...]] = {}
    num_queries = 0
    for row, rank_list in enumerate(rank_lists):
        places = [
            (rank_list.candidates[position].image_id, scored.box)
            for position, boxes in labels.confident(row).items()
            for scored in boxes
        ]
        drawn = np.random.default_rng((seed, row)).permutation(len(places))[:number]
        if len(drawn):
            found[rank_list.query_id] = tuple(
                RankList(num_queries + n, *places[i], rank_list.label, ())
                for n, i in enumerate(sorted(drawn))
            )
        num_queries += len(drawn)
    return found
