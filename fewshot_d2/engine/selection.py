"""The best checkpoint of a run, chosen on data that no result is reported of (SILCO section 4.3)."""

import csv
import io
import logging
import math
import shutil
from collections.abc import Mapping
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.utils import comm

from ..checkpoint import read_checkpoint
from ..config import load_config
from ..files import atomic_path, write_bytes, write_text
from ..visualization import plot_by_number
from .evaluate import evaluate_only

logger = logging.getLogger(__name__)

BEST = "model_best.pth"


def select_checkpoint(cfg: CfgNode, folder: str | Path, metric: str) -> Path | None:
    """Evaluate a run's checkpoints as the config says, and copy the best to ``folder``/model_best.pth.

    Each is evaluated in OUTPUT_DIR/<its name>; ``checkpoints.csv`` and ``checkpoints.png`` there have the numbers of
    all. Of equal ones the earliest is taken.

    Args:
        folder: OUTPUT_DIR of the training run.
        metric: what is compared, e.g. "AP_voc": its mean over all results that have it.

    Returns:
        The copy; None off the main process.

    Raises:
        ValueError: no checkpoint, one of no training run, or no result with that number.
    """
    folder, paths, values = Path(folder), checkpoints_of(Path(folder)), {}
    _warn_of_tested(cfg, folder / "config.yaml")
    for iteration, path in paths.items():
        results = evaluate_only(_evaluation_of(cfg, path))
        if comm.is_main_process():
            values[iteration] = mean_metric(results, metric)
            logger.info("%s: %s %.2f", path.name, metric, values[iteration])
            _write_numbers(Path(cfg.OUTPUT_DIR), values, metric)
    if not comm.is_main_process():
        return None
    best = max(values, key=values.__getitem__)
    with atomic_path(folder / BEST) as copy:
        shutil.copyfile(paths[best], copy)
    logger.info("%s: %s of iteration %d", folder / BEST, paths[best].name, best)
    return folder / BEST


def checkpoints_of(folder: Path) -> dict[int, Path]:
    """A run's checkpoints by their iterations, in order; the final one stands for a periodic one of the same."""
    paths = {}
    for path in sorted(folder.glob("model_*.pth")):
        if path.name != BEST:
            content = read_checkpoint(str(path), lazy=True)
            if "iteration" not in content:
                raise ValueError(f"{path} must be a checkpoint of a training run, got no iteration")
            paths[content["iteration"]] = path
    if not paths:
        raise ValueError(f"{folder} must have checkpoints model_*.pth, got none")
    return dict(sorted(paths.items()))


def mean_metric(results: Mapping[str, Mapping[str, float]], metric: str) -> float:
    """Mean of a number over the results that have it; what is undefined, NaN, does not count."""
    values = [metrics[metric] for metrics in results.values() if metric in metrics]
    if not values:
        known = sorted({name for metrics in results.values() for name in metrics})
        raise ValueError(f"metric must be one of {known}, got {metric!r}")
    defined = [value for value in values if math.isfinite(value)]
    if not defined:
        raise ValueError(f"{metric} must be defined on the data of the choice, got {values}")
    return sum(defined) / len(defined)


def _warn_of_tested(cfg: CfgNode, run: Path) -> None:
    """Say so if the data of the choice are those that the run itself is tested on."""
    tested = load_config(str(run)).DATASETS.TEST if run.is_file() else ()
    both = sorted(set(tested) & set(cfg.DATASETS.TEST))
    if both:
        logger.warning(
            "The best checkpoint is chosen on %s, which %s tests: its results there will be too good",
            *(both, run),
        )


def _evaluation_of(cfg: CfgNode, path: Path) -> CfgNode:
    """The config of one checkpoint's evaluation, in a folder of its own; without baselines."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.merge_from_list(
        [
            *("MODEL.WEIGHTS", str(path), "OUTPUT_DIR", str(Path(cfg.OUTPUT_DIR) / path.stem)),
            *("FEWSHOT.TEST.BASELINES", (), "TEST.EXPECTED_RESULTS", []),
        ]
    )
    cfg.freeze()
    return cfg


def _write_numbers(folder: Path, values: Mapping[int, float], metric: str) -> None:
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows([("iteration", metric), *values.items()])
    write_text(folder / "checkpoints.csv", table.getvalue())
    curve = {iteration: (value, math.nan) for iteration, value in values.items()}
    write_bytes(
        folder / "checkpoints.png", plot_by_number({"checkpoints": curve}, "iteration", metric)
    )
