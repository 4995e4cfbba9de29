"""Rank lists and the stages that were trained on them, measured against annotations (SPIL spec 32 to 34).

The truth of a query is the instances of its label, which is a category of the data set that was searched. Boxes are
XYXY in pixels of the original image; D = candidates of a list.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from detectron2.structures import BoxMode

from ..data.pseudo_labels import PseudoLabels
from ..data.rank_lists import RankList, RankLists
from .coco_scoring import GroundTruth
from .instance_search import SearchedQuery, candidate_ious

Box = Sequence[float]
NO_BOX = (float("nan"),) * 4
_NO_BOXES = np.empty((0, 4))


@dataclass(frozen=True, eq=False)
class SearchTruth:
    """Where the instances of rank lists really are.

    Attributes:
        boxes: {label: {image id: float64[G, 4]}} of the whole data set that was searched.
        ignored: {query id: images that count neither as true nor as false}: the query's own image, and images whose
            only instances of the label are crowds.
    """

    boxes: Mapping[int, Mapping[int, np.ndarray]]
    ignored: Mapping[int, frozenset[int]]

    @classmethod
    def of(
        cls, rank_lists: RankLists, truth: GroundTruth, query_truth: GroundTruth
    ) -> "SearchTruth":
        """Collect the truth of rank lists.

        Args:
            rank_lists: their labels are categories of the data set.
            truth: of the data set that was searched. query_truth: of the queries'. An image of the first that has
                the file of a query's image is that image, whatever the two data sets are called.

        Raises:
            ValueError: a label is no category, is another one in the queries' data set, or no image has any.
        """
        labels = {row.label for row in rank_lists}
        _check_labels(rank_lists, truth, query_truth)
        instances: dict[int, dict[int, list[Box]]] = {label: defaultdict(list) for label in labels}
        crowds: dict[int, set[int]] = {label: set() for label in labels}
        for instance in truth.annotations.values():
            if instance.class_id not in labels:
                continue
            if instance.is_crowd:
                crowds[instance.class_id].add(instance.image_id)
            else:
                box = BoxMode.convert(instance.box, BoxMode.XYWH_ABS, BoxMode.XYXY_ABS)
                instances[instance.class_id][instance.image_id].append(box)
        if not any(instances.values()):
            raise ValueError(
                f"{rank_lists.dataset} must have annotations of the queries' labels to measure a search in it, "
                f"got none in {len(truth.images)} images"
            )
        same_file: dict[str, set[int]] = defaultdict(set)
        for image_id, record in truth.images.items():
            same_file[record["file_name"]].add(image_id)
        own = {row.query_id: query_truth.images[row.image_id]["file_name"] for row in rank_lists}
        return cls(
            {
                label: {i: np.array(boxes, dtype=float) for i, boxes in of_label.items()}
                for label, of_label in instances.items()
            },
            {
                row.query_id: frozenset(
                    same_file.get(own[row.query_id], set())
                    | (crowds[row.label] - instances[row.label].keys())
                )
                for row in rank_lists
            },
        )

    def of_image(self, row: RankList, image_id: int) -> np.ndarray:
        """The query's instances in an image, float64[G, 4]."""
        return self.boxes[row.label].get(image_id, _NO_BOXES)

    def counted(self, row: RankList) -> list[int]:
        """Positions of the candidates that count."""
        ignored = self.ignored[row.query_id]
        return [i for i, c in enumerate(row.candidates) if c.image_id not in ignored]

    def query(self, row: RankList, boxes: Sequence[Box | None]) -> SearchedQuery:
        """Put a rank list, the boxes of its candidates (D of them, None = no box) and the truth together."""
        counted = self.counted(row)
        found = [NO_BOX if boxes[i] is None else boxes[i] for i in counted]
        truth = [self.of_image(row, row.candidates[i].image_id) for i in counted]
        return SearchedQuery(
            query_id=row.query_id,
            boxes=np.array(found, dtype=float).reshape(-1, 4),
            relevant=np.array([len(rows) > 0 for rows in truth], dtype=bool),
            truth=truth,
            num_relevant=len(self.boxes[row.label].keys() - self.ignored[row.query_id]),
        )


