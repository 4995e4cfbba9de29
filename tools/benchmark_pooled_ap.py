#!/usr/bin/env python3
"""Time and memory of the pooled AP on as many entries as the paper's 500 episodes give (RepMet spec 3.4)."""

import argparse
import time

import numpy as np
from high_water import high_water
from tqdm import tqdm

from fewshot_d2.evaluation.pooled_ap import PooledPrecision

# Entries of one class in one image; five classes and 50 images an episode, as 5-way episodes with 2000 proposals.
_PER_ADD, _CLASSES, _IMAGES = 300, 5, 50


def gather(num_entries: int) -> PooledPrecision:
    """Boxes on background and, in every image, one of each class that is found."""
    rng = np.random.default_rng(0)
    precision = PooledPrecision()
    truth = np.array([[100.0 * c, 0, 100 * c + 50, 50] for c in range(_CLASSES)])
    boxes = rng.uniform(1000, 2000, (_PER_ADD, 2))
    boxes = np.concatenate([boxes, boxes + 20], axis=1)
    for number in tqdm(range(num_entries // _PER_ADD), unit="class of an image", mininterval=5):
        class_id = number % _CLASSES
        boxes[0] = truth[class_id]
        scores = rng.random(_PER_ADD)
        scores[0] = rng.random() ** 0.01
        precision.add(
            number // (_CLASSES * _IMAGES),
            class_id,
            boxes=boxes,
            scores=scores,
            truth_boxes=truth,
            truth_classes=np.arange(_CLASSES),
        )
    return precision


def main() -> None:
    """Gather, reduce, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--entries", type=int, default=40_000_000)
    args = parser.parse_args()
    start = time.perf_counter()
    precision = gather(args.entries)
    gathered = time.perf_counter()
    summary = precision.summary()
    end = time.perf_counter()
    peak = high_water() / 2**10
    print(
        f"{summary['num_entries']} entries, joint AP {summary['joint']:.4f} +- {summary['joint_ci95']:.4f}: "
        f"matched in {gathered - start:.1f} s, reduced in {end - gathered:.1f} s, peak memory {peak:.2f} GiB"
    )


if __name__ == "__main__":
    main()
