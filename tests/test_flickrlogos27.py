"""FlickrLogos-27 as a data set of one-shot detection: sets that share no image, and the plans of its config."""

import json

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from factories import ROOT

from fewshot_d2 import load_config
from fewshot_d2.data.datasets.flickrlogos27 import SETS, load_flickrlogos27
from fewshot_d2.engine.evaluate import evaluation_plans

CONFIG = ROOT / "configs/os2d/Base-flickrlogos27-data.yaml"
BRANDS = 8


@pytest.fixture
def sets(tmp_path, monkeypatch):
    """Eight brands of seven images and five distractors in place of the real files."""
    images, annotations = [], []
    for number in range(BRANDS * 7 + 5):
        brand = number // 7 if number < BRANDS * 7 else None
        row = {"id": number, "file_name": f"{number:03}.jpg", "height": 50, "width": 60}
        of_brand = {"split": "train", "query_label": None}
        other = {"split": "query", "query_label": "none"}
        images.append(row | (other if brand is None else of_brand))
        if brand is not None:
            box = {"bbox": [5, 5, 20, 10], "category_id": brand + 1}
            annotations.append({"id": number, "image_id": number, **box})
    categories = [{"id": brand + 1, "name": f"brand {brand}"} for brand in range(BRANDS)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (tmp_path / "instances.json").write_text(json.dumps(content))
    names = [f"flickrlogos27_{which}" for which in SETS]
    for which, name in zip(SETS, names, strict=True):
        monkeypatch.setitem(
            DatasetCatalog.data, name, lambda w=which, n=name: load_flickrlogos27(tmp_path, w, n)
        )
        # The real set may have been read before.
        MetadataCatalog.data.pop(name, None)
    yield
    for name in names:
        MetadataCatalog.data.pop(name, None)


def test_test_set_is_the_gallery_without_the_queries(sets):
    ids = {w: {d["image_id"] for d in DatasetCatalog.get(f"flickrlogos27_{w}")} for w in SETS}
    assert len(ids["queries"]) == BRANDS * 5 and len(ids["gallery"]) == BRANDS * 7 + 5
    assert ids["test"] == ids["gallery"] - ids["queries"]
    assert ids["queries"] < ids["train"]


def test_plans_search_novel_brands_in_their_images_and_distractors(sets, tmp_path):
    cfg = load_config(str(CONFIG), ["OUTPUT_DIR", str(tmp_path / "out")])
    plans = evaluation_plans(cfg)
    assert len(plans) == 5 and len({plan.sha256 for plan in plans}) > 1
    queries = {
        a["id"] for d in DatasetCatalog.get("flickrlogos27_queries") for a in d["annotations"]
    }
    for plan in plans:
        assert plan.class_ids == (1, 5) and plan.protocol == "open"
        # Two images are left of each of the two novel brands.
        assert [e.image_id for e in plan.episodes] == [5, 6, 33, 34, *range(56, 61)]
        assert all(e.class_ids == (1, 5) for e in plan.episodes)
        assert {i for ids in plan.fixed_supports.values() for i in ids} <= queries
