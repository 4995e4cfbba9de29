"""The HTML report of an evaluation: one file that can be mailed, with the hash of every plan."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from ..files import write_text
from . import report_figures as figures
from . import report_html as html
from .coco_scoring import GroundTruth
from .environment import hardware, versions
from .metrics import Interval, summarize_runs
from .report_figures import EvaluatedRun, ReportRow, RowAnalysis

__all__ = ["EvaluatedRun", "ReportFacts", "ReportRow", "write_report"]

logger = logging.getLogger(__name__)

_TASK_NAMES = {"bbox": "box", "segm": "mask"}


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
        gallery_size: pictures in each of best, median and worst, for each row that is no baseline; 0 = none.
    """
    facts = facts or ReportFacts()
    read = cache(GroundTruth.of_dataset)
    analyses = [RowAnalysis.of(row, read(row.runs[0].plan.dataset)) for row in rows]
    models = [a for a in analyses if not a.row.is_baseline]
    sections = [_summary(rows, facts.notes), _plans(rows)]
    sections += [
        figures.gallery(a, read(a.row.runs[0].plan.support_dataset), gallery_size) for a in models
    ]
    sections += [figures.precision_recall(analyses), figures.clutter(analyses)]
    sections += [figures.confusion(a) for a in models]
    sections += [_per_class(rows), figures.training(facts.metrics_file), how_measured(facts)]
    write_text(path, html.page(title, _lead(rows), [s for s in sections if s]))
    logger.info("Report: %s", path)


def _lead(rows: Sequence[ReportRow]) -> str:
    plan = rows[0].runs[0].plan
    searched = {
        "present": "each image is searched for the classes that it contains",
        "open": "each image is searched for every class, absent ones too",
    }
    shots = f"{plan.shots} example{'s' if plan.shots > 1 else ''} a class"
    return f"{plan.dataset}, split {plan.split}: {shots}; {searched[plan.protocol]}."


def _summary(rows: Sequence[ReportRow], notes: str) -> str:
    columns = {
        "box AP50": ("bbox", "AP50"),
        "box AP": ("bbox", "AP"),
        "VOC mAP": ("voc", "mAP"),
        "mask AP50": ("segm", "AP50"),
        "mask AP": ("segm", "AP"),
        "IoU of the best": ("localization", "mask_iou"),
        "localised": ("localization", "localization_accuracy"),
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
        "Percent, COCO's definitions. Mean over the runs ± 1.96 s / √n (s with n - 1); a run is "
        "another draw of supports. Pairs are the (image, class) searches of one run; missing "
        "episodes gave no output and count as not found. FP / image: wrong detections that score "
        "at least the evaluator's presence threshold."
    )
    content = [html.table(header, lines, kinds), html.paragraph(note, "note")]
    return html.section("Summary", *([html.paragraph(notes)] if notes else []), *content)


def _cell(value: Interval | None) -> str:
    return "–" if value is None else str(value)


def _count(value: Interval | None) -> str:
    return "–" if value is None or math.isnan(value.mean) else f"{value.mean:.6g}"


def _plans(rows: Sequence[ReportRow]) -> str:
    header = ["", "data set", "run", "seed", "protocol", "shots", "box AP50", "plan SHA-256"]
    lines = []
    for row in rows:
        for run in row.runs:
            plan = run.plan
            ap50 = run.results.get("bbox", {}).get("AP50", math.nan)
            cells = (plan.dataset, plan.run, plan.seed, plan.protocol, plan.shots)
            ap50_text = "–" if math.isnan(ap50) else f"{ap50:.1f}"
            lines.append([row.name, *map(str, cells), ap50_text, plan.sha256])
    return html.section("Plans", html.table(header, lines, hash_column=len(header) - 1))


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
        header = [
            "class",
            *(f"{_TASK_NAMES[task]} {metric}" for task in tasks for metric in ("AP50", "AP")),
        ]
        parts.append(html.folded(f"{row.name} ({len(names)} classes)", html.table(header, lines)))
    return html.section("Classes", *parts)


def how_measured(facts: ReportFacts) -> str:
    """The section that tells how to repeat it."""
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
