"""Embedded data sets; importing this package registers them in detectron2's catalogue."""

from . import builtin, coco, common_localization, flickrlogos27, imagenet_loc  # noqa: F401
