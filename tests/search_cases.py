"""A small annotated set with rank lists and stages that are worked out by hand."""

import json

import numpy as np
from PIL import Image

from fewshot_d2.data.pseudo_labels import PseudoLabels, ScoredBox
from fewshot_d2.data.rank_lists import Candidate, RankList, RankLists

CATEGORIES = {5: "a", 11: "b"}
# (image id, category, XYXY, crowd); 106 is empty, 105 is in no list.
ANNOTATIONS = [
    (100, 5, (0, 0, 20, 20), 0),
    (101, 5, (0, 0, 10, 10), 0),
    (102, 5, (0, 0, 10, 10), 0),
    (102, 5, (20, 20, 40, 40), 0),
    (103, 11, (0, 0, 10, 10), 0),
    (104, 5, (0, 0, 60, 40), 1),
    (105, 5, (10, 10, 30, 30), 0),
    (107, 11, (0, 0, 20, 10), 0),
]
FAR = (50.0, 30.0, 60.0, 40.0)
# Of query 7, which is image 100: exact, in a false image, in its own, in a crowd's, half of the first instance.
FIRST = [
    (101, (0.0, 0.0, 10.0, 10.0)),
    (103, FAR),
    (100, FAR),
    (104, FAR),
    (102, (0.0, 0.0, 10.0, 5.0)),
]
# Of query 8, which is image 103: in an empty image, half of the instance.
SECOND = [(106, FAR), (107, (0.0, 0.0, 10.0, 10.0))]
# One exact box, then all of them; None = nothing found, scores as given.
STAGES = [
    [
        [None, (FAR, 0.9), (FAR, 0.2), None, ((20.0, 20.0, 40.0, 40.0), 0.8)],
        [None, ((0.0, 0.0, 20.0, 10.0), 0.3)],
    ],
    [
        [
            ((0.0, 0.0, 10.0, 10.0), 0.95),
            (FAR, 0.1),
            (FAR, 0.7),
            None,
            ((0.0, 0.0, 10.0, 10.0), 0.6),
        ],
        [(FAR, 0.9), ((0.0, 0.0, 20.0, 10.0), 0.4)],
    ],
]


def write_search_set(folder):
    """Pictures of 60x40 pixels and their json."""
    rng = np.random.default_rng(0)
    images = []
    for i in range(8):
        Image.fromarray(rng.integers(0, 255, (40, 60, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        images.append({"id": 100 + i, "file_name": f"{i}.png", "height": 40, "width": 60})
    annotations = [
        {
            "id": i,
            "image_id": image_id,
            "category_id": category,
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "iscrowd": crowd,
        }
        for i, (image_id, category, (x0, y0, x1, y1), crowd) in enumerate(ANNOTATIONS)
    ]
    categories = [{"id": i, "name": name} for i, name in CATEGORIES.items()]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "instances.json").write_text(json.dumps(content))


def search_lists(dataset="searched", query_dataset="searched"):
    """Two queries, one of each category."""
    lists = [
        RankList(query_id, image_id, (0.0, 0.0, 10.0, 10.0), label, candidates_of(rows))
        for query_id, image_id, label, rows in ((7, 100, 5, FIRST), (8, 103, 11, SECOND))
    ]
    return RankLists(dataset, query_dataset, "by hand", tuple(lists))


def candidates_of(rows):
    return tuple(Candidate(image_id, 0.9 - 0.1 * i, box) for i, (image_id, box) in enumerate(rows))


def stage_labels(lists, number):
    """What stage ``number`` (0 or 1) found."""
    found = tuple(
        tuple((ScoredBox(*pair),) if pair else () for pair in row) for row in STAGES[number]
    )
    return PseudoLabels(number + 1, 0.5, lists.sha256, found)
