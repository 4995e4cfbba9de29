"""Diagrams of an evaluation or a training run as PNG bytes; matplotlib without its global state."""

import io
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .canvas import CLASS_COLORS

_GRAY = "#666666"
# Most readable first on white: blue, vermillion, green, orange, purple, sky blue.
_LINES = [tuple(v / 255 for v in CLASS_COLORS[i]) for i in (6, 5, 2, 1, 4, 0)]
_STYLES = ("-", "--", "-.", ":")
_MAX_TICKS = 8


def plot_precision_recall(curves: Mapping[str, np.ndarray], title: str = "") -> bytes:
    """Draw precision against recall.

    Args:
        curves: name -> ndarray[101], precision in [0, 1] at the recalls 0, 0.01, ..., 1.
        title: above the diagram.
    """
    figure, axes = new_figure(title, "recall", "precision")
    for i, (name, precision) in enumerate(curves.items()):
        axes.plot(np.linspace(0, 1, len(precision)), precision, label=name, **line_style(i))
    axes.set(xlim=(0, 1), ylim=(0, 1.02))
    add_legend(figure, axes, len(curves))
    return as_png(figure)


def plot_ap50_by_instances(
    values: Mapping[str, Sequence[float]],
    labels: Sequence[str],
    num_images: Sequence[int],
    title: str = "",
) -> bytes:
    """Draw AP50 against the number of instances in the image.

    Args:
        values: name -> AP50 in percent, one a bin, NaN = no such image.
        labels: one a bin. num_images: one a bin, of the first series.
        title: above the diagram.
    """
    figure, axes = new_figure(title, "instances in the image (n = images)", "AP50 (%)")
    for i, (name, series) in enumerate(values.items()):
        axes.plot(range(len(labels)), series, marker="o", label=name, **line_style(i))
    ticks = [f"{label}\nn = {count}" for label, count in zip(labels, num_images, strict=True)]
    axes.set_xticks(range(len(labels)), ticks)
    axes.set_xlim(-0.3, len(labels) - 0.7)
    axes.set_ylim(bottom=0)
    add_legend(figure, axes, len(values))
    return as_png(figure)


def plot_by_number(
    values: Mapping[str, Mapping[int, tuple[float, float]]],
    xlabel: str,
    ylabel: str,
    title: str = "",
) -> bytes:
    """Draw a value against whole numbers, which are equally far apart, as shots are in the papers.

    Args:
        values: name -> {number: (value, half width of its interval; NaN = none)}.
        xlabel, ylabel: what number and value are. title: above the diagram.
    """
    figure, axes = new_figure(title, xlabel, ylabel)
    numbers = sorted({n for series in values.values() for n in series})
    for i, (name, series) in enumerate(values.items()):
        places = [numbers.index(n) for n in series]
        means, widths = np.array(list(series.values())).T
        bars = None if np.isnan(widths).all() else np.nan_to_num(widths)
        axes.errorbar(places, means, bars, marker="o", capsize=4, label=name, **line_style(i))
    step = max(-(-len(numbers) // _MAX_TICKS), 1)
    axes.set_xticks(range(0, len(numbers), step), numbers[::step])
    axes.set_xlim(-0.3, len(numbers) - 0.7)
    axes.set_ylim(bottom=0)
    add_legend(figure, axes, len(values))
    return as_png(figure)


def plot_confusion(matrix: np.ndarray, class_names: Sequence[str], title: str = "") -> bytes:
    """Draw a confusion matrix and, below it, the sums of its columns without the diagonal.

    Args:
        matrix (ndarray[K, K]): AP50 in percent, row = class of the references, column = class it is
            scored as, NaN = undefined.
        class_names: K names.
        title: above the diagram.
    """
    num_classes = len(class_names)
    side = float(np.clip(2.2 + 0.3 * num_classes, 4.5, 11))
    figure = Figure(figsize=(side, side * 1.15), dpi=130, layout="constrained")
    axes, sums = figure.subplots(2, 1, height_ratios=(4, 1), sharex=True)
    axes.set_facecolor("#d9d9d9")
    image = axes.imshow(matrix, cmap="YlGnBu", vmin=0, vmax=max(np.nanmax(matrix, initial=0), 1))
    figure.colorbar(image, ax=axes, label="AP50 (%)", shrink=0.8)
    size = float(np.clip(11 - num_classes / 8, 6, 10))
    axes.set_yticks(range(num_classes), class_names, fontsize=size)
    axes.set_ylabel("class of the references")
    if title:
        axes.set_title(title, fontsize=11)
    if num_classes <= 12:
        _write_cells(axes, matrix, size)
    # What the paper draws below its matrix: how often a class is found where another was looked
    # for.
    false = np.where(np.eye(num_classes, dtype=bool), 0.0, np.nan_to_num(matrix)).sum(axis=0)
    sums.bar(range(num_classes), false, color=_LINES[1])
    sums.set(xlabel="scored as", ylabel="sum off the\ndiagonal")
    sums.set_xticks(range(num_classes), class_names, rotation=90, fontsize=size)
    _tidy(sums)
    return as_png(figure)


def plot_training_losses(
    losses: Mapping[str, tuple[Sequence[int], Sequence[float]]], title: str = ""
) -> bytes:
    """Draw losses against the iteration: name -> (iterations, values), on a logarithmic scale."""
    figure, axes = new_figure(title, "iteration", "loss")
    for i, (name, (iterations, values)) in enumerate(losses.items()):
        axes.plot(iterations, values, label=name, **line_style(i))
    positive = any(v > 0 for _, values in losses.values() for v in values)
    axes.set_yscale("log" if positive else "linear")
    add_legend(figure, axes, len(losses))
    return as_png(figure)


def new_figure(title: str, xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    """A figure with one diagram."""
    figure = Figure(figsize=(5.6, 4.2), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.set_title(title, fontsize=11)
    _tidy(axes)
    return figure, axes


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)


def line_style(index: int) -> dict:
    """Colour and dashes of the i-th curve; both differ, so that either tells curves apart."""
    return {
        "color": _LINES[index % len(_LINES)],
        "linestyle": _STYLES[index % len(_STYLES)],
        "linewidth": 1.8,
    }


def add_legend(figure: Figure, axes: Axes, num_curves: int) -> None:
    """Below the axes, where it hides no curve."""
    if num_curves:
        columns = min(num_curves, 3)
        figure.legend(fontsize=8, frameon=False, loc="outside lower center", ncols=columns)
    else:
        axes.text(0.5, 0.5, "nothing to draw", ha="center", color=_GRAY, transform=axes.transAxes)


def _write_cells(axes: Axes, matrix: np.ndarray, size: float) -> None:
    middle = np.nanmax(matrix, initial=0) / 2
    for (row, column), value in np.ndenumerate(matrix):
        if not np.isnan(value):
            color = "white" if value > middle else "black"
            axes.text(
                column, row, f"{value:.0f}", ha="center", va="center", color=color, fontsize=size
            )


def as_png(figure: Figure) -> bytes:
    """The bytes of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
