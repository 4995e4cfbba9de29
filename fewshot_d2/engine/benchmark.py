"""The episodic benchmark by config: plans, runs without and with fine-tuning, numbers, a diagram and pictures."""

import io
import logging
import sys
import time
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.evaluation import inference_context, print_csv_format
from detectron2.utils import comm
from PIL import Image
from torch import nn

from ..data.benchmark_plans import BenchmarkPlan, build_benchmark_plans
from ..data.dataset_mapper import read_image
from ..data.ground_truth import GroundTruthFilter
from ..data.loaders import build_factory, build_mapper
from ..data.tuple_plans import TuplePlan, build_tuple_plans
from ..evaluation.benchmark_page import write_benchmark_page
from ..evaluation.report import ReportFacts
from ..files import write_bytes
from ..visualization import episode_panel
from .episode_pictures import explanation_panels
from .episode_runner import EpisodeRunner, Found
from .finetune import FineTuning
from .plans import check_tested_classes, checked_plan, save_plans, support_datasets, write_results
from .solver import unwrapped

logger = logging.getLogger(__name__)


def evaluate_benchmark(cfg: CfgNode, model: nn.Module) -> dict[str, Any]:
    """Run all plans without and with fine-tuning as FEWSHOT.BENCHMARK says; print, draw and write the numbers.

    Returns:
        ``{"dataset/side/5way-1shot": {metric: percent}}``, ``".../fine-tuned"`` beside it; empty off the main process,
        with which the others share the episodes.

    Raises:
        ValueError: the system cannot be fine-tuned and FEWSHOT.BENCHMARK.FINE_TUNE wants it, or a plan does not fit.
    """
    # What is trained on an episode is the detector itself.
    model = unwrapped(model)
    node, output = cfg.FEWSHOT.BENCHMARK, Path(cfg.OUTPUT_DIR)
    if any(node.FINE_TUNE) and not hasattr(model, "episode_tuner"):
        raise ValueError(
            f"FEWSHOT.BENCHMARK.FINE_TUNE must be (False,) for {type(model).__name__}, got {node.FINE_TUNE}"
        )
    mapper, ground_truth = build_mapper(cfg, is_train=False), GroundTruthFilter.from_cfg(cfg)

    @lru_cache(maxsize=1)
    def runner_of(dataset: str, support_dataset: str) -> EpisodeRunner:
        factory = build_factory(dataset, support_dataset, ground_truth=ground_truth)
        return EpisodeRunner(
            model, factory, mapper, kept_queries=node.KEPT_QUERIES, square=node.SQUARE
        )

    results: dict[str, Any] = {}
    start, plans = time.perf_counter(), named_plans(benchmark_plans(cfg))
    with inference_context(model):
        for plan, plan_name in plans:
            runner = runner_of(plan.dataset, plan.support_dataset)
            plan.check(runner.factory.query_index, runner.factory.support_index, plan.dataset)
            for is_tuned in node.FINE_TUNE:
                name = f"{plan_name}/fine-tuned" if is_tuned else plan_name
                logger.info("%s, %d episodes, SHA-256 %s", name, len(plan.episodes), plan.sha256)
                show = _painter(output / "pictures" / name, runner, node.PICTURES)
                outcome = runner.run(plan, FineTuning.from_cfg(cfg) if is_tuned else None, show)
                if comm.is_main_process():
                    results[name] = outcome.metrics()
                    write_results(cfg, results)
    if comm.is_main_process():
        facts = ReportFacts(
            command=" ".join(sys.argv),
            config=cfg.dump(),
            seeds={"SEED": cfg.SEED, "FEWSHOT.BENCHMARK.SEED": node.SEED},
            elapsed={"evaluation": time.perf_counter() - start},
        )
        write_benchmark_page(
            output,
            results,
            facts,
            metric="AP_voc" if node.SUPPORTS == "images" else "AP",
            title=type(model).__name__,
            plans=[(name, plan.sha256) for plan, name in plans],
        )
        print_csv_format(results)
    return results


