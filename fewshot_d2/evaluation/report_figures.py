"""Figures of the report: what was measured at IoU 0.5, row by row, as HTML sections."""

import json
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..data.plans import EvaluationPlan
from ..visualization import (
    plot_ap50_by_instances,
    plot_confusion,
    plot_precision_recall,
    plot_training_losses,
)
from ..visualization.pictures import RIGHT, TRUTH, WRONG
from . import report_html as html
from .assignment import Assignment, assign_pairs, best_threshold, precision_by_class
from .coco_scoring import Detection, GroundTruth, Pair
from .metrics import ap50_by_instances, confusion_matrix
from .report_gallery import GROUPS, GalleryPicture, choose_pairs, draw_pairs, explain_pair

TASK_NAMES = {"bbox": "boxes", "segm": "masks"}
_MAX_CONFUSION_CLASSES = 40


@dataclass(frozen=True)
class EvaluatedRun:
    """One plan with what came of it: the evaluator's result dict and its COCO result rows.

    Attributes:
        explain: draws how an image (id) was searched for a class (id), {name: ndarray[H, W, 3]}.
    """

    plan: EvaluationPlan
    results: Mapping[str, Any]
    detections: Sequence[Detection]
    explain: Callable[[int, int], Mapping[str, np.ndarray]] | None = None


@dataclass(frozen=True)
class ReportRow:
    """A row of the summary: all runs of a model or a baseline on one side of the classes."""

    name: str
    runs: Sequence[EvaluatedRun]
    is_baseline: bool = False

    def __post_init__(self) -> None:
        if not self.runs:
            raise ValueError(f"report row {self.name!r} must have at least one run, got none")


@dataclass
class RowAnalysis:
    """A row's assignments at IoU 0.5, by task, one dict a run."""

    row: ReportRow
    truth: GroundTruth
    assignments: dict[str, list[dict[Pair, Assignment]]]

    @classmethod
    def of(cls, row: ReportRow, truth: GroundTruth) -> "RowAnalysis":
        """Assign the detections of all runs."""
        tasks = [t for t in TASK_NAMES if all(t in run.results for run in row.runs)]
        runs = [(run.detections, run.plan) for run in row.runs]
        return cls(row, truth, {t: [assign_pairs(truth, *run, t) for run in runs] for t in tasks})

    def precision(self, task: str) -> np.ndarray:
        """ndarray[101]: mean over classes and runs."""
        curves = [c for run in self.assignments[task] for c in precision_by_class(run).values()]
        return np.mean(curves, axis=0) if curves else np.full(101, np.nan)


def gallery(analysis: RowAnalysis, support_truth: GroundTruth, number: int) -> str:
    """Best, median and worst pairs of a row's first run, and how the first of each was searched."""
    if "bbox" not in analysis.assignments or number < 1:
        return ""
    run, assignments = analysis.row.runs[0], analysis.assignments["bbox"][0]
    threshold = best_threshold(assignments)
    parts = [
        html.paragraph(
            f"Boxes that score at least {threshold:.2f}, the threshold with the best F1 of this "
            f"run (for the pictures only); right at IoU 0.5. The example is in the corner.",
            "note",
        ),
        html.color_key({"truth": TRUTH, "right": RIGHT, "wrong (dashed)": WRONG}),
    ]
    groups = choose_pairs(assignments, threshold, number)
    for name in GROUPS:
        pictures = draw_pairs(
            groups[name], run.plan, analysis.truth, support_truth, run.detections, assignments,
            threshold=threshold,
        )  # fmt: skip
        if pictures:
            parts.append(f"<h3>{name.capitalize()}</h3>" + html.grid(_figures(pictures)))
    if run.explain is not None:
        firsts = [groups[name][0] for name in GROUPS if groups[name]]
        explained = [p for pair in firsts for p in explain_pair(run.explain, pair, analysis.truth)]
        if explained:
            note = (
                "The first of each group, searched for this class alone: its best boxes (dashed in heat maps), "
                "whatever their score."
            )
            parts += ["<h3>How they were searched</h3>", html.paragraph(note, "note")]
            parts.append(html.grid(_figures(explained)))
    return html.section(f"Pictures: {analysis.row.name}", *parts)


