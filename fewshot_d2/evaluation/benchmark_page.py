"""Page and table of an episodic benchmark: numbers against the examples a class (SILCO Fig. 5), and pictures."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..files import write_bytes, write_text
from ..visualization import plot_by_number
from . import report_html as html
from .report import ReportFacts, how_measured

Results = Mapping[str, Mapping[str, float]]

# What is drawn and comes first, where it is there.
_METRICS = {
    "AP_voc": "AP, all tuples in one list (%)",
    "AP": "AP, all detections in one list (%)",
}


def parse_name(name: str) -> tuple[str, int]:
    """``dataset/side/1way-5shot`` -> (``dataset/side/1way``, 5); what follows "shot" stays with the name."""
    source, _, kind = name.rpartition("way-")
    shots, _, tuned = kind.partition("shot")
    return f"{source}way{tuned}", int(shots)


def shot_curves(results: Results, metric: str) -> dict[str, dict[int, tuple[float, float]]]:
    """{curve: {shots: (value, half width of its 95 % interval)}} of results by the names of their plans."""
    curves: dict[str, dict[int, tuple[float, float]]] = {}
    for name, metrics in results.items():
        curve, shots = parse_name(name)
        curves.setdefault(curve, {})[shots] = metrics[metric], metrics[f"{metric}_ci95"]
    return curves


def shot_diagram(results: Results, metric: str) -> bytes:
    """A metric against the shots as PNG: a curve for each data set, side and number of ways."""
    return plot_by_number(shot_curves(results, metric), "examples a class", _METRICS[metric])


def shot_csv(results: Results) -> str:
    """All numbers, a line for each plan: its curve, its shots, then every metric."""
    names = list(dict.fromkeys(metric for metrics in results.values() for metric in metrics))
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["name", "shots", *names])
    for name, metrics in results.items():
        writer.writerow([*parse_name(name), *(metrics.get(metric, "") for metric in names)])
    return buffer.getvalue()


def write_benchmark_page(
    folder: str | Path,
    results: Results,
    facts: ReportFacts,
    *,
    metric: str,
    title: str,
    plans: Sequence[tuple[str, str]] = (),
) -> None:
    """Write ``benchmark.png``, ``by_shots.csv`` and ``report.html`` with all pictures below ``folder``/pictures.

    Args:
        results: numbers by the name of their plan. facts: how it was measured. metric: "AP_voc" or "AP".
        title: headline. plans: (name, SHA-256) of each.
    """
    folder = Path(folder)
    diagram = shot_diagram(results, metric)
    write_bytes(folder / "benchmark.png", diagram)
    write_text(folder / "by_shots.csv", shot_csv(results))
    columns = dict.fromkeys([metric, "AP_voc", "AP_voc_classes", "AP", "AP_classes", "episodes"])
    lines = [[name, *(_cell(metrics, c) for c in columns)] for name, metrics in results.items()]
    sections = [
        html.section("Summary", html.table(["", *columns], lines)),
        html.section(
            "Examples a class",
            html.grid([html.picture(diagram, "bars: 95 % intervals over the episodes")], "plots"),
        ),
        *(_pictures(folder / "pictures" / name, name) for name in results),
        html.section("Plans", html.table(["", "SHA-256"], [list(p) for p in plans], (), 1)),
        how_measured(facts),
    ]
    lead = "Percent at IoU 0.5. AP_voc: duplicates are wrong; AP: RepMet's matching; _classes: mean over classes."
    write_text(folder / "report.html", html.page(title, lead, [s for s in sections if s]))


def _cell(metrics: Mapping[str, float], column: str) -> str:
    if column not in metrics:
        return "–"
    if column == "episodes":
        return f"{metrics[column]:.0f}"
    return f"{metrics[column]:.1f} ± {metrics.get(f'{column}_ci95', float('nan')):.1f}"


def _pictures(folder: Path, name: str) -> str:
    paths = sorted(folder.glob("*.png"))
    if not paths:
        return ""
    figures = [html.picture(path.read_bytes(), path.stem.replace("_", " ")) for path in paths]
    return html.section(f"Pictures: {name}", html.grid(figures, "plots"))
