"""Evaluation on plans: make or read them, run the model, add baselines, summarise over runs."""

import logging
import sys
import time
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.evaluation import (
    inference_context,
    inference_on_dataset,
    print_csv_format,
    verify_results,
)
from detectron2.modeling import build_model
from detectron2.utils import comm
from torch import nn

from ..checkpoint import FewShotCheckpointer
from ..data.datasets.cluttered_omniglot import cluttered_omniglot_plan
from ..data.episodes import EpisodeFactory
from ..data.loaders import EpisodicTestLoader, build_factory, build_mapper, build_plans
from ..data.plans import EvaluationPlan
from ..evaluation.baselines import detection_shift, gt_shift
from ..evaluation.episodic_coco import EpisodicCOCOEvaluator, evaluate_detections
from ..evaluation.localization import single_target_scores
from ..evaluation.metrics import summarize_runs
from ..evaluation.report import EvaluatedRun, ReportFacts, ReportRow, write_report
from ..evaluation.voc_ap import voc_scores
from ..modeling.detector import FewShotDetector
from ..structures import SupportFeatures
from .benchmark import evaluate_benchmark
from .episode_pictures import PairExplainer
from .plans import check_tested_classes, checked_plan, save_plans, support_datasets, write_results
from .solver import unwrapped

logger = logging.getLogger(__name__)

# Cluttered Omniglot: each scene is searched with its own reference, and the best detection's mask counts.
SINGLE_TARGET = "single_target"
# RepMet's benchmark: several queries share the supports of an episode; see ``engine.benchmark``.
EPISODES = "episodes"


def evaluate_only(cfg: CfgNode) -> dict[str, Any]:
    """``--eval-only``: load MODEL.WEIGHTS, evaluate, compare with TEST.EXPECTED_RESULTS."""
    model = build_model(cfg)
    FewShotCheckpointer(model, cfg.OUTPUT_DIR).load(cfg.MODEL.WEIGHTS)
    results = evaluate(cfg, model)
    if comm.is_main_process():
        verify_results(cfg, results)
    return results


def evaluate(cfg: CfgNode, model: nn.Module) -> dict[str, Any]:
    """Run the config's plans, print and return the numbers and write OUTPUT_DIR/report.html.

    Returns:
        ``{"dataset/side/task": {metric: mean over runs, "metric_ci95": half width}}``, the baselines as
        ``"dataset/side/baseline/task"``; empty off the main process and without DATASETS.TEST.
    """
    if cfg.FEWSHOT.TEST.PROTOCOL == EPISODES:
        return evaluate_benchmark(cfg, model)
    start = time.perf_counter()
    rows = evaluate_plans(cfg, model)
    if not rows:
        return {}
    results = summarize(rows)
    write_results(cfg, results)
    facts = ReportFacts(
        command=" ".join(sys.argv),
        config=cfg.dump(),
        seeds={"SEED": cfg.SEED, "FEWSHOT.TEST.SEED": cfg.FEWSHOT.TEST.SEED},
        elapsed={"evaluation": time.perf_counter() - start},
        metrics_file=Path(cfg.OUTPUT_DIR) / "metrics.json",
    )
    write_report(Path(cfg.OUTPUT_DIR) / "report.html", rows, facts, title=type(model).__name__)
    print_csv_format(results)
    return results


def evaluate_plans(cfg: CfgNode, model: nn.Module) -> list[ReportRow]:
    """Run every plan: a row for each (data set, side) and one for each baseline on it."""
    plans = evaluation_plans(cfg)
    # Plans of the same data sets follow each other: they are read and indexed once.
    factory_of = lru_cache(maxsize=1)(build_factory)
    runs: dict[tuple[str, str], list[EvaluatedRun]] = {}
    for number, plan in enumerate(plans, start=1):
        logger.info(
            "Plan %d of %d: %s, %s, %s classes, %d shots, seed %d, run %d, SHA-256 %s",
            *(number, len(plans), plan.dataset, plan.protocol, plan.side),
            *(plan.shots, plan.seed, plan.run, plan.sha256),
        )
        factory = factory_of(plan.dataset, plan.support_dataset)
        for baseline, run in evaluate_plan(cfg, model, plan, factory).items():
            runs.setdefault((f"{plan.dataset}/{plan.side}", baseline), []).append(run)
    return [
        ReportRow(f"{group}/{baseline}" if baseline else group, of_row, is_baseline=bool(baseline))
        for (group, baseline), of_row in runs.items()
    ]


