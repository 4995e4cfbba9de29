"""Images of users, whatever they are: JPEG in CMYK, 16-bit grey, transparent PNG, turned by EXIF, broken or hostile.

Pixels are RGB uint8 (H, W, 3). A file that cannot be read is a ValueError that names it; nothing is decoded before its
size is known to be harmless.
"""

import io
import os
import stat
import warnings
from pathlib import Path

import numpy as np
from PIL import Image

# A few kilobytes can declare an image of gigabytes.
MAX_PIXELS = 64_000_000

# What a camera, a phone or the web gives. Pillow knows more: EPS, for one, would start another program.
_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "AVIF", "TIFF", "BMP", "GIF", "PPM")
_ORIENTATION = 0x0112
# How the pixels must be moved, by the tag's value; 1 = not at all.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
IMAGE_SUFFIXES = frozenset(
    {
        ".jpg",
        ".jpeg",
        ".jpe",
        ".jfif",
        ".mpo",
        ".png",
        ".webp",
        ".avif",
        ".tif",
        ".tiff",
        ".bmp",
        ".gif",
    }
    | {".ppm", ".pgm", ".pbm", ".pnm"}
)


def read_rgb(path: str | Path, *, paper: int = 255) -> np.ndarray:
    """Read an image file as it is meant to be looked at.

    It is turned as its EXIF tag says, 16-bit values are scaled to 8 bits, transparent parts lie on paper of that grey
    value (white), and of an animation the first picture counts.

    Returns:
        uint8 (H, W, 3), RGB.

    Raises:
        ValueError: missing, no regular file, broken, of another format or above ``MAX_PIXELS``; names the file.
    """
    try:
        # Opening a pipe or a device would wait for ever.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ValueError("it is no regular file")
        return decode_rgb(Path(path), paper=paper)
    # Decoders raise whatever a broken file makes them stumble over.
    except Exception as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ValueError(
            f"{printable(path)} must be a readable image, got: {printable(reason)}"
        ) from error


def decode_rgb(
    source: Path | bytes, formats: tuple[str, ...] = _FORMATS, *, paper: int = 255
) -> np.ndarray:
    """``read_rgb`` of a file or of its bytes, with whatever error the decoder raises."""
    image = open_image(source, formats)
    with image:
        return np.array(_as_rgb(_turned(image), paper))


def open_image(source: Path | bytes, formats: tuple[str, ...] = _FORMATS) -> Image.Image:
    """Open without decoding; refuse what is too large to be decoded."""
    Image.init()
    known = [name for name in formats if name in Image.OPEN]
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    with warnings.catch_warnings():
        # Of images just above Pillow's own limit, which is ours to judge.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        image = Image.open(file, formats=known)
    if image.width * image.height > MAX_PIXELS:
        image.close()
        raise ValueError(f"at most {MAX_PIXELS} pixels are allowed, got {image.size}")
    return image


def _turned(image: Image.Image) -> Image.Image:
    """As the EXIF tag says; Pillow's own function writes the tags anew, and refuses a picture over a broken one."""
    try:
        turn = _TURNS.get(image.getexif().get(_ORIENTATION))
    # Whatever broken tags raise: the pixels are as good as without them.
    except Exception:
        turn = None
    return image if turn is None else image.transpose(turn)


def _as_rgb(image: Image.Image, paper: int) -> Image.Image:
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range; save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        # Pillow would cut 16-bit values at 255.
        values = np.clip(np.asarray(image).astype(np.int64), 0, 65535) >> 8
        return Image.fromarray(values.astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        layer = image.convert("RGBA")
        below = Image.new("RGBA", layer.size, (paper, paper, paper, 255))
        return Image.alpha_composite(below, layer).convert("RGB")
    return image.convert("RGB")


def printable(text: str | os.PathLike) -> str:
    """A name as it can be shown and written as UTF-8: odd bytes and control characters become escapes."""
    text = os.fsencode(text).decode("utf-8", "backslashreplace") if _is_path(text) else str(text)
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _is_path(text: str | os.PathLike) -> bool:
    """Whether the operating system can spell it: a lone surrogate that stands for no byte cannot be encoded."""
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        return False
    return True
