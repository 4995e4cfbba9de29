"""Evaluation plans: which query, classes and supports, fixed in a file and known by its SHA-256."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from .index import InstanceIndex, same_images
from .plan_files import PlanFile
from .splits import check_side

logger = logging.getLogger(__name__)

PROTOCOLS = ("present", "open")


@dataclass(frozen=True)
class PlannedEpisode:
    """One query with its classes.

    Attributes:
        id (int): number of the episode in its plan.
        image_id (int): the query.
        class_ids (tuple[int, ...]): the K classes that are searched in it.
        supports (tuple[tuple[int, ...], ...]): annotation ids of the S shots of each class.
    """

    id: int
    image_id: int
    class_ids: tuple[int, ...]
    supports: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class EvaluationPlan(PlanFile):
    """All episodes of one evaluation run and where they come from.

    Attributes:
        dataset (str), support_dataset (str): registered names.
        split (str): specification (see ``splits``). side (str): "base", "novel" or "all".
        protocol (str): "present" = classes in the image only; "open" = every class of the side in
            every image.
        shots (int): supports a class. seed (int), run (int): the draw.
        class_ids (tuple[int, ...]): every class that is searched.
        episodes (tuple[PlannedEpisode, ...]): one a query image.
    """

    KIND: ClassVar[str] = "evaluation"
    EPISODE: ClassVar[type] = PlannedEpisode

    protocol: str
    shots: int
    seed: int
    run: int
    class_ids: tuple[int, ...]
    episodes: tuple[PlannedEpisode, ...]

    def __post_init__(self) -> None:
        _check_draw(self.side, self.protocol, shots=self.shots, seed=self.seed, run=self.run)
        self.check_classes()
        for episode in self.episodes:
            shots = [len(ids) for ids in episode.supports]
            if shots != [self.shots] * len(episode.class_ids):
                raise ValueError(
                    f"episode {episode.id}: supports must be {self.shots} for each of its "
                    f"{len(episode.class_ids)} classes, got {shots}"
                )

    @property
    def num_pairs(self) -> int:
        """How many (image, class) pairs are searched."""
        return sum(len(episode.class_ids) for episode in self.episodes)

    @cached_property
    def fixed_supports(self) -> Mapping[int, tuple[int, ...]] | None:
        """{class id: its supports} if they are the same in all episodes, else None."""
        supports: dict[int, tuple[int, ...]] = {}
        for episode in self.episodes:
            for class_id, ids in zip(episode.class_ids, episode.supports, strict=True):
                if supports.setdefault(class_id, ids) != ids:
                    return None
        return supports

    @property
    def file_name(self) -> str:
        """A name that tells the plans of one data set apart."""
        what = f"{self.protocol}-{self.shots}shot-{len(self.episodes)}images"
        if len(self.episodes) > 1 and self.fixed_supports is not None:
            what += "-fixed"
        return f"{self._source()}-{what}-seed{self.seed}-run{self.run}.json"

    def _check_queries(self, episode: PlannedEpisode, query_index: InstanceIndex) -> None:
        in_image = query_index.classes_in(query_index.image_index(episode.image_id))
        absent = set(episode.class_ids) - set(in_image)
        if self.protocol == "present" and absent:
            raise ValueError(
                f"classes must be present in image {episode.image_id}, got also {sorted(absent)}"
            )


def make_plan(
    query_index: InstanceIndex,
    support_index: InstanceIndex,
    *,
    dataset: str,
    support_dataset: str,
    split: str,
    side: str,
    class_ids: Iterable[int],
    protocol: str,
    shots: int,
    seed: int,
    run: int,
    max_images: int = 0,
    fixed_supports: bool = False,
    foreign_images: bool = True,
) -> EvaluationPlan:
    """Draw the supports of one evaluation run.

    Classes without any instance to draw a support from are left out with a warning.

    Args:
        query_index, support_index: one object, or indices of two data sets with the same categories.
        dataset, support_dataset: their names. Supports come from other images than the query whenever another image
            has the class.
        split, side: where ``class_ids`` come from, for the record.
        class_ids: the classes to search.
        protocol: "present" (only images that have one of the classes, and only those) or "open".
        shots: supports a class. seed, run: the draw; runs differ in their supports only.
        max_images: at most this many images, the same ones for every run; 0 = all.
        fixed_supports: draw once for all episodes, as few-shot training needs it that learns from the supports;
            they must then be of a data set that has none of the queries.
        foreign_images: in the open protocol, search images too that hold other classes alone (say, those of training);
            images without any annotation are searched anyway.

    Raises:
        ValueError: an argument is out of its range, no episode remains, or fixed supports are of a query.
    """
    _check_draw(side, protocol, shots=shots, seed=seed, run=run)
    classes = _searchable(class_ids, query_index, support_index)
    wanted = _queries(query_index, classes, protocol, foreign_images=foreign_images)
    if not wanted:
        raise ValueError(
            f"plan must have at least one episode, got none: {len(classes)} classes of side "
            f"{side!r} in {len(query_index.dicts)} images of {dataset!r}"
        )
    as_supports = same_images(query_index, support_index)
    if fixed_supports and as_supports:
        raise ValueError(
            "fixed supports must be of a data set that shares no image with the queries, got "
            f"{len(as_supports)} of both, for example {query_index.dicts[min(as_supports)]['file_name']}"
        )
    episodes, num_own = [], 0
    for image_index, chosen in _subset(wanted, seed, max_images):
        image_id = query_index.dicts[image_index]["image_id"]
        of_image = () if fixed_supports else (image_id,)
        own = as_supports.get(image_index, ())
        num_own += sum(all(i in own for i in support_index.images_with(c)) for c in chosen)
        supports = tuple(
            _draw(support_index, class_id, shots, key=(seed, run, *of_image), exclude=own)
            for class_id in chosen
        )
        episodes.append(PlannedEpisode(len(episodes), image_id, chosen, supports))
    if num_own:
        logger.warning("%d pairs have supports out of the query: no other image has them", num_own)
    return EvaluationPlan(
        dataset, support_dataset, split, side, protocol, shots, seed, run, classes, tuple(episodes)
    )


def _queries(
    index: InstanceIndex, classes: tuple[int, ...], protocol: str, *, foreign_images: bool
) -> list[tuple[int, tuple[int, ...]]]:
    """(image index, classes to search in it) of the images that are worth an episode."""
    queries = []
    for image_index in range(len(index.dicts)):
        in_image = set(index.classes_in(image_index))
        chosen = classes if protocol == "open" else tuple(c for c in classes if c in in_image)
        is_foreign = index.dicts[image_index]["annotations"] and not in_image & set(classes)
        if chosen and (foreign_images or not is_foreign):
            queries.append((image_index, chosen))
    return queries


def _draw(
    index: InstanceIndex, class_id: int, shots: int, *, key: tuple[int, ...], exclude: tuple
) -> tuple[int, ...]:
    # Keyed by class, and by image unless supports are fixed: neither the other episodes nor their order matter.
    rng = np.random.default_rng((*key, class_id))
    places = index.draw_support(rng, class_id, shots, exclude)
    return tuple(index.annotation_id(*place) for place in places)


def _check_draw(side: str, protocol: str, *, shots: int, seed: int, run: int) -> None:
    check_side(side)
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol must be one of {PROTOCOLS}, got {protocol!r}")
    if shots < 1 or seed < 0 or run < 0:
        raise ValueError(
            f"shots must be at least 1, seed and run at least 0, got {shots}, {seed} and {run}"
        )


def _searchable(
    class_ids: Iterable[int], query_index: InstanceIndex, support_index: InstanceIndex
) -> tuple[int, ...]:
    wanted = set(class_ids)
    unknown = wanted - set(query_index.category_ids)
    if unknown:
        raise ValueError(f"class_ids must exist in the data set, got {sorted(unknown)[:5]}")
    without = wanted - set(support_index.class_ids)
    if without:
        logger.warning(
            "%d of %d classes have no instance to draw a support from and are left out: %s",
            len(without),
            len(wanted),
            sorted(without)[:20],
        )
    return tuple(sorted(wanted - without))


def _subset(items: list[Any], seed: int, limit: int) -> list[Any]:
    """At most ``limit`` items in their order (0 = all); smaller subsets are part of larger ones."""
    if not 0 < limit < len(items):
        return items
    lots = np.random.default_rng(seed).random(len(items))
    return [items[i] for i in sorted(lots.argsort(kind="stable")[:limit])]
