"""Embedded data sets; importing this package registers them in detectron2's catalogue."""

from . import (  # noqa: F401
    builtin,
    coco,
    common_localization,
    flickrlogos27,
    imagenet_loc,
    instre,
    retail,
)
