"""The HTML report of an evaluation: one file that can be mailed, with every number's plan hash beside it."""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ..data.plans import EvaluationPlan
from ..files import write_text
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
from .environment import hardware, versions
from .metrics import Interval, ap50_by_instances, confusion_matrix, summarize_runs
from .report_gallery import GROUPS, choose_pairs, draw_pairs

logger = logging.getLogger(__name__)

_TASK_NAMES = {"bbox": "boxes", "segm": "masks"}
_SHORT = {"bbox": "box", "segm": "mask"}
_MAX_CONFUSION_CLASSES = 40


@dataclass(frozen=True)
class EvaluatedRun:
    """One plan with what came of it: the evaluator's result dict and its COCO result rows."""

    plan: EvaluationPlan
    results: Mapping[str, Any]
    detections: Sequence[Detection]


@dataclass(frozen=True)
class ReportRow:
    """A row of the summary: the runs of one model or baseline on one side of the classes, e.g. "novel classes"."""

    name: str
    runs: Sequence[EvaluatedRun]
    is_baseline: bool = False

    def __post_init__(self) -> None:
        if not self.runs:
            raise ValueError(f"report row {self.name!r} must have at least one run, got none")


@dataclass(frozen=True)
class ReportFacts:
    """What a reader needs to repeat the evaluation.

    Attributes:
        command: the command line.
        config: dump of the config, YAML.
        seeds: name -> seed.
        elapsed: step -> seconds.
        metrics_file: detectron2's ``metrics.json`` of the training run.
        notes: free text under the title, e.g. what the backbone's weights have seen.
    """

    command: str = ""
    config: str = ""
    seeds: Mapping[str, int] = field(default_factory=dict)
    elapsed: Mapping[str, float] = field(default_factory=dict)
    metrics_file: str | Path | None = None
    notes: str = ""


@dataclass
class _Analysis:
    """A row's assignments at IoU 0.5, by task, one dict a run."""

    row: ReportRow
    truth: GroundTruth
    assignments: dict[str, list[dict[Pair, Assignment]]]

    @classmethod
    def of(cls, row: ReportRow, truth: GroundTruth) -> "_Analysis":
        tasks = [t for t in _TASK_NAMES if all(t in run.results for run in row.runs)]
        runs = [(run.detections, run.plan) for run in row.runs]
        return cls(row, truth, {t: [assign_pairs(truth, *run, t) for run in runs] for t in tasks})

    def precision(self, task: str) -> np.ndarray:
        """ndarray[101]: mean over classes and runs."""
        curves = [c for run in self.assignments[task] for c in precision_by_class(run).values()]
        return np.mean(curves, axis=0) if curves else np.full(101, np.nan)


def write_report(
    path: str | Path,
    rows: Sequence[ReportRow],
    facts: ReportFacts | None = None,
    *,
    title: str = "Few-shot detection",
    gallery_size: int = 4,
) -> None:
    """Write the report, atomically.

    Args:
        path: the HTML file.
        rows: what is compared, the most important first; their data sets must be registered.
        facts: how it was measured.
        title: headline.
        gallery_size: pictures in each of best, median and worst, for each row that is no baseline.
    """
    facts = facts or ReportFacts()
    read = cache(GroundTruth.of_dataset)
    analyses = [_Analysis.of(row, read(row.runs[0].plan.dataset)) for row in rows]
    models = [a for a in analyses if not a.row.is_baseline]
    sections = [_summary(rows, facts.notes), _plans(rows)]
    sections += [
        _gallery(a, read(a.row.runs[0].plan.support_dataset), gallery_size) for a in models
    ]
    sections += [_precision_recall(analyses), _clutter(analyses), *map(_confusion, models)]
    sections += [_per_class(rows), _training(facts.metrics_file), _how(facts)]
    write_text(path, html.page(title, _lead(rows), [s for s in sections if s]))
    logger.info("Report: %s", path)


def _lead(rows: Sequence[ReportRow]) -> str:
    plan = rows[0].runs[0].plan
    searched = {
        "present": "each image is searched for the classes that it contains",
        "open": "each image is searched for every class, absent ones too",
    }
    shots = f"{plan.shots} example{'s' if plan.shots > 1 else ''} a class"
    return f"{plan.dataset}, split {plan.split}: {shots}; {searched.get(plan.protocol, plan.protocol)}."


def _summary(rows: Sequence[ReportRow], notes: str) -> str:
    columns = {
        "box AP50": ("bbox", "AP50"),
        "box AP": ("bbox", "AP"),
        "mask AP50": ("segm", "AP50"),
        "mask AP": ("segm", "AP"),
        "AUROC": ("presence", "AUROC"),
        "FP / image": ("presence", "false_positives_per_image"),
    }
    summaries = [summarize_runs([run.results for run in row.runs]) for row in rows]
    columns = {k: v for k, v in columns.items() if any(v[0] in s for s in summaries)}
    header = ["", *columns, "runs", "episodes", "pairs", "missing"]
    lines = []
    for row, summary in zip(rows, summaries, strict=True):
        cells = [_cell(summary.get(group, {}).get(name)) for group, name in columns.values()]
        counts = [
            _count(summary.get(name)) for name in ("num_episodes", "num_pairs", "num_missing")
        ]
        lines.append([row.name, *cells, str(len(row.runs)), *counts])
    kinds = ["baseline" if r.is_baseline else "main" if r is rows[0] else "" for r in rows]
    note = (
        "Percent, COCO's definitions. Mean over the runs ± 1.96 s / √n (s with n - 1); a run is another draw of "
        "supports. Pairs are the (image, class) searches of one run; missing episodes gave no output and count as "
        "not found."
    )
    content = [html.table(header, lines, kinds), html.paragraph(note, "note")]
    return html.section("Summary", *([html.paragraph(notes)] if notes else []), *content)


