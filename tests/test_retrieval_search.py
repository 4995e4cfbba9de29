"""Rank lists from vectors: search, re-ranking and query expansion by loops."""

from dataclasses import replace

import pytest
import torch

from fewshot_d2.data.rank_lists import Candidate, RankList, RankLists
from fewshot_d2.retrieval import (
    ExactIndex,
    FaissIndex,
    GalleryRegions,
    expand_queries,
    rank,
    rerank,
)

BOX = (0.0, 0.0, 5.0, 5.0)


def query(query_id, image_id=1000, *found):
    """A query with candidates (image, score[, x1])."""
    candidates = tuple(Candidate(i, s, (0.0, 0.0, *(x or (5.0,)), 5.0)) for i, s, *x in found)
    return RankList(query_id, image_id, BOX, query_id, candidates)


@pytest.fixture
def gallery(rng):
    """90 regions of 20 images; image 0 has 30 of them, most like the first axis."""
    image_ids = torch.cat([torch.zeros(30).long(), torch.arange(60) % 19 + 1])
    corner = torch.rand(90, 2, generator=rng) * 100
    vectors = torch.randn(90, 6, generator=rng)
    vectors[:30, 0] += 20
    order = torch.randperm(90, generator=rng)
    boxes = torch.cat([corner, corner + 1 + torch.rand(90, 2, generator=rng)], dim=1)
    return GalleryRegions(image_ids[order], boxes[order], vectors[order])


def by_loops(gallery, vector, depth, skipped):
    best = {}
    for image_id, box, other in zip(gallery.image_ids.tolist(), gallery.boxes, gallery.vectors):
        score = float(vector @ other / (vector.norm() * other.norm()))
        if image_id not in skipped and score > best.get(image_id, (-2,))[0]:
            best[image_id] = score, tuple(box.tolist())
    return sorted(((s, i, b) for i, (s, b) in best.items()), reverse=True)[:depth]


@pytest.mark.parametrize("skip", ["own", "none", "several"])
@pytest.mark.parametrize("depth", [1, 3, 128])
@pytest.mark.parametrize("kind", [ExactIndex, FaissIndex])
def test_rank_by_loops(rng, gallery, kind, depth, skip):
    if kind is FaissIndex:
        pytest.importorskip("faiss")
    vectors = torch.randn(3, 6, generator=rng)
    vectors[0, 0] = 50
    queries = [query(5, 3), query(6, 0), query(7, 0, (1, 0.5))]
    # 99 is in no gallery.
    skipped = {"own": [{3}, {0}, {0}], "none": [()] * 3, "several": [[3, 5], [0, 99], [7]]}[skip]
    index = gallery.fill(kind())
    given = None if skip == "own" else skipped
    found = rank(gallery, vectors, queries, depth=depth, index=index, skip=given)
    assert [replace(row, candidates=()) for row in found] == [
        replace(row, candidates=()) for row in queries
    ]
    for row, vector, left_out in zip(found, vectors, skipped):
        expected = by_loops(gallery, vector, depth, left_out)
        assert [(c.image_id, c.box) for c in row.candidates] == [(i, b) for _, i, b in expected]
        assert [c.score for c in row.candidates] == pytest.approx(
            [s for s, *_ in expected], abs=1e-5
        )
    RankLists("all", "all", "test", found)


def test_rank_makes_an_exact_index(rng, gallery):
    vectors = torch.randn(1, 6, generator=rng)
    given = rank(gallery, vectors, [query(1, 2)], index=gallery.fill(ExactIndex()))
    assert rank(gallery, vectors, [query(1, 2)]) == given


def test_rank_with_an_index_that_gives_up_early(rng, gallery):
    pytest.importorskip("faiss")
    index = gallery.fill(FaissIndex("IVF2,Flat", num_probes=1))
    (row,) = rank(gallery, torch.randn(1, 6, generator=rng), [query(1, 2)], index=index)
    assert 0 < len(row.candidates) < 20


def test_rank_bad_input(gallery):
    vectors = torch.ones(1, 6)
    with pytest.raises(ValueError, match="skip must have 1 entries, got 2"):
        rank(gallery, vectors, [query(1, 0)], skip=[(), ()])
    with pytest.raises(ValueError, match="query_vectors must be 2"):
        rank(gallery, vectors, [query(1, 0), query(2, 0)])
    with pytest.raises(ValueError, match="depth must be"):
        rank(gallery, vectors, [query(1, 0)], depth=0)
    with pytest.raises(ValueError, match="index must hold 90"):
        rank(gallery, vectors, [query(1, 0)], index=ExactIndex())
    with pytest.raises(ValueError, match="vectors must be"):
        rank(gallery, torch.ones(1, 5), [query(1, 0)])


def test_gallery_file(tmp_path, gallery):
    path = tmp_path / "gallery.pt"
    gallery.save(path)
    loaded = GalleryRegions.load(path)
    for name in ("image_ids", "boxes", "vectors"):
        assert torch.equal(getattr(loaded, name), getattr(gallery, name))
    assert {i: gallery.image_ids[list(r)].unique().tolist() for i, r in gallery.rows.items()} == {
        i: [i] for i in gallery.image_ids.tolist()
    }
    content = torch.load(path, weights_only=True)
    for bad in (
        {**content, "boxes": content["boxes"][:3]},
        {**content, "version": 2},
        {k: v for k, v in content.items() if k != "vectors"},
    ):
        torch.save(bad, path)
        with pytest.raises(ValueError, match="gallery.pt must"):
            GalleryRegions.load(path)


