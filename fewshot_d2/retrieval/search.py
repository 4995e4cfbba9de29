"""From the vectors of regions to rank lists: search, re-ranking, query expansion. Features are the caller's."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.rank_lists import Candidate, RankList
from ..files import write_tensors
from .index import ExactIndex, VectorIndex, read_tensors


@dataclass(frozen=True, eq=False)
class GalleryRegions:
    """The regions of all images of a data set that is searched; a region's id in an index is its row.

    Attributes:
        image_ids (int64[M]): image of each region, in any order.
        boxes (float32[M, 4]): XYXY in pixels of the original image.
        vectors (float32[M, D]): finite.
    """

    FORMAT: ClassVar[str] = "fewshot_d2/gallery_regions"
    VERSION: ClassVar[int] = 1

    image_ids: Tensor
    boxes: Tensor
    vectors: Tensor

    def __post_init__(self) -> None:
        size = len(self.image_ids)
        if self.image_ids.dtype != torch.int64 or self.image_ids.shape != (size,) or not size:
            raise ValueError(f"image_ids must be int64[M], got {list(self.image_ids.shape)}")
        if self.boxes.shape != (size, 4) or self.vectors.dim() != 2 or len(self.vectors) != size:
            raise ValueError(
                f"boxes and vectors must be [{size}, 4] and [{size}, D], "
                f"got {list(self.boxes.shape)} and {list(self.vectors.shape)}"
            )
        if not all(t.isfinite().all() for t in (self.boxes, self.vectors)):
            raise ValueError("boxes and vectors must be finite, got others")
        empty = (self.boxes[:, 2:] <= self.boxes[:, :2]).any(dim=1)
        if empty.any():
            row = int(empty.nonzero()[0])
            raise ValueError(
                f"boxes must have an area, got {self.boxes[row].tolist()} in row {row}"
            )

    def __len__(self) -> int:
        return len(self.image_ids)

    @cached_property
    def rows(self) -> Mapping[int, tuple[int, ...]]:
        """Rows of each image."""
        found: dict[int, list[int]] = {}
        for row, image_id in enumerate(self.image_ids.tolist()):
            found.setdefault(image_id, []).append(row)
        return {image_id: tuple(rows) for image_id, rows in found.items()}

    @classmethod
    def cat(cls, parts: Sequence["GalleryRegions"]) -> "GalleryRegions":
        """The regions of all parts, one after the other."""
        names = ("image_ids", "boxes", "vectors")
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in names))

    def fill(self, index: VectorIndex) -> VectorIndex:
        """Add all regions to an empty index and return it."""
        index.add(torch.arange(len(self)), self.vectors)
        return index

    def save(self, path: str | Path) -> None:
        """Write the regions atomically as one file of tensors."""
        content = {"image_ids": self.image_ids, "boxes": self.boxes, "vectors": self.vectors}
        # A copy, as torch would write all that a slice is part of.
        content = {name: value.detach().cpu().clone() for name, value in content.items()}
        write_tensors(path, {"format": self.FORMAT, "version": self.VERSION, **content})

    @classmethod
    def load(cls, path: str | Path) -> "GalleryRegions":
        """Read regions.

        Raises:
            ValueError: the file holds none; the message names it.
        """
        keys = {"image_ids", "boxes", "vectors"}
        content = read_tensors(path, cls.FORMAT, cls.VERSION, keys)
        try:
            return cls(**content)
        except ValueError as error:
            raise ValueError(f"{path} must be a file of regions, got: {error}") from error


def rank(
    gallery: GalleryRegions,
    query_vectors: Tensor,
    queries: Sequence[RankList],
    *,
    depth: int = 128,
    index: VectorIndex | None = None,
    skip: Sequence[Collection[int]] | None = None,
) -> tuple[RankList, ...]:
    """Search: the score of an image is that of its most similar region, whose box is the candidate's.

    Args:
        gallery: what is searched.
        query_vectors (float[Q, D]).
        queries: Q of them; candidates that they have are replaced.
        depth: images in a list, at most.
        index: of ``gallery.fill``; None makes an exact one.
        skip: for each query, ids of images that its list lacks, such as its own; None takes the queries to be of
            the data set that is searched, and skips the image of each.

    Returns:
        The queries with their candidates, as many as the gallery and an approximate index give.

    Raises:
        ValueError: sizes do not fit.
    """
    if depth < 1:
        raise ValueError(f"depth must be at least 1, got {depth}")
    if len(query_vectors) != len(queries):
        raise ValueError(f"query_vectors must be {len(queries)}, got {len(query_vectors)}")
    skip = [(query.image_id,) for query in queries] if skip is None else skip
    if len(skip) != len(queries):
        raise ValueError(f"skip must have {len(queries)} entries, got {len(skip)}")
    index = gallery.fill(ExactIndex()) if index is None else index
    if len(index) != len(gallery):
        raise ValueError(f"index must hold {len(gallery)} regions of the gallery, got {len(index)}")
    exclude = [[row for i in images for row in gallery.rows.get(i, ())] for images in skip]
    found = _search_images(gallery, index, query_vectors, exclude, depth)
    return tuple(replace(q, candidates=c) for q, c in zip(queries, found, strict=True))


def rerank(
    rank_lists: Sequence[RankList],
    query_vectors: Tensor,
    vectors: Sequence[Tensor],
    boxes: Sequence[Tensor] | None = None,
) -> tuple[RankList, ...]:
    """Order candidates by the similarity of new vectors, such as of boxes that a detector found.

    Args:
        rank_lists: Q of them.
        query_vectors (float[Q, D]).
        vectors: Q of float[n, D], of the n candidates of each list in its order.
        boxes: Q of float[n, 4], XYXY in pixels of the original image, that replace those of the candidates.

    Returns:
        The lists with new scores; of equal ones the better candidate before stays the better.

    Raises:
        ValueError: sizes do not fit.
    """
    if boxes is None:
        boxes = [_boxes(row) for row in rank_lists]
    if not len(rank_lists) == len(query_vectors) == len(vectors) == len(boxes):
        raise ValueError(
            f"there must be as many query vectors, vectors and boxes as the {len(rank_lists)} rank lists, "
            f"got {len(query_vectors)}, {len(vectors)} and {len(boxes)}"
        )
    rows = zip(rank_lists, query_vectors, vectors, boxes, strict=True)
    return tuple(_reranked(*row) for row in rows)


def expand_queries(
    rank_lists: Sequence[RankList],
    extra: Mapping[int, Sequence[RankList]],
    *,
    depth: int = 128,
    skip_own_image: bool = True,
) -> tuple[RankList, ...]:
    """Merge what further instances of a query found into its list: union by image, best similarity.

    Args:
        rank_lists: of the original queries.
        extra: id of an original query -> rank lists of further instances of it.
        depth: images in a list, at most.
        skip_own_image: whether extra lists may hold the original query's own image, which is left out.

    Returns:
        The original queries in their order. Of equal similarities the original list's candidate comes first and
        keeps its box.

    Raises:
        ValueError: ``extra`` has a query that there is none of.
    """
    unknown = extra.keys() - {row.query_id for row in rank_lists}
    if unknown:
        raise ValueError(f"extra lists must be of queries that exist, got {sorted(unknown)[:5]}")
    if depth < 1:
        raise ValueError(f"depth must be at least 1, got {depth}")
    merged = []
    for row in rank_lists:
        further = (c for other in extra.get(row.query_id, ()) for c in other.candidates)
        if skip_own_image:
            further = (c for c in further if c.image_id != row.image_id)
        best = _best_per_image([*row.candidates, *further], depth)
        merged.append(replace(row, candidates=best))
    return tuple(merged)


def _search_images(
    gallery: GalleryRegions,
    index: VectorIndex,
    vectors: Tensor,
    exclude: Sequence[Sequence[int]],
    depth: int,
) -> list[tuple[Candidate, ...]]:
    """Candidates of each query; more and more regions are asked for until there are enough images."""
    num_regions = min(len(gallery), 4 * depth)
    found: list[tuple[Candidate, ...]] = [()] * len(vectors)
    open_rows = list(range(len(vectors)))
    while open_rows:
        scores, ids = index.search(
            vectors[open_rows], num_regions, [exclude[row] for row in open_rows]
        )
        for row, hit_scores, hits in zip(open_rows, scores, ids, strict=True):
            known = hits >= 0
            found[row] = _candidates(gallery, hit_scores[known], hits[known], depth)
        # A query that got fewer hits than it asked for has seen all there are.
        full = (ids >= 0).all(dim=1).tolist()
        open_rows = [r for r, more in zip(open_rows, full) if more and len(found[r]) < depth]
        if num_regions == len(gallery):
            break
        num_regions = min(len(gallery), 2 * num_regions)
    return found


def _candidates(
    gallery: GalleryRegions, scores: Tensor, rows: Tensor, depth: int
) -> tuple[Candidate, ...]:
    """Hits (float[k] and int64[k]) -> the best of each image."""
    values = zip(
        gallery.image_ids[rows].tolist(), scores.tolist(), gallery.boxes[rows].tolist(), strict=True
    )
    return _best_per_image([Candidate(i, s, tuple(box)) for i, s, box in values], depth)


def _best_per_image(candidates: Sequence[Candidate], depth: int) -> tuple[Candidate, ...]:
    """The best candidate of each image, best first, of equal ones the first."""
    best: dict[int, Candidate] = {}
    for candidate in sorted(candidates, key=lambda c: -c.score):
        best.setdefault(candidate.image_id, candidate)
    return tuple(best.values())[:depth]


def _boxes(row: RankList) -> Tensor:
    """The candidates' boxes as float64[n, 4]: they are to come out as they went in."""
    return torch.tensor([c.box for c in row.candidates], dtype=torch.float64).reshape(-1, 4)


def _reranked(row: RankList, query: Tensor, vectors: Tensor, boxes: Tensor) -> RankList:
    size = len(row.candidates)
    if boxes.shape != (size, 4) or vectors.shape != (size, *query.shape):
        raise ValueError(
            f"query {row.query_id}: vectors and boxes must be [{size}, {len(query)}] and [{size}, 4], "
            f"got {list(vectors.shape)} and {list(boxes.shape)}"
        )
    scores = F.normalize(vectors.float(), dim=1) @ F.normalize(query.float(), dim=0)
    values = zip(row.candidates, scores.tolist(), boxes.tolist(), strict=True)
    new = [replace(c, score=score, box=tuple(box)) for c, score, box in values]
    return replace(row, candidates=tuple(sorted(new, key=lambda c: -c.score)))
