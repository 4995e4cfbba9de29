"""Plans of a config, of either kind: where they come from, whether they fit it, where they and results are written."""

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.utils import comm

from ..data.benchmark_plans import BenchmarkPlan
from ..data.plans import EvaluationPlan
from ..data.splits import check_same_classes, classes_of_side
from ..files import write_json

logger = logging.getLogger(__name__)

Plan = TypeVar("Plan", EvaluationPlan, BenchmarkPlan)


def checked_plan(cfg: CfgNode, path: str, plan: Plan) -> Plan:
    """The plan, if it is one of this config: a plan of another split would call trained classes novel."""
    if plan.dataset not in cfg.DATASETS.TEST or plan.split != cfg.FEWSHOT.SPLIT:
        raise ValueError(
            f"{path} must be a plan of DATASETS.TEST {tuple(cfg.DATASETS.TEST)} and FEWSHOT.SPLIT "
            f"{cfg.FEWSHOT.SPLIT!r}, got one of {plan.dataset!r} and {plan.split!r}"
        )
    foreign = set(plan.class_ids) - set(classes_of_side(plan.dataset, plan.split, plan.side))
    if foreign:
        raise ValueError(
            f"{path} must have {plan.side} classes only, got also {sorted(foreign)[:5]}"
        )
    return plan


def check_tested_classes(cfg: CfgNode) -> None:
    """Raise a ``ValueError`` where FEWSHOT.SPLIT would call classes novel that training has seen under another number.

    Tests need no training data, and generate none: where it is neither read nor a file, a warning says that it is open.
    """
    if cfg.FEWSHOT.SPLIT == "all":
        return
    for name in cfg.DATASETS.TRAIN:
        metadata = MetadataCatalog.get(name)
        is_read = metadata.get("thing_classes") is not None
        if is_read or Path(metadata.get("json_file", "")).is_file():
            check_same_classes(name, cfg.DATASETS.TEST)
        else:
            logger.warning(
                "Whether split %r means the same classes in %s is not known: its annotations are not here",
                *(cfg.FEWSHOT.SPLIT, name),
            )


def support_datasets(cfg: CfgNode) -> Sequence[str]:
    """One data set of supports for each of DATASETS.TEST."""
    names = cfg.FEWSHOT.SUPPORT.DATASETS_TEST or cfg.DATASETS.TEST
    if len(names) != len(cfg.DATASETS.TEST):
        raise ValueError(
            f"FEWSHOT.SUPPORT.DATASETS_TEST must have one name for each of {cfg.DATASETS.TEST}, "
            f"got {names}"
        )
    return names


def save_plans(cfg: CfgNode, plans: Sequence[EvaluationPlan | BenchmarkPlan]) -> None:
    """Write new plans below OUTPUT_DIR/plans and their hashes into OUTPUT_DIR/plans.json."""
    if not comm.is_main_process():
        return
    for plan in plans:
        plan.save(Path(cfg.OUTPUT_DIR) / "plans" / plan.file_name)
    hashes = [{"file": plan.file_name, "sha256": plan.sha256} for plan in plans]
    write_json(Path(cfg.OUTPUT_DIR) / "plans.json", hashes, indent=1)


def write_results(cfg: CfgNode, results: Mapping[str, Mapping[str, float]]) -> None:
    """Write OUTPUT_DIR/results.json; what is not a number is null there."""
    content = {
        task: {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        for task, metrics in results.items()
    }
    write_json(Path(cfg.OUTPUT_DIR) / "results.json", content, indent=1)
