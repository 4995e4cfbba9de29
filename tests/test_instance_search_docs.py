"""The block of docs/instance_search.md on galleries above one machine runs and finds what one index finds."""

import re

import pytest
import torch
import torch.nn.functional as F
from factories import ROOT

from fewshot_d2.data.rank_lists import RankList
from fewshot_d2.retrieval import ExactIndex, FaissIndex, GalleryRegions, rank

BLOCK = re.compile(r"runs this block -->\n```python\n(.*?)```", re.DOTALL)


def test_parts_are_searched_as_one(tmp_path, rng):
    pytest.importorskip("faiss")
    (code,) = BLOCK.findall((ROOT / "docs/instance_search.md").read_text())
    corner = torch.rand(900, 2, generator=rng) * 50
    image_ids = torch.arange(900) // 9
    boxes = torch.cat([corner, corner + 5], dim=1)
    gallery = GalleryRegions(image_ids, boxes, torch.randn(900, 16, generator=rng))
    (tmp_path / "regions-0").mkdir()
    for start in range(0, 900, 300):
        rows = slice(start, start + 300)
        part = GalleryRegions(image_ids[rows], boxes[rows], gallery.vectors[rows])
        part.save(tmp_path / "regions-0" / f"{start:09d}.pt")
    # Vectors are kept whole and every cell is searched, so what is found is exact.
    queries = [RankList(i, 1000 + i, (0.0, 0.0, 5.0, 5.0), i, ()) for i in range(4)]
    vectors = torch.randn(4, 16, generator=rng)
    names = {"output": tmp_path, "sample_step": 2, "factory": "IVF8,Flat", "num_probes": 8}
    names |= {"queries": queries, "query_vectors": vectors}
    exec(code, names)  # noqa: S102
    expected = rank(gallery, vectors, queries, index=gallery.fill(ExactIndex()))
    for found in (names["lists"], names["same"]):
        for row, other in zip(found, expected, strict=True):
            assert [c.image_id for c in row.candidates] == [c.image_id for c in other.candidates]
            assert [c.box for c in row.candidates] == [c.box for c in other.candidates]
            scores = [c.score for c in row.candidates]
            assert scores == pytest.approx([c.score for c in other.candidates], abs=1e-5)


def test_wrapped_index(rng):
    faiss = pytest.importorskip("faiss")
    vectors = F.normalize(torch.randn(30, 4, generator=rng))
    inner = faiss.IndexFlatIP(4)
    inner.add(vectors.numpy())
    index = FaissIndex.wrap(inner)
    assert (len(index), index.dimension) == (30, 4)
    assert torch.equal(index.search(vectors * 3, 1)[1][:, 0], torch.arange(30))
    with pytest.raises(ValueError, match="it is complete"):
        index.add(torch.tensor([40]), torch.ones(1, 4))
    with pytest.raises(ValueError, match="must be of inner products, got metric"):
        FaissIndex.wrap(faiss.IndexFlatL2(4))
