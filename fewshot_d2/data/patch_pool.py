"""Patches with a high loss, found every so many iterations, and training episodes out of them (OS2D spec 1.14).

A pool is a file for the iterations from its own on until the next one's, so that what is trained on depends on the
seed, the number of the episode and the files alone, and a resumed run goes on as an uninterrupted one.
"""

import logging
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ..files import write_json
from . import typed_json
from .episodes import Episode, EpisodeFactory, TrainingEpisodes
from .patches import Window

logger = logging.getLogger(__name__)

# Negative anchors with a high score, positive ones with a low one, and positive ones that are badly placed.
KINDS = ("neg", "pos", "pos_loc")


@dataclass(frozen=True)
class HardPatch:
    """One patch.

    Attributes:
        image_id (int), class_id (int): where the loss was found, dataset ids.
        window (tuple[int, int, int, int]): XYXY in pixels of the original image, which it may leave.
        loss (float): not normalised. kind (str): of ``KINDS``.
    """

    image_id: int
    class_id: int
    window: Window
    loss: float
    kind: str

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {KINDS}, got {self.kind!r}")
        if not typed_json.has_area(self.window):
            raise ValueError(f"window must be XYXY with an area, got {list(self.window)}")


@dataclass(frozen=True)
class PatchPool:
    """What one search found.

    Attributes:
        iteration (int): the first iteration that learns from it. patches (tuple[HardPatch, ...]).
    """

    FORMAT: ClassVar[str] = "fewshot_d2/hard_patches"
    VERSION: ClassVar[int] = 1

    iteration: int
    patches: tuple[HardPatch, ...]

    @cached_property
    def by_image(self) -> Mapping[tuple[int, bool], tuple[HardPatch, ...]]:
        """{(image id, whether negative): its patches}."""
        groups: dict[tuple[int, bool], list[HardPatch]] = defaultdict(list)
        for patch in self.patches:
            groups[patch.image_id, patch.kind == "neg"].append(patch)
        return {key: tuple(group) for key, group in groups.items()}

    @staticmethod
    def path(folder: str | Path, iteration: int) -> Path:
        """Where the pool of an iteration is kept."""
        return Path(folder) / f"{iteration:08d}.json"

    def save(self, folder: str | Path) -> Path:
        """Write the file of its iteration, atomically."""
        header = {"format": self.FORMAT, "version": self.VERSION, "iteration": self.iteration}
        path = self.path(folder, self.iteration)
        write_json(path, {**header, "patches": [astuple(patch) for patch in self.patches]})
        return path

    @classmethod
    def load(cls, path: str | Path) -> "PatchPool":
        """Read what ``save`` wrote.

        Raises:
            ValueError: the file is no pool; the message names the file and what is wrong.
        """
        kind = {"kind": "a file of hard patches", "format": cls.FORMAT, "version": cls.VERSION}
        return typed_json.load_document(path, cls._parsed, **kind)

    @classmethod
    def _parsed(cls, content: Mapping[str, Any]) -> "PatchPool":
        iteration = typed_json.typed(int, content.get("iteration"), "iteration")
        rows = typed_json.sequence(content.get("patches"), "patches")
        return cls(iteration, tuple(_patch(row, f"patches[{i}]") for i, row in enumerate(rows)))


def _patch(row: Any, where: str) -> HardPatch:
    values = typed_json.sequence(row, where)
    if len(values) != 5:
        raise ValueError(f"{where} must be [image, class, window, loss, kind], got {values}")
    ids = [typed_json.typed(int, value, f"{where}: id") for value in values[:2]]
    window = tuple(typed_json.typed(int, int(v), where) for v in typed_json.box(values[2], where))
    loss = typed_json.number(values[3], f"{where}: loss")
    return HardPatch(*ids, window, loss, typed_json.typed(str, values[4], f"{where}: kind"))


class MinedEpisodes(TrainingEpisodes):
    """Training episodes of which each second one shows a mined negative patch of its image, the others a positive one.

    An image without such a patch, and all images before the first search, show a random one. The class of the patch is
    always searched: it takes the place of another one of its kind, present or absent, where there is no room.
    """

    def __init__(
        self,
        factory: EpisodeFactory,
        mapper: Callable[[Episode], dict[str, Any]],
        *,
        folder: str | Path,
        period: int,
        batch_size: int,
        **kwargs: Any,
    ):
        """Add to ``TrainingEpisodes`` where pools are.

        Args:
            folder: of the pools. period: iterations from one to the next. batch_size: episodes of an iteration, in all
                processes.
        """
        super().__init__(factory, mapper, **kwargs)
        self.folder, self.period, self.batch_size = Path(folder), period, batch_size
        self._load = lru_cache(maxsize=1)(_load_pool)

    def __getstate__(self) -> dict[str, Any]:
        """For workers that are spawned: without the pool."""
        return {**self.__dict__, "_load": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _load=lru_cache(maxsize=1)(_load_pool))

    def sample(self, number: int) -> Episode:
        """Draw episode ``number``; the result depends on the seed, the number and the pool alone."""
        image_index = self._order[number]
        patch = self._draw_patch(number, image_index)
        if patch is None:
            return super().sample(number)
        rng = np.random.default_rng((self.seed, number, 0))
        classes = self._draw_classes(rng, image_index)
        in_image = self.factory.query_index.classes_in(image_index)
        if patch.class_id not in classes:
            classes = with_class(
                classes, patch.class_id, in_image, self.num_ways, self.num_absent_ways
            )
        episode = self._episode(rng, number, image_index, classes)
        return replace(episode, window=patch.window)

    def _draw_patch(self, number: int, image_index: int) -> HardPatch | None:
        iteration = number // self.batch_size // self.period * self.period
        if not iteration:
            return None
        pool = self._load(PatchPool.path(self.folder, iteration))
        image_id = self.factory.query_index.dicts[image_index]["image_id"]
        is_negative = number % 2 == 0
        patches = [
            patch
            for patch in pool.by_image.get((image_id, is_negative), ())
            if patch.class_id in self.class_ids
        ]
        if not patches:
            return None
        rng = np.random.default_rng((self.seed, number, 6))
        return patches[int(rng.integers(len(patches)))]


def with_class(
    classes: Sequence[int],
    class_id: int,
    in_image: Sequence[int],
    num_ways: int,
    num_absent_ways: int,
) -> tuple[int, ...]:
    """Classes of an episode, present ones first, with one more in the last place of its kind.

    Args:
        classes: drawn ones without ``class_id``. in_image: classes that the image has.
        num_ways, num_absent_ways: most classes of each kind; one if it is 0.
    """
    present = [c for c in classes if c in in_image]
    absent = [c for c in classes if c not in in_image]
    if class_id in in_image:
        return (*present[: max(num_ways, 1) - 1], class_id, *absent)
    return (*present, *absent[: max(num_absent_ways, 1) - 1], class_id)


def _load_pool(path: Path) -> PatchPool:
    """The pool, an empty one where mining began only later."""
    if not path.is_file():
        logger.warning("No hard patches in %s: random ones are trained on", path)
        return PatchPool(0, ())
    return PatchPool.load(path)
