"""Writes generated pictures as COCO data sets, once, on the first ``DatasetCatalog.get``.

A set lies in ``<root>/scenes/<name>-<hash of its spec>``: another spec gets another folder, so a stale set is never
read. It appears there complete or not at all, and is the same for any number of processes.
"""

import contextlib
import dataclasses
import functools
import logging
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from pycocotools import mask as coco_mask
from tqdm import tqdm

from ...files import canonical_sha256, only_one_process, write_json
from ..coco_json import load_instances_json
from .glyphs import GlyphSource

# Part of every hash: to be raised when the same spec gives other pictures than before.
_VERSION = 1
_CHUNK = 25

logger = logging.getLogger(__name__)


@dataclass
class GlyphObject:
    """One annotated glyph: category id, bool mask (H, W) of its visible ink, place in the pile (0 = bottom)."""

    category_id: int
    mask: np.ndarray
    z_order: int


@dataclass
class Picture:
    """Uint8 RGB image (H, W, 3) and its objects."""

    image: np.ndarray
    objects: list[GlyphObject]


class PictureSpec(Protocol):
    """What a set needs to be generated; implementations are frozen dataclasses of plain values."""

    @property
    def num_images(self) -> int:
        """Number of pictures."""

    def categories(self) -> list[dict]:
        """COCO categories."""

    def picture(self, index: int) -> Picture:
        """Picture number ``index``, a function of (spec, index) alone."""


def categories_of(source: GlyphSource, classes: tuple[int, int]) -> list[dict]:
    """COCO categories of a range of classes; ids are class index + 1, unique over the whole source."""
    names = source.class_names
    return [{"id": index + 1, "name": names[index]} for index in range(*classes)]


def describe(spec: Any) -> Any:
    """A spec as JSON content: type names and fields."""
    if dataclasses.is_dataclass(spec):
        fields = {
            f.name: describe(getattr(spec, f.name)) for f in dataclasses.fields(spec) if f.compare
        }
        return {"type": type(spec).__name__, **fields}
    return list(spec) if isinstance(spec, tuple) else spec


def set_folder(name: str, spec: PictureSpec, root: str | Path) -> Path:
    """Where the set lies below ``root``."""
    digest = canonical_sha256({"version": _VERSION, "spec": describe(spec)})
    return Path(root) / "scenes" / f"{name}-{digest[:12]}"


def register_generated(name: str, spec: PictureSpec, root: str | Path) -> None:
    """Register a set that is written below ``root`` when it is first asked for."""
    folder = set_folder(name, spec, root)

    def load() -> list[dict]:
        if not folder.exists():
            with only_one_process(folder.parent / f".{folder.name}.lock"):
                generate(folder, spec)
        return load_instances_json(str(folder / "instances.json"), str(folder / "images"), name)

    DatasetCatalog.register(name, load)
    MetadataCatalog.get(name).set(
        json_file=str(folder / "instances.json"),
        image_root=str(folder / "images"),
        evaluator_type="fewshot",
    )


def generate(folder: str | Path, spec: PictureSpec, num_processes: int | None = None) -> None:
    """Write the set unless ``folder`` exists.

    Args:
        folder: final place of ``instances.json`` and ``images/``.
        spec: what to draw.
        num_processes: default is one for each core that may be used, 8 at most.
    """
    folder = Path(folder)
    if folder.exists():
        return
    if spec.num_images < 1:
        raise ValueError(f"num_images must be at least 1, got {spec.num_images} for {folder}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        (building / "images").mkdir()
        content = _write_pictures(building / "images", spec, num_processes)
        write_json(building / "instances.json", content)
        building.chmod(0o755)
        try:
            building.rename(folder)
        except OSError:
            # Another process may have finished the same set meanwhile; both are equal.
            if not folder.exists():
                raise
    finally:
        shutil.rmtree(building, ignore_errors=True)
    logger.info("wrote %d generated images to %s", spec.num_images, folder)


def _write_pictures(folder: Path, spec: PictureSpec, num_processes: int | None) -> dict:
    """Write all images; return the content of the COCO json."""
    images, annotations = [], []
    for image, objects in _rows(folder, spec, num_processes):
        images.append(image)
        for row in objects:
            annotations.append({"id": len(annotations) + 1, "image_id": image["id"], **row})
    return {
        "info": {"description": "generated by fewshot_d2", "spec": describe(spec)},
        "images": images,
        "annotations": annotations,
        "categories": spec.categories(),
    }


def _rows(
    folder: Path, spec: PictureSpec, num_processes: int | None
) -> Iterator[tuple[dict, list[dict]]]:
    """(image row, annotation rows without ids) of every picture, in order."""
    chunks = [range(i, min(i + _CHUNK, spec.num_images)) for i in range(0, spec.num_images, _CHUNK)]
    processes = min(num_processes or _usable_processes(), len(chunks))
    # The first picture also fills the source's cache, which forked workers then share.
    spec.picture(0)
    progress = tqdm(total=spec.num_images, desc="generating images", unit="img")
    with progress, _parallel_map(processes) as run:
        for rows in run(functools.partial(_write_chunk, folder, spec), chunks):
            progress.update(len(rows))
            yield from rows


def _usable_processes() -> int:
    """One for each usable core up to 8; 1 where processes cannot be forked."""
    # A daemon, such as a worker of a data loader, may not have children.
    can_fork = "fork" in multiprocessing.get_all_start_methods()
    if not can_fork or multiprocessing.current_process().daemon:
        return 1
    return min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1, 8)


@contextlib.contextmanager
def _parallel_map(processes: int) -> Iterator[Callable]:
    """An ordered ``map`` over forked processes, or the built-in one."""
    if processes <= 1:
        yield map
        return
    # OpenCV's threads do not survive a fork: without them there is nothing to wait for.
    threads = cv2.getNumThreads()
    cv2.setNumThreads(0)
    try:
        with multiprocessing.get_context("fork").Pool(processes) as pool:
            yield pool.imap
    finally:
        cv2.setNumThreads(threads)


def _write_chunk(folder: Path, spec: PictureSpec, indices: range) -> list[tuple[dict, list[dict]]]:
    return [_write_picture(folder, index, spec.picture(index)) for index in indices]


def _write_picture(folder: Path, index: int, picture: Picture) -> tuple[dict, list[dict]]:
    """Write the PNG; return its image row and annotation rows."""
    name = f"{index:06d}.png"
    height, width = picture.image.shape[:2]
    path = folder / name
    # Noise compresses badly at any level, so the fastest one is best.
    encoded = cv2.imencode(".png", picture.image[:, :, ::-1], [cv2.IMWRITE_PNG_COMPRESSION, 1])[1]
    try:
        path.write_bytes(encoded.tobytes())
    except OSError as error:
        raise OSError(error.errno, f"{path} could not be written: {error.strerror}") from error
    image = {"id": index + 1, "file_name": name, "height": height, "width": width}
    return image, [annotation_of(glyph) for glyph in picture.objects]


def annotation_of(glyph: GlyphObject) -> dict:
    """COCO fields of an object: tight XYWH box, compressed RLE, area, and its place in the pile."""
    rle = coco_mask.encode(np.asfortranarray(glyph.mask, np.uint8))
    return {
        "category_id": glyph.category_id,
        "bbox": [float(value) for value in cv2.boundingRect(glyph.mask.astype(np.uint8))],
        "segmentation": {"size": rle["size"], "counts": rle["counts"].decode("ascii")},
        "area": int(glyph.mask.sum()),
        "iscrowd": 0,
        "z_order": glyph.z_order,
    }
