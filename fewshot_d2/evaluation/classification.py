"""Top-1 error of a classifier with its interval (RepMet section 5.1, Table 1), and embeddings to draw."""

import math
from typing import Any

import torch
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from torch import Tensor

_Z95 = 1.959964


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """95 % score interval of a proportion (Wilson, 1927): within [0, 1] and useful at 0 and 1 too.

    Raises:
        ValueError: there is no trial, or more successes than trials.
    """
    if not 0 <= successes <= trials or trials < 1:
        raise ValueError(f"proportion must be of at least 1 trial, got {successes} of {trials}")
    share, z2 = successes / trials, _Z95**2
    centre = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = _Z95 / (1 + z2 / trials)
    half *= math.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2))
    return max(centre - half, 0.0), min(centre + half, 1.0)


class TopOneEvaluator(DatasetEvaluator):
    """Counts images whose most probable class is wrong.

    Attributes:
        embeddings (Tensor[P, D]), labels (Tensor[P]): after ``evaluate``, on the main process: of images of the first
            classes, to be drawn.
    """

    def __init__(self, *, kept_classes: int = 20, kept_per_class: int = 50):
        """Keep at most that many embeddings; points beyond them only hide each other."""
        self.kept_classes, self.kept_per_class = kept_classes, kept_per_class
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self._wrong = self._images = 0
        self._kept: dict[int, list[Tensor]] = {}
        self.embeddings, self.labels = torch.empty(0, 0), torch.empty(0, dtype=torch.int64)

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Tensor]]) -> None:
        """Take images with ``label`` and their ``log_posteriors`` (Tensor[N]) and ``embedding`` (Tensor[D])."""
        for image, output in zip(inputs, outputs, strict=True):
            label = image["label"]
            self._images += 1
            self._wrong += int(output["log_posteriors"].argmax()) != label
            if label < self.kept_classes:
                kept = self._kept.setdefault(label, [])
                if len(kept) < self.kept_per_class:
                    kept.append(output["embedding"].cpu())

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Percentages and the number of images under "classification"; empty off the main process."""
        parts = comm.gather((self._wrong, self._images, self._kept))
        if not comm.is_main_process():
            return {}
        wrong, images = (sum(part[i] for part in parts) for i in (0, 1))
        kept = [(e, label) for part in parts for label, own in sorted(part[2].items()) for e in own]
        if kept:
            self.embeddings = torch.stack([embedding for embedding, _ in kept])
            self.labels = torch.tensor([label for _, label in kept])
        low, high = wilson_interval(wrong, images)
        return {
            "classification": {
                "top1_error": 100 * wrong / images,
                "top1_error_low": 100 * low,
                "top1_error_high": 100 * high,
                "images": images,
            }
        }
