"""Episodes of RepMet's benchmark (paper 5.2, spec 3.3): m classes with n examples each, and queries that share them."""

import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from .ground_truth import KEEP_ALL, GroundTruthFilter
from .index import InstanceIndex, same_images
from .loaders import plan_sources
from .plan_files import PlanFile
from .splits import check_side

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BenchmarkEpisode:
    """One m-way n-shot task.

    Attributes:
        id (int): number of the episode in its plan.
        class_ids (tuple[int, ...]): the m classes; each is searched in every query.
        supports (tuple[tuple[int, ...], ...]): annotation ids of the shots of each class, n of them; fewer, even
            none, only in plans that were converted from released files.
        query_image_ids (tuple[int, ...]): the images that are searched.
    """

    id: int
    class_ids: tuple[int, ...]
    supports: tuple[tuple[int, ...], ...]
    query_image_ids: tuple[int, ...]


@dataclass(frozen=True)
class BenchmarkPlan(PlanFile):
    """All episodes of a benchmark and where they come from.

    Attributes:
        dataset, support_dataset, split, side, class_ids: as of ``EvaluationPlan``.
        ways (int), shots (int), queries_per_class (int): of an episode; shots are boxes, not images.
        max_shots (int): plans of one seed that differ in ``shots`` only have the same classes and queries, and the
            shots of the smaller one are among those of the larger.
        seed (int): the draw.
        episodes (tuple[BenchmarkEpisode, ...]).
    """

    KIND: ClassVar[str] = "benchmark"
    EPISODE: ClassVar[type] = BenchmarkEpisode

    ways: int
    shots: int
    max_shots: int
    queries_per_class: int
    seed: int
    class_ids: tuple[int, ...]
    episodes: tuple[BenchmarkEpisode, ...]

    def __post_init__(self) -> None:
        check_side(self.side)
        _check_numbers(self.ways, self.shots, self.max_shots, self.queries_per_class, self.seed)
        self.check_classes()
        for episode in self.episodes:
            shots = [len(ids) for ids in episode.supports]
            if len(episode.class_ids) != self.ways or len(shots) != self.ways:
                raise ValueError(
                    f"episode {episode.id}: classes and supports must be {self.ways} each, got "
                    f"{len(episode.class_ids)} and {len(shots)}"
                )
            if not 0 < max(shots) <= self.shots:
                raise ValueError(
                    f"episode {episode.id}: shots must be at most {self.shots} a class and not all 0, got {shots}"
                )
            queries = episode.query_image_ids
            if not queries or len(set(queries)) != len(queries):
                raise ValueError(
                    f"episode {episode.id}: query images must be at least 1, each once, got {list(queries)}"
                )

    @property
    def file_name(self) -> str:
        """A name that tells the plans of one data set apart."""
        what = f"{self.ways}way-{self.shots}of{self.max_shots}shot-{self.queries_per_class}queries"
        return f"{self._source()}-{what}-{len(self.episodes)}episodes-seed{self.seed}.json"

    def _check_queries(self, episode: BenchmarkEpisode, query_index: InstanceIndex) -> None:
        for image_id in episode.query_image_ids:
            query_index.image_index(image_id)


def make_benchmark_plan(
    query_index: InstanceIndex,
    support_index: InstanceIndex,
    *,
    dataset: str,
    support_dataset: str,
    split: str,
    side: str,
    class_ids: Iterable[int],
    ways: int,
    shots: int,
    max_shots: int,
    queries_per_class: int,
    num_episodes: int,
    seed: int,
) -> BenchmarkPlan:
    """Draw episodes; each depends on the seed and its number alone.

    Classes are drawn without replacement. Support images of a class are drawn until it has ``max_shots`` boxes, and
    every box of an episode class in a drawn image counts for *its* class; the first ``shots`` boxes are used. Queries
    of a class come from the images that are left. Unlike the original we keep support images out of the queries of
    all classes, not only of their own.

    Args:
        query_index, support_index: one object, or indices of two data sets with the same categories.
        class_ids: the classes of ``side``; those with too few boxes or images are left out with a warning.
        ways, shots, max_shots, queries_per_class, seed: see ``BenchmarkPlan``. num_episodes: how many.

    Raises:
        ValueError: an argument is out of its range, or fewer than ``ways`` classes remain.
    """
    _check_numbers(ways, shots, max_shots, queries_per_class, seed)
    as_queries = same_images(support_index, query_index)
    wanted = sorted(set(class_ids))
    usable = [c for c in wanted if _is_usable(query_index, support_index, c, max_shots, as_queries)]
    if len(usable) < len(wanted):
        logger.warning(
            "%d of %d classes have too few boxes for %d shots and a query and are left out",
            *(len(wanted) - len(usable), len(wanted), max_shots),
        )
    if len(usable) < ways or num_episodes < 1:
        raise ValueError(
            f"a plan must have at least 1 episode and {ways} classes with {max_shots} boxes and a query, got "
            f"{num_episodes} episodes and {len(usable)} classes of side {side!r} in {dataset!r}"
        )
    episodes = []
    for number in range(num_episodes):
        rng = np.random.default_rng((seed, number))
        classes = _shuffled(rng, usable)[:ways]
        supports, images = _draw_supports(rng, support_index, classes, max_shots)
        taken = {query for image in images for query in as_queries.get(image, ())}
        queries = _draw_queries(rng, query_index, classes, queries_per_class, taken)
        shown = tuple(ids[:shots] for ids in supports)
        episodes.append(BenchmarkEpisode(number, tuple(classes), shown, queries))
    num_short = sum(len(e.query_image_ids) < ways * queries_per_class for e in episodes)
    if num_short:
        logger.warning(
            "%d of %d episodes have fewer than %d queries: there are no more images of their classes",
            *(num_short, num_episodes, ways * queries_per_class),
        )
    return BenchmarkPlan(
        *(dataset, support_dataset, split, side, ways, shots, max_shots, queries_per_class, seed),
        *(tuple(usable), tuple(episodes)),
    )