def evaluate_plan(
    cfg: CfgNode, model: nn.Module, plan: EvaluationPlan, factory: EpisodeFactory
) -> dict[str, EvaluatedRun]:
    """The model's run under "" and each baseline's under its name; empty off the main process."""
    tasks = ("bbox", "segm") if cfg.MODEL.MASK_ON else ("bbox",)
    threshold = cfg.FEWSHOT.TEST.PRESENCE_THRESHOLD
    evaluator = EpisodicCOCOEvaluator(
        plan.dataset,
        plan,
        tasks=tasks,
        output_dir=str(Path(cfg.OUTPUT_DIR) / "inference" / Path(plan.file_name).stem),
        presence_threshold=threshold,
    )
    loader = EpisodicTestLoader(cfg, plan, factory, _fixed_features(cfg, model, plan, factory))
    results = inference_on_dataset(model, loader, evaluator)
    if not comm.is_main_process():
        return {}
    explain, detector = None, unwrapped(model)
    # Of a row the first run is shown.
    if plan.run == 0 and isinstance(detector, FewShotDetector):
        explain = PairExplainer(detector, plan, factory, build_mapper(cfg, is_train=False))
    runs = {"": EvaluatedRun(plan, results, evaluator.detections, explain)}
    for name in cfg.FEWSHOT.TEST.BASELINES:
        detections = _baseline(name, evaluator, plan)
        scores = evaluate_detections(
            evaluator.ground_truth, detections, plan, tasks=tasks, presence_threshold=threshold
        )
        runs[name] = EvaluatedRun(plan, scores, detections)
    if cfg.FEWSHOT.TEST.PROTOCOL == SINGLE_TARGET:
        for run in runs.values():
            run.results["localization"] = single_target_scores(
                evaluator.ground_truth, run.detections, plan
            )
    if cfg.FEWSHOT.TEST.VOC:
        extent = 1.0 if cfg.FEWSHOT.TEST.VOC_PIXEL else 0.0
        for run in runs.values():
            run.results["voc"] = voc_scores(
                evaluator.ground_truth, run.detections, plan, extent=extent
            )
    return runs


@torch.no_grad()
def _fixed_features(
    cfg: CfgNode, model: nn.Module, plan: EvaluationPlan, factory: EpisodeFactory
) -> SupportFeatures | None:
    """Supports that all episodes share are read and encoded once, class by class to bound the memory."""
    if plan.fixed_supports is None or len(plan.episodes) == 1:
        return None
    plan.check(factory.query_index, factory.support_index, plan.dataset)
    mapper, parts = build_mapper(cfg, is_train=False), []
    detector = unwrapped(model)
    with inference_context(detector):
        for class_id, ids in plan.fixed_supports.items():
            places = [factory.support_index.locate(annotation) for annotation in ids]
            episode = factory.build(0, (class_id,), [places], key=(plan.seed, 0), episode_id=0)
            parts.append(detector.encode_support([mapper.support_set(episode)]))
    return SupportFeatures.cat(parts)


def _baseline(name: str, evaluator: EpisodicCOCOEvaluator, plan: EvaluationPlan) -> list[dict]:
    rng = np.random.default_rng((plan.seed, plan.run))
    if name == "gt_shift":
        return gt_shift(evaluator.ground_truth, plan, rng)
    if name == "detection_shift":
        return detection_shift(evaluator.ground_truth, evaluator.detections, plan, rng)
    raise ValueError(f"FEWSHOT.TEST.BASELINES must name gt_shift or detection_shift, got {name!r}")


def summarize(rows: Sequence[ReportRow]) -> dict[str, Any]:
    """Means and 95 % intervals over the runs of each row, flat as detectron2's printing wants them."""
    results: dict[str, Any] = {}
    for row in rows:
        for task, metrics in summarize_runs([run.results for run in row.runs]).items():
            if isinstance(metrics, Mapping):
                flat = results[f"{row.name}/{task}"] = {}
                # Single classes ("AP-cat") are in the report; here they would bury the rest.
                for name, interval in metrics.items():
                    if "-" in name:
                        continue
                    flat[name] = interval.mean
                    if interval.half_width is not None:
                        flat[f"{name}_ci95"] = interval.half_width
    return results


def evaluation_plans(cfg: CfgNode) -> list[EvaluationPlan]:
    """The plans of FEWSHOT.TEST.PLANS, or new ones that are saved below OUTPUT_DIR/plans."""
    check_tested_classes(cfg)
    if cfg.FEWSHOT.TEST.PLANS:
        return [
            checked_plan(cfg, path, EvaluationPlan.load(path)) for path in cfg.FEWSHOT.TEST.PLANS
        ]
    plans = [
        plan
        for dataset, support_dataset in zip(cfg.DATASETS.TEST, support_datasets(cfg), strict=True)
        for plan in _make_plans(cfg, dataset, support_dataset)
    ]
    save_plans(cfg, plans)
    return plans


def _make_plans(cfg: CfgNode, dataset: str, support_dataset: str) -> list[EvaluationPlan]:
    node = cfg.FEWSHOT.TEST
    if node.PROTOCOL == SINGLE_TARGET:
        return [cluttered_omniglot_plan(dataset)]
    return build_plans(
        dataset=dataset,
        support_dataset=support_dataset,
        split=cfg.FEWSHOT.SPLIT,
        sides=node.SIDES,
        runs=node.NUM_RUNS,
        protocol=node.PROTOCOL,
        shots=node.NUM_SHOTS,
        seed=node.SEED,
        max_images=node.MAX_IMAGES,
        fixed_supports=node.FIXED_SUPPORTS,
        foreign_images=node.FOREIGN_IMAGES,
    )
