"""Superpixels of images by Felzenszwalb and Huttenlocher's method, computed once in the life of a data set.

They depend on the image alone, so they are kept as files and follow its resizing and flips by nearest neighbours.
Needs scikit-image where an image has no file yet.
"""

import hashlib
import io
import logging
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from detectron2.utils.file_io import PathManager
from PIL import Image
from torch import Tensor

from ..decoding import read_rgb
from ..files import canonical_sha256, write_bytes

logger = logging.getLogger(__name__)

_FORMAT = "fewshot_d2/superpixels 1"
# zipfile takes a wrong bit for a version or an encryption that it does not know: RuntimeError.
_BROKEN = (
    *(OSError, ValueError, KeyError, EOFError, RuntimeError),
    *(zipfile.BadZipFile, zlib.error),
)


class SuperpixelCache:
    """Superpixels of an image file: ``cache(path)`` reads them from ``folder`` or computes and keeps them.

    An entry is named by the image file's bytes and the parameters, so an image that is replaced, moved or held twice
    needs no care. Processes may share the folder: entries appear whole, and all write the same.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        short_side: int = 300,
        scale: float = 100.0,
        sigma: float = 0.5,
        min_size: int = 50,
    ):
        """Set the parameters; nothing is read or written yet.

        Args:
            folder: of the entries; made when the first is written.
            short_side: pixels that the image's shorter side is reduced to; smaller images stay as they are.
            scale: the method's k for channels of 0 to 255; larger = larger superpixels.
            sigma: pixels, of the Gaussian blur before. min_size: pixels that a superpixel has at least.

        Raises:
            ValueError: a parameter is out of range.
        """
        if short_side < 1 or scale <= 0 or sigma < 0 or min_size < 0:
            raise ValueError(
                "short_side and scale must be positive, sigma and min_size not negative, got "
                f"short_side {short_side}, scale {scale}, sigma {sigma}, min_size {min_size}"
            )
        self.folder = Path(folder)
        self.short_side, self.min_size = int(short_side), int(min_size)
        self.scale, self.sigma = float(scale), float(sigma)
        parameters = [_FORMAT, self.short_side, self.scale, self.sigma, self.min_size]
        self._parameters = canonical_sha256(parameters).encode("ascii")

    def __call__(self, path: str | Path) -> np.ndarray:
        """Superpixels of the image file ``path`` as ``read_rgb`` gives it.

        Like the mappers, which read with it, this turns the image as its EXIF orientation says.

        Returns:
            int32[h, w]: labels 0 ... n - 1 of the reduced image.

        Raises:
            ImportError: there is no entry and no scikit-image.
            OSError: the image cannot be read or the entry cannot be written.
        """
        entry = self.entry(path)
        try:
            return _unpacked(entry.read_bytes())
        except FileNotFoundError:
            pass
        except _BROKEN as error:
            logger.warning("%s is broken (%s) and is computed anew from %s.", entry, error, path)
        return self._compute(path, entry)

    def entry(self, path: str | Path) -> Path:
        """Where the superpixels of the image file ``path`` are kept."""
        with PathManager.open(str(path), "rb") as file:
            digest = hashlib.sha256(self._parameters + file.read())
        return self.folder / f"{digest.hexdigest()}.npz"

    def _compute(self, path: str | Path, entry: Path) -> np.ndarray:
        image = _reduced(read_rgb(path), self.short_side)
        labels = felzenszwalb_labels(
            image, scale=self.scale, sigma=self.sigma, min_size=self.min_size
        )
        write_bytes(entry, _packed(labels))
        return labels


def felzenszwalb_labels(
    image: np.ndarray, *, scale: float, sigma: float, min_size: int
) -> np.ndarray:
    """Superpixels of an RGB image (uint8[h, w, 3]); parameters as of ``SuperpixelCache``.

    Returns:
        int32[h, w]: labels 0 ... n - 1.

    Raises:
        ImportError: scikit-image is missing.
    """
    try:
        from skimage.segmentation import felzenszwalb
    except ImportError as error:
        raise ImportError(
            f"scikit-image must be installed for superpixels (pip install scikit-image), got: {error}"
        ) from error
    return felzenszwalb(image, scale=scale, sigma=sigma, min_size=min_size).astype(np.int32)


def resize_labels(labels: np.ndarray, shape: tuple[int, int], *, flip: bool) -> Tensor:
    """Bring labels to the network's image: nearest neighbours, then a horizontal flip.

    Args:
        labels (int[h, w]): of the image at another size, not flipped.
        shape: (H, W) of the network's image. flip: whether that image is flipped.

    Returns:
        Tensor[H, W]: int64; a pixel has the label that its centre lies on.

    Raises:
        ValueError: labels or shape have no pixel or are not two-dimensional.
    """
    if labels.ndim != 2 or not labels.size or len(shape) != 2 or min(shape) < 1:
        raise ValueError(
            f"labels and shape must be two-dimensional and not empty, got {labels.shape} and {tuple(shape)}"
        )
    rows, columns = (
        _nearest(size, target) for size, target in zip(labels.shape, shape, strict=True)
    )
    columns = columns[::-1] if flip else columns
    return torch.from_numpy(labels[rows[:, None], columns].astype(np.int64))


def _nearest(size: int, target: int) -> np.ndarray:
    """Old index of each new one; in integers, because (i + 0.5) * size / target may be rounded across a border."""
    return (2 * np.arange(target) + 1) * size // (2 * target)


def _reduced(image: np.ndarray, short_side: int) -> np.ndarray:
    """The RGB image with at most ``short_side`` pixels on its shorter side."""
    height, width = image.shape[:2]
    if min(height, width) <= short_side:
        return image
    ratio = short_side / min(height, width)
    size = int(width * ratio + 0.5), int(height * ratio + 0.5)
    picture = Image.fromarray(np.ascontiguousarray(image))
    return np.asarray(picture.resize(size, Image.Resampling.BILINEAR))


def _packed(labels: np.ndarray) -> bytes:
    """A compressed .npz: whatever the number of labels, no pickle, and a checksum that tells a broken file."""
    buffer = io.BytesIO()
    # Two bytes a pixel are enough for all but extreme parameters.
    np.savez_compressed(buffer, labels=labels.astype(np.min_scalar_type(int(labels.max()))))
    return buffer.getvalue()


def _unpacked(content: bytes) -> np.ndarray:
    archive = np.load(io.BytesIO(content), allow_pickle=False)
    if not isinstance(archive, np.lib.npyio.NpzFile):
        raise ValueError("an entry must be a .npz file")
    labels = archive["labels"]
    if labels.ndim != 2 or labels.dtype.kind != "u":
        raise ValueError(f"labels must be unsigned (h, w), got {labels.dtype} {labels.shape}")
    return labels.astype(np.int32)
