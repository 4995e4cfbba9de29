"""Is an example any good? It is searched with in pictures whose answer is known: those of the examples themselves.

K classes, S positive examples a class. A detection *covers* an example at IoU 0.5 with its region. Every test goes
through the predictor alone, so that it is the same for every system. All classes are searched together, as ``find``
does: in a system whose classes compete (RepMet's softmax) a score depends on which others there are.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from detectron2.structures import Boxes, pairwise_iou
from PIL import Image
from torch import Tensor

from ..predictor import FewShotPredictor, ImageSource
from ..structures import Support, SupportFeatures, SupportSet

_MIN_IOU = 0.5
# Share of its image that an example may fill and still be searched in it as it is.
_MOST_FILLED = 0.5
# Of an example that is laid on paper.
_MAX_SIDE = 1000
# Detections of a class that are looked at in each unlabelled picture.
_PER_PICTURE = 20


@dataclass
class ShotCheck:
    """One example.

    Attributes:
        number (int): from 1 within its class.
        self_score (float): best score of its own class on it, which has this example alone; 0 = not found again.
        other_score (float): the same, searched with all other examples of its class; NaN with a single example.
        confusable (str): the other class that scores best on it, all classes searched; "" = none.
        confusable_score (float): that score.
    """

    number: int
    self_score: float
    other_score: float = math.nan
    confusable: str = ""
    confusable_score: float = 0.0

    @property
    def verdict(self) -> str:
        """In a word or two, the worst that is known."""
        if self.self_score <= 0:
            return "not found again"
        if self.other_score <= 0:
            return "unlike the others"
        best = self.self_score if math.isnan(self.other_score) else self.other_score
        return f"like {self.confusable}" if self.confusable_score >= best else "good"


@dataclass
class ClassCheck:
    """One class: its examples, and a threshold that keeps what is like them and drops what is not."""

    name: str
    shots: list[ShotCheck] = field(default_factory=list)
    threshold: float = 0.5


def check_examples(
    predictor: FewShotPredictor, support_set: SupportSet, unlabelled: Iterable[ImageSource] = ()
) -> list[ClassCheck]:
    """Check every positive example.

    Args:
        predictor: of any system; its support is all examples afterwards.
        unlabelled: pictures of the kind that will be searched, whatever is on them; unreadable ones are left out.
    """
    checks = [ClassCheck(name) for name in support_set.class_names]
    # Each class is encoded once, however often it stands beside another one.
    classes = [
        predictor.set_support(support_set.one_class(k, shots))
        for k, shots in enumerate(support_set.positives())
    ]
    for k, shots in enumerate(support_set.positives()):
        numbers = [i for i, s in enumerate(support_set.examples[k], start=1) if not s.negative]
        for i in range(len(shots)):
            found = ShotCheck(numbers[i], _score_with(predictor, support_set, classes, k, [i]))
            if len(shots) > 1:
                rest = [j for j in range(len(shots)) if j != i]
                found.other_score = _score_with(predictor, support_set, classes, k, rest, of=i)
            checks[k].shots.append(found)
    predictor.set_support(support_set)
    wrong = _look_for_confusions(predictor, support_set, checks)
    scores = _unlabelled_scores(predictor, unlabelled, len(support_set))
    for k, check in enumerate(checks):
        right = [
            shot.self_score if math.isnan(shot.other_score) else shot.other_score
            for shot in check.shots
        ]
        check.threshold = suggested_threshold(right, wrong[k], scores[k])
    return checks


def _score_with(
    predictor: FewShotPredictor,
    support_set: SupportSet,
    classes: Sequence[SupportFeatures],
    k: int,
    kept: Sequence[int],
    of: int | None = None,
) -> float:
    """Best score of class k with but the ``kept`` examples on its example ``of`` (default: the first kept)."""
    shots = support_set.positives()[k]
    query = shots[kept[0] if of is None else of]
    parts = list(classes)
    if len(kept) < len(shots):
        parts[k] = predictor.set_support(support_set.one_class(k, [shots[i] for i in kept]))
    predictor.set_support(SupportFeatures.cat(parts))
    return float(_scores_on(predictor, query, len(classes))[k])


def _look_for_confusions(
    predictor: FewShotPredictor, support_set: SupportSet, checks: Sequence[ClassCheck]
) -> list[list[float]]:
    """Fill in the confusable classes; returns for each class its scores on examples of the others."""
    wrong: list[list[float]] = [[] for _ in checks]
    for k, shots in enumerate(support_set.positives()):
        for check, shot in zip(checks[k].shots, shots, strict=True):
            scores = _scores_on(predictor, shot, len(checks))
            for other, score in enumerate(scores.tolist()):
                if other != k:
                    wrong[other].append(score)
            scores[k] = 0.0
            if scores.max() > 0:
                check.confusable = checks[int(scores.argmax())].name
                check.confusable_score = float(scores.max())
    return wrong


def _scores_on(predictor: FewShotPredictor, shot: Support, num_classes: int) -> np.ndarray:
    """Best score of each class among the detections that cover the example; ndarray[K], 0 where there is none."""
    best = np.zeros(num_classes)
    picture, region = picture_of(shot)
    instances = predictor.predict(picture)
    if len(instances):
        covers = pairwise_iou(Boxes(region[None]), instances.pred_boxes)[0] >= _MIN_IOU
        kept = instances[covers]
        np.maximum.at(best, kept.pred_classes.numpy(), kept.scores.numpy())
    return best


def _unlabelled_scores(
    predictor: FewShotPredictor, pictures: Iterable[ImageSource], num_classes: int
) -> list[list[float]]:
    scores: list[list[float]] = [[] for _ in range(num_classes)]
    found = (query.instances for query in predictor.search(pictures) if query.error is None)
    for instances in found:
        for k in range(num_classes):
            of_class = instances.scores[instances.pred_classes == k]
            scores[k] += sorted(of_class.tolist(), reverse=True)[:_PER_PICTURE]
    return scores


def suggested_threshold(
    right: Sequence[float], wrong: Sequence[float], unlabelled: Sequence[float] = ()
) -> float:
    """A score between what is the class and what is not.

    Without unlabelled scores: where the fewest of ``right`` lie below and of ``wrong`` above, each as a share of its
    kind, in the middle of the widest such gap, never above all of ``right``. With nothing that is wrong, half of the
    lowest right one. With unlabelled scores the gap is that of the best split of all scores into two groups (Otsu),
    which may only raise it.

    Args:
        right: scores in [0, 1] on examples of the class; 0 = not found, of no use here.
        wrong: on examples of other classes. unlabelled: on pictures that nobody has looked at.
    """
    right = sorted(score for score in right if score > 0)
    if not right:
        return 0.5
    wrong = [score for score in wrong if score > 0]
    threshold = _least_errors(right, wrong) if wrong else right[0] / 2
    if len(unlabelled):
        split = _otsu(np.array([*right, *wrong, *unlabelled]))
        # Above the highest right score nothing would be found at all.
        threshold = max(threshold, min(split, right[0]))
    # Down: what has just the threshold's score stays.
    return math.floor(1000 * float(threshold)) / 1000


def _least_errors(right: Sequence[float], wrong: Sequence[float]) -> float:
    values = np.unique([0.0, *right, *wrong, 1.0])
    middles = ((values[1:] + values[:-1]) / 2)[values[:-1] < max(right)]
    missed = (np.asarray(right)[:, None] < middles).mean(axis=0)
    passed = (np.asarray(wrong)[:, None] >= middles).mean(axis=0)
    errors = missed + passed
    best = np.flatnonzero(np.isclose(errors, errors.min()))
    return float(middles[best[np.argmax(np.diff(values)[best])]])


def _otsu(scores: np.ndarray) -> float:
    """Middle of the gap that splits scores into two groups of least variance."""
    scores = np.sort(scores)
    if scores[0] == scores[-1]:
        return 0.0
    counts = np.arange(1, len(scores))
    sums = np.cumsum(scores)[:-1]
    low, high = sums / counts, (scores.sum() - sums) / (len(scores) - counts)
    between = counts * (len(scores) - counts) * (high - low) ** 2
    # A group may not begin between equal scores.
    between[scores[1:] == scores[:-1]] = -1.0
    split = int(between.argmax())
    return float(scores[split] + scores[split + 1]) / 2


def picture_of(shot: Support) -> tuple[np.ndarray, Tensor]:
    """What an example is searched in: its own image.

    An example that fills its image, as one that was cut out does, is laid in the middle of paper three times as wide
    and high, of the colour of the image's edge: detectors look for things in pictures, not for whole pictures.

    Returns:
        uint8 (H, W, 3), BGR; Tensor[4]: the example in it, XYXY, absolute pixels.
    """
    pixels, region = shot.image.permute(1, 2, 0).numpy(), shot.region
    height, width = shot.image_size
    if Boxes(region[None]).area().item() <= _MOST_FILLED * height * width:
        return pixels[:, :, ::-1], region
    image = Image.fromarray(np.ascontiguousarray(pixels))
    image.thumbnail((_MAX_SIDE, _MAX_SIDE))
    pixels = np.asarray(image)
    edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    paper = Image.new(
        "RGB", (3 * image.width, 3 * image.height), tuple(np.median(edge, 0).astype(int))
    )
    paper.paste(image, image.size)
    scale = region.new_tensor([image.width / width, image.height / height] * 2)
    return np.asarray(paper)[:, :, ::-1], region * scale + region.new_tensor(image.size * 2)
