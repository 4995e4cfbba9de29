"""CL-VOC-07, CL-VOC-12, CL-COCO and CL-VID (SILCO paper 4.1, spec A7).

Training images are those of the official training sets; the official validation images are shared out between "val"
(two fifths) and "test" by a hash of their names, because the paper's lists are not published. The paper's group g is
FEWSHOT.SPLIT "part:g/2", and fold f = 0..3 of its authors' later code "part:f+1/4": parts of the official order.
Of CL-VID only the rule is known: snippets with one class that VOC does not have.
"""

import functools
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.pascal_voc import CLASS_NAMES as VOC_CLASSES
from tqdm import tqdm

from ...files import dataset_path
from ..coco_json import DatasetDict, read_json, records_of
from ..voc_xml import add_voc_image, read_voc_xml

SETS = ("train", "val", "test")
_VAL_SHARE = 0.4
_YEARS = {"07": "VOC2007", "12": "VOC2012"}
# WordNet ids and names of the 30 classes of ImageNet VID, in its order; "" = a class of VOC.
VID_CLASSES = {
    "n02691156": "", "n02419796": "antelope", "n02131653": "bear", "n02834778": "", "n01503061": "",
    "n02924116": "", "n02958343": "", "n02402425": "", "n02084071": "", "n02121808": "",
    "n02503517": "elephant", "n02118333": "fox", "n02510455": "giant panda", "n02342885": "hamster",
    "n02374451": "", "n02129165": "lion", "n01674464": "lizard", "n02484322": "monkey", "n03790512": "",
    "n02324045": "rabbit", "n02509815": "red panda", "n02411705": "", "n01726692": "snake",
    "n02355227": "squirrel", "n02129604": "tiger", "n04468005": "", "n01662784": "turtle", "n04530566": "",
    "n02062744": "whale", "n02391049": "zebra",
}  # fmt: skip


def register_common_localization(root: str | Path) -> None:
    """Register ``cl_voc07_<set>``, ``cl_voc12_<set>`` and ``cl_coco_<set>`` for each of ``SETS``, and CL-VID.

    ``cl_vid_test`` has every frame, ``cl_vid_test_30th`` one in thirty, ``cl_vid_support`` images of ImageNet DET. All
    are read on first use.
    """
    root = Path(root)
    loaders: dict[str, Any] = {}
    for which in SETS:
        loaders[f"cl_coco_{which}"] = functools.partial(load_cl_coco, root / "coco", which)
        for year, folder in _YEARS.items():
            loaders[f"cl_voc{year}_{which}"] = functools.partial(load_cl_voc, root / folder, which)
    imagenet = root / "ILSVRC"
    loaders["cl_vid_test"] = functools.partial(load_cl_vid, imagenet, 1)
    loaders["cl_vid_test_30th"] = functools.partial(load_cl_vid, imagenet, 30)
    loaders["cl_vid_support"] = functools.partial(load_cl_vid_support, imagenet)
    for name, load in loaders.items():
        DatasetCatalog.register(name, functools.partial(load, name))
        MetadataCatalog.get(name).set(evaluator_type="fewshot")


def shared_out(names: Iterable[str], which: str) -> list[str]:
    """The names of official validation images that are "val" or "test", in their order."""
    names = list(names)
    ranked = sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())
    val = set(ranked[: round(_VAL_SHARE * len(names))])
    return [name for name in names if (name in val) == (which == "val")]


def load_cl_voc(root: Path, which: str, name: str) -> list[DatasetDict]:
    """Dataset dicts of one of ``SETS``; category ids are 1..20 in VOC's order, image ids the digits of the names.

    Args:
        root: has ``ImageSets/Main``, ``Annotations`` and ``JPEGImages``. name: for the metadata.

    Raises:
        FileNotFoundError: the list or an annotation is missing.
    """
    official = root / "ImageSets/Main" / ("train.txt" if which == "train" else "val.txt")
    _check_exists(official, name)
    images = official.read_text().split()
    if which != "train":
        images = shared_out(images, which)
    content = _empty({class_name: i for i, class_name in enumerate(VOC_CLASSES, start=1)})
    class_ids = {row["name"]: row["id"] for row in content["categories"]}
    for image in tqdm(images, desc=f"reading {name}", unit="image", mininterval=5):
        path = root / "Annotations" / f"{image}.xml"
        _check_exists(path, name)
        add_voc_image(
            content,
            path,
            file_name=f"{image}.jpg",
            image_id=int(image.replace("_", "")),
            class_ids=class_ids,
        )
    return records_of(content, root / "JPEGImages", name, root)


