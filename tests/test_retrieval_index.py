"""Indices by loops; faiss against the exact one."""

import sys

import pytest
import torch

from fewshot_d2.retrieval import ExactIndex, FaissIndex


def made(kind, *args, **settings):
    if kind is FaissIndex:
        pytest.importorskip("faiss")
    return kind(*args, **settings)


@pytest.fixture
def vectors(rng):
    return torch.randn(60, 8, generator=rng)


@pytest.fixture
def ids(rng):
    return torch.randperm(1000, generator=rng)[:60] + 5_000_000_000


def by_loops(ids, vectors, query, k, exclude=()):
    cosine = torch.nn.functional.cosine_similarity(vectors.double(), query.double()[None])
    rows = sorted(zip((-cosine).tolist(), ids.tolist()))
    rows = [(-score, i) for score, i in rows if i not in exclude][:k]
    return [score for score, _ in rows], [i for _, i in rows]


@pytest.mark.parametrize("kind", [ExactIndex, FaissIndex])
def test_search_by_loops(rng, kind, ids, vectors):
    index = made(kind)
    index.add(ids[:20], vectors[:20] * 7)
    index.add(ids[20:], vectors[20:])
    assert len(index) == 60 and index.dimension == 8 and torch.equal(index.ids, ids)
    queries = torch.randn(4, 8, generator=rng)
    exclude = [(), set(ids[:30].tolist()), [by_loops(ids, vectors, queries[2], 1)[1][0]], [7]]
    scores, found = index.search(queries * 3, 5, exclude)
    for row, query in enumerate(queries):
        expected = by_loops(ids, vectors, query, 5, exclude[row])
        assert found[row].tolist() == expected[1]
        assert scores[row].tolist() == pytest.approx(expected[0], abs=1e-6)


@pytest.mark.parametrize("max_scores", [1, 21, 1 << 20])
def test_chunks_change_nothing(rng, ids, vectors, max_scores):
    queries = torch.randn(3, 8, generator=rng)
    index, whole = ExactIndex(max_scores=max_scores), ExactIndex()
    for i in (index, whole):
        i.add(ids, vectors)
    assert torch.equal(index.search(queries, 10)[1], whole.search(queries, 10)[1])


def test_exact_and_faiss_agree(rng, ids, vectors):
    exact, flat = ExactIndex(), made(FaissIndex, "Flat")
    for index in (exact, flat):
        index.add(ids, vectors)
    queries = torch.randn(10, 8, generator=rng)
    (scores, found), (flat_scores, flat_found) = (i.search(queries, 60) for i in (exact, flat))
    assert torch.equal(found, flat_found)
    torch.testing.assert_close(scores, flat_scores)


@pytest.mark.parametrize("kind", [ExactIndex, FaissIndex])
def test_fewer_hits_than_asked(kind):
    index = made(kind)
    none = index.search(torch.ones(2, 3), 2)
    assert none[1].tolist() == [[-1, -1]] * 2 and none[0].isneginf().all()
    index.add(torch.tensor([4, 2, 3]), torch.eye(3)[[0, 0, 1]])
    scores, ids = index.search(torch.eye(3)[:1], 4, [[3]])
    assert ids.tolist() == [[2, 4, -1, -1]], "equal similarities: lowest id first"
    assert scores[0, :2].tolist() == [1, 1] and scores[0, 2:].isneginf().all()
    assert index.search(torch.zeros(0, 3), 4)[0].shape == (0, 4)


def test_inverted_file(rng, tmp_path):
    index = made(FaissIndex, "IVF4,Flat", num_probes=1)
    vectors = torch.randn(200, 8, generator=rng)
    with pytest.raises(ValueError, match="must be enough to train"):
        index.add(torch.arange(2), vectors[:2])
    index.add(torch.arange(200), vectors)
    scores, ids = index.search(vectors[:5], 200)
    assert ids[:, 0].tolist() == [0, 1, 2, 3, 4]
    # One cell of four is searched.
    assert (ids[:, -1] == -1).all() and scores[:, -1].isneginf().all()
    index.save(tmp_path / "index")
    all_cells = FaissIndex.load(tmp_path / "index", num_probes=9)
    assert sorted(all_cells.search(vectors[:1], 200)[1][0].tolist()) == list(range(200))


@pytest.mark.parametrize("kind", [ExactIndex, FaissIndex])
def test_files(rng, tmp_path, kind, ids, vectors):
    index, path = made(kind), tmp_path / "folder" / "index"
    with pytest.raises(ValueError, match="must have vectors"):
        index.save(path)
    index.add(ids[:50], vectors[:50])
    index.save(path)
    assert [p.name for p in path.parent.iterdir()] == ["index"]
    loaded = kind.load(path)
    queries = torch.randn(3, 8, generator=rng)
    for a, b in zip(index.search(queries, 9), loaded.search(queries, 9)):
        assert torch.equal(a, b)
    loaded.add(ids[50:], vectors[50:])
    assert torch.equal(loaded.ids, ids)
    for content in (b"", b"nonsense", path.read_bytes()[:100]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=str(path)):
            kind.load(path)


@pytest.mark.parametrize(
    "content",
    [
        [1],
        {"format": "other", "version": 1},
        {"format": "fewshot_d2/exact_index", "version": 1, "ids": torch.arange(2)},
        {
            "format": "fewshot_d2/exact_index",
            "version": 1,
            "ids": torch.zeros(2, dtype=torch.int64),
            "vectors": torch.ones(2, 2),
        },
    ],
)
def test_other_files(tmp_path, content):
    torch.save(content, tmp_path / "file")
    with pytest.raises(ValueError, match="file must"):
        ExactIndex.load(tmp_path / "file")


@pytest.mark.parametrize("kind", [ExactIndex, FaissIndex])
def test_bad_input(kind):
    index = made(kind)
    index.add(torch.arange(3), torch.eye(3))
    for ids, vectors in [
        (torch.tensor([3, 3]), torch.ones(2, 3)),
        (torch.tensor([2]), torch.ones(1, 3)),
        (torch.tensor([-1]), torch.ones(1, 3)),
        (torch.tensor([3.0]), torch.ones(1, 3)),
        (torch.tensor([3, 4]), torch.ones(1, 3)),
        (torch.tensor([3]), torch.ones(1, 2)),
        (torch.tensor([3]), torch.full((1, 3), torch.nan)),
    ]:
        with pytest.raises(ValueError, match="must be"):
            index.add(ids, vectors)
    assert len(index) == 3
    for queries, k, exclude in [
        (torch.ones(1, 2), 1, None),
        (torch.ones(3), 1, None),
        (torch.full((1, 3), torch.inf), 1, None),
        (torch.ones(1, 3), 0, None),
        (torch.ones(1, 3), 1, []),
    ]:
        with pytest.raises(ValueError, match="must"):
            index.search(queries, k, exclude)


def test_unknown_factory():
    with pytest.raises(ValueError, match="factory must be"):
        made(FaissIndex, "Nonsense").add(torch.arange(1), torch.ones(1, 2))


def test_missing_faiss(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ModuleNotFoundError, match="pip install"):
        FaissIndex()