def _cell(value: Interval | None) -> str:
    return "–" if value is None else str(value)


def _count(value: Interval | None) -> str:
    return "–" if value is None or math.isnan(value.mean) else f"{value.mean:.6g}"


def _plans(rows: Sequence[ReportRow]) -> str:
    header = ["", "run", "seed", "protocol", "shots", "images", "box AP50", "plan SHA-256"]
    lines = []
    for row in rows:
        for run in row.runs:
            plan = run.plan
            ap50 = run.results.get("bbox", {}).get("AP50", math.nan)
            cells = (plan.run, plan.seed, plan.protocol, plan.shots, len(plan.episodes))
            ap50_text = "–" if math.isnan(ap50) else f"{ap50:.1f}"
            lines.append([row.name, *map(str, cells), ap50_text, plan.sha256])
    return html.section("Plans", html.table(header, lines, hash_column=len(header) - 1))


def _gallery(analysis: _Analysis, support_truth: GroundTruth, number: int) -> str:
    if "bbox" not in analysis.assignments or number < 1:
        return ""
    run, assignments = analysis.row.runs[0], analysis.assignments["bbox"][0]
    threshold = best_threshold(assignments)
    parts = [
        html.paragraph(
            f"Boxes that score at least {threshold:.2f}, the threshold with the best F1 of this run (for the pictures "
            f"only). A box is right at IoU 0.5. The example is in the corner.",
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
            figures = [html.picture(p.jpeg, p.caption, kind="jpeg") for p in pictures]
            parts.append(f"<h3>{name.capitalize()}</h3>" + html.grid(figures))
    return html.section(f"Pictures: {analysis.row.name}", *parts)


def _precision_recall(analyses: Sequence[_Analysis]) -> str:
    figures = []
    for task, name in _TASK_NAMES.items():
        curves = {
            f"{a.row.name} ({100 * a.precision(task).mean():.1f})": a.precision(task)
            for a in analyses
            if task in a.assignments
        }
        if curves:
            content = plot_precision_recall(curves, f"{name}, IoU 0.5")
            figures.append(html.picture(content, f"{name}: mean over classes and runs (AP50)"))
    return html.section("Precision and recall", html.grid(figures, "plots"))


def _clutter(analyses: Sequence[_Analysis]) -> str:
    figures = []
    for task, name in _TASK_NAMES.items():
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


def _confusion(analysis: _Analysis) -> str:
    plan = analysis.row.runs[0].plan
    title = f"Confusion: {analysis.row.name}"
    if len(plan.class_ids) > _MAX_CONFUSION_CLASSES:
        text = f"Not drawn: {len(plan.class_ids)} classes, at most {_MAX_CONFUSION_CLASSES} can be read."
        return html.section(title, html.paragraph(text, "note"))
    matrices = np.array(
        [confusion_matrix(analysis.truth, r.detections, r.plan) for r in analysis.row.runs]
    )
    # A cell is undefined in all runs or in none: the images are those of the plan's classes.
    matrix = matrices.mean(axis=0)
    names = [analysis.truth.class_names[c] for c in plan.class_ids]
    caption = (
        "Box AP50 of the detections made with references of one class (row), scored as another (column), on the images "
        "searched for the row's class. Grey: these images have no such instance."
    )
    return html.section(
        title, html.grid([html.picture(plot_confusion(matrix, names), caption)], "plots")
    )


def _per_class(rows: Sequence[ReportRow]) -> str:
    parts = []
    for row in rows:
        if row.is_baseline:
            continue
        summary = summarize_runs([run.results for run in row.runs])
        tasks = [task for task in _TASK_NAMES if task in summary]
        names = [k.partition("-")[2] for k in summary.get("bbox", {}) if k.startswith("AP50-")]
        lines = [
            [
                name,
                *(
                    _cell(summary[task].get(f"{metric}-{name}"))
                    for task in tasks
                    for metric in ("AP50", "AP")
                ),
            ]
            for name in names
        ]
        header = ["class", *(f"{_SHORT[task]} {metric}" for task in tasks for metric in ("AP50", "AP"))]
        parts.append(html.folded(f"{row.name} ({len(names)} classes)", html.table(header, lines)))
    return html.section("Classes", *parts)


def _training(metrics_file: str | Path | None) -> str:
    losses = read_losses(metrics_file) if metrics_file else {}
    if not losses:
        return ""
    content = plot_training_losses(losses, "training")
    return html.section(
        "Training", html.grid([html.picture(content, "losses as detectron2 logged them")], "plots")
    )


def read_losses(path: str | Path) -> dict[str, tuple[list[int], list[float]]]:
    """Losses in a ``metrics.json`` of detectron2: name -> (iterations, values); half-written lines are passed over."""
    losses: dict[str, tuple[list[int], list[float]]] = {}
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        for name, value in record.items():
            if name.startswith("loss_") or name == "total_loss":
                iterations, values = losses.setdefault(name, ([], []))
                iterations.append(record["iteration"])
                values.append(value)
    return losses


def _how(facts: ReportFacts) -> str:
    parts = []
    if facts.command:
        parts += ["<h3>Command</h3>", html.code(facts.command)]
    measured = [("seed: " + name, str(seed)) for name, seed in facts.seeds.items()]
    measured += [("time: " + name, _duration(seconds)) for name, seconds in facts.elapsed.items()]
    if measured:
        parts += ["<h3>Seeds and times</h3>", html.facts(measured)]
    parts += ["<h3>Versions</h3>", html.facts(versions().items())]
    parts += ["<h3>Hardware</h3>", html.facts(hardware().items())]
    if facts.config:
        parts.append(html.folded("Config", html.code(facts.config)))
    return html.section("How it was measured", *parts)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"
