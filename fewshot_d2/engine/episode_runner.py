"""Running m-way n-shot episodes with any detector, and matching what it finds (RepMet paper 5.2, spec 3)."""

import contextlib
import logging
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from detectron2.structures import Boxes, BoxMode, Instances
from tqdm import tqdm

from ..data.benchmark_plans import BenchmarkEpisode, BenchmarkPlan
from ..data.dataset_mapper import EpisodicDatasetMapper
from ..data.episodes import EpisodeFactory
from ..evaluation.pooled_ap import PooledPrecision, pixel_iou
from ..modeling.detector import FewShotDetector
from ..structures import SupportFeatures, SupportSet
from .finetune import FineTuning, fine_tuned

logger = logging.getLogger(__name__)

_RANKS = (10, 100)
# The matching counts the last pixel as part of a box; ours end before it.
_LAST_PIXEL = np.array([0, 0, 1, 1])


@dataclass
class Outcome:
    """What a run over a plan gives.

    Attributes:
        pooled (dict[str, PooledPrecision]): "official" and "voc" by matching; "searched" is the official one without
            detections on objects that the data set knows but the episode does not search.
        left_out (list[str]): messages of unreadable images.
        seconds (float): of the whole run. support_seconds (list[float]): of encoding and tuning each episode.
    """

    pooled: dict[str, PooledPrecision] = field(
        default_factory=lambda: {
            "official": PooledPrecision("official", ranks=_RANKS),
            "voc": PooledPrecision("voc"),
            "searched": PooledPrecision("official"),
        }
    )
    left_out: list[str] = field(default_factory=list)
    seconds: float = 0.0
    support_seconds: list[float] = field(default_factory=list)

    def metrics(self) -> dict[str, float]:
        """Percent, flat: AP = all entries as one list with RepMet's matching; see ``PooledPrecision``."""
        official, voc, searched = (
            self.pooled[name].summary() for name in ("official", "voc", "searched")
        )
        return {
            "AP": 100 * official["joint"],
            "AP_ci95": 100 * official["joint_ci95"],
            "AP_episodes": 100 * official["per_episode_mean"],
            "AP_episodes_ci95": 100 * official["per_episode_mean_ci95"],
            "AP_classes": 100 * official["per_class_mean"],
            "AP_classes_ci95": 100 * official["per_class_mean_ci95"],
            "AP_voc": 100 * voc["joint"],
            "AP_voc_ci95": 100 * voc["joint_ci95"],
            "AP_searched": 100 * searched["joint"],
            "AP_searched_ci95": 100 * searched["joint_ci95"],
            **{f"R{k}": 100 * self.pooled["official"].recall_at(k) for k in _RANKS},
            "episodes": official["num_episodes"],
            "left_out": len(self.left_out),
            "support_seconds": float(np.mean(self.support_seconds or [np.nan])),
            "seconds": self.seconds,
        }


@dataclass
class Found:
    """One searched query, for pictures.

    Attributes:
        episode (BenchmarkEpisode), image_id (int), support_set (SupportSet): which and with what.
        truth (Instances): ``gt_boxes`` and ``gt_classes`` of the searched classes. predictions (Instances).
            Both in original pixels, classes in the order of ``support_set``.
    """

    episode: BenchmarkEpisode
    image_id: int
    support_set: SupportSet
    truth: Instances
    predictions: Instances


