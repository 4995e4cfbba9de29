"""INSTRE-S1 and S2 (Wang and Jiang, 2015) with the queries of Iscen et al. as one-shot classes (OS2D A.2).

Each query is a class of its own, five of an object. Queries of a subset are split in file order: 75 % to train, 5 % to
validate, 20 % to test. Those of INSTRE-M, which show two objects, are left out.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from scipy.io import loadmat
from scipy.io.matlab import MatReadError

from ...files import dataset_path
from ..class_images import BoxRow, ClassImage, OneShotSet, images_of, register_one_shot

SUBSETS = ("s1", "s2")
# Percent of the classes at which a part begins and ends.
PARTS = {"train": (0, 75), "val": (75, 80), "test": (80, 100)}


def read_instre(root: Path, subset: str, part: str) -> OneShotSet:
    """Read the queries of a part and the boxes of their true images.

    Args:
        root: has ``gnd_instre.mat`` and the folders INSTRE-S1, INSTRE-S2 and INSTRE-M of images with a text file each.
        subset: of ``SUBSETS``. part: of ``PARTS``.

    Raises:
        FileNotFoundError: the annotations or the boxes of an image are missing.
        ValueError: a file is not what it must be; names it.
    """
    path = root / "gnd_instre.mat"
    queries, files, truth = _ground_truth(path)
    prefix = f"instre-{subset}/"
    own = [i for i, file in enumerate(queries) if file.lower().startswith(prefix)]
    first, end = (len(own) * share // 100 for share in PARTS[part])
    rows, classes = [], []
    for i in own[first:end]:
        positives, box = truth[i]
        name = f"{i:05d}_{'_'.join(Path(queries[i]).with_suffix('').parts)}"
        classes.append(ClassImage(i, name, root / queries[i], box))
        for image in positives:
            for xyxy in boxes_of(root, files[image], queries[i]):
                rows.append(BoxRow(len(rows), image, i, files[image], xyxy))
    if not rows:
        raise ValueError(f"{path} must have queries of {prefix} with true images, got none")
    return OneShotSet(tuple(rows), images_of(rows), tuple(classes), root, is_relative=False)


def boxes_of(root: Path, image_file: str, query_file: str) -> list[tuple[float, ...]]:
    """XYXY boxes, in pixels, of a query's object in one of its true images.

    The text file beside an image has a line "x y width height" for each box. An image of INSTRE-M has two objects,
    "a" first and "b" second; which of them is meant is the third letter of the query's folder.

    Raises:
        FileNotFoundError: there is no text file.
        ValueError: it has no such lines; names it.
    """
    path = root / Path(image_file).with_suffix(".txt")
    if not path.is_file():
        raise FileNotFoundError(f"boxes must exist, got {path}; see datasets/README.md")
    try:
        lines = [line.split() for line in path.read_text().splitlines() if line.strip()]
        boxes = [tuple(map(float, line)) for line in lines]
        corners = [(x, y, x + w, y + h) for x, y, w, h in boxes]
    except ValueError as error:
        raise ValueError(f"{path} must have lines 'x y width height', got: {error}") from error
    if not image_file.lower().startswith("instre-m/"):
        return corners
    letter = Path(query_file).parts[1][2:3].lower()
    if len(corners) != 2 or letter not in ("a", "b"):
        raise ValueError(
            f"{path} must have two boxes for objects a and b, got {len(corners)} and {query_file}"
        )
    return [corners["ab".index(letter)]]


def _ground_truth(
    path: Path,
) -> tuple[list[str], list[str], list[tuple[list[int], tuple[float, ...]]]]:
    """Files of the queries, files of the images, and of each query its true images and its box (XYXY)."""
    if not path.is_file():
        raise FileNotFoundError(f"annotation file must exist, got {path}; see datasets/README.md")
    try:
        content = loadmat(path)
        queries, files = _texts(content["qimlist"]), _texts(content["imlist"])
        # Numbers of Matlab begin at 1.
        truth = [
            ((np.ravel(row[0]).astype(int) - 1).tolist(), tuple(map(float, np.ravel(row[1]))))
            for row in np.ravel(content["gnd"])
        ]
    except (KeyError, IndexError, TypeError, ValueError, MatReadError) as error:
        raise ValueError(
            f"{path} must be a Matlab file with qimlist, imlist and gnd, got: {error}"
        ) from error
    images = [number for positives, _ in truth for number in positives]
    if len(truth) != len(queries) or any(not 0 <= number < len(files) for number in images):
        raise ValueError(
            f"{path} must have true images of {len(files)} for each of {len(queries)} queries, "
            f"got {len(truth)} lists"
        )
    if any(len(box) != 4 for _, box in truth):
        raise ValueError(f"{path} must have a box of four numbers for each query, got others")
    return queries, files, truth


def _texts(cells: Sequence[Any]) -> list[str]:
    return [str(np.ravel(cell)[0]) for cell in np.ravel(cells)]


def register_instre(root: Path) -> None:
    """Register ``instre_<subset>_<part>`` and their companions."""
    for subset in SUBSETS:
        for part in PARTS:
            register_one_shot(
                f"instre_{subset}_{part}", partial(read_instre, root, subset, part), root
            )


register_instre(dataset_path("instre"))
