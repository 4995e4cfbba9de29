"""Running m-way n-shot episodes with any detector, and matching what it finds (RepMet paper 5.2, spec 3)."""

import contextlib
import logging
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from detectron2.data.samplers import InferenceSampler
from detectron2.structures import Boxes, BoxMode, Instances
from detectron2.utils import comm
from tqdm import tqdm

from ..data.benchmark_plans import BenchmarkEpisode, BenchmarkPlan
from ..data.dataset_mapper import EpisodicDatasetMapper
from ..data.episodes import EpisodeFactory
from ..data.index import InstanceIndex
from ..data.plans import PlannedEpisode
from ..evaluation.pooled_ap import PooledPrecision, in_square, pixel_iou
from ..modeling.detector import FewShotDetector
from ..structures import SupportFeatures, SupportSet
from .finetune import FineTuning, fine_tuned

logger = logging.getLogger(__name__)

_RANKS = (10, 100)
# The matching counts the last pixel as part of a box; ours end before it.
_LAST_PIXEL = np.array([0, 0, 1, 1])
_NOTHING = Instances(
    (0, 0),
    pred_boxes=Boxes(torch.empty(0, 4)),
    scores=torch.empty(0),
    pred_classes=torch.empty(0, dtype=torch.int64),
)


@dataclass
class Outcome:
    """What a run over a plan gives.

    Attributes:
        pooled (dict[str, PooledPrecision]): "official" and "voc" by matching; "searched" is the official one without
            detections on objects that the data set knows but the episode does not search.
        unread (list[str]): why a query was not searched, once for each of an episode: its picture or one of the
            supports' cannot be read. Its objects count as missed, so that the numbers are those of the whole plan.
        seconds (float): of the whole run. support_seconds (list[float]): of encoding and tuning each episode.
    """

    pooled: dict[str, PooledPrecision] = field(
        default_factory=lambda: {
            "official": PooledPrecision("official", ranks=_RANKS),
            "voc": PooledPrecision("voc"),
            "searched": PooledPrecision("official"),
        }
    )
    unread: list[str] = field(default_factory=list)
    seconds: float = 0.0
    support_seconds: list[float] = field(default_factory=list)

    @classmethod
    def joined(cls, parts: Iterable["Outcome"]) -> "Outcome":
        """One of the episodes of all parts, which have different ones; only ``seconds`` is left open."""
        whole = cls()
        for part in parts:
            for name, precision in whole.pooled.items():
                precision.update(part.pooled[name])
            whole.unread += part.unread
            whole.support_seconds += part.support_seconds
        return whole

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
            "AP_voc_classes": 100 * voc["per_class_mean"],
            "AP_voc_classes_ci95": 100 * voc["per_class_mean_ci95"],
            "AP_searched": 100 * searched["joint"],
            "AP_searched_ci95": 100 * searched["joint_ci95"],
            **{f"R{k}": 100 * self.pooled["official"].recall_at(k) for k in _RANKS},
            "episodes": official["num_episodes"],
            "unread_queries": len(self.unread),
            "support_seconds": float(np.mean(self.support_seconds or [np.nan])),
            "seconds": self.seconds,
        }


@dataclass
class Found:
    """What was found in one query.

    Attributes:
        episode (BenchmarkEpisode or PlannedEpisode), image_id (int), support_set (SupportSet or None): which, and what
            it was searched with; None where it could not be searched.
        truth (Instances): ``gt_boxes`` and ``gt_ids`` of the episode's classes, see ``truth_of``.
        predictions (Instances): in original pixels, ``pred_classes`` in the order of ``support_set``.
        query (Any), features (SupportFeatures or None): what the model's ``search`` was given.
    """

    episode: BenchmarkEpisode | PlannedEpisode
    image_id: int
    support_set: SupportSet | None
    truth: Instances
    predictions: Instances
    query: Any = None
    features: SupportFeatures | None = None