def test_galleries_one_after_the_other(gallery):
    names = ("image_ids", "boxes", "vectors")
    parts = [
        GalleryRegions(*(getattr(gallery, name)[rows] for name in names))
        for rows in (slice(40), slice(40, 41), slice(41, None))
    ]
    whole = GalleryRegions.cat(parts)
    assert all(torch.equal(getattr(whole, name), getattr(gallery, name)) for name in names)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_ids": torch.zeros(2)}, "int64"),
        ({"image_ids": torch.zeros(0, dtype=torch.int64)}, "int64"),
        ({"boxes": torch.ones(3, 4)}, r"\[2, 4\]"),
        ({"boxes": torch.tensor([[0.0, 0, 1, 1], [0, 0, 1, 0]])}, "in row 1"),
        ({"vectors": torch.tensor([[1.0], [torch.nan]])}, "finite"),
        ({"vectors": torch.ones(2)}, r"\[2, D\]"),
    ],
)
def test_gallery_bad_input(change, message):
    good = {
        "image_ids": torch.arange(2),
        "boxes": torch.tensor([[0.0, 0, 1, 1], [0, 0, 1, 1]]),
        "vectors": torch.ones(2, 3),
    }
    GalleryRegions(**good)
    with pytest.raises(ValueError, match=message):
        GalleryRegions(**{**good, **change})


def test_rerank_by_loops(rng):
    lists = [query(1, 9, (3, 0.9, 5.1), (4, 0.8, 6.0), (5, 0.7, 7.0)), query(2)]
    vectors = [torch.randn(3, 4, generator=rng), torch.zeros(0, 4)]
    queries = torch.randn(2, 4, generator=rng) * 9
    found, empty = rerank(lists, queries, vectors)
    scores = {
        c.image_id: float(queries[0] @ v / queries[0].norm() / v.norm())
        for c, v in zip(lists[0].candidates, vectors[0])
    }
    assert [c.image_id for c in found.candidates] == sorted(scores, key=scores.get, reverse=True)
    for c in found.candidates:
        assert c.score == pytest.approx(scores[c.image_id], abs=1e-6)
        assert c.box[2] == {3: 5.1, 4: 6.0, 5: 7.0}[c.image_id]
    assert empty == lists[1]


def test_rerank_takes_new_boxes_and_keeps_order_of_equals():
    boxes = torch.tensor([[1.0, 1, 2, 2], [3, 3, 4, 4], [5, 5, 6, 6]])
    vectors = torch.tensor([[0.0, 2], [0, 1], [1, 0]])
    lists = [query(1, 9, (3, 0.9), (4, 0.8), (5, 0.7))]
    (row,) = rerank(lists, torch.tensor([[0.0, 1]]), [vectors], [boxes])
    assert [(c.image_id, c.score, c.box[0]) for c in row.candidates] == [
        (3, 1, 1),
        (4, 1, 3),
        (5, 0, 5),
    ]


@pytest.mark.parametrize(
    ("queries", "vectors", "boxes"),
    [
        (torch.ones(2, 4), [torch.ones(1, 4)], None),
        (torch.ones(1, 4), [], None),
        (torch.ones(1, 4), [torch.ones(2, 4)], None),
        (torch.ones(1, 4), [torch.ones(1, 3)], None),
        (torch.ones(1, 4), [torch.ones(1, 4)], [torch.ones(2, 4)]),
        (torch.ones(1, 4), [torch.ones(1, 4)], []),
    ],
)
def test_rerank_bad_input(queries, vectors, boxes):
    with pytest.raises(ValueError, match="must be"):
        rerank([query(1, 9, (3, 0.5))], queries, vectors, boxes)


def test_expand_queries():
    lists = [query(8, 50, (1, 0.9), (2, 0.5), (3, 0.1)), query(7, 51, (1, 0.3))]
    extra = {
        8: [
            query(100, 1, (50, 0.99), (2, 0.7, 9.0), (4, 0.1)),
            query(101, 2, (1, 0.9, 9.0), (3, 0.2)),
        ]
    }
    first, second = expand_queries(lists, extra)
    assert [(c.image_id, c.score, c.box[2]) for c in first.candidates] == [
        (1, 0.9, 5.0),  # as good in an extra list: the original's stays
        (2, 0.7, 9.0),
        (3, 0.2, 5.0),
        (4, 0.1, 5.0),
    ]
    assert (first.query_id, first.image_id, first.box, first.label) == (8, 50, BOX, 8)
    assert second == lists[1]
    assert [c.image_id for c in expand_queries(lists, extra, depth=2)[0].candidates] == [1, 2]
    with_own = expand_queries(lists, extra, skip_own_image=False)[0]
    assert with_own.candidates[0].image_id == 50
    assert expand_queries(lists, {}) == tuple(lists)


def test_expand_queries_bad_input():
    with pytest.raises(ValueError, match=r"queries that exist, got \[3\]"):
        expand_queries([query(8)], {3: []})
    with pytest.raises(ValueError, match="depth must be"):
        expand_queries([query(8)], {}, depth=0)
