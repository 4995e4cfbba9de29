"""What is to be searched: folders, patterns, images and the frames of videos, as one stream of pictures."""

import glob
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import cv2
import numpy as np

from ..decoding import IMAGE_SUFFIXES, MAX_PIXELS, printable, read_rgb
from .pipeline import mapped_ahead

logger = logging.getLogger(__name__)

# A video that has fewer of the promised frames is reported: headers may be a little wrong.
_WHOLE = 0.9
VIDEO_SUFFIXES = frozenset({".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg"})


@dataclass(frozen=True)
class Picture:
    """An image file, or a frame of a video.

    Attributes:
        name (str): path, with ``#frame`` for a frame of a video. stem (str): for names of files about it.
        pixels (uint8 (H, W, 3) or None): BGR, of a frame; files are read when they are needed.
        reason (str): why it cannot be read; "" = nothing is known.
    """

    name: str
    stem: str
    pixels: np.ndarray | None = None
    reason: str = ""

    def read(self) -> np.ndarray:
        """BGR pixels, uint8 (H, W, 3).

        Raises:
            ValueError: the file cannot be read; names it.
        """
        if self.reason:
            raise ValueError(f"{printable(self.name)} {self.reason}")
        return read_rgb(self.name)[:, :, ::-1] if self.pixels is None else self.pixels


class Pictures:
    """All pictures behind some paths and patterns, each file once; iterating reads videos, one frame at a time."""

    def __init__(self, patterns: Sequence[str], *, every: int = 1):
        """Look for the files.

        Args:
            patterns: folders (images below them), files, or patterns such as ``photos/**/*.jpg``.
            every: of a video, the first of so many frames.

        Raises:
            ValueError: ``every`` below 1, or a pattern that nothing matches.
        """
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        self.every = every
        files = [file for pattern in patterns for file in _files_of(pattern)]
        self.files = list({os.path.abspath(file): file for file in reversed(files)}.values())[::-1]

    def __len__(self) -> int:
        """Number of pictures; of videos, what their headers promise."""
        return sum(self._length(file) if _is_video(file) else 1 for file in self.files)

    def __iter__(self) -> Iterator[Picture]:
        for file in self.files:
            if _is_video(file):
                yield from self._frames(file)
            else:
                yield Picture(file, Path(file).stem)

    def _length(self, file: str) -> int:
        video = _opened(file)
        return 1 if video is None else -(-_num_frames(video) // self.every)

    def _frames(self, file: str) -> Iterator[Picture]:
        """The frames, and a picture without pixels where the video is broken."""
        stem, number = Path(file).stem, -1
        video = _opened(file)
        if video is None:
            yield Picture(file, stem, reason="must be a video that OpenCV can read")
            return
        promised = _num_frames(video)
        # One thread alone reads, and a frame ahead of the model is enough.
        frames = mapped_ahead(lambda _: video.read(), count(), ahead=1)
        for number, (is_read, pixels) in enumerate(frames):
            if not is_read:
                break
            if number % self.every == 0:
                yield Picture(f"{file}#{number}", f"{stem}_{number:06d}", pixels)
        if number < max(_WHOLE * promised, 1):
            reason = f"must be a whole video, got {number} of {promised} frames"
            yield Picture(file, stem, reason=reason)


def _files_of(pattern: str) -> list[str]:
    # A name may have the characters of a pattern.
    if os.path.isdir(pattern):
        found = [
            os.path.join(folder, name)
            for folder, _, names in os.walk(pattern, onerror=_tell)
            for name in names
            if Path(name).suffix.lower() in IMAGE_SUFFIXES
        ]
    elif os.path.exists(pattern):
        found = [pattern]
    else:
        matches = glob.glob(pattern, recursive=True)
        found = [name for name in matches if not os.path.isdir(name)]
    if not found:
        raise ValueError(
            f"images must be a folder with images, a file or a pattern that matches some, got '{printable(pattern)}'"
        )
    return sorted(found)


def _is_video(file: str) -> bool:
    return Path(file).suffix.lower() in VIDEO_SUFFIXES


def _tell(error: OSError) -> None:
    logger.warning("%s is passed over: %s", printable(str(error.filename)), error.strerror)


def _num_frames(video: cv2.VideoCapture) -> int:
    return max(int(video.get(cv2.CAP_PROP_FRAME_COUNT)), 0)


def _opened(file: str) -> cv2.VideoCapture | None:
    """None for what is no video, is too large to be decoded or has a codec that OpenCV was built without."""
    video = cv2.VideoCapture(file) if os.path.isfile(file) else cv2.VideoCapture()
    size = video.get(cv2.CAP_PROP_FRAME_WIDTH) * video.get(cv2.CAP_PROP_FRAME_HEIGHT)
    return video if video.isOpened() and size <= MAX_PIXELS else None
