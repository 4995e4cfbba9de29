"""Measured rows of instance search as numbers, tables, diagrams and one HTML page."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..visualization.search import recall_iou_figure
from . import report_html as html
from .instance_search import IOU_THRESHOLDS, paired_difference, recall_iou_curve, summary
from .metrics import Interval
from .report import ReportFacts, how_measured
from .report_gallery import GalleryPicture
from .search_runs import MeasuredRow

# Heading -> metric.
_COLUMNS = {
    "mIoU": "mIoU",
    "recall, IoU .50": "recall_iou50",
    "recall, IoU .75": "recall_iou75",
    "mIoU, all": "mIoU_all",
    "mAP": "mAP",
    "mAP, listable": "mAP_listable",
}
_COUNTS = {
    "threshold": "threshold",
    "confident": "num_confident",
    "of them true": "num_confident_true",
    "and IoU .50": "num_confident_iou50",
    "candidates": "num_candidates",
    "without a box": "num_without_box",
}
_NOTE = (
    "Percent, mean over queries ± 1.96 s / √n. mIoU and recall: over the true images in a list, best box of an image; "
    "mIoU, all: over the whole list with 0 for false images. mAP: average precision of the list, divided by all true "
    "images or, listable, by those that a list of this length can hold; stages keep the order of the search, "
    "re-ranked lists do not. Differences are paired by query. Queries of one class share their true images, so "
    "intervals are too narrow where a class has several."
)


@dataclass(frozen=True)
class SearchPage:
    """What the page shows beside the numbers.

    Attributes:
        lead: a line under the title. facts: how it was measured.
        figures: {caption: PNG}. pictures: {heading: pictures}.
        warnings: what was left out, for people.
    """

    lead: str
    facts: ReportFacts
    figures: Mapping[str, bytes]
    pictures: Mapping[str, Sequence[GalleryPicture]] = field(default_factory=dict)
    warnings: Sequence[str] = ()


def compare(rows: Sequence[MeasuredRow], depth: int) -> dict[str, dict[str, Any]]:
    """Numbers of each row, and its differences to others.

    Args:
        rows: the first is the search. Others are compared with it, with the same stage of the first run, and with
            "search, re-ranked" if they are re-ranked too.
        depth: candidates that count.

    Returns:
        {name: ``summary``, facts, and ``difference``: {name of the other row: ``paired_difference``}}.

    Raises:
        ValueError: two rows have one name.
    """
    names = [row.name for row in rows]
    if len(set(names)) != len(names):
        raise ValueError(f"rows must have different names, got {names}")
    results = {}
    for row in rows:
        results[row.name] = {
            "run": row.run,
            "stage": row.stage,
            **row.facts,
            **summary(row.queries, depth),
            "difference": {
                other.name: paired_difference(row.queries, other.queries, depth)
                for other in _references(rows, row)
            },
        }
    return results


def _references(rows: Sequence[MeasuredRow], row: MeasuredRow) -> list[MeasuredRow]:
    first_run = next((other.run for other in rows if other.run), "")
    same_stage = [(first_run, row.stage), ("", f"search, {row.stage}")] if row.run else []
    return [
        other
        for other in rows
        if other is not row and (other is rows[0] or (other.run, other.stage) in same_stage)
    ]


def recall_table(rows: Sequence[MeasuredRow], depth: int) -> str:
    """The Recall-IoU curves of all rows as CSV: a line for each IoU, recalls in [0, 1], empty = undefined."""
    curves = [recall_iou_curve(row.queries, depth=depth) for row in rows]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["IoU", *(row.name for row in rows)])
    for threshold, recalls in zip(IOU_THRESHOLDS.tolist(), np.array(curves).T, strict=True):
        values = ["" if math.isnan(value) else f"{value:.6f}" for value in recalls]
        writer.writerow([f"{threshold:.2f}", *values])
    return text.getvalue()


def recall_figures(rows: Sequence[MeasuredRow], depth: int) -> dict[str, bytes]:
    """PNGs of Recall-IoU curves: {"": of the search and all runs; name of a run: of all its stages}.

    One run needs only the first; of several, the first has the last stage of each.
    """
    search = rows[0]
    runs: dict[str, list[MeasuredRow]] = {}
    for row in rows:
        if row.run and row.stage.startswith("stage"):
            runs.setdefault(row.run, []).append(row)
    groups = {name: [search, *stages] for name, stages in runs.items()}
    if len(runs) == 1:
        groups = {"": groups.popitem()[1]}
    else:
        groups = {"": [search, *(stages[-1] for stages in runs.values())], **groups}
    return {name: _figure(group, depth, name) for name, group in groups.items()}


def _figure(rows: Sequence[MeasuredRow], depth: int, title: str) -> bytes:
    curves = {row.name: recall_iou_curve(row.queries, depth=depth) for row in rows}
    return recall_iou_figure(curves, IOU_THRESHOLDS, title)


def table(results: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and lines of the main numbers, for people; ``results`` of ``compare``."""
    search = next(iter(results))
    first_run = next((row["run"] for row in results.values() if row["run"]), "")
    several = any(row["run"] not in ("", first_run) for row in results.values())
    lines = []
    for name, row in results.items():
        to_first = f"{first_run}: {row['stage']}"
        cells = {heading: _cell(row, metric) for heading, metric in _COLUMNS.items()}
        mean_iou = cells.pop("mIoU")
        differences = [_difference(row, search, "mIoU")]
        differences += [_difference(row, to_first, "mIoU")] if several else []
        last = _difference(row, search, "mAP")
        lines.append([name, mean_iou, *differences, *cells.values(), last])
    first, *rest = _COLUMNS
    paired = [f"mIoU - {search}", *([f"mIoU - {first_run}"] if several else [])]
    return ["", first, *paired, *rest, f"mAP - {search}"], lines


def counts_table(results: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and lines of what the stages are sure of; no line for rows that are no stage."""
    lines = [
        [name, *(f"{row[key]:g}" for key in _COUNTS.values())]
        for name, row in results.items()
        if "num_confident" in row
    ]
    return ["", *_COUNTS], lines


def as_text(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table in columns for a terminal."""
    rows = [header, *lines]
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:]))])
        for row in rows
    )


def render(results: Mapping[str, Mapping[str, Any]], page: SearchPage) -> str:
    """The page as HTML, pictures embedded; ``results`` of ``compare``."""
    counts = counts_table(results)
    pictures = [
        html.section(f"Boxes from stage to stage{': ' * bool(name)}{name}", _gallery(rows))
        for name, rows in page.pictures.items()
        if rows
    ]
    figures = [html.picture(png, caption) for caption, png in page.figures.items()]
    sections = [
        html.section(
            "Numbers",
            *(html.paragraph(warning) for warning in page.warnings),
            html.table(*table(results)),
            html.paragraph(_NOTE, "note"),
        ),
        html.section("Recall against IoU", html.grid(figures, "plots")),
        *([html.section("Stages", html.table(*counts))] if counts[1] else []),
        *pictures,
        how_measured(page.facts),
    ]
    return html.page("Instance search", page.lead, sections)


def _gallery(pictures: Sequence[GalleryPicture]) -> str:
    return "\n".join(html.picture(p.jpeg, p.caption, kind="jpeg") for p in pictures)


def _cell(row: Mapping[str, float], metric: str) -> str:
    width = row[f"{metric}_ci95"]
    return str(Interval(row[metric], None if math.isnan(width) else width, 0))


def _difference(row: Mapping[str, Any], other: str, metric: str) -> str:
    return _cell(row["difference"][other], metric) if other in row["difference"] else ""
