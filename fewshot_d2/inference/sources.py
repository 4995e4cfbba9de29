"""What is to be searched: folders, patterns, images and the frames of videos, as one stream of pictures."""

import glob
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import cv2
import numpy as np

from ..decoding import IMAGE_SUFFIXES, printable, read_rgb
from .pipeline import mapped_ahead

VIDEO_SUFFIXES = frozenset({".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg"})


@dataclass(frozen=True)
class Picture:
    """An image file, or a frame of a video.

    Attributes:
        name (str): path, with ``#frame`` for a frame of a video. stem (str): for names of files about it.
        pixels (uint8 (H, W, 3) or None): BGR, of a frame; files are read when they are needed.
    """

    name: str
    stem: str
    pixels: np.ndarray | None = None

    def read(self) -> np.ndarray:
        """BGR pixels, uint8 (H, W, 3).

        Raises:
            ValueError: the file cannot be read; names it.
        """
        return read_rgb(self.name)[:, :, ::-1] if self.pixels is None else self.pixels


class Pictures:
    """All pictures behind some paths and patterns; iterating reads videos, one frame at a time."""

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
        self.files = [file for pattern in patterns for file in _files_of(pattern)]

    def __len__(self) -> int:
        """Number of pictures; of videos, what their headers promise."""
        return sum(
            -(-_num_frames(file) // self.every) if _is_video(file) else 1 for file in self.files
        )

    def __iter__(self) -> Iterator[Picture]:
        for file in self.files:
            if _is_video(file):
                yield from self._frames(file)
            else:
                yield Picture(file, Path(file).stem)

    def _frames(self, file: str) -> Iterator[Picture]:
        video = _opened(file)
        # One thread alone reads, and a frame ahead of the model is enough.
        frames = mapped_ahead(lambda _: video.read(), count(), ahead=1)
        for number, (is_read, pixels) in enumerate(frames):
            if not is_read:
                return
            if number % self.every == 0:
                yield Picture(f"{file}#{number}", f"{Path(file).stem}_{number:06d}", pixels)


def _files_of(pattern: str) -> list[str]:
    # A name may have the characters of a pattern.
    if os.path.isdir(pattern):
        found = [
            os.path.join(folder, name)
            for folder, _, names in os.walk(pattern)
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


def _num_frames(file: str) -> int:
    return max(int(_opened(file).get(cv2.CAP_PROP_FRAME_COUNT)), 0)


def _opened(file: str) -> cv2.VideoCapture:
    video = cv2.VideoCapture(file) if os.path.isfile(file) else cv2.VideoCapture()
    if not video.isOpened():
        raise ValueError(f"{printable(file)} must be a readable video")
    return video
