"""Rank lists: what an instance search found for each query, as a file that any search engine can supply.

``box`` is XYXY in pixels of the original image everywhere. A candidate's box is where the search saw the instance.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from ..files import canonical_sha256, write_json
from .index import InstanceIndex

T = TypeVar("T")
XYXY = tuple[float, float, float, float]


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
            if not all(map(math.isfinite, box)) or box[2] <= box[0] or box[3] <= box[1]:
                raise ValueError(
                    f"query {self.query_id}: the box of {name} must be finite XYXY with an area, got {list(box)}"
                )
        scores = [c.score for c in self.candidates]
        if not all(map(math.isfinite, scores)) or scores != sorted(scores, reverse=True):
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
        try:
            content = json.loads(Path(path).read_bytes())
            header = content if isinstance(content, dict) else {}
            if header.get("format") != cls.FORMAT or header.get("version") != cls.VERSION:
                raise ValueError(f"format must be {cls.FORMAT} version {cls.VERSION}")
            rows = _sequence(content.get("lists"), "lists")
            return cls(
                **{
                    k: _typed(str, content.get(k), k)
                    for k in ("dataset", "query_dataset", "method")
                },
                lists=tuple(_rank_list(row, f"lists[{i}]") for i, row in enumerate(rows)),
            )
        except ValueError as error:
            raise ValueError(f"{path} must be a rank-list file, got: {error}") from error

    def check(self, query_index: InstanceIndex, index: InstanceIndex) -> None:
        """Raise a ``ValueError`` that names the culprit unless all images exist in these data sets."""
        for row in self.lists:
            try:
                query_index.image_index(row.image_id)
                for candidate in row.candidates:
                    index.image_index(candidate.image_id)
            except ValueError as error:
                raise ValueError(
                    f"query {row.query_id} of the rank lists must fit the data sets: {error}"
                ) from error

    def _content(self) -> dict[str, Any]:
        lists = [
            {**vars(row), "candidates": [vars(candidate) for candidate in row.candidates]}
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


def _rank_list(row: Any, where: str) -> RankList:
    values = _checked(RankList, row, where)
    candidates = _sequence(values["candidates"], f"{where}: candidates")
    return RankList(
        query_id=_typed(int, values["query_id"], f"{where}: query_id"),
        image_id=_typed(int, values["image_id"], f"{where}: image_id"),
        box=_box(values["box"], where),
        label=_typed(int, values["label"], f"{where}: label"),
        candidates=tuple(
            _candidate(c, f"{where}: candidate {i}") for i, c in enumerate(candidates)
        ),
    )


def _candidate(row: Any, where: str) -> Candidate:
    values = _checked(Candidate, row, where)
    return Candidate(
        image_id=_typed(int, values["image_id"], f"{where}: image_id"),
        score=_number(values["score"], f"{where}: score"),
        box=_box(values["box"], where),
    )


def _checked(kind: type, row: Any, where: str) -> Mapping[str, Any]:
    expected = {field.name for field in fields(kind)}
    if not isinstance(row, dict) or row.keys() != expected:
        raise ValueError(f"{where} must be an object of {sorted(expected)}, got {str(row)[:80]}")
    return row


def _box(value: Any, where: str) -> XYXY:
    numbers = [_number(v, f"{where}: box") for v in _sequence(value, f"{where}: box")]
    if len(numbers) != 4:
        raise ValueError(f"{where}: box must be four numbers XYXY, got {numbers}")
    return tuple(numbers)


def _number(value: Any, what: str) -> float:
    if type(value) not in (int, float):
        raise ValueError(f"{what} must be a number, got {value!r}")
    return float(value)


def _typed(kind: type[T], value: Any, what: str) -> T:
    if type(value) is not kind:
        raise ValueError(f"{what} must be of type {kind.__name__}, got {value!r}")
    return value


def _sequence(value: Any, what: str) -> Sequence[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{what} must be a list, got {str(value)[:80]}")
    return value
