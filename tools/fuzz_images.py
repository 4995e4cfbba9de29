"""Images for ``fuzz_inputs.py``: each maker writes a file and returns its pixels as they must be read, or None.

None means that either a picture or an error is right: nobody knows what a decoder makes of damaged data.
"""

import os
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image

Maker = Callable[[Path, Random], np.ndarray | None]


def _pixels(rng: Random) -> np.ndarray:
    shape = rng.randint(1, 24), rng.randint(1, 24), 3
    return np.random.default_rng(rng.getrandbits(32)).integers(0, 256, shape, dtype=np.uint8)


def plain(path: Path, rng: Random) -> np.ndarray:
    """A whole file of a lossless format, whatever its name ends in."""
    pixels = _pixels(rng)
    Image.fromarray(pixels).save(path, rng.choice(["PNG", "BMP", "TIFF", "PPM"]))
    return pixels


def grey(path: Path, rng: Random) -> np.ndarray:
    """One channel."""
    pixels = _pixels(rng)[:, :, 0]
    Image.fromarray(pixels).save(path, "PNG")
    return np.stack([pixels] * 3, axis=2)


def sixteen_bit(path: Path, rng: Random) -> np.ndarray:
    """16-bit grey."""
    pixels = _pixels(rng)
    values = pixels[:, :, 0].astype(np.uint16) * 256 + pixels[:, :, 1]
    Image.fromarray(values).save(path, rng.choice(["PNG", "TIFF"]))
    return np.stack([pixels[:, :, 0]] * 3, axis=2)


def transparent(path: Path, rng: Random) -> np.ndarray:
    """RGBA, its parts either solid or clear."""
    pixels = _pixels(rng)
    solid = pixels[:, :, :1] > 127
    alpha = np.where(solid, 255, 0).astype(np.uint8)
    Image.fromarray(np.concatenate([pixels, alpha], axis=2)).save(path, "PNG")
    return np.where(solid, pixels, 255)


def cmyk(path: Path, rng: Random) -> np.ndarray:
    """Lossless CMYK."""
    pixels = _pixels(rng)
    picture = Image.fromarray(pixels).convert("CMYK")
    picture.save(path, "TIFF")
    return np.array(picture.convert("RGB"))


def turned(path: Path, rng: Random) -> np.ndarray:
    """With an EXIF orientation."""
    pixels, orientation = _pixels(rng), rng.randint(1, 8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(path, "PNG", exif=exif)
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return pixels


def _any_format(path: Path, rng: Random) -> None:
    formats = ["PNG", "JPEG", "GIF", "TIFF", "BMP", "WEBP", "PPM"]
    Image.fromarray(_pixels(rng)).save(path, rng.choice(formats))


def truncated(path: Path, rng: Random) -> None:
    """The first part of a file."""
    _any_format(path, rng)
    content = path.read_bytes()
    path.write_bytes(content[: rng.randrange(len(content))])


def flipped(path: Path, rng: Random) -> None:
    """A few wrong bits, most often in the header."""
    _any_format(path, rng)
    content = bytearray(path.read_bytes())
    for _ in range(rng.randint(1, 6)):
        end = len(content) if rng.random() < 0.5 else min(64, len(content))
        content[rng.randrange(end)] = rng.randrange(256)
    path.write_bytes(content)


def huge(path: Path, rng: Random) -> None:
    """A declared size of up to four thousand million pixels a side."""
    kind, at, form = rng.choice([("PNG", 16, ">II"), ("BMP", 18, "<II"), ("GIF", 6, "<HH")])
    Image.fromarray(_pixels(rng)).save(path, kind)
    content = bytearray(path.read_bytes())
    largest = 2**16 - 1 if form == "<HH" else rng.choice([2**16, 2**31 - 1, 2**32 - 1])
    struct.pack_into(form, content, at, rng.randint(9000, largest), rng.randint(9000, largest))
    path.write_bytes(content)


def empty(path: Path, rng: Random) -> None:
    """No bytes, or only a few."""
    path.write_bytes(rng.randbytes(rng.choice([0, 0, 1, 3, 20])))


def noise(path: Path, rng: Random) -> None:
    """Random bytes behind the first bytes of some format."""
    starts = [
        b"\x89PNG\r\n\x1a\n",
        b"\xff\xd8\xff\xe0",
        b"GIF89a",
        b"II*\x00",
        b"BM",
        b"%!PS",
        b"P6\n",
    ]
    path.write_bytes(rng.choice([*starts, b""]) + rng.randbytes(rng.randint(1, 400)))


def link(path: Path, rng: Random) -> None:
    """A symbolic link to nothing, to itself or to a folder; a named pipe; a folder."""
    kind = rng.randrange(5)
    if kind == 3:
        os.mkfifo(path)
    elif kind == 4:
        path.mkdir()
    else:
        path.symlink_to([path.with_name("nothing"), path, path.parent][kind])


def linked(path: Path, rng: Random) -> np.ndarray:
    """A symbolic link to a good file."""
    target = path.with_name("target")
    pixels = plain(target, rng)
    path.symlink_to(target)
    return pixels


MAKERS: dict[str, Maker] = {
    maker.__name__: maker
    for maker in (
        *(plain, grey, sixteen_bit, transparent, cmyk, turned, linked),
        *(truncated, flipped, huge, empty, noise, link),
    )
}