def benchmark_plans(cfg: CfgNode) -> list[BenchmarkPlan]:
    """The plans of FEWSHOT.BENCHMARK.PLANS, or new ones, one for each number of shots, saved in OUTPUT_DIR/plans."""
    check_tested_classes(cfg)
    node = cfg.FEWSHOT.BENCHMARK
    if node.PLANS:
        kind = TuplePlan if node.SUPPORTS == "images" else BenchmarkPlan
        return [_fitting(cfg, path, kind.load(path)) for path in node.PLANS]
    plans = [
        plan
        for dataset, support_dataset in zip(cfg.DATASETS.TEST, support_datasets(cfg), strict=True)
        for plan in _new_plans(cfg, dataset, support_dataset)
    ]
    save_plans(cfg, plans)
    return plans


def _new_plans(cfg: CfgNode, dataset: str, support_dataset: str) -> list[BenchmarkPlan]:
    node = cfg.FEWSHOT.BENCHMARK
    options = {
        "dataset": dataset,
        "support_dataset": support_dataset,
        "split": cfg.FEWSHOT.SPLIT,
        "sides": cfg.FEWSHOT.TEST.SIDES,
        "shots": node.SHOTS,
        "num_episodes": node.EPISODES,
        "seed": node.SEED,
        "ground_truth": GroundTruthFilter.from_cfg(cfg),
    }
    if node.SUPPORTS == "images":
        return build_tuple_plans(**options)
    return build_benchmark_plans(
        **options, ways=node.WAYS, queries_per_class=node.QUERIES_PER_CLASS
    )


def _fitting(cfg: CfgNode, path: str, plan: BenchmarkPlan) -> BenchmarkPlan:
    """The plan, if it is of this config and of its ground truth."""
    wanted = str(GroundTruthFilter.from_cfg(cfg))
    if isinstance(plan, TuplePlan) and plan.ground_truth != wanted:
        raise ValueError(
            f"{path} must be a plan of FEWSHOT.GROUND_TRUTH {wanted!r}, got one of {plan.ground_truth!r}"
        )
    return checked_plan(cfg, path, plan)


def named_plans(plans: Iterable[BenchmarkPlan]) -> list[tuple[BenchmarkPlan, str]]:
    """Each plan and the name of its results.

    Raises:
        ValueError: two plans have one name; the numbers of one would replace those of the other.
    """
    named = [(p, f"{p.dataset}/{p.side}/{p.ways}way-{p.shots}shot") for p in plans]
    names = [name for _, name in named]
    if len(set(names)) < len(names):
        raise ValueError(
            f"plans of one run must differ in data set, side, ways or shots, got {sorted(names)}"
        )
    return named


def _painter(folder: Path, runner: EpisodeRunner, number: int) -> Callable[[Found], None]:
    """Draws the first query of each of the first ``number`` episodes into ``folder``, and how it was searched."""
    factory = runner.factory

    def paint(found: Found) -> None:
        episode = found.episode
        if episode.id >= number or found.image_id != episode.query_image_ids[0]:
            return
        record = factory.query_index.dicts[factory.query_index.image_index(found.image_id)]
        labels = {class_id: k for k, class_id in enumerate(found.support_set.class_ids)}
        truth = found.truth[[class_id in labels for class_id in found.truth.gt_ids.tolist()]]
        truth.gt_classes = torch.tensor(
            [labels[c] for c in truth.gt_ids.tolist()], dtype=torch.int64
        )
        pixels = read_image(record, "RGB")
        panel = episode_panel(
            pixels,
            found.support_set,
            ground_truth=truth,
            predictions=found.predictions,
            threshold=0.5,
        )
        panels = {"": panel, **explanation_panels(runner.model, found, pixels)}
        for name, picture in panels.items():
            png = io.BytesIO()
            Image.fromarray(picture).save(png, "PNG")
            write_bytes(folder / f"episode_{episode.id}{name}.png", png.getvalue())

    return paint
