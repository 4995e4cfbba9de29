"""Queries, supports and instances as pictures: numpy in, numpy out.

Images are RGB uint8 (H, W, 3); boxes are XYXY in absolute pixels of the image that is given. Small
images are enlarged, and large ones reduced, before anything is drawn. A verdict is told by colour and by dashes.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from detectron2.structures import BitMasks, Instances, PolygonMasks
from PIL import Image, ImageDraw

from ..structures import Support, SupportSet
from .canvas import CLASS_COLORS, DARK, PAPER, Color, Mark, at_drawing_size, draw_marks, font_for

RIGHT, WRONG, TRUTH = CLASS_COLORS[0], CLASS_COLORS[5], CLASS_COLORS[3]

_GAP = 10
# Side of a support's thumbnail, relative to the shorter side of the query.
_THUMBNAIL = 0.27
_MIN_THUMBNAIL, _FRAME = 48, 8


def draw_instances(
    image: np.ndarray,
    instances: Instances,
    class_names: Sequence[str] | None = None,
    *,
    threshold: float = 0.0,
) -> np.ndarray:
    """Draw boxes, mask outlines, names and scores, one colour a class.

    Args:
        image (ndarray[H, W, 3]): RGB, uint8; not changed.
        instances: with ``pred_boxes, pred_classes, scores`` or ``gt_boxes, gt_classes``, and masks
            if there are any.
        class_names: one a class; None writes the scores alone.
        threshold: least score of a detection that is drawn.

    Returns:
        ndarray[H', W', 3]: RGB, uint8, at least 384 pixels on its shorter side (unless very long).
    """
    shown = _above(instances, threshold)
    canvas, scale = at_drawing_size(image)
    labels = _labels(shown, class_names)
    draw_marks(canvas, _marks(shown, scale, canvas.size, _class_colors(shown), labels))
    return np.asarray(canvas)


def episode_panel(
    query: np.ndarray,
    support: SupportSet,
    *,
    ground_truth: Instances | None = None,
    predictions: Instances | None = None,
    threshold: float = 0.0,
    correct: Sequence[bool] | None = None,
    found: Sequence[bool] | None = None,
) -> np.ndarray:
    """Draw an episode: the support, ground truth below it and, below that, what was found.

    ``correct`` and ``found`` turn colours into a verdict: right detections are blue, wrong ones
    dashed vermillion, instances yellow, dashed if they were missed. Without them colours are
    classes.

    Args:
        query (ndarray[H, W, 3]): RGB, uint8.
        support: examples of the K classes; the positive ones are shown as crops.
        ground_truth: with ``gt_boxes, gt_classes`` and perhaps ``gt_masks``.
        predictions: with ``pred_boxes, pred_classes, scores`` and perhaps ``pred_masks``.
        threshold: least score of a detection that is drawn.
        correct: one a prediction, those below the threshold included. found: one an instance of the
            ground truth.
    """
    canvas, scale = at_drawing_size(query)
    names = support.class_names
    # The name of an only class stands in the caption, not on every instance.
    label_names = names if len(names) > 1 else None
    truth, caption = canvas.copy(), ", ".join(names)
    if ground_truth is not None:
        colors, dashed = _class_colors(ground_truth), None
        if found is not None:
            colors, dashed = [TRUTH] * len(found), [not f for f in found]
        labels = _labels(ground_truth, label_names)
        draw_marks(truth, _marks(ground_truth, scale, truth.size, colors, labels, dashed))
        caption = f"truth: {len(ground_truth)} × {caption}" if len(names) == 1 else "truth"
    tiles = [captioned(_under_supports(truth, support), caption)]
    if predictions is not None:
        shown = _above(predictions, threshold)
        colors, dashed, caption = _class_colors(shown), None, f"found: {len(shown)}"
        if correct is not None:
            kept = [s >= threshold for s in predictions.scores.tolist()]
            verdicts = [c for c, k in zip(correct, kept, strict=True) if k]
            colors, dashed = [RIGHT if v else WRONG for v in verdicts], [not v for v in verdicts]
            caption = f"found: {sum(verdicts)} right, {len(verdicts) - sum(verdicts)} wrong"
        if found is not None:
            caption += f", {len(found) - sum(found)} missed"
        labels = _labels(shown, label_names)
        draw_marks(canvas, _marks(shown, scale, canvas.size, colors, labels, dashed))
        tiles.append(captioned(canvas, caption))
    return np.asarray(_stacked(tiles, gap=_GAP))


def query_panel(
    query: Mapping[str, Any],
    predictions: Instances,
    image_format: str = "BGR",
    *,
    threshold: float = 0.0,
) -> np.ndarray:
    """Draw a query dict of the batch contract with the model's output, as ``episode_panel`` does.

    Args:
        query: with ``image`` (Tensor[3, H, W], uint8, resized); ``instances``, if any, are the ground
            truth on the resized image. Without ``support`` only what was found is drawn.
        predictions: on the original query.
        image_format: channel order of the image, "BGR" or "RGB".
        threshold: least score of a detection that is drawn.
    """
    pixels = query["image"].permute(1, 2, 0).cpu().numpy()
    pixels = pixels[:, :, ::-1] if image_format == "BGR" else pixels
    resized = copy.copy(predictions)
    # Masks need no scaling here: whatever their size, they are drawn over the whole picture.
    resized.pred_boxes = predictions.pred_boxes.clone()
    resized.pred_boxes.scale(
        pixels.shape[1] / predictions.image_size[1], pixels.shape[0] / predictions.image_size[0]
    )
    if "support" not in query:
        return draw_instances(pixels, resized, threshold=threshold)
    return episode_panel(
        pixels,
        query["support"],
        ground_truth=query.get("instances"),
        predictions=resized,
        threshold=threshold,
    )


def _above(instances: Instances, threshold: float) -> Instances:
    return instances[instances.scores >= threshold] if instances.has("scores") else instances


def _classes(instances: Instances) -> list[int]:
    for name in ("pred_classes", "gt_classes"):
        if instances.has(name):
            return instances.get(name).tolist()
    return [0] * len(instances)


def _class_colors(instances: Instances) -> list[Color]:
    return [CLASS_COLORS[c % len(CLASS_COLORS)] for c in _classes(instances)]


def _labels(instances: Instances, class_names: Sequence[str] | None) -> list[str]:
    """Name (if there are names) and score (if there is one) of each instance."""
    classes = _classes(instances)
    parts = [[class_names[c]] if class_names is not None else [] for c in classes]
    if instances.has("scores"):
        for part, score in zip(parts, instances.scores.tolist(), strict=True):
            part.append(f"{score:.2f}")
    return [" ".join(part) for part in parts]


def _boxes(instances: Instances) -> np.ndarray:
    boxes = instances.pred_boxes if instances.has("pred_boxes") else instances.gt_boxes
    return boxes.tensor.detach().cpu().numpy().astype(float)


def _masks(instances: Instances) -> np.ndarray | None:
    """Masks as bool (n, H, W), or None."""
    for name in ("pred_masks", "gt_masks"):
        if instances.has(name):
            masks = instances.get(name)
            if isinstance(masks, PolygonMasks):
                masks = BitMasks.from_polygon_masks(masks.polygons, *instances.image_size)
            masks = masks.tensor if isinstance(masks, BitMasks) else masks
            return masks.detach().cpu().numpy().astype(bool)
    return None


def _marks(
    instances: Instances,
    scale: float,
    size: tuple[int, int],
    colors: Sequence[Color],
    labels: Sequence[str],
    dashed: Sequence[bool] | None = None,
) -> list[Mark]:
    """Scale instances to the size that is drawn."""
    masks = _masks(instances)
    marks = []
    for i, box in enumerate(_boxes(instances) * scale):
        mask = None
        if masks is not None and masks[i].any():
            # Bilinear and cut at one half, so that an enlarged mask has no stairs.
            picture = Image.fromarray(masks[i].astype(np.uint8) * 255)
            mask = np.asarray(picture.resize(size, Image.Resampling.BILINEAR)) > 127
        marks.append(Mark(tuple(box), mask, colors[i], labels[i], bool(dashed and dashed[i])))
    return marks


def _under_supports(canvas: Image.Image, support: SupportSet) -> Image.Image:
    """The picture below a row of as many supports as fit its width."""
    classes = support.positives()
    # Several classes show one shot each, in the colour of their instances; one class shows all its
    # shots.
    several = len(classes) > 1
    shots = [of_class[0] for of_class in classes] if several else classes[0]
    colors = CLASS_COLORS if several else (PAPER,)
    side = min(round(_THUMBNAIL * min(canvas.size)), canvas.width // len(shots) - _FRAME)
    side = max(side, _MIN_THUMBNAIL)
    shots = shots[: max(canvas.width // (side + _FRAME), 1)]
    frames = [thumbnail(shot, side, colors[k % len(colors)]) for k, shot in enumerate(shots)]
    return _stacked([in_a_row(frames, gap=0), canvas], gap=0)


def thumbnail(shot: Support, side: int, color: Color) -> Image.Image:
    """The example's region, its longer side of ``side`` pixels, in a frame."""
    x0, y0 = shot.region[:2].floor().int().tolist()
    x1, y1 = shot.region[2:].ceil().int().tolist()
    pixels = shot.image[:, y0:y1, x0:x1].permute(1, 2, 0).numpy()
    crop = Image.fromarray(np.ascontiguousarray(pixels))
    ratio = side / max(crop.size)
    crop = crop.resize([max(round(s * ratio), 1) for s in crop.size], Image.Resampling.BICUBIC)
    frame = Image.new("RGB", (crop.width + _FRAME, crop.height + _FRAME), DARK)
    ImageDraw.Draw(frame).rectangle((1, 1, frame.width - 2, frame.height - 2), fill=color)
    frame.paste(crop, (_FRAME // 2, _FRAME // 2))
    return frame


def captioned(tile: Image.Image, text: str) -> Image.Image:
    """The tile with a line of text above it, cut where it is too long."""
    font = font_for(tile.size)
    bar = round(font.size * 1.7)
    result = Image.new("RGB", (tile.width, tile.height + bar), PAPER)
    result.paste(tile, (0, bar))
    draw = ImageDraw.Draw(result)
    # No letter of the font is that narrow: a name of a million of them is not measured.
    text = text if len(text) <= tile.width else text[: tile.width] + "…"
    while draw.textlength(text, font=font) > tile.width and len(text) > 1:
        text = text[:-2] + "…"
    draw.text((0, bar / 2), text, fill=DARK, font=font, anchor="lm")
    return result


def in_a_row(tiles: Sequence[Image.Image], *, gap: int) -> Image.Image:
    """Tiles side by side, so many pixels apart."""
    width = sum(tile.width + gap for tile in tiles) - gap
    row = Image.new("RGB", (width, max(tile.height for tile in tiles)), PAPER)
    x = 0
    for tile in tiles:
        row.paste(tile, (x, 0))
        x += tile.width + gap
    return row


def _stacked(tiles: Sequence[Image.Image], *, gap: int) -> Image.Image:
    """Tiles above each other, so many pixels apart: on a phone each has the whole width."""
    height = sum(tile.height + gap for tile in tiles) - gap
    panel = Image.new("RGB", (max(tile.width for tile in tiles), height), PAPER)
    y = 0
    for tile in tiles:
        panel.paste(tile, (0, y))
        y += tile.height + gap
    return panel
