"""Instance search by config on a small set: what is described, kept, left out and ranked."""

import json
import logging
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from factories import ROOT, registered_set, write_set
from PIL import Image
from retrieval_cases import retrieval_config

from fewshot_d2 import load_config
from fewshot_d2.data.loaders import build_index
from fewshot_d2.data.rank_lists import RankList
from fewshot_d2.engine import region_search
from fewshot_d2.engine.region_search import describe_boxes, describe_gallery, search_regions
from fewshot_d2.retrieval import ExactIndex, FaissIndex
from fewshot_d2.retrieval.describer import RegionDescriber, build_describer


@pytest.fixture(scope="module")
def cfg():
    return retrieval_config()


@pytest.fixture(scope="module")
def describer(cfg):
    return build_describer(retrieval_config())


@pytest.fixture
def folder(tmp_path):
    """A registered set of eight images, 100 to 107."""
    path = tmp_path / "data"
    path.mkdir()
    write_set(path, num_images=8)
    with registered_set("search_set", path):
        yield path


@pytest.fixture
def index(folder):
    return build_index("search_set", class_ids=())


def queries_of(*images, box=(5.0, 5.0, 40.0, 30.0)):
    return [RankList(50 + i, image, box, i, ()) for i, image in enumerate(images)]


def search(cfg, folder, queries, describer, *, query_dataset="search_set"):
    return search_regions(
        cfg,
        dataset="search_set",
        query_dataset=query_dataset,
        queries=queries,
        folder=folder / "found",
        describer=describer,
    )


