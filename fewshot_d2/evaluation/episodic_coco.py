"""The evaluator of a plan, and the scoring that baselines share with it."""

import itertools
import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.evaluation import COCOEvaluator
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.utils import comm
from detectron2.utils.logger import create_small_table

from ..data.plans import EvaluationPlan, PlannedEpisode
from ..files import write_json
from .assignment import assign_pairs
from .coco_scoring import (
    TASKS,
    Detection,
    GroundTruth,
    Pair,
    has_masks,
    planned_pairs,
    score_detections,
)
from .metrics import presence_metrics

logger = logging.getLogger(__name__)

RESULTS_FILE = "coco_instances_results.json"


def evaluate_detections(
    ground_truth: GroundTruth,
    detections: Sequence[Detection],
    plan: EvaluationPlan,
    *,
    tasks: Collection[str] = TASKS,
    presence_threshold: float = 0.5,
    searched: Collection[Pair] | None = None,
) -> dict[str, Any]:
    """Score COCO result rows against a plan; this is what the evaluator and the baselines report.

    Args:
        ground_truth: of the plan's data set.
        detections: rows with dataset category ids.
        plan: what had to be searched.
        tasks: of "bbox" and "segm"; "segm" is left out for detections without masks.
        presence_threshold: score of an alarm (open protocol only).
        searched: the pairs that got an output, default all. A planned pair without one stays ground
            truth, so that a failure can only lower the average precision; it has no say in
            presence.

    Returns:
        ``{"bbox": {"AP", "AP50", ..., "AP-<class>", "AP50-<class>"}, "segm": ...}``, in percent,
        ``"presence"`` in the open protocol, ``num_episodes``, ``num_missing``, ``num_pairs`` and
        ``num_missing_pairs``; an episode is missing if none of its pairs was searched.
    """
    planned = planned_pairs(plan)
    searched = planned if searched is None else planned & set(searched)
    results: dict[str, Any] = {}
    for task in TASKS:
        if task not in tasks or (task == "segm" and not has_masks(detections)):
            continue
        scores = score_detections(ground_truth, detections, plan, task)
        results[task] = dict(scores.metrics)
        for class_id, ap, ap50 in zip(scores.class_ids, scores.ap, scores.ap50, strict=True):
            name = ground_truth.class_names[class_id]
            results[task] |= {f"AP-{name}": float(ap), f"AP50-{name}": float(ap50)}
    # In the present protocol every class is there, so presence has nothing to tell apart.
    if plan.protocol == "open":
        assignments = assign_pairs(ground_truth, detections, plan)
        assignments = {pair: a for pair, a in assignments.items() if pair in searched}
        results["presence"] = presence_metrics(ground_truth, assignments, presence_threshold)
    missing = planned - searched
    results["num_episodes"] = len(plan.episodes)
    results["num_missing"] = sum(
        all((episode.image_id, class_id) in missing for class_id in episode.class_ids)
        for episode in plan.episodes
    )
    results["num_pairs"] = len(planned)
    results["num_missing_pairs"] = len(missing)
    return results


