"""Rank lists and pseudo labels for tests, ways to break their files, and the rules of sampling from them."""

import json

import numpy as np

from fewshot_d2.data.pseudo_labels import PseudoLabels, ScoredBox
from fewshot_d2.data.rank_lists import Candidate, RankList, RankLists
from fewshot_d2.data.sample_pool import Place

BOX, QUERY_BOX = (0.0, 0.0, 20.0, 20.0), (5.0, 5.0, 40.0, 40.0)


def random_box(rng, *, shortest=8.0):
    corner = rng.uniform(0, 100, 2)
    return tuple(map(float, (*corner, *(corner + rng.uniform(shortest, 80, 2)))))


def random_rank_lists(rng, *, num_queries=8, num_images=40, depths=(0, 12), one_set=True):
    """Lists of ``depths`` images, queries of few labels; some boxes have a side of less than 8 pixels."""
    lists = []
    for row in range(num_queries):
        images = rng.permutation(num_images)[: rng.integers(depths[0], depths[1] + 1)].tolist()
        scores = sorted(rng.uniform(-1, 1, len(images)).tolist(), reverse=True)
        candidates = [
            Candidate(image, score, random_box(rng, shortest=rng.choice([3, 8])))
            for image, score in zip(images, scores)
        ]
        image, label = int(rng.integers(num_images)), int(rng.integers(num_queries // 2 + 1))
        lists.append(RankList(100 + row, image, random_box(rng), label, tuple(candidates)))
    return RankLists("base", "base" if one_set else "queries", "random", tuple(lists))


def random_labels(rng, rank_lists, *, stage=1, threshold=0.5, most=3):
    """Up to ``most`` boxes in each candidate image."""
    found = tuple(
        tuple(
            tuple(
                ScoredBox(random_box(rng, shortest=rng.choice([3, 8])), score)
                for score in sorted(rng.uniform(0, 1, rng.integers(most + 1)).tolist())[::-1]
            )
            for _ in row.candidates
        )
        for row in rank_lists
    )
    return PseudoLabels(stage, threshold, rank_lists.sha256, found)


def listed(*images, labels=None, query_images=None, one_set=True):
    """A list of candidates with ``BOX`` for each sequence of image ids; query images are 1000, 1001, ..."""
    labels = labels or range(len(images))
    query_images = query_images or range(1000, 1000 + len(images))
    rows = (
        RankList(70 + i, q, QUERY_BOX, label, tuple(Candidate(c, 0.5, BOX) for c in found))
        for i, (found, label, q) in enumerate(zip(images, labels, query_images))
    )
    return RankLists("base", "base" if one_set else "queries", "by hand", tuple(rows))


def labels_of(lists, *confident, stage=1):
    """Of each list, the scores of the box of its first candidates; 0.1 for the others. Threshold 0.5.

    A box tells its score: its left side is at 100 times that.
    """
    found = tuple(
        tuple(
            (ScoredBox((100 * s, 0.0, 100 * s + 30, 30.0), s),)
            for s in (*scores, *[0.1] * len(row.candidates))[: len(row.candidates)]
        )
        for row, scores in zip(lists, confident)
    )
    return PseudoLabels(stage, 0.5, lists.sha256, found)


def with_value(content, place, value):
    """A copy of JSON content with the value at ``place``, keys one after another; without the key if it is ``...``."""
    copy = json.loads(json.dumps(content))
    *outer, last = place
    target = copy
    for key in outer:
        target = target[key]
    if value is ...:
        del target[last]
    else:
        target[last] = value
    return copy


# What no JSON file of ours is, and what the error says of it.
NO_DOCUMENTS = [
    (b"", "Expecting value"),
    (b"query,image\n1,2\n", "Expecting value"),
    (b'{"format": "fewshot', "Unterminated string"),
    (b'{"format": "\xff\xfe"}', "utf-8"),
    (b"[" * 100_000, "recursion"),
    (b"[1]", "format must be"),
    (b"null", "format must be"),
    (b'{"format": "coco", "version": 1}', "format must be"),
]
# What no box and no number is.
NO_BOXES = [
    (7, "box must be a list, got 7"),
    ([0, 0, 9], "box must be four numbers"),
    ([0, 0, 9, 9, 9], "box must be four numbers"),
    ([0, 0, "9", 9], "box must be a number, got '9'"),
    ([0, 0, None, 9], "box must be a number, got None"),
    ([0, 0, 0, 9], "with an area"),
    ([0, 9, 9, 0], "with an area"),
    ([0, 0, float("nan"), 9], "finite"),
    ([0, 0, float("inf"), 9], "finite"),
]
NO_NUMBERS = [
    (True, "must be a number, got True"),
    ("1", "must be a number, got '1'"),
    ([1], r"must be a number, got \[1\]"),
    (10**400, "must fit a float, got 1000"),
]


class PoolRules:
    """The rules of the sample pool once more, naively, for one query of the lists."""

    def __init__(self, lists, labels, row, min_side):
        self.lists = lists
        query = lists.lists[row]
        self.query = Place(True, query.image_id, query.box)
        self.boxes, self.weights, searched = {}, {}, {}
        for position, candidate in enumerate(query.candidates):
            place = Place(False, candidate.image_id, candidate.box)
            if self.key(place) == self.key(self.query):
                continue
            if large(candidate.box, min_side):
                searched[candidate.image_id] = place
            sure = [
                b
                for b in (labels.found[row][position] if labels else ())
                if b.score > labels.threshold and large(b.box, min_side)
            ]
            if sure:
                self.boxes[candidate.image_id] = tuple(b.box for b in sure)
                self.weights[candidate.image_id] = np.mean([b.score for b in sure])
        sure = {i: Place(False, i, boxes[0]) for i, boxes in self.boxes.items()}
        self.places = set((sure or searched).values())

    def key(self, place):
        name = self.lists.query_dataset if place.is_query else self.lists.dataset
        return name, place.image_id

    def assert_target(self, target):
        if target.is_query:
            assert (target.image_id, target.boxes) == (self.query.image_id, (self.query.box,))
            assert target.weight == 1
        else:
            assert target.boxes == self.boxes[target.image_id]
            assert abs(target.weight - self.weights[target.image_id]) < 1e-9

    def assert_examples(self, places, target, number, *, own):
        assert len(places) == number
        others = {p for p in self.places if self.key(p) != self.key(target.place)}
        crop = {self.query} if self.key(self.query) != self.key(target.place) else set()
        if own and not target.is_query and len(self.places) >= number:
            assert len(set(places)) == number and self.query in places
            assert set(places) <= others | crop
        elif len(others) >= number:
            assert len(set(places)) == number and set(places) <= others
        else:
            assert set(places) <= (others | crop or {self.query})
        if others | crop:
            assert all(self.key(p) != self.key(target.place) for p in places)


def large(box, min_side):
    return box[2] - box[0] >= min_side and box[3] - box[1] >= min_side


def is_negative(one, other, max_shared):
    images = [{c.image_id for c in row.candidates} for row in (one, other)]
    shorter = min(map(len, images))
    shares = bool(shorter) and len(images[0] & images[1]) / shorter > max_shared
    return one.label != other.label and not shares
