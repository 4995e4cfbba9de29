"""From "it is somewhere in these pictures" to boxes: image-level supports become boxed ones that every system takes.

"others": each picture is searched with the other examples of its class, best with SILCO, whose supports need no boxes.
"common": what the pictures have in common stands out in a network's features (SPIL's co-attention); any system will
do, and of a single picture it finds what stands out in it.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..predictor import FewShotPredictor
from ..structures import Support, SupportSet

METHODS = ("others", "common")


@dataclass(frozen=True)
class Localized:
    """What became of one example without a box.

    Attributes:
        class_name (str). number (int): from 1 among the examples of the class, as a contact sheet counts.
        box (Tensor[4] or None): XYXY in pixels of its image; None = nothing was found, the example is as it was.
        score (float): of the detection, or mean attention in the region; 0 = nothing was found.
    """

    class_name: str
    number: int
    box: torch.Tensor | None
    score: float


def localize_supports(
    predictor: FewShotPredictor,
    support_set: SupportSet,
    *,
    method: str = "others",
    min_score: float = 0.0,
) -> tuple[SupportSet, list[Localized]]:
    """Give positive examples that are whole images a box each; those with a box or a mask, and negatives, stay.

    Args:
        predictor: its own supports are afterwards what they were.
        method: one of ``METHODS``. min_score: what scores less is not found.

    Returns:
        A new support set, and what was done, in the order of the examples.

    Raises:
        ValueError: an unknown method, or by "others" a class with a single positive example, which has none.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {method!r}")
    if method == "others":
        _check_others(support_set)
    localize = _by_others if method == "others" else _by_common
    before = predictor.support
    examples, done = [], []
    try:
        for k, name in enumerate(support_set.class_names):
            shots = list(support_set.examples[k])
            for i, (box, score) in localize(predictor, support_set, k).items():
                if box is None or score < min_score:
                    box, score = None, 0.0
                else:
                    shots[i] = dataclasses.replace(shots[i], box=box)
                done.append(Localized(name, i + 1, shots[i].box, score))
            examples.append(shots)
    finally:
        predictor.support = before
    return SupportSet(list(support_set.class_ids), list(support_set.class_names), examples), done


def _is_whole(shot: Support) -> bool:
    return shot.box is None and shot.mask is None and not shot.negative


def _check_others(support_set: SupportSet) -> None:
    for name, shots in zip(support_set.class_names, support_set.positives(), strict=True):
        if len(shots) == 1 and _is_whole(shots[0]):
            raise ValueError(
                f"class {name!r} must have at least 2 examples, so that each can be found by the others, got 1; method "
                "'common' takes what stands out in a single image"
            )


Boxes = dict[int, tuple[torch.Tensor | None, float]]


def _by_others(predictor: FewShotPredictor, support_set: SupportSet, k: int) -> Boxes:
    """Best detection in each whole image of a class, searched with the other positive examples of it."""
    shots, found = support_set.examples[k], {}
    for i, shot in enumerate(shots):
        if not _is_whole(shot):
            continue
        rest = shots[:i] + shots[i + 1 :]
        predictor.set_support(support_set.one_class(k, rest))
        instances = predictor.predict(_bgr(shot))
        found[i] = None, 0.0
        # The best box with an area inside the image.
        for j in instances.scores.argsort(descending=True).tolist():
            box = _inside(instances.pred_boxes.tensor[j], shot)
            if box is not None:
                found[i] = box, float(instances.scores[j])
                break
    return found


def _by_common(predictor: FewShotPredictor, support_set: SupportSet, k: int) -> Boxes:
    """Region of what all positive images of a class have in common; boxes that are there are not looked at."""
    shots = support_set.examples[k]
    whole = [i for i, shot in enumerate(shots) if _is_whole(shot)]
    if not whole:
        return {}
    positives = [i for i, shot in enumerate(shots) if not shot.negative]
    regions = predictor.common_boxes([_bgr(shots[i]) for i in positives])
    found: Boxes = {}
    for i, region in zip(positives, regions, strict=True):
        if i in whole:
            box = None if region is None else _inside(region[0], shots[i])
            found[i] = (None, 0.0) if box is None else (box, region[1])
    return found


def _inside(box: torch.Tensor, shot: Support) -> torch.Tensor | None:
    """The part of a box that is inside the image of an example, if it has an area."""
    height, width = shot.image_size
    limit = torch.tensor([width, height, width, height], dtype=torch.float32)
    box = torch.minimum(box.float().cpu().clamp(min=0), limit)
    return box if bool((box[2:] > box[:2]).all()) else None


def _bgr(shot: Support) -> np.ndarray:
    return shot.image.permute(1, 2, 0).numpy()[:, :, ::-1]


def rows_of(done: Sequence[Localized]) -> list[tuple[str, int, str, float]]:
    """(class, number, box as x,y,w,h or "not found", score) of each, to be printed."""
    rows = []
    for shot in done:
        text = "not found"
        if shot.box is not None:
            x0, y0, x1, y1 = shot.box.tolist()
            text = ",".join(f"{value:.0f}" for value in (x0, y0, x1 - x0, y1 - y0))
        rows.append((shot.class_name, shot.number, text, shot.score))
    return rows
