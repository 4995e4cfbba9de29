"""Evaluation on plans: make or read them, run the model, add baselines, summarise over runs."""

import itertools
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.evaluation import inference_on_dataset, print_csv_format, verify_results
from detectron2.modeling import build_model
from detectron2.utils import comm
from torch import nn

from ..checkpoint import FewShotCheckpointer
from ..data.loaders import EpisodicTestLoader, build_factory, class_table
from ..data.plans import EvaluationPlan, make_plan
from ..data.splits import split_of
from ..evaluation.baselines import detection_shift, gt_shift
from ..evaluation.episodic_coco import EpisodicCOCOEvaluator, evaluate_detections
from ..evaluation.metrics import summarize_runs

logger = logging.getLogger(__name__)


@dataclass
class PlanOutcome:
    """What one plan gave.

    Attributes:
        plan: what was searched. results: metrics of the model. seconds: wall time of inference.
        baselines (dict[str, dict]): metrics of each baseline by name.
        evaluator: holds ground truth and detections for reports; main process only.
    """

    plan: EvaluationPlan
    results: dict[str, Any]
    seconds: float
    evaluator: EpisodicCOCOEvaluator
    baselines: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def group(self) -> str:
        """Runs of one group differ in their supports only; mean and interval are over these."""
        return f"{self.plan.dataset}/{self.plan.side}"


def evaluate_only(cfg: CfgNode) -> dict[str, Any]:
    """``--eval-only``: load MODEL.WEIGHTS, evaluate, compare with TEST.EXPECTED_RESULTS."""
    model = build_model(cfg)
    FewShotCheckpointer(model, cfg.OUTPUT_DIR).load(cfg.MODEL.WEIGHTS)
    results = evaluate(cfg, model)
    if comm.is_main_process():
        verify_results(cfg, results)
    return results


def evaluate(cfg: CfgNode, model: nn.Module) -> dict[str, Any]:
    """Metrics ``{"dataset/side/task": {metric: mean over runs, "metric_ci95": half width}}``; empty off rank 0."""
    outcomes = evaluate_plans(cfg, model)
    if not comm.is_main_process():
        return {}
    results = summarize(outcomes)
    print_csv_format(results)
    return results


def evaluate_plans(cfg: CfgNode, model: nn.Module) -> list[PlanOutcome]:
    """Run every plan of the config."""
    plans = evaluation_plans(cfg)
    outcomes = []
    for number, plan in enumerate(plans, start=1):
        logger.info(
            "Plan %d of %d: %s, %s, %s classes, %d shots, seed %d, run %d, SHA-256 %s",
            *(number, len(plans), plan.dataset, plan.protocol, plan.side),
            *(plan.shots, plan.seed, plan.run, plan.sha256),
        )
        outcomes.append(evaluate_plan(cfg, model, plan))
    return outcomes


def evaluate_plan(cfg: CfgNode, model: nn.Module, plan: EvaluationPlan) -> PlanOutcome:
    """Run one plan and its baselines."""
    tasks = ("bbox", "segm") if cfg.MODEL.MASK_ON else ("bbox",)
    threshold = cfg.FEWSHOT.TEST.PRESENCE_THRESHOLD
    evaluator = EpisodicCOCOEvaluator(
        plan.dataset,
        plan,
        tasks=tasks,
        output_dir=str(Path(cfg.OUTPUT_DIR) / "inference" / Path(plan.file_name).stem),
        presence_threshold=threshold,
    )
    start = time.perf_counter()
    results = inference_on_dataset(model, EpisodicTestLoader(cfg, plan), evaluator)
    outcome = PlanOutcome(plan, results or {}, time.perf_counter() - start, evaluator)
    if comm.is_main_process():
        for name in cfg.FEWSHOT.TEST.BASELINES:
            outcome.baselines[name] = evaluate_detections(
                evaluator.ground_truth,
                _baseline(name, evaluator, plan),
                plan,
                tasks=tasks,
                presence_threshold=threshold,
            )
    return outcome


def _baseline(name: str, evaluator: EpisodicCOCOEvaluator, plan: EvaluationPlan) -> list[dict]:
    rng = np.random.default_rng((plan.seed, plan.run))
    if name == "gt_shift":
        return gt_shift(evaluator.ground_truth, plan, rng)
    if name == "detection_shift":
        return detection_shift(evaluator.ground_truth, evaluator.detections, plan, rng)
    raise ValueError(f"FEWSHOT.TEST.BASELINES must name gt_shift or detection_shift, got {name!r}")


def summarize(outcomes: Sequence[PlanOutcome]) -> dict[str, Any]:
    """Mean and 95 % interval over the runs of each group, of the model and of its baselines."""
    results: dict[str, Any] = {}
    for group, members in itertools.groupby(outcomes, key=lambda outcome: outcome.group):
        runs = list(members)
        results |= _named(group, [run.results for run in runs])
        for baseline in runs[0].baselines:
            rows = [run.baselines[baseline] for run in runs]
            results |= _named(f"{group}/{baseline}", rows)
    return results


def _named(prefix: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Flat numbers, as detectron2's printing and EXPECTED_RESULTS want them."""
    results = {}
    for task, metrics in summarize_runs(runs).items():
        if isinstance(metrics, dict):
            row = results[f"{prefix}/{task}"] = {}
            for name, interval in metrics.items():
                row[name] = interval.mean
                if interval.half_width is not None:
                    row[f"{name}_ci95"] = interval.half_width
    return results


def evaluation_plans(cfg: CfgNode) -> list[EvaluationPlan]:
    """The plans of FEWSHOT.TEST.PLANS, or new ones that are saved below OUTPUT_DIR/plans."""
    if cfg.FEWSHOT.TEST.PLANS:
        return [EvaluationPlan.load(path) for path in cfg.FEWSHOT.TEST.PLANS]
    plans = [
        plan
        for dataset, support_dataset in zip(cfg.DATASETS.TEST, _support_datasets(cfg), strict=True)
        for side in cfg.FEWSHOT.TEST.SIDES
        for plan in _make_plans(cfg, dataset, support_dataset, side)
    ]
    if comm.is_main_process():
        for plan in plans:
            plan.save(Path(cfg.OUTPUT_DIR) / "plans" / plan.file_name)
    return plans


def _support_datasets(cfg: CfgNode) -> Sequence[str]:
    names = cfg.FEWSHOT.SUPPORT.DATASETS_TEST or cfg.DATASETS.TEST
    if len(names) != len(cfg.DATASETS.TEST):
        raise ValueError(
            f"FEWSHOT.SUPPORT.DATASETS_TEST must have one name for each of {cfg.DATASETS.TEST}, "
            f"got {names}"
        )
    return names


def _make_plans(
    cfg: CfgNode, dataset: str, support_dataset: str, side: str
) -> list[EvaluationPlan]:
    DatasetCatalog.get(dataset)
    factory = build_factory(dataset, support_dataset)
    split = split_of(dataset, cfg.FEWSHOT.SPLIT)
    class_ids = {"base": split.base, "novel": split.novel, "all": tuple(class_table(dataset)[0])}
    node = cfg.FEWSHOT.TEST
    return [
        make_plan(
            factory.query_index,
            factory.support_index,
            dataset=dataset,
            support_dataset=support_dataset,
            split=cfg.FEWSHOT.SPLIT,
            side=side,
            class_ids=class_ids[side],
            protocol=node.PROTOCOL,
            shots=node.NUM_SHOTS,
            seed=node.SEED,
            run=run,
            max_images=node.MAX_IMAGES,
        )
        for run in range(node.NUM_RUNS)
    ]
