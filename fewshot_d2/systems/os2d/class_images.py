"""Class images of a batch: which of them a query is searched for, and what is known of their matches.

K classes, S shots, R class images of one query, n = H W places of its map.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .matchers import Matches
from .objective import Targets


@dataclass(frozen=True)
class ClassImages:
    """The R class images that one query is searched for; on the CPU, where nobody waits for them.

    Attributes:
        classes, rows, shots (int64[R]): of each, its class in the query's support, its class in the batch's, its shot.
    """

    classes: Tensor
    rows: Tensor
    shots: Tensor

    @classmethod
    def of(cls, valid: Tensor, rows: list[int]) -> "ClassImages":
        """All shots of the classes at ``rows`` of the batch's support; valid (Tensor[K, S]): 1 where there is one."""
        row = torch.tensor(rows, dtype=torch.int64)
        classes, shots = valid[row].nonzero(as_tuple=True)
        return cls(classes, row[classes], shots)

    def split(self, size: int) -> list["ClassImages"]:
        """At most ``size`` at a time; one part of none where there is none."""
        parts = zip(
            self.classes.split(size), self.rows.split(size), self.shots.split(size), strict=True
        )
        return [ClassImages(*part) for part in parts]


@dataclass
class LabelledMatches:
    """The matches of one query of a batch with what is known about them.

    Attributes:
        rows (int64[R]): of each class image, in the batch's support.
        matches: of R class images. targets: theirs. anchors (Tensor[n, 4]).
    """

    rows: Tensor
    matches: Matches
    targets: Targets
    anchors: Tensor
