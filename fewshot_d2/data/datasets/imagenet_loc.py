"""ImageNet-LOC with RepMet's classes: 101 to train on, 214 others to test (spec 3.1).

The lists of classes are WordNet ids; the order of the first is that of the devkit. A backbone that was trained to
classify ImageNet has seen all of them.
"""

import functools
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from tqdm import tqdm

from ...files import dataset_path
from ..coco_json import DatasetDict, records_of
from ..voc_xml import add_voc_image

SETS = ("train101", "test214")


def class_list(which: str) -> list[str]:
    """WordNet ids of one of ``SETS``."""
    return (Path(__file__).parent / f"imagenet_loc_{which}.txt").read_text().split()


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
            add_voc_image(
                content,
                path,
                file_name=f"{wnid}/{path.stem}.JPEG",
                image_id=len(content["images"]),
                class_ids=class_ids,
                first_pixel=0,
            )
    return records_of(content, root / "Data/CLS-LOC/train", name, root)


register_imagenet_loc(dataset_path("imagenet_loc"))
