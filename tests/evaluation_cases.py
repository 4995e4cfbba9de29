"""Small random data sets, plans and detections that the evaluation tests share."""

import numpy as np
from detectron2.structures import BoxMode
from pycocotools import mask as mask_api

from fewshot_d2.data.plans import EvaluationPlan, PlannedEpisode
from fewshot_d2.evaluation.coco_scoring import GroundTruth

HEIGHT, WIDTH = 90, 120
# Category ids with holes, in the order of the contiguous ids.
CLASS_NAMES = {3: "cat", 7: "dog", 20: "bird", 21: "ant"}


def box_mask(box, height=HEIGHT, width=WIDTH):
    """An ellipse-like mask inside an XYWH box, bool (height, width)."""
    x, y, w, h = box
    rows, columns = np.mgrid[:height, :width] + 0.5
    return ((columns - x - w / 2) / (w / 2)) ** 2 + ((rows - y - h / 2) / (h / 2)) ** 2 <= 1


def rle(mask):
    encoded = mask_api.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(mask.shape), "counts": encoded["counts"].decode("ascii")}


def random_box(rng, height=HEIGHT, width=WIDTH, largest=60):
    w, h = rng.integers(6, largest, 2)
    return [int(rng.integers(0, width - w)), int(rng.integers(0, height - h)), int(w), int(h)]


def random_dicts(rng, num_images=6, max_instances=5, crowd=0.15, masks=True, file_name=""):
    """Dataset dicts of images with instances of random classes, some of them crowds."""
    dicts, annotation_id = [], 0
    for image_id in range(1, num_images + 1):
        annotations = []
        for _ in range(rng.integers(1, max_instances + 1)):
            box = random_box(rng)
            annotation = {
                # The first id is 0: COCOeval takes a match with annotation 0 for none.
                "id": annotation_id,
                "bbox": box,
                "bbox_mode": BoxMode.XYWH_ABS,
                "category_id": int(rng.integers(0, len(CLASS_NAMES) - 1)),
                "iscrowd": int(rng.random() < crowd),
            }
            if masks:
                annotation["segmentation"] = rle(box_mask(box))
            annotations.append(annotation)
            annotation_id += 1
        name = file_name.format(image_id)
        size = {"height": HEIGHT, "width": WIDTH}
        dicts.append({"file_name": name, "image_id": image_id, **size, "annotations": annotations})
    return dicts


def plan_of(dicts, class_ids=(3, 7, 20), protocol="present", dataset="random", **header):
    """A plan that gives each pair the first instance of its class as support."""
    ids = list(CLASS_NAMES)
    support, episodes = {}, []
    for record in dicts:
        for row in record["annotations"]:
            support.setdefault(ids[row["category_id"]], row["id"])
    for record in dicts:
        present = {ids[a["category_id"]] for a in record["annotations"] if not a["iscrowd"]}
        chosen = tuple(c for c in class_ids if protocol == "open" or c in present)
        if chosen:
            supports = tuple((support.get(c, 0),) for c in chosen)
            episodes.append(PlannedEpisode(len(episodes), record["image_id"], chosen, supports))
    values = {"split": "every_4th:1", "side": "novel", "shots": 1, "seed": 5, "run": 0, **header}
    return EvaluationPlan(
        dataset=dataset,
        support_dataset=dataset,
        protocol=protocol,
        class_ids=tuple(class_ids),
        episodes=tuple(episodes),
        **values,
    )


def truth_of(dicts):
    return GroundTruth(dicts, CLASS_NAMES)


def detection(image_id, class_id, box, score, masks=True):
    row = {
        "image_id": image_id,
        "category_id": class_id,
        "bbox": [float(v) for v in box],
        "score": float(score),
    }
    if masks:
        row["segmentation"] = rle(box_mask(box))
    return row


def random_detections(rng, dicts, class_ids=(3, 7, 20), masks=True):
    """Shaken ground truth, duplicates, other classes' instances and noise; no equal scores."""
    ids = list(CLASS_NAMES)
    rows = []
    for record in dicts:
        for annotation in record["annotations"]:
            for _ in range(rng.integers(0, 3)):
                x, y, w, h = annotation["bbox"]
                x, y = x + rng.integers(-4, 5), y + rng.integers(-4, 5)
                w, h = max(w + rng.integers(-4, 5), 3), max(h + rng.integers(-4, 5), 3)
                wrong = rng.random() < 0.2
                class_id = int(rng.choice(class_ids)) if wrong else ids[annotation["category_id"]]
                rows.append((record["image_id"], class_id, [x, y, w, h]))
        for _ in range(rng.integers(0, 4)):
            rows.append((record["image_id"], int(rng.choice(class_ids)), random_box(rng)))
    scores = rng.permutation(len(rows)) / len(rows)
    return [detection(*row, score, masks) for row, score in zip(rows, scores, strict=True)]


def perfect_detections(dicts, masks=True):
    ids = list(CLASS_NAMES)
    return [
        detection(r["image_id"], ids[a["category_id"]], a["bbox"], 0.9 - 0.001 * a["id"], masks)
        for r in dicts
        for a in r["annotations"]
        if not a["iscrowd"]
    ]