def load_cl_coco(root: Path, which: str, name: str) -> list[DatasetDict]:
    """Dataset dicts of one of ``SETS`` of COCO 2014; ids are COCO's.

    Args:
        root: has ``annotations/instances_<official>2014.json`` and ``<official>2014``. name: for the metadata.
    """
    official = "train2014" if which == "train" else "val2014"
    json_file = root / "annotations" / f"instances_{official}.json"
    content = read_json(json_file)
    if which != "train":
        files = set(shared_out([image["file_name"] for image in content["images"]], which))
        images = [image for image in content["images"] if image["file_name"] in files]
        ids = {image["id"] for image in images}
        annotations = [a for a in content["annotations"] if a["image_id"] in ids]
        content = {**content, "images": images, "annotations": annotations}
    return records_of(content, root / official, name, json_file)


def vid_class_ids() -> dict[str, int]:
    """{WordNet id: category id} of the classes that VOC does not have; ids are places in VID's own order, from 1."""
    return {wnid: i for i, (wnid, name) in enumerate(VID_CLASSES.items(), start=1) if name}


def load_cl_vid(root: Path, step: int, name: str) -> list[DatasetDict]:
    """Dataset dicts of one frame in ``step`` of the training snippets that have one class, and none of VOC.

    Which classes a snippet has is seen in the frames that are read.

    Args:
        root: has ``Annotations/VID/train`` and ``Data/VID/train``. name: for the metadata.
    """
    folder = root / "Annotations/VID/train"
    _check_exists(folder, name)
    class_ids, content = vid_class_ids(), _empty_vid()
    snippets = sorted({path.parent for path in folder.rglob("*.xml")})
    for snippet in tqdm(snippets, desc=f"reading {name}", unit="snippet", mininterval=5):
        frames = sorted(snippet.glob("*.xml"))[::step]
        classes = {found.name for frame in frames for found in _objects(frame)}
        if len(classes) == 1 and classes <= class_ids.keys():
            _add_frames(content, frames, folder)
    return records_of(content, root / "Data/VID/train", name, root)


def load_cl_vid_support(root: Path, name: str) -> list[DatasetDict]:
    """Dataset dicts of the validation images of ImageNet DET that have a class of CL-VID.

    Args:
        root: has ``Annotations/DET/val`` and ``Data/DET/val``. name: for the metadata.
    """
    folder = root / "Annotations/DET/val"
    _check_exists(folder, name)
    class_ids, content = vid_class_ids(), _empty_vid()
    paths = tqdm(sorted(folder.glob("*.xml")), desc=f"reading {name}", unit="image", mininterval=5)
    chosen = [path for path in paths if any(o.name in class_ids for o in _objects(path))]
    _add_frames(content, chosen, folder)
    return records_of(content, root / "Data/DET/val", name, root)


def _objects(path: Path) -> Iterator[Any]:
    yield from read_voc_xml(path, first_pixel=0).objects


def _add_frames(content: dict[str, list], paths: Sequence[Path], folder: Path) -> None:
    for path in paths:
        add_voc_image(
            content,
            path,
            file_name=str(path.relative_to(folder).with_suffix(".JPEG")),
            image_id=len(content["images"]),
            class_ids=vid_class_ids(),
            first_pixel=0,
        )


def _empty(class_ids: dict[str, int]) -> dict[str, list]:
    """A COCO json without images."""
    categories = [{"id": i, "name": name} for name, i in class_ids.items()]
    return {"images": [], "annotations": [], "categories": categories}


def _empty_vid() -> dict[str, list]:
    return _empty({VID_CLASSES[wnid]: i for wnid, i in vid_class_ids().items()})


def _check_exists(path: Path, name: str) -> None:
    if not path.exists():
        raise FileNotFoundError(f"{name} must have {path}; see datasets/README.md")


register_common_localization(dataset_path("."))
