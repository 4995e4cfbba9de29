"""A small data set and its plans, shared by the tests of plans."""

from detectron2.structures import BoxMode

from fewshot_d2.data.index import InstanceIndex
from fewshot_d2.data.plans import make_plan

DATASET_IDS = {0: 3, 1: 7, 2: 20, 3: 21}


def make_index(num_images=12, first_id=0, num_classes=3, folder=""):
    """Images with up to four instances; class 21 has none. Written with arithmetic, not a generator."""
    dicts, number = [], first_id
    for i in range(num_images):
        annotations = []
        for k in range(i * 7 % 5):
            number += 1
            annotations.append(
                {
                    "id": number,
                    "bbox": [1, 1, 5, 5],
                    "bbox_mode": BoxMode.XYWH_ABS,
                    "category_id": (i * i + k * 3 + k * k) % num_classes,
                    "iscrowd": int((i + k) % 6 == 5),
                }
            )
        image = {"file_name": f"{folder}{i}.jpg", "height": 9, "width": 9, "image_id": 1000 + 3 * i}
        dicts.append({**image, "annotations": annotations})
    return InstanceIndex(dicts, DATASET_IDS)


def plan_of(query_index, support_index=None, **changes):
    values = {"dataset": "a", "support_dataset": "a", "split": "all", "side": "all", "run": 0}
    values |= {"class_ids": (20, 3, 7), "protocol": "present", "shots": 2, "seed": 5, **changes}
    return make_plan(query_index, support_index or query_index, **values)