def build_benchmark_plans(
    *,
    dataset: str,
    support_dataset: str,
    split: str,
    sides: Iterable[str],
    shots: Sequence[int],
    ground_truth: GroundTruthFilter = KEEP_ALL,
    make: Callable[..., BenchmarkPlan] = make_benchmark_plan,
    **options: Any,
) -> list[BenchmarkPlan]:
    """Plans of registered data sets, one for each side with classes and number of shots; indexed once.

    Args:
        shots: the largest of them is the ``max_shots`` of all. ground_truth: what counts. make: makes a plan out of
            indices and numbers. Others: as of ``make``.
    """
    sources = plan_sources(
        dataset=dataset,
        support_dataset=support_dataset,
        split=split,
        sides=sides,
        ground_truth=ground_truth,
    )
    return [
        make(**source, shots=number, max_shots=max(shots), **options)
        for source in sources
        for number in shots
    ]


def _check_numbers(
    ways: int, shots: int, max_shots: int, queries_per_class: int, seed: int
) -> None:
    if min(ways, shots, queries_per_class) < 1 or max_shots < shots or seed < 0:
        raise ValueError(
            "ways, shots and queries_per_class must be at least 1, max_shots at least shots and seed at least 0, "
            f"got {ways}, {shots}, {queries_per_class}, {max_shots} and {seed}"
        )


def _is_usable(
    query_index: InstanceIndex,
    support_index: InstanceIndex,
    class_id: int,
    shots: int,
    as_queries: Mapping[int, Collection[int]],
) -> bool:
    """Whether a class has the boxes even if the images with the fewest are drawn, and an image left to search."""
    images = support_index.images_with(class_id)
    queries = set(query_index.images_with(class_id))
    shared = sum(len(queries.intersection(as_queries.get(image, ()))) for image in images)
    counts = sorted(len(support_index.instances(image, class_id)) for image in images)
    num_boxes = np.cumsum([0, *counts])
    needed = int(np.searchsorted(num_boxes, shots))
    return num_boxes[-1] >= shots and len(queries) > min(shared, needed)


def _draw_supports(
    rng: np.random.Generator, index: InstanceIndex, classes: Sequence[int], shots: int
) -> tuple[list[tuple[int, ...]], set[int]]:
    """Annotation ids of each class, and the images they come from."""
    found: dict[int, list[int]] = {class_id: [] for class_id in classes}
    drawn: set[int] = set()
    for class_id in classes:
        for image in _shuffled(rng, index.images_with(class_id)):
            if len(found[class_id]) >= shots:
                break
            if image in drawn:
                continue
            drawn.add(image)
            for other in classes:
                for position in index.instances(image, other):
                    found[other].append(index.annotation_id(image, position))
    return [tuple(ids[:shots]) for ids in found.values()], drawn


def _draw_queries(
    rng: np.random.Generator,
    index: InstanceIndex,
    classes: Sequence[int],
    number: int,
    taken: set[int],
) -> tuple[int, ...]:
    """Image ids, ``number`` a class where there are as many; an image is taken for one class only."""
    taken, queries = set(taken), []
    for class_id in classes:
        free = [image for image in index.images_with(class_id) if image not in taken]
        chosen = _shuffled(rng, free)[:number]
        taken.update(chosen)
        queries += [index.dicts[image]["image_id"] for image in chosen]
    return tuple(queries)


def _shuffled(rng: np.random.Generator, items: Sequence[int]) -> list[int]:
    """A permutation; only ``integers`` is used, whose stream is the same in every version of numpy."""
    items = list(items)
    for last in range(len(items) - 1, 0, -1):
        other = int(rng.integers(last + 1))
        items[last], items[other] = items[other], items[last]
    return items