def _figures(pictures: Sequence[GalleryPicture]) -> list[str]:
    return [html.picture(p.jpeg, p.caption, kind="jpeg") for p in pictures]


def precision_recall(analyses: Sequence[RowAnalysis]) -> str:
    """Curves of all rows, boxes and masks."""
    figures = []
    for task, name in TASK_NAMES.items():
        curves = {
            f"{a.row.name} ({100 * a.precision(task).mean():.1f})": a.precision(task)
            for a in analyses
            if task in a.assignments
        }
        if curves:
            content = plot_precision_recall(curves, f"{name}, IoU 0.5")
            figures.append(html.picture(content, f"{name}: mean over classes and runs (AP50)"))
    return html.section("Precision and recall", html.grid(figures, "plots"))


def clutter(analyses: Sequence[RowAnalysis]) -> str:
    """AP50 against the number of instances, of all rows."""
    figures = []
    for task, name in TASK_NAMES.items():
        series = {
            a.row.name: [ap50_by_instances(a.truth, run) for run in a.assignments[task]]
            for a in analyses
            if task in a.assignments
        }
        if not series:
            continue
        first = next(iter(series.values()))[0]
        values = {
            row: [_mean([b.ap50 for b in bins]) for bins in zip(*runs, strict=True)]
            for row, runs in series.items()
        }
        labels, counts = [b.label for b in first], [b.num_images for b in first]
        content = plot_ap50_by_instances(values, labels, counts, name)
        figures.append(
            html.picture(content, f"{name}: instances of all classes, crowds not counted")
        )
    return html.section("Clutter", html.grid(figures, "plots"))


def _mean(values: Sequence[float]) -> float:
    finite = [v for v in values if not math.isnan(v)]
    return float(np.mean(finite)) if finite else math.nan


def confusion(analysis: RowAnalysis) -> str:
    """Confusion matrix of a row, mean over its runs."""
    plan = analysis.row.runs[0].plan
    title = f"Confusion: {analysis.row.name}"
    if len(plan.class_ids) > _MAX_CONFUSION_CLASSES:
        text = f"Not drawn for more than {_MAX_CONFUSION_CLASSES} classes."
        return html.section(title, html.paragraph(text, "note"))
    matrices = np.array(
        [confusion_matrix(analysis.truth, r.detections, r.plan) for r in analysis.row.runs]
    )
    # A cell is undefined in all runs or in none: the images are those of the plan's classes.
    matrix = matrices.mean(axis=0)
    names = [analysis.truth.class_names[c] for c in plan.class_ids]
    caption = (
        "Box AP50 of the detections made with references of one class (row), scored as another "
        "(column), on the images searched for the row's class. Grey: they have no such instance."
    )
    return html.section(
        title, html.grid([html.picture(plot_confusion(matrix, names), caption)], "plots")
    )


def training(metrics_file: str | Path | None) -> str:
    """Losses, where a training run logged them."""
    losses = read_losses(metrics_file) if metrics_file and Path(metrics_file).is_file() else {}
    if not losses:
        return ""
    content = plot_training_losses(losses, "training")
    return html.section(
        "Training", html.grid([html.picture(content, "losses as detectron2 logged them")], "plots")
    )


def read_losses(path: str | Path) -> dict[str, tuple[list[int], list[float]]]:
    """Losses in a ``metrics.json`` of detectron2: name -> (iterations, values).

    A line that a killed run left half-written is passed over; of an iteration that a resumed run
    logged again the last record counts.
    """
    losses: dict[str, dict[int, float]] = defaultdict(dict)
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        for name, value in record.items():
            if name.startswith("loss_") or name == "total_loss":
                losses[name][record["iteration"]] = value
    return {
        name: (sorted(values), [values[i] for i in sorted(values)])
        for name, values in losses.items()
    }
