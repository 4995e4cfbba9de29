"""docs/instance_search.md: its first command and its code run, and parts of a gallery find what one index finds."""

import re
import runpy
import shlex
import sys

import pytest
import torch
import torch.nn.functional as F
from detectron2.data import DatasetCatalog, MetadataCatalog
from factories import ROOT
from inference_cases import write_photos
from torch.testing import assert_close
from torchvision.models import MobileNet_V2_Weights, mobilenet_v2

from fewshot_d2 import load_config
from fewshot_d2.data.pseudo_labels import PseudoLabels, ScoredBox
from fewshot_d2.data.rank_lists import RankList, RankLists
from fewshot_d2.modeling.backbones import build_torchvision_backbone
from fewshot_d2.retrieval import ExactIndex, FaissIndex, GalleryRegions, rank

PAGE = (ROOT / "docs/instance_search.md").read_text()
BLOCK = re.compile(r"runs this block -->\n```python\n(.*?)```", re.DOTALL)
RESULTS = re.compile(r"## 3. Results\n.*?```python\n(.*?)```", re.DOTALL)
COMMAND = re.compile(r"^```\n(python tools/make_rank_lists.py .*?)^```", re.MULTILINE | re.DOTALL)
# The four keys for torchvision's own file.
KEYS = re.compile(r"^```\n(MODEL.TORCHVISION.WEIGHTS .*?)^```", re.MULTILINE | re.DOTALL)
SMALL = "INPUT.MIN_SIZE_TEST 64 INPUT.MAX_SIZE_TEST 64 FEWSHOT.RETRIEVAL.NUM_REGIONS 2 DATALOADER.NUM_WORKERS 0"


@pytest.fixture
def torchvisions(tmp_path, monkeypatch):
    """A random MobileNetV2 of torchvision, saved, and the keys that the page on data says its file needs."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    torch.manual_seed(0)
    model = mobilenet_v2(weights=None).eval()
    (tmp_path / "weights").mkdir()
    torch.save(model.state_dict(), tmp_path / "weights/mobilenet_v2.pth")
    (keys,) = KEYS.findall((ROOT / "datasets/README.md").read_text())
    yield model, shlex.split(keys)
    DatasetCatalog.pop("photos", None)
    MetadataCatalog.pop("photos", None)


@torch.no_grad()
def test_keys_give_the_features_of_torchvision(torchvisions, rng):
    model, keys = torchvisions
    cfg = load_config(str(ROOT / "configs/retrieval/mobilenet_v2.yaml"), keys)
    image = torch.randint(0, 256, (1, 3, 64, 96), generator=rng).float()
    mean, std = (
        torch.tensor(v)[:, None, None] for v in (cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD)
    )
    found = build_torchvision_backbone(cfg, None).eval()((image - mean) / std)["res5"]
    preset = MobileNet_V2_Weights.DEFAULT.transforms()
    mean, std = (torch.tensor(v)[:, None, None] for v in (preset.mean, preset.std))
    assert cfg.INPUT.FORMAT == "RGB"
    assert_close(found, model.features((image / 255 - mean) / std), atol=1e-4, rtol=1e-4)


def test_first_command_and_results(torchvisions, tmp_path, monkeypatch, capsys):
    _, keys = torchvisions
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    sources = write_photos(tmp_path / "photos", 4, (270, 330))
    (tmp_path / "photos/desk").mkdir()
    for source, name in zip(sources, ("cup", "desk/cup2", "fork"), strict=False):
        source.rename(tmp_path / f"photos/{name}.jpg")
    (command,) = COMMAND.findall(PAGE.partition("## 2.")[0])
    words = shlex.split(command.replace("\\\n", " "))
    monkeypatch.setattr(sys, "argv", [*words[1:], *keys, *SMALL.split()])
    runpy.run_path(str(ROOT / words[1]), run_name="__main__")
    lists = RankLists.load("output/photos/rank_lists.json")
    assert [row.box for row in lists] == [(120, 40, 320, 220), (10, 10, 100, 90), (5, 30, 65, 230)]
    assert [row.label for row in lists][0] == [row.label for row in lists][1]

    boxes = [[(ScoredBox((1.0, 2.0, 3.0, 4.0), 0.5),) for _ in q.candidates] for q in lists]
    labels = PseudoLabels(4, 0.5, lists.sha256, boxes)
    labels.save("output/photos_spil/stage_4.json")
    capsys.readouterr()
    (code,) = RESULTS.findall(PAGE)
    exec(code, {})  # noqa: S102
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == sum(len(q.candidates) for q in lists) > 0
    assert printed[0].endswith("(1.0, 2.0, 3.0, 4.0) 0.5")


def test_parts_are_searched_as_one(tmp_path, rng):
    pytest.importorskip("faiss")
    (code,) = BLOCK.findall(PAGE)
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
