"""Rank lists: what an instance search found for each query, as a file that any search engine can supply.

``box`` is XYXY in pixels of the original image everywhere. A candidate's box is where the search saw the instance.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from ..files import canonical_sha256, write_json
from . import typed_json
from .index import InstanceIndex
from .typed_json import XYXY, has_area, is_falling, number, sequence, typed


@dataclass(frozen=True)
class Candidate:
    """An image of a rank list.

    Attributes:
        image_id (int): of the data set that was searched. score (float): of the search, higher is better. box (XYXY).
    """

    image_id: int
    score: float
    box: XYXY


@dataclass(frozen=True)
class RankList:
    """A query and what was found for it.

    Attributes:
        query_id (int): unique in its file. image_id (int), box (XYXY): the instance that was searched for.
        label (int): what is known of the instance, such as its class; queries of one label never are each other's
            negatives. Each query has a label of its own where nothing is known.
        candidates (tuple[Candidate, ...]): best first, each image once.
    """

    query_id: int
    image_id: int
    box: XYXY
    label: int
    candidates: tuple[Candidate, ...]

    def __post_init__(self) -> None:
        images = [c.image_id for c in self.candidates]
        if len(set(images)) != len(images):
            raise ValueError(f"query {self.query_id}: each image must be listed once, got {images}")
        for name, box in (("query", self.box), *((c.image_id, c.box) for c in self.candidates)):
            if not has_area(box):
                raise ValueError(
                    f"query {self.query_id}: the box of {name} must be finite XYXY with an area, got {list(box)}"
                )
        if not is_falling([c.score for c in self.candidates]):
            raise ValueError(
                f"query {self.query_id}: scores must be finite and fall from the first candidate on"
            )


@dataclass(frozen=True)
class RankLists:
    """All rank lists of a search.

    Attributes:
        dataset (str): registered name of what was searched. query_dataset (str): of the queries; may be the same.
        method (str): how the lists were made, for people.
        lists (tuple[RankList, ...]).
    """

    FORMAT: ClassVar[str] = "fewshot_d2/rank_lists"
    VERSION: ClassVar[int] = 1

    dataset: str
    query_dataset: str
    method: str
    lists: tuple[RankList, ...]

    def __post_init__(self) -> None:
        ids = [row.query_id for row in self.lists]
        if not ids or len(set(ids)) != len(ids):
            raise ValueError(f"rank lists must have queries with unique ids, got {ids}")

    def __len__(self) -> int:
        return len(self.lists)

    def __iter__(self) -> Iterator[RankList]:
        return iter(self.lists)

    @cached_property
    def sha256(self) -> str:
        """Hash of the content in canonical form."""
        return canonical_sha256(self._content())

    def save(self, path: str | Path) -> None:
        """Write the lists atomically."""
        write_json(path, self._content())

    @classmethod
    def load(cls, path: str | Path) -> "RankLists":
        """Read rank lists, of this package or of any other search.

        Raises:
            ValueError: the file is none; the message names the file and what is wrong in it.
        """
        return typed_json.load_document(
            path, cls._from_content, kind="a rank-list file", format=cls.FORMAT, version=cls.VERSION
        )

    def check(self, query_index: InstanceIndex, index: InstanceIndex) -> None:
        """Raise a ``ValueError`` that names the culprit unless these data sets have all images, and they the boxes.

        A box may leave its image, as those of a search do, but not altogether.
        """
        for row in self.lists:
            try:
                _check_box(query_index, row.image_id, row.box)
                for candidate in row.candidates:
                    _check_box(index, candidate.image_id, candidate.box)
            except ValueError as error:
                raise ValueError(
                    f"query {row.query_id} of the rank lists must fit the data sets: {error}"
                ) from error

    @classmethod
    def _from_content(cls, content: Mapping[str, Any]) -> "RankLists":
        rows = sequence(content.get("lists"), "lists")
        return cls(
            **{k: typed(str, content.get(k), k) for k in ("dataset", "query_dataset", "method")},
            lists=tuple(_rank_list(row, f"lists[{i}]") for i, row in enumerate(rows)),
        )

    def _content(self) -> dict[str, Any]:
        # Numbers become what they are once the file was read, so that the hash is the same before and after.
        lists = [
            {
                **vars(row),
                "box": [*map(float, row.box)],
                "candidates": [
                    {"image_id": c.image_id, "score": float(c.score), "box": [*map(float, c.box)]}
                    for c in row.candidates
                ],
            }
            for row in self.lists
        ]
        return {
            "format": self.FORMAT,
            "version": self.VERSION,
            "dataset": self.dataset,
            "query_dataset": self.query_dataset,
            "method": self.method,
            "lists": lists,
        }


def _check_box(index: InstanceIndex, image_id: int, box: XYXY) -> None:
    record = index.dicts[index.image_index(image_id)]
    width, height = record["width"], record["height"]
    if not has_area((max(box[0], 0), max(box[1], 0), min(box[2], width), min(box[3], height))):
        raise ValueError(
            f"the box in image {image_id} must have an area inside its {width} x {height} pixels, got {list(box)}"
        )


def _rank_list(row: Any, where: str) -> RankList:
    values = typed_json.record(RankList, row, where)
    candidates = sequence(values["candidates"], f"{where}: candidates")
    return RankList(
        query_id=typed(int, values["query_id"], f"{where}: query_id"),
        image_id=typed(int, values["image_id"], f"{where}: image_id"),
        box=typed_json.box(values["box"], where),
        label=typed(int, values["label"], f"{where}: label"),
        candidates=tuple(
            _candidate(c, f"{where}: candidate {i}") for i, c in enumerate(candidates)
        ),
    )


def _candidate(row: Any, where: str) -> Candidate:
    values = typed_json.record(Candidate, row, where)
    return Candidate(
        image_id=typed(int, values["image_id"], f"{where}: image_id"),
        score=number(values["score"], f"{where}: score"),
        box=typed_json.box(values["box"], where),
    )
