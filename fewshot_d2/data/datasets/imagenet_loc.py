"""ImageNet-LOC with RepMet's classes: 101 to train on, 214 others to test (spec 3.1).

The lists of classes are WordNet ids; the order of the first is that of the devkit. A backbone that was trained to
classify ImageNet has seen all of them.
"""

import functools
import hashlib
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from tqdm import tqdm

from ...files import dataset_path
from ..coco_json import DatasetDict, records_of
from ..voc_xml import read_voc_xml

SETS = ("train101", "test214")


def class_list(which: str) -> list[str]:
    """WordNet ids of one of ``SETS``."""
    return (Path(__file__).parent / f"imagenet_loc_{which}.txt").read_text().split()


def class_list_sha256(which: str) -> str:
    """Of the sorted ids, one a line, as the spec gives it."""
    return hashlib.sha256("\n".join(sorted(class_list(which))).encode()).hexdigest()


def register_imagenet_loc(root: str | Path) -> None:
    """Register ``imagenet_loc_repmet_<set>`` for each of ``SETS``; read from ``root`` on first use."""
    for which in SETS:
        name = f"imagenet_loc_repmet_{which}"
        DatasetCatalog.register(name, functools.partial(_load_set, Path(root), which, name))
        MetadataCatalog.get(name).set(image_root=str(root), evaluator_type="fewshot")


def _load_set(root: Path, which: str, name: str) -> list[DatasetDict]:
    return load_imagenet_loc(root, class_list(which), name)


def load_imagenet_loc(root: Path, wnids: list[str], name: str) -> list[DatasetDict]:
    """Dataset dicts of the annotated training images of some classes.

    Args:
        root: has ``Annotations/CLS-LOC/train/<wnid>/*.xml`` and ``Data/CLS-LOC/train/<wnid>/*.JPEG``.
        wnids: the classes; category ids are 1, 2, ... in their order. Other objects in the images are left out.
        name: for the metadata.

    Raises:
        FileNotFoundError: the folder of a class is missing.
    """
    class_ids = {wnid: i for i, wnid in enumerate(wnids, start=1)}
    content: dict[str, list[dict[str, Any]]] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": i, "name": wnid} for wnid, i in class_ids.items()],
    }
    for wnid in tqdm(wnids, desc=f"reading {name}", unit="class", mininterval=5):
        folder = root / "Annotations/CLS-LOC/train" / wnid
        if not folder.is_dir():
            raise FileNotFoundError(f"{name} must have the folder {folder}; see datasets/README.md")
        for path in sorted(folder.glob("*.xml")):
            _add_image(content, path, class_ids)
    return records_of(content, root / "Data/CLS-LOC/train", name, root)


def _add_image(content: dict[str, list], path: Path, class_ids: dict[str, int]) -> None:
    image = read_voc_xml(path, first_pixel=0)
    image_id = len(content["images"])
    file_name = f"{path.parent.name}/{path.stem}.JPEG"
    size = {"height": image.height, "width": image.width}
    content["images"].append({"id": image_id, "file_name": file_name, **size})
    for found in image.objects:
        if found.name in class_ids:
            x0, y0, x1, y1 = found.box
            row = {"id": len(content["annotations"]) + 1, "image_id": image_id}
            row |= {"category_id": class_ids[found.name], "bbox": [x0, y0, x1 - x0, y1 - y0]}
            content["annotations"].append(row)


register_imagenet_loc(dataset_path("imagenet_loc"))