@dataclass(frozen=True, eq=False)
class MeasuredRow:
    """Boxes or an order of the candidates of all queries, to be compared with others.

    Attributes:
        run: name of the training run, "" for the search. stage: such as "stage 0".
        queries (sequence of Q): the same in all rows that are compared.
        facts: what else is known, as JSON.
    """

    run: str
    stage: str
    queries: Sequence[SearchedQuery]
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Unique among the rows that are compared."""
        return f"{self.run}: {self.stage}" if self.run else self.stage


def search_row(rank_lists: RankLists, truth: SearchTruth) -> MeasuredRow:
    """What the search itself found."""
    queries = [truth.query(row, [c.box for c in row.candidates]) for row in rank_lists]
    return MeasuredRow(
        "", "search", queries, {"num_own_or_crowd_left_out": _left_out(queries, rank_lists)}
    )


def stage_row(
    run: str, rank_lists: RankLists, labels: PseudoLabels, truth: SearchTruth
) -> MeasuredRow:
    """What the network of a stage found, its best box in each candidate.

    Raises:
        ValueError: the labels are of other rank lists.
    """
    labels.check(rank_lists)
    queries = [truth.query(*pair) for pair in zip(rank_lists, best_boxes(labels), strict=True)]
    facts = {
        "threshold": labels.threshold,
        "num_candidates": sum(len(row.candidates) for row in rank_lists),
        "num_without_box": sum(not boxes for row in labels.found for boxes in row),
        "num_confident": labels.num_confident,
        **_confident_in_truth(rank_lists, labels, truth, queries),
    }
    # A file is called after the stage that learns from it; the one before has found what is in it.
    return MeasuredRow(run, f"stage {labels.stage - 1}", queries, facts)


def best_boxes(labels: PseudoLabels) -> Iterator[list[Box | None]]:
    """The best box of each candidate, list after list; None where nothing was found."""
    for row in labels.found:
        yield [boxes[0].box if boxes else None for boxes in row]


def _confident_in_truth(
    rank_lists: RankLists,
    labels: PseudoLabels,
    truth: SearchTruth,
    queries: Sequence[SearchedQuery],
) -> dict[str, int]:
    """Of the confident candidates that count, those that are true, and those of them whose IoU is at least 0.5."""
    num_true = num_right = 0
    for number, (row, query) in enumerate(zip(rank_lists, queries, strict=True)):
        confident = labels.confident(number)
        chosen = np.array([i in confident for i in truth.counted(row)], dtype=bool)
        num_true += int((chosen & query.relevant).sum())
        # Comparisons with NaN, the IoU of false images, are false.
        ious = candidate_ious(query, depth=len(chosen))
        num_right += int((chosen & (ious >= 0.5)).sum())
    return {"num_confident_true": num_true, "num_confident_iou50": num_right}


def _left_out(queries: Sequence[SearchedQuery], rank_lists: RankLists) -> int:
    listed = sum(len(row.candidates) for row in rank_lists)
    return listed - sum(len(query.relevant) for query in queries)


def _check_labels(rank_lists: RankLists, truth: GroundTruth, query_truth: GroundTruth) -> None:
    names, query_names = truth.class_names, query_truth.class_names
    for row in rank_lists:
        if row.label not in names:
            raise ValueError(
                f"query {row.query_id}: label must be a category of {rank_lists.dataset}, one of {len(names)}, "
                f"got {row.label}"
            )
        name = names[row.label]
        if query_names.get(row.label, name) != name:
            raise ValueError(
                f"query {row.query_id}: label {row.label} must be the same category in {rank_lists.dataset} and "
                f"{rank_lists.query_dataset}, got {name!r} and {query_names[row.label]!r}"
            )