class EpisodicCOCOEvaluator(COCOEvaluator):
    """COCO metrics of the (image, class) pairs of one evaluation plan.

    The model's episode-local classes become dataset category ids here. An episode without usable
    output is counted as missing and its instances as not found.
    """

    def __init__(
        self,
        dataset_name: str,
        plan: EvaluationPlan,
        *,
        tasks: Sequence[str] = TASKS,
        output_dir: str | None = None,
        distributed: bool = True,
        presence_threshold: float = 0.5,
    ):
        """Check the plan against the data set.

        Args:
            dataset_name: a registered data set, the plan's.
            plan: what is searched.
            tasks: of "bbox" and "segm".
            output_dir: folder for ``coco_instances_results.json``; None writes nothing.
            distributed: gather the outputs of all processes on the first.
            presence_threshold: score of an alarm in the open protocol.

        Raises:
            ValueError: the plan is empty, of another data set, or names an image or a class that is
                not there.
        """
        # First, because reading a generated data set writes the json that the parent opens.
        self._ground_truth = _checked_ground_truth(dataset_name, plan)
        # The unofficial fast evaluation is not in every build of detectron2, and its numbers differ
        # a little.
        super().__init__(
            dataset_name,
            tasks=tuple(tasks),
            distributed=distributed,
            output_dir=output_dir,
            use_fast_impl=False,
        )
        self._plan = plan
        self._presence_threshold = presence_threshold
        self._episodes = {episode.id: episode for episode in plan.episodes}
        self.reset()

    @property
    def ground_truth(self) -> GroundTruth:
        """Annotations of the data set."""
        return self._ground_truth

    @property
    def detections(self) -> list[Detection]:
        """COCO result rows after ``evaluate``, on the main process."""
        return self._detections

    def reset(self) -> None:
        """Forget all outputs."""
        self._predictions: list[dict[str, Any]] = []
        self._detections: list[Detection] = []

    def process(
        self, inputs: Sequence[Mapping[str, Any]], outputs: Sequence[Mapping[str, Any]]
    ) -> None:
        """Keep the outputs of some queries.

        Args:
            inputs: query dicts of the batch contract.
            outputs: ``{"instances": Instances}`` each, ``pred_classes`` in 0..K-1, boxes XYXY in
                pixels of the original query.

        Raises:
            ValueError: an episode is not of the plan or its classes are not the planned ones.
        """
        for query, output in zip(inputs, outputs, strict=True):
            class_ids = self._class_ids(query)
            instances = output.get("instances")
            if instances is None:
                self.skip(query, "the model returned no instances")
                continue
            instances = instances.to("cpu")
            # A NaN would be sorted anywhere among the scores and cannot be written as JSON.
            values = (instances.pred_boxes.tensor, instances.scores)
            if not all(torch.isfinite(v).all() for v in values):
                self.skip(query, "boxes or scores are not finite")
                continue
            local = instances.pred_classes
            if len(local) and not 0 <= int(local.min()) <= int(local.max()) < len(class_ids):
                raise ValueError(
                    f"pred_classes of episode {query['episode_id']} must be in "
                    f"0..{len(class_ids) - 1}, got {sorted(set(local.tolist()))}"
                )
            rows = instances_to_coco_json(instances, query["image_id"])
            for row in rows:
                row["category_id"] = class_ids[row["category_id"]]
            self._predictions.append(
                {"episode_id": query["episode_id"], "class_ids": class_ids, "rows": rows}
            )

    def skip(self, query: Mapping[str, Any], reason: str) -> None:
        """Log why an episode has no output; ``evaluate`` counts every one that is missing."""
        logger.error(
            "Episode %s (%s) is skipped: %s",
            query.get("episode_id"),
            query.get("file_name"),
            reason,
        )

    def evaluate(self) -> dict[str, Any]:
        """Score everything; on the main process only, elsewhere the result is empty.

        Returns:
            As ``evaluate_detections``.
        """
        predictions = self._predictions
        if self._distributed:
            comm.synchronize()
            predictions = list(itertools.chain(*comm.gather(predictions, dst=0)))
            if not comm.is_main_process():
                return {}
        # Order of the plan, not of the processes: equal scores are ranked the same on any number of
        # them.
        by_episode = {p["episode_id"]: p for p in predictions}
        if len(by_episode) < len(predictions):
            raise ValueError(
                f"each episode must be evaluated once, got {len(predictions)} outputs of "
                f"{len(by_episode)} episodes"
            )
        ordered = [by_episode[e.id] for e in self._plan.episodes if e.id in by_episode]
        self._detections = list(itertools.chain(*(p["rows"] for p in ordered)))
        if self._output_dir:
            write_json(Path(self._output_dir) / RESULTS_FILE, self._detections)
        results = evaluate_detections(
            self._ground_truth,
            self._detections,
            self._plan,
            tasks=self._tasks,
            presence_threshold=self._presence_threshold,
            searched=self._searched_pairs(ordered),
        )
        self._log(results)
        return results

    def _class_ids(self, query: Mapping[str, Any]) -> list[int]:
        """Dataset category ids behind the episode-local classes, after a check against the plan."""
        episode = self._episodes.get(query["episode_id"])
        key = "support_features" if "support_features" in query else "support"
        class_ids = list(query[key].class_ids)
        if (
            episode is None
            or episode.image_id != query["image_id"]
            or not set(class_ids) <= set(episode.class_ids)
        ):
            raise ValueError(
                f"episode {query['episode_id']} (image {query['image_id']}, classes {class_ids}) "
                f"must be one of the evaluation plan, got {_described(episode)} there"
            )
        return class_ids

    def _searched_pairs(self, predictions: Iterable[Mapping[str, Any]]) -> set[Pair]:
        return {
            (self._episodes[p["episode_id"]].image_id, class_id)
            for p in predictions
            for class_id in p["class_ids"]
        }

    def _log(self, results: Mapping[str, Any]) -> None:
        plan = self._plan
        logger.info(
            "Evaluated %s, %s classes, %s protocol, run %d, plan %s: %d episodes, %d missing",
            *(plan.dataset, plan.side, plan.protocol, plan.run, plan.sha256),
            *(results["num_episodes"], results["num_missing"]),
        )
        for task, values in results.items():
            if isinstance(values, Mapping):
                overall = {name: v for name, v in values.items() if "-" not in name}
                logger.info("%s:\n%s", task, create_small_table(overall))


def _described(episode: PlannedEpisode | None) -> str:
    if episode is None:
        return "no such episode"
    return f"image {episode.image_id}, classes {list(episode.class_ids)}"


def _checked_ground_truth(dataset_name: str, plan: EvaluationPlan) -> GroundTruth:
    if plan.dataset != dataset_name:
        raise ValueError(
            f"evaluation plan must be one of data set {dataset_name}, got a plan of {plan.dataset}"
        )
    planned_pairs(plan)
    ground_truth = GroundTruth.of_dataset(dataset_name)
    for episode in plan.episodes:
        unknown = [c for c in episode.class_ids if c not in ground_truth.class_names]
        if episode.image_id not in ground_truth.images or unknown:
            raise ValueError(
                f"episode {episode.id} must name an image and classes of data set {dataset_name}, "
                f"got image {episode.image_id} "
                f"{f'with unknown classes {unknown}' if unknown else 'that is not there'}"
            )
    return ground_truth
