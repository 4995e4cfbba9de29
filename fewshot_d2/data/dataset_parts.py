"""Parts of a COCO json that share no image: training and test data where a data set comes without."""

from collections.abc import Mapping
from typing import Any

import numpy as np


def split_images(
    content: Mapping[str, Any], sizes: Mapping[str, int | None], seed: int
) -> dict[str, dict[str, Any]]:
    """Draw the images of each part; an annotation goes where its image goes.

    The draw depends on the ids of the images and the seed, not on the order in the file. Everything but images and
    annotations, such as the categories, is the same in all parts.

    Args:
        content: of a COCO or LVIS json (``coco_json.read_json``).
        sizes: {name of a part: images it gets}; None, for one part at most, is all that the others leave.
        seed: of the draw.

    Returns:
        {name: content of its json}, images and annotations in the order that they had.

    Raises:
        ValueError: sizes do not fit the images, or two images are one file, which could end up in two parts.
    """
    ids = _image_ids(content["images"])
    counts = _counts(sizes, len(ids))
    order = np.random.default_rng(seed).permutation(len(ids))
    parts, start = {}, 0
    for name, count in counts.items():
        chosen = {ids[i] for i in order[start : start + count]}
        start += count
        parts[name] = {
            **content,
            "images": [row for row in content["images"] if row["id"] in chosen],
            "annotations": [row for row in content["annotations"] if row["image_id"] in chosen],
        }
    return parts


def _image_ids(images: list[Mapping[str, Any]]) -> list[int]:
    """Ids of all images, ascending."""
    ids = sorted({image["id"] for image in images})
    files = {image.get("file_name") or image.get("coco_url") for image in images}
    if not len(ids) == len(files) == len(images):
        raise ValueError(
            f"images must have ids and files of their own, got {len(ids)} ids and {len(files)} files for "
            f"{len(images)} images"
        )
    return ids


def _counts(sizes: Mapping[str, int | None], num_images: int) -> dict[str, int]:
    rest = [name for name, size in sizes.items() if size is None]
    given = sum(size for size in sizes.values() if size is not None)
    if not sizes or len(rest) > 1 or given + len(rest) > num_images:
        raise ValueError(
            f"parts must be at least one, of {num_images} images together, and one of them the rest at most, "
            f"got {dict(sizes)}"
        )
    counts = {name: num_images - given if size is None else size for name, size in sizes.items()}
    if min(counts.values()) < 1:
        raise ValueError(f"every part must get at least one image, got {counts}")
    return counts