def write_square(path, side=64, seed=3):
    pixels = np.random.default_rng(seed).integers(0, 255, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return torch.from_numpy(pixels).permute(2, 0, 1)


def test_boxes_of_whole_cells_are_means_of_the_maps(cfg, describer, tmp_path):
    """Channels in the config's order, a layer after the other, each of length 1."""
    pixels = write_square(tmp_path / "0.png")
    content = {
        "images": [{"id": 4, "file_name": "0.png", "height": 64, "width": 64}],
        "annotations": [],
        "categories": [],
    }
    (tmp_path / "instances.json").write_text(json.dumps(content))
    with registered_set("square_set", tmp_path):
        index = build_index("square_set", class_ids=())
    boxes = torch.tensor([[32.0, 0, 64, 64], [0, 32, 32, 64], [-9, -9, 99, 99]])
    (found,) = describe_boxes(cfg, index, {4: boxes}, describer=describer).values()
    assert cfg.INPUT.FORMAT == "RGB"
    with torch.no_grad():
        maps = describer.backbone((pixels[None] - 127.5) / 127.5)
    for row, (x0, y0, x1, y1) in zip(found, [(1, 0, 2, 2), (0, 1, 1, 2), (0, 0, 2, 2)]):
        fine = maps["res4"][0, :, 2 * y0 : 2 * y1, 2 * x0 : 2 * x1].mean(dim=(1, 2))
        last = maps["res5"][0, :, y0:y1, x0:x1].mean(dim=(1, 2))
        expected = torch.cat([F.normalize(fine, dim=0), F.normalize(last, dim=0)])
        torch.testing.assert_close(row, expected, atol=1e-5, rtol=1e-4)


def test_boxes_are_of_the_original_image(describer, rng):
    image = torch.randint(0, 256, (3, 48, 64), generator=rng, dtype=torch.uint8)
    boxes = torch.tensor([[3.0, 5, 40, 33], [20, 10, 64, 48]])
    query = {"image": image, "height": 48, "width": 64, "file_name": "x"}
    larger = {**query, "height": 48 * 3, "width": 64 * 2}
    vectors = describer.vectors(query, boxes)
    stretch = torch.tensor([2.0, 3, 2, 3])
    torch.testing.assert_close(describer.vectors(larger, boxes * stretch), vectors)
    found, described = describer.regions(query)
    of_larger, described_larger = describer.regions(larger)
    torch.testing.assert_close(of_larger, found * stretch)
    torch.testing.assert_close(described_larger, described)
    assert found[-1].tolist() == [0, 0, 64, 48] and len(found) > 1
    assert (found[:, 2:] - found[:, :2] >= 1).all() and (found[:, 3] <= 48).all()
    # Regions are described as boxes are.
    torch.testing.assert_close(describer.vectors(query, found), described)


def test_no_boxes(cfg, describer, index):
    found = describe_boxes(cfg, index, {101: torch.zeros(0, 4)}, describer=describer)
    assert found[101].shape == (0, describer.vectors(_image(), torch.ones(0, 4)).shape[1])
    assert describe_boxes(cfg, index, {}, describer=describer) == {}


def _image():
    image = torch.zeros(3, 64, 64, dtype=torch.uint8)
    return {"image": image, "height": 64, "width": 64, "file_name": "x"}


@pytest.mark.parametrize(
    ("image_id", "box", "message"),
    [
        (99, [0, 0, 5, 5], "image id must be .* got 99"),
        (101, [60, 0, 70, 5], "1.png: boxes must have an area inside"),
        (101, [5, 5, 5, 9], "1.png: boxes must have an area"),
        (102, [0, 0, 5, 5], "2.png must be a readable image"),
    ],
)
def test_boxes_bad_input(cfg, describer, folder, index, image_id, box, message):
    (folder / "2.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=message):
        describe_boxes(cfg, index, {image_id: torch.tensor([box])}, describer=describer)


def test_gallery_is_described_once_and_completed(cfg, describer, folder, index, monkeypatch):
    described = []
    original = RegionDescriber.regions
    monkeypatch.setattr(
        RegionDescriber,
        "regions",
        lambda self, query: described.append(query["image_id"]) or original(self, query),
    )
    monkeypatch.setattr(region_search, "_IMAGES_PER_FILE", 3)
    gallery = describe_gallery(cfg, index, folder / "found", describer=describer)
    assert described == list(range(100, 108)) == list(gallery.rows)
    # Only the files of regions matter: 0-2, 3-5 and 6-7.
    (regions,) = (folder / "found").glob("regions-*")
    assert len(list(regions.iterdir())) == 3
    described.clear()
    again = describe_gallery(cfg, index, folder / "found", describer=describer)
    assert not described
    (regions / "000000003.pt").unlink()
    completed = describe_gallery(cfg, index, folder / "found", describer=describer)
    assert described == [103, 104, 105]
    for other in (again, completed):
        assert torch.equal(other.image_ids, gallery.image_ids)
        assert torch.equal(other.boxes, gallery.boxes)
        torch.testing.assert_close(other.vectors, gallery.vectors)
    assert (gallery.boxes <= torch.tensor([60, 40, 60, 40])).all()
    for rows in gallery.rows.values():
        assert gallery.boxes[rows[-1]].tolist() == pytest.approx([0, 0, 60, 40])


def test_processes_share_the_gallery(cfg, describer, folder, index, monkeypatch):
    monkeypatch.setattr(region_search, "_IMAGES_PER_FILE", 2)
    alone = describe_gallery(cfg, index, folder / "alone", describer=describer)
    monkeypatch.setattr(region_search.comm, "get_world_size", lambda: 3)
    for rank, files in ((2, [4]), (1, [2, 4]), (0, [0, 2, 4, 6])):
        monkeypatch.setattr(region_search.comm, "get_rank", lambda rank=rank: rank)
        found = describe_gallery(cfg, index, folder / "found", describer=describer)
        # Named by their first image.
        assert sorted(int(p.stem) for p in folder.glob("found/*/*.pt")) == files
        assert (found is None) == (rank > 0)
    assert torch.equal(found.image_ids, alone.image_ids)
    assert torch.equal(found.boxes, alone.boxes)


def test_gallery_is_described_anew_where_something_differs(cfg, describer, folder, index):
    def folders():
        return len(list((folder / "found").glob("regions-*")))

    describe_gallery(cfg, index, folder / "found", describer=describer)
    # What is no matter of regions or vectors.
    for keys in (
        ["FEWSHOT.RETRIEVAL.DEPTH", 3],
        ["FEWSHOT.RETRIEVAL.INDEX", "Flat"],
        ["MODEL.TORCHVISION.WEIGHTS", "elsewhere.pth", "MODEL.ROI_HEADS.NUM_CLASSES", 3],
    ):
        describe_gallery(retrieval_config(*keys), index, folder / "found", describer=describer)
    assert folders() == 1
    for keys in (["FEWSHOT.RETRIEVAL.SMOOTHING", 2.0], ["INPUT.MAX_SIZE_TEST", 80]):
        describe_gallery(retrieval_config(*keys), index, folder / "found", describer=describer)
    assert folders() == 3
    write_square(folder / "4.png")
    os.utime(folder / "4.png", ns=(7, 7))
    fewer = build_index("search_set", class_ids=())
    describe_gallery(cfg, fewer, folder / "found", describer=describer)
    assert folders() == 4
    fewer.dicts.pop()
    describe_gallery(cfg, fewer, folder / "found", describer=describer)
    assert folders() == 5


def test_untrained_network_is_warned_of(caplog):
    build_describer(retrieval_config())
    assert "the search is untrained" in caplog.text


def test_weights_have_a_hash(describer):
    before = describer.state_sha256()
    bias = next(p for name, p in describer.named_parameters() if name.endswith("weight"))
    old = bias.detach().clone()
    with torch.no_grad():
        bias.view(-1)[0] += 1
    assert describer.state_sha256() != before
    with torch.no_grad():
        bias.copy_(old)
    assert describer.state_sha256() == before


def test_search_by_loops(cfg, describer, folder, index):
    """The score of an image is the highest cosine of the query's box and one of its regions."""
    queries = queries_of(101, 104)
    found = search(cfg, folder, queries, describer)
    gallery = describe_gallery(cfg, index, folder / "found", describer=describer)
    boxes = {q.image_id: torch.tensor([q.box]) for q in queries}
    vectors = describe_boxes(cfg, index, boxes, describer=describer)
    assert [replace(row, candidates=()) for row in found] == queries
    for row in found:
        best = {}
        for image_id, box, vector in zip(
            gallery.image_ids.tolist(), gallery.boxes, gallery.vectors
        ):
            score = F.cosine_similarity(vector, vectors[row.image_id][0], dim=0).item()
            best[image_id] = max(best.get(image_id, (-2,)), (score, tuple(box.tolist())))
        del best[row.image_id]
        assert {c.image_id for c in row.candidates} == set(best)
        for candidate in row.candidates:
            score, box = best[candidate.image_id]
            assert candidate.score == pytest.approx(score, abs=1e-5)
            assert candidate.box == box
    found.check(index, index)
    assert "res4+res5" in found.method and describer.state_sha256()[:16] in found.method


def test_search_with_faiss_is_the_same(cfg, describer, folder):
    pytest.importorskip("faiss")
    queries = queries_of(100, 103, 107)
    exact = search(cfg, folder, queries, describer)
    flat = retrieval_config("FEWSHOT.RETRIEVAL.INDEX", "Flat")
    for row, other in zip(exact, search(flat, folder, queries, describer), strict=True):
        pairs = [(c.image_id, c.box) for c in row.candidates]
        assert pairs == [(c.image_id, c.box) for c in other.candidates] and len(pairs) == 7
        scores = [c.score for c in row.candidates]
        assert scores == pytest.approx([c.score for c in other.candidates], abs=1e-5)


def test_index_by_name():
    pytest.importorskip("faiss")
    assert isinstance(region_search.build_vector_index(retrieval_config()), ExactIndex)
    keys = ["FEWSHOT.RETRIEVAL.INDEX", "IVF2,PQ2x4", "FEWSHOT.RETRIEVAL.NUM_PROBES", 1]
    index = region_search.build_vector_index(retrieval_config(*keys))
    assert isinstance(index, FaissIndex)
    vectors = F.normalize(torch.randn(200, 8, generator=torch.Generator().manual_seed(0)))
    index.add(torch.arange(200), vectors)
    # Vectors are compressed and one of two cells is searched: most, not all, are found.
    _, ids = index.search(vectors, 20)
    assert (ids == torch.arange(200)[:, None]).any(dim=1).float().mean() > 0.8


def test_depth(describer, folder):
    shallow = retrieval_config("FEWSHOT.RETRIEVAL.DEPTH", 3)
    (row,) = search(shallow, folder, queries_of(101), describer)
    (full,) = search(retrieval_config(), folder, queries_of(101), describer)
    assert row.candidates == full.candidates[:3]


def test_own_image_is_skipped_whatever_its_id(cfg, describer, folder):
    content = json.loads((folder / "instances.json").read_text())
    for image in content["images"]:
        image["id"] += 1000
    (folder / "others.json").write_text(json.dumps({**content, "annotations": []}))
    with _registered(folder):
        (row,) = search(cfg, folder, queries_of(1104), describer, query_dataset="other_ids")
    assert {c.image_id for c in row.candidates} == set(range(100, 108)) - {104}


def _registered(folder):
    (folder / "other").mkdir()
    content = (folder / "others.json").read_text()
    (folder / "other" / "instances.json").write_text(content)
    for path in folder.glob("*.png"):
        (folder / "other" / path.name).symlink_to(path)
    return registered_set("other_ids", folder / "other")


def test_unreadable_images_are_left_out_by_name(cfg, describer, folder, caplog):
    (folder / "3.png").write_bytes(b"no picture")
    (folder / "5.png").unlink()
    with caplog.at_level(logging.INFO):
        found = search(cfg, folder, queries_of(101, 103), describer)
    assert [row.image_id for row in found] == [101]
    assert {c.image_id for c in found.lists[0].candidates} == {100, 102, 104, 106, 107}
    assert "3.png" in caplog.text and "5.png" in caplog.text
    assert "6 images; 2 images left out" in caplog.text
    assert "Query 51 is left out" in caplog.text and "1 queries; 1 left out" in caplog.text
    with pytest.raises(ValueError, match="queries must be readable, got 1"):
        search(cfg, folder, queries_of(103), describer)
    for path in folder.glob("*.png"):
        path.write_bytes(b"no picture")
    with pytest.raises(ValueError, match="must be readable, got 8 bad"):
        search(cfg, folder, queries_of(101), describer)


DETECTOR = [
    *("FEWSHOT.RETRIEVAL.REGIONS", "proposals", "MODEL.RPN.IN_FEATURES", ["res4"]),
    *("MODEL.ANCHOR_GENERATOR.SIZES", [[16, 32]], "MODEL.RPN.CONV_DIMS", [8]),
    *("MODEL.ROI_HEADS.NAME", "StandardROIHeads", "MODEL.ROI_HEADS.IN_FEATURES", ["res4"]),
    *("MODEL.ROI_BOX_HEAD.NAME", "FastRCNNConvFCHead", "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", 2),
    *("MODEL.ROI_HEADS.NUM_CLASSES", 1, "MODEL.ROI_BOX_HEAD.NUM_FC", 1),
    *("MODEL.ROI_BOX_HEAD.FC_DIM", 8),
]


def test_proposals_of_a_detector(rng):
    cfg = retrieval_config(*DETECTOR)
    describer = build_describer(cfg)
    image = torch.randint(0, 256, (3, 48, 64), generator=rng, dtype=torch.uint8)
    query = {"image": image, "height": 48, "width": 64, "file_name": "x"}
    boxes, vectors = describer.regions(query)
    assert 1 < len(boxes) <= 4 and boxes[-1].tolist() == [0, 0, 64, 48]
    torch.testing.assert_close(vectors, describer.vectors(query, boxes))
    # Of another RPN on the same trunk other regions would come.
    before = describer.state_sha256()
    with torch.no_grad():
        describer.network.proposal_generator.rpn_head.objectness_logits.bias += 1
    assert describer.state_sha256() != before


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            [
                *(*DETECTOR, "MODEL.META_ARCHITECTURE", "SPIL"),
                *("MODEL.PROPOSAL_GENERATOR.NAME", "LookalikeRPN"),
            ],
            "proposes without examples.*got SPIL",
        ),
        (["FEWSHOT.RETRIEVAL.LAYERS", ("res9",)], "LAYERS must be among .* got .*res9"),
        (["FEWSHOT.RETRIEVAL.LAYERS", ()], "LAYERS must be"),
        (["FEWSHOT.RETRIEVAL.FINE", "res2"], "must be among .* 'res2'"),
        (["FEWSHOT.RETRIEVAL.REGIONS", "edges"], "REGIONS must be of .* got 'edges'"),
        (["MODEL.TORCHVISION.WEIGHTS", "none.pth"], "must be a local file, got .*none.pth"),
    ],
)
def test_bad_configs(keys, message):
    with pytest.raises(ValueError, match=message):
        build_describer(retrieval_config(*keys))


def test_config_of_the_papers_size_describes(rng):
    cfg = load_config(str(ROOT / "configs/retrieval/R_50.yaml"), ["MODEL.DEVICE", "cpu"])
    image = torch.randint(0, 256, (3, 64, 96), generator=rng, dtype=torch.uint8)
    boxes, vectors = build_describer(cfg).regions({**_image(), "image": image, "width": 96})
    assert boxes[-1].tolist() == [0, 0, 96, 64] and vectors.shape == (len(boxes), 1024)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(len(boxes)))
