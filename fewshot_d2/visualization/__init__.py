"""The only place that draws: ``pictures`` and ``alignment`` for images, ``plots`` for diagrams."""

from .alignment import alignment_panel
from .pictures import draw_instances, episode_panel, query_panel
from .plots import (
    plot_ap50_by_instances,
    plot_by_number,
    plot_confusion,
    plot_precision_recall,
    plot_training_losses,
)

__all__ = [
    "alignment_panel",
    "draw_instances",
    "episode_panel",
    "plot_ap50_by_instances",
    "plot_by_number",
    "plot_confusion",
    "plot_precision_recall",
    "plot_training_losses",
    "query_panel",
]
