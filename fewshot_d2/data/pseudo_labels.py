"""Pseudo labels: the boxes that a stage of self-paced training (SPIL, paper 3.1) found in the images of rank lists.

Paper equation 4 keeps the best box of an image if its probability is above the threshold of the stage. The boxes below
it are kept in the file too, so that it tells how a candidate fared, and so are further boxes of an image if the search
gives them: few-shot detection has several objects in one.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from ..files import write_json
from . import typed_json
from .rank_lists import RankLists
from .typed_json import XYXY, has_area, is_falling, number, sequence, typed


@dataclass(frozen=True)
class ScoredBox:
    """A box and how sure the network is of it.

    Attributes:
        box (XYXY): pixels of the original image. score (float): probability, in [0, 1].
    """

    box: XYXY
    score: float


@dataclass(frozen=True)
class PseudoLabels:
    """What the network found in every candidate image before a stage that learns from it.

    Attributes:
        stage (int): the stage that learns from these boxes, 1 or more; the network of the stage before found them.
        threshold (float): in [0, 1]; boxes with a score *above* it are confident.
        rank_lists_sha256 (str): of the rank lists that were searched.
        found (tuple[tuple[tuple[ScoredBox, ...], ...], ...]): a tuple for each rank list, in it one for each candidate
            in the list's order, in it the boxes, best first; empty where nothing was found.
    """

    FORMAT: ClassVar[str] = "fewshot_d2/pseudo_labels"
    VERSION: ClassVar[int] = 1

    stage: int
    threshold: float
    rank_lists_sha256: str
    found: tuple[tuple[tuple[ScoredBox, ...], ...], ...]

    def __post_init__(self) -> None:
        if self.stage < 1 or not 0 <= self.threshold <= 1:
            raise ValueError(
                f"stage must be at least 1 and threshold in [0, 1], got {self.stage} and {self.threshold}"
            )
        for row, candidates in enumerate(self.found):
            for position, boxes in enumerate(candidates):
                scores = [b.score for b in boxes]
                if not is_falling(scores) or scores and not 0 <= scores[-1] <= scores[0] <= 1:
                    raise ValueError(
                        f"found[{row}][{position}]: scores must be in [0, 1] and fall from the first box on, "
                        f"got {scores}"
                    )
                if not all(has_area(b.box) for b in boxes):
                    raise ValueError(
                        f"found[{row}][{position}]: boxes must be finite XYXY with an area, "
                        f"got {[list(b.box) for b in boxes]}"
                    )

    def confident(self, row: int) -> dict[int, tuple[ScoredBox, ...]]:
        """{position of a candidate in rank list ``row``: its confident boxes}, of the candidates that have any."""
        above = (
            tuple(box for box in boxes if box.score > self.threshold) for boxes in self.found[row]
        )
        return {position: boxes for position, boxes in enumerate(above) if boxes}

    @cached_property
    def num_confident(self) -> int:
        """Candidates with a confident box, in all rank lists together."""
        return sum(len(self.confident(row)) for row in range(len(self.found)))

    def save(self, path: str | Path) -> None:
        """Write the labels atomically."""
        write_json(path, self._content())

    @classmethod
    def load(cls, path: str | Path) -> "PseudoLabels":
        """Read pseudo labels.

        Raises:
            ValueError: the file has none; the message names the file and what is wrong in it.
        """
        return typed_json.load_document(
            path,
            cls._from_content,
            kind="a pseudo-label file",
            format=cls.FORMAT,
            version=cls.VERSION,
        )

    def check(self, rank_lists: RankLists) -> None:
        """Raise a ``ValueError`` unless the labels are of these rank lists."""
        searched = self.rank_lists_sha256, [len(row) for row in self.found]
        given = rank_lists.sha256, [len(row.candidates) for row in rank_lists]
        if searched != given:
            raise ValueError(
                f"pseudo labels of stage {self.stage} were made for other rank lists: they must be those of "
                f"{self.rank_lists_sha256}, {len(self.found)} lists with {sum(searched[1])} candidates, got "
                f"{rank_lists.sha256}, {len(rank_lists)} lists with {sum(given[1])} candidates"
            )

    @classmethod
    def _from_content(cls, content: Mapping[str, Any]) -> "PseudoLabels":
        rows = sequence(content.get("found"), "found")
        return cls(
            stage=typed(int, content.get("stage"), "stage"),
            threshold=number(content.get("threshold"), "threshold"),
            rank_lists_sha256=typed(str, content.get("rank_lists_sha256"), "rank_lists_sha256"),
            found=tuple(
                tuple(
                    _scored_boxes(boxes, f"found[{row}][{position}]")
                    for position, boxes in enumerate(sequence(candidates, f"found[{row}]"))
                )
                for row, candidates in enumerate(rows)
            ),
        )

    def _content(self) -> dict[str, Any]:
        return {
            "format": self.FORMAT,
            "version": self.VERSION,
            "stage": self.stage,
            "threshold": float(self.threshold),
            "rank_lists_sha256": self.rank_lists_sha256,
            "found": [
                [
                    [{"box": [*map(float, b.box)], "score": float(b.score)} for b in boxes]
                    for boxes in candidates
                ]
                for candidates in self.found
            ],
        }


def _scored_boxes(rows: Any, where: str) -> tuple[ScoredBox, ...]:
    values = [typed_json.record(ScoredBox, row, where) for row in sequence(rows, where)]
    return tuple(
        ScoredBox(typed_json.box(v["box"], where), number(v["score"], f"{where}: score"))
        for v in values
    )
