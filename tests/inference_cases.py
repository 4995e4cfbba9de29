"""A small model of every system in the package, photos and a command line for tests of inference."""

import functools
from pathlib import Path

import numpy as np
import torch
from factories import (
    TINY_OVERRIDES,
    TINY_REPMET_OVERRIDES,
    TINY_SPIL_OVERRIDES,
    tiny_config,
    tiny_model,
)
from PIL import Image, ImageFilter
from test_configs import CONFIGS, SMALL

from fewshot_d2 import load_config
from fewshot_d2.files import write_tensors, write_text

_NARROW = {
    "SiameseMaskRCNN": TINY_OVERRIDES,
    "RepMet": TINY_REPMET_OVERRIDES,
    "SPIL": TINY_SPIL_OVERRIDES,
}


@functools.cache
def system_configs() -> dict[str, Path]:
    """One config of every meta-architecture that has any, a small one where there is one."""
    # Configs of the papers' size are called after their ResNet.
    paths = sorted(CONFIGS, key=lambda path: (path.name.startswith("R_"), path.name))
    found: dict[str, Path] = {}
    for path in paths:
        found.setdefault(load_config(str(path), SMALL).MODEL.META_ARCHITECTURE, path)
    return found


def small_config(system: str):
    """A config of the system, as small as the tests can make it."""
    path = system_configs()[system]
    narrow = _NARROW.get(system, []) if not path.name.startswith("R_") else []
    cfg = load_config(str(path), [*SMALL, *narrow])
    cfg.FEWSHOT.SUPPORT.SIZE = min(cfg.FEWSHOT.SUPPORT.SIZE, 64)
    return cfg


def write_photos(folder: Path, number: int = 3, size: tuple[int, int] = (48, 64)) -> list[Path]:
    """Blurred noise as JPEGs."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"photo_{i}.jpg" for i in range(number)]
    for i, path in enumerate(paths):
        noise_picture(size, i).save(path, quality=95)
    return paths


def noise_picture(size: tuple[int, int], seed: int = 0) -> Image.Image:
    """Blurred noise of a (height, width)."""
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    return Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(2))


def write_model(folder: Path) -> None:
    """``config.yaml`` and ``model_final.pth`` of a random Siamese Mask R-CNN, as training leaves them."""
    low = ("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0, "TEST.DETECTIONS_PER_IMAGE", 5)
    write_text(folder / "config.yaml", tiny_config(*low).dump())
    model = tiny_model(*low)
    content = {"model": model.state_dict(), "system": type(model).__name__}
    write_tensors(folder / "model_final.pth", content)


def same_instances(a, b) -> bool:
    """Whether all fields are equal to the last bit."""
    return (
        torch.equal(a.scores, b.scores)
        and torch.equal(a.pred_boxes.tensor, b.pred_boxes.tensor)
        and torch.equal(a.pred_classes, b.pred_classes)
    )
