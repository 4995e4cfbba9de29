"""Rank lists of a search that does not exist: made from annotations, as good or bad as wanted.

They show what self-paced training (SPIL) makes of a search of known quality, apart from how a search comes by it. As
salient regions do, a box shows a part of the instance.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from detectron2.structures import BoxMode

from .index import InstanceIndex
from .rank_lists import Candidate, RankList
from .typed_json import XYXY


def simulated_lists(
    index: InstanceIndex,
    queries: Sequence[RankList],
    *,
    depth: int,
    precision: float,
    box_iou: float,
    seed: int,
) -> tuple[RankList, ...]:
    """Rank lists whose every place has a true image with the same probability, as long as there are any.

    Args:
        index: of the data set that is searched, with annotations; the queries are of it too.
        queries: without candidates; their labels are classes. depth: images in a list, at most.
        precision: probability of a true image, in [0, 1].
        box_iou: of a box with the instance that it lies in, in (0, 1]; of another class's in false images.

    Returns:
        The queries with candidates, without their own image. Scores are places and mean nothing else.

    Raises:
        ValueError: an argument is out of its range.
    """
    if not 0 <= precision <= 1 or not 0 < box_iou <= 1 or depth < 1:
        raise ValueError(
            "precision must be in [0, 1], box_iou in (0, 1] and depth at least 1, got "
            f"{precision}, {box_iou} and {depth}"
        )
    return tuple(
        _filled(
            index, query, depth, precision, box_iou, np.random.default_rng((seed, query.query_id))
        )
        for query in queries
    )


def _filled(
    index: InstanceIndex,
    query: RankList,
    depth: int,
    precision: float,
    box_iou: float,
    rng: np.random.Generator,
) -> RankList:
    own = index.image_index(query.image_id)
    right = set(index.images_with(query.label)) - {own}
    wrong = {i for c in index.class_ids for i in index.images_with(c)} - right - {own}
    drawn = {
        True: list(rng.permutation(sorted(right))),
        False: list(rng.permutation(sorted(wrong))),
    }
    candidates: list[Candidate] = []
    while len(candidates) < depth and (drawn[True] or drawn[False]):
        is_right = bool(drawn[True]) and (not drawn[False] or rng.random() < precision)
        image = int(drawn[is_right].pop())
        classes = [query.label] if is_right else index.classes_in(image)
        whole = _an_instance(index, image, int(rng.choice(classes)), rng)
        record = index.dicts[image]
        score = 1 - len(candidates) / depth
        candidates.append(Candidate(record["image_id"], score, _part(whole, box_iou, rng)))
    return replace(query, candidates=tuple(candidates))


def _an_instance(index: InstanceIndex, image: int, class_id: int, rng: np.random.Generator) -> XYXY:
    position = int(rng.choice(index.instances(image, class_id)))
    annotation = index.dicts[image]["annotations"][position]
    return BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS)


def _part(box: XYXY, iou: float, rng: np.random.Generator) -> XYXY:
    """A box of the same shape somewhere inside: the ratio of the areas is the IoU."""
    corner, size = np.array(box[:2], float), np.array(box[2:], float) - np.array(box[:2], float)
    part = size * iou**0.5
    start = corner + rng.random(2) * (size - part)
    return tuple(map(float, (*start, *(start + part))))
