"""A learned embedding in the plane (RepMet Fig. 5): images as points, representatives of classes as stars."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from sklearn.manifold import TSNE

from .canvas import CLASS_COLORS

_MAX_PERPLEXITY = 30.0
_MARKERS = ("o", "s", "^", "D")
_STAR = 80
_NUMBER = {
    "xytext": (5, 4),
    "textcoords": "offset points",
    "fontsize": 7,
    "zorder": 4,
    "path_effects": [withStroke(linewidth=2, foreground="white")],
}
# Most that differ in colour or marker.
MAX_CLASSES = len(CLASS_COLORS) * len(_MARKERS)


def tsne_figure(
    embeddings: np.ndarray,
    labels: np.ndarray,
    representatives: np.ndarray,
    *,
    class_names: Sequence[str],
    title: str = "",
) -> Figure:
    """Draw a t-SNE of images and representatives together; the same input gives the same picture.

    Args:
        embeddings (ndarray[P, D]): of unit length, as the representatives. labels (ndarray[P]): 0..N-1.
        representatives (ndarray[N, M, D]): may be of any length.
        class_names: N names. title: above the picture.

    Raises:
        ValueError: no point, labels that do not fit or more classes than can be told apart.
    """
    num_classes, num_modes, dim = representatives.shape
    fits = len(labels) == len(embeddings) > 0 and embeddings.shape[1:] == (dim,)
    if (
        not fits
        or len(class_names) != num_classes
        or not 0 <= min(labels) <= max(labels) < num_classes
    ):
        raise ValueError(
            f"t-SNE must have points of {dim} dimensions with labels below {num_classes} and as many names, got "
            f"{embeddings.shape} points, {len(labels)} labels and {len(class_names)} names"
        )
    if num_classes > MAX_CLASSES:
        raise ValueError(f"t-SNE must have at most {MAX_CLASSES} classes, got {num_classes}")
    modes = representatives.reshape(-1, dim)
    modes = modes / np.maximum(np.linalg.norm(modes, axis=1, keepdims=True), 1e-12)
    vectors = np.concatenate([embeddings, modes]).astype(np.float64)
    # TSNE wants a perplexity below the number of points.
    perplexity = min(_MAX_PERPLEXITY, (len(vectors) - 1) / 3)
    # The plane of the principal components, unless all is one point: TSNE would divide by its extent and crash.
    init = "pca" if np.ptp(vectors, axis=0).max() > 1e-6 else "random"
    places = TSNE(perplexity=perplexity, init=init, random_state=0).fit_transform(vectors)
    points, stars = np.split(places, [len(embeddings)])
    figure = Figure(figsize=(8, 6), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.set(xticks=[], yticks=[])
    axes.set_aspect("equal")
    axes.spines[:].set_color("#bbbbbb")
    axes.set_title(title, fontsize=11)
    _scatter(
        axes, points, np.asarray(labels), stars.reshape(num_classes, num_modes, 2), class_names
    )
    figure.legend(fontsize=8, frameon=False, loc="outside right center")
    return figure


def _scatter(
    axes: Axes,
    points: np.ndarray,
    labels: np.ndarray,
    stars: np.ndarray,
    class_names: Sequence[str],
) -> None:
    for label, name in enumerate(class_names):
        color = [tuple(v / 255 for v in CLASS_COLORS[label % len(CLASS_COLORS)])]
        marker = _MARKERS[label // len(CLASS_COLORS)]
        own = points[labels == label]
        text = f"{label + 1}  {name}"
        axes.scatter(*own.T, s=26, c=color, marker=marker, alpha=0.8, lw=0, label=text)
        axes.scatter(*stars[label].T, s=_STAR, c=color, marker="*", ec="black", lw=0.8, zorder=3)
        # Stars of one colour are told apart by their class's number.
        for place in stars[label]:
            axes.annotate(str(label + 1), place, **_NUMBER)
    axes.scatter(
        [], [], s=_STAR, c="white", marker="*", ec="black", lw=0.8, label="representatives"
    )
