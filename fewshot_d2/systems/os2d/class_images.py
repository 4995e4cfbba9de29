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


def by_class(
    parts: list[dict[str, Tensor]], order: list[int], num_shots: list[int]
) -> dict[str, Tensor]:
    """Join chunks of encoded class images.

    Args:
        parts: {name: Tensor[B, ...]} of each chunk. order: numbers of the class images in them, class after class.
        num_shots: of each of the K classes, S at most.

    Returns:
        {name: Tensor[K, S, ...]}: zero where a class has fewer.
    """
    most = max(num_shots)
    # Behind all images is a row of zeros.
    places = torch.full((len(num_shots) * most,), len(order))
    wanted = [k * most + s for k, shots in enumerate(num_shots) for s in range(shots)]
    places[torch.tensor(wanted)] = torch.tensor(order).argsort()
    index = places.to(parts[0]["valid"].device)
    joined = {}
    for name, first in parts[0].items():
        nothing = first.new_zeros(1, *first.shape[1:])
        rows = torch.cat([*(part[name] for part in parts), nothing]).index_select(0, index)
        joined[name] = rows.unflatten(0, (len(num_shots), most))
    return joined