def truth_of(index: InstanceIndex, image_id: int, class_ids: Collection[int]) -> Instances:
    """``gt_boxes`` (XYXY, original pixels), ``gt_ids`` (dataset category ids), ``gt_difficult`` of classes."""
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
    difficult = [bool(a.get("difficult", 0)) for a, _ in chosen]
    truth.gt_difficult = torch.tensor(difficult, dtype=torch.bool)
    return truth


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
        square: int = 0,
    ):
        """Take a model in inference mode.

        Args:
            kept_queries: bounds the memory. square: side of a square in whose whole pixels boxes are compared; 0 =
                they are compared as they are, in pixels of the query.
        """
        self.model, self.factory, self.mapper, self.square = model, factory, mapper, square
        self.kept = lru_cache(maxsize=kept_queries)(self.describe)

    def run(
        self,
        plan: BenchmarkPlan,
        tuning: FineTuning | None,
        show: Callable[[Found], None] = lambda found: None,
    ) -> Outcome:
        """All episodes, with fine-tuning if ``tuning`` is given; progress with the time left.

        Several processes share the episodes out, as many to each, so that none of them waits long for another.

        Args:
            plan: was checked against the factory's indices. show: is called with every searched query.

        Returns:
            That of all processes on the main one, an empty one on the others.
        """
        outcome, start = Outcome(), time.perf_counter()
        describe = self.kept
        if tuning is not None and self.model.tunes_description(tuning.layers):
            describe = self.describe
        # In runs of neighbours: joined, they are in the order of the plan.
        own = [plan.episodes[number] for number in InferenceSampler(len(plan.episodes))]
        progress = {"desc": "episodes", "unit": "episode", "mininterval": 5}
        for episode in tqdm(own, **progress, disable=not comm.is_main_process()):
            try:
                support_set = self.support_set(episode, plan.seed)
            except ValueError as error:
                for image_id in episode.query_image_ids:
                    self._miss(episode, image_id, f"episode {episode.id}: {error}", outcome)
                continue
            begin = time.perf_counter()
            with self.encoded(support_set, tuning) as features:
                outcome.support_seconds.append(time.perf_counter() - begin)
                for image_id in episode.query_image_ids:
                    query = describe(image_id)
                    if isinstance(query, str):
                        self._miss(episode, image_id, query, outcome)
                        continue
                    with torch.no_grad():
                        predictions = self.model.search(query, features).to("cpu")
                    truth = truth_of(self.factory.query_index, image_id, episode.class_ids)
                    found = Found(
                        *(episode, image_id, support_set, truth, predictions, query, features)
                    )
                    self._match(found, outcome)
                    show(found)
        outcome = Outcome.joined(comm.gather(outcome))
        outcome.seconds = time.perf_counter() - start
        for message in dict.fromkeys(outcome.unread):
            logger.error("Not searched, so that all objects count as missed: %s", message)
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

    def _match(self, found: Found, outcome: Outcome) -> None:
        """Match the detections of every class of the episode, also of one that could not be searched."""
        episode, predictions = found.episode, found.predictions
        searched = found.support_set.class_ids if found.support_set else ()
        label_of = {class_id: label for label, class_id in enumerate(searched)}
        others = set(self.factory.query_index.class_ids) - set(episode.class_ids)
        unsearched = truth_of(self.factory.query_index, found.image_id, sorted(others))
        labels, scores = predictions.pred_classes.numpy(), predictions.scores.numpy()
        boxes, truth_boxes, other_boxes = (
            self._comparable(b.tensor.numpy(), found.truth.image_size)
            for b in (predictions.pred_boxes, found.truth.gt_boxes, unsearched.gt_boxes)
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
                    image=found.image_id,
                    boxes=boxes[counted],
                    scores=scores[counted],
                    truth_boxes=truth_boxes,
                    truth_classes=found.truth.gt_ids.numpy(),
                    truth_difficult=found.truth.gt_difficult.numpy(),
                )

    def _comparable(self, boxes: np.ndarray, image_size: tuple[int, int]) -> np.ndarray:
        """Boxes as ``pixel_iou`` takes them."""
        if self.square:
            return in_square(boxes, image_size, self.square)
        return boxes - _LAST_PIXEL

    def _miss(
        self, episode: BenchmarkEpisode, image_id: int, message: str, outcome: Outcome
    ) -> None:
        """Nothing is found in a query that cannot be searched."""
        outcome.unread.append(message)
        truth = truth_of(self.factory.query_index, image_id, episode.class_ids)
        self._match(Found(episode, image_id, None, truth, _NOTHING), outcome)