class EpisodeRunner:
    """Runs plans of one data set with one model.

    What a detector can say of a query before it knows the classes is kept for later episodes and plans.
    """

    def __init__(
        self,
        model: FewShotDetector,
        factory: EpisodeFactory,
        mapper: EpisodicDatasetMapper,
        *,
        kept_queries: int,
    ):
        """Take a model in inference mode; ``kept_queries`` bounds the memory."""
        self.model, self.factory, self.mapper = model, factory, mapper
        self.kept = lru_cache(maxsize=kept_queries)(self.describe)

    def run(
        self,
        plan: BenchmarkPlan,
        tuning: FineTuning | None,
        show: Callable[[Found], None] = lambda found: None,
    ) -> Outcome:
        """All episodes, with fine-tuning if ``tuning`` is given; progress with the time left.

        Args:
            plan: was checked against the factory's indices. show: is called with every searched query.
        """
        outcome, start = Outcome(), time.perf_counter()
        describe = self.kept
        if tuning is not None and self.model.tunes_description(tuning.layers):
            describe = self.describe
        for episode in tqdm(plan.episodes, desc="episodes", unit="episode", mininterval=5):
            try:
                support_set = self.support_set(episode, plan.seed)
            except ValueError as error:
                outcome.left_out.append(f"episode {episode.id}: {error}")
                continue
            begin = time.perf_counter()
            with self.encoded(support_set, tuning) as features:
                outcome.support_seconds.append(time.perf_counter() - begin)
                for image_id in episode.query_image_ids:
                    query = describe(image_id)
                    if isinstance(query, str):
                        outcome.left_out.append(query)
                        continue
                    with torch.no_grad():
                        found = self.model.search(query, features).to("cpu")
                    truth = self.truth(image_id, episode.class_ids)
                    others = set(self.factory.query_index.class_ids) - set(episode.class_ids)
                    unsearched = self.truth(image_id, sorted(others))
                    _match(episode, image_id, found, truth, unsearched, support_set, outcome)
                    show(Found(episode, image_id, support_set, truth, found))
        outcome.seconds = time.perf_counter() - start
        for message in dict.fromkeys(outcome.left_out):
            logger.error("Left out: %s", message)
        return outcome

    def support_set(self, episode: BenchmarkEpisode, seed: int) -> SupportSet:
        """Read the supports; classes of a converted release that have none are not searched, and so missed."""
        pairs = zip(episode.class_ids, episode.supports, strict=True)
        class_ids, supports = zip(*((c, ids) for c, ids in pairs if ids), strict=True)
        places = [[self.factory.support_index.locate(i) for i in ids] for ids in supports]
        built = self.factory.build(
            0, class_ids, places, key=(seed, episode.id), episode_id=episode.id
        )
        return self.mapper.support_set(built)

    def describe(self, image_id: int) -> Any:
        """The query as the model's ``search`` takes it, or the message that tells why it cannot be read."""
        image = self.factory.query_index.image_index(image_id)
        try:
            query = self.mapper(self.factory.build(image, (), [], key=(0, image_id), episode_id=0))
        except ValueError as error:
            return f"query {image_id}: {error}"
        with torch.no_grad():
            return self.model.describe_queries([query])[0]

    @contextlib.contextmanager
    def encoded(
        self, support_set: SupportSet, tuning: FineTuning | None
    ) -> Iterator[SupportFeatures]:
        """Features of the supports; within the context the model is tuned to them if wanted."""
        if tuning is None:
            with torch.no_grad():
                features = self.model.encode_support([support_set])
            yield features
            return
        with fine_tuned(self.model, support_set, tuning) as features:
            yield features

    def truth(self, image_id: int, class_ids: Collection[int]) -> Instances:
        """``gt_boxes`` (XYXY, original pixels) and ``gt_ids``, dataset category ids, of the given classes."""
        index = self.factory.query_index
        image = index.image_index(image_id)
        record = index.dicts[image]
        chosen = [
            (record["annotations"][position], class_id)
            for class_id in class_ids
            for position in index.instances(image, class_id)
        ]
        boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a, _ in chosen]
        truth = Instances((record["height"], record["width"]))
        truth.gt_boxes = Boxes(torch.tensor(boxes, dtype=torch.float64).reshape(-1, 4))
        truth.gt_ids = torch.tensor([class_id for _, class_id in chosen], dtype=torch.int64)
        return truth


def _match(
    episode: BenchmarkEpisode,
    image_id: int,
    found: Instances,
    truth: Instances,
    unsearched: Instances,
    support_set: SupportSet,
    outcome: Outcome,
) -> None:
    """Match the detections of every class of the episode, also of one that could not be searched."""
    label_of = {class_id: label for label, class_id in enumerate(support_set.class_ids)}
    labels, scores = found.pred_classes.numpy(), found.scores.numpy()
    boxes, truth_boxes, other_boxes = (
        b.tensor.numpy() - _LAST_PIXEL
        for b in (found.pred_boxes, truth.gt_boxes, unsearched.gt_boxes)
    )
    on_truth, on_other = (
        (pixel_iou(boxes, b) >= 0.5).any(axis=1) for b in (truth_boxes, other_boxes)
    )
    for class_id in episode.class_ids:
        own = labels == label_of.get(class_id, -1)
        for name, precision in outcome.pooled.items():
            counted = own & (on_truth | ~on_other) if name == "searched" else own
            precision.add(
                episode.id,
                class_id,
                image=image_id,
                boxes=boxes[counted],
                scores=scores[counted],
                truth_boxes=truth_boxes,
                truth_classes=truth.gt_ids.numpy(),
            )
