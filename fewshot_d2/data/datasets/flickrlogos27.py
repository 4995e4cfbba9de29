"""FlickrLogos-27 (Kalantidis et al., ICMR 2011) for search and one-shot detection: 27 brands, photos, distractors.

One COCO json with the fields ``split`` ("train" or "query") and ``query_label`` ("none" for distractors) of images.
The published subsets of training images are not in it; the first five images of a brand, by file name, stand for
subset 1. Near-duplicates between a brand's images were not looked for.
"""

import functools
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog

from ...files import dataset_path
from ..coco_json import DatasetDict, read_json, records_of

# Images a brand in the set of queries.
QUERIES_PER_BRAND = 5
# "train": all that have boxes; "queries": the first of each brand; "gallery": train and distractors; "test": gallery
# without queries, whose boxes may then serve as supports.
SETS = ("train", "queries", "gallery", "test")


def register_flickrlogos27(root: Path) -> None:
    """Register ``flickrlogos27_<set>`` for each of ``SETS``; read from ``root`` on first use."""
    for which in SETS:
        name = f"flickrlogos27_{which}"
        DatasetCatalog.register(name, functools.partial(load_flickrlogos27, root, which, name))
        MetadataCatalog.get(name).set(image_root=str(root / "images"), evaluator_type="fewshot")


def load_flickrlogos27(root: Path, which: str, name: str) -> list[DatasetDict]:
    """Dataset dicts of one of ``SETS``; images keep their ids, so an image is the same in all of them.

    Args:
        root: has ``instances.json`` and ``images``. name: for the metadata.
    """
    content = read_json(root / "instances.json")
    images = sorted(content["images"], key=lambda image: image["file_name"])
    brands = {a["image_id"]: a["category_id"] for a in content["annotations"]}
    # One image lost its only, degenerate box.
    train = [i for i in images if i["split"] == "train" and i["id"] in brands]
    queries = _first_of_each_brand(train, brands)
    distractors = [i for i in images if i["query_label"] == "none"]
    chosen = {
        "train": train,
        "queries": queries,
        "gallery": train + distractors,
        "test": [i for i in train if i not in queries] + distractors,
    }[which]
    ids = {image["id"] for image in chosen}
    annotations = [a for a in content["annotations"] if a["image_id"] in ids]
    content = {**content, "images": chosen, "annotations": annotations}
    return records_of(content, root / "images", name, root / "instances.json")


def _first_of_each_brand(
    images: Iterable[dict[str, Any]], brands: Mapping[int, int]
) -> list[dict[str, Any]]:
    seen: Counter[int] = Counter()
    chosen = []
    for image in images:
        brand = brands[image["id"]]
        seen[brand] += 1
        if seen[brand] <= QUERIES_PER_BRAND:
            chosen.append(image)
    return chosen


register_flickrlogos27(dataset_path("flickrlogos27"))
