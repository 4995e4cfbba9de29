"""Embedded data sets; importing this package registers them in detectron2's catalogue."""

from . import builtin, coco, flickrlogos27, imagenet_loc, instre, retail  # noqa: F401
