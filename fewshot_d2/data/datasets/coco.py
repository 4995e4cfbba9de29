"""COCO 2017 and LVIS v1 as published, below DETECTRON2_DATASETS.

detectron2 has its own registrations of both; these keep the annotation ids that evaluation plans name, and read
LVIS without its API.
"""

from ..coco_json import register_instances

_SETS = {
    "coco_2017_train_fewshot": ("coco/annotations/instances_train2017.json", "coco/train2017"),
    "coco_2017_val_fewshot": ("coco/annotations/instances_val2017.json", "coco/val2017"),
    "lvis_v1_train_fewshot": ("lvis/lvis_v1_train.json", "coco"),
    "lvis_v1_val_fewshot": ("lvis/lvis_v1_val.json", "coco"),
}

for _name, _paths in _SETS.items():
    register_instances(_name, *_paths)
