"""Evaluation plans of tuples (SILCO paper 4.3): the same ones can be evaluated with 1, 3, 5, ... of their supports."""

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from .benchmark_plans import BenchmarkEpisode, BenchmarkPlan, build_benchmark_plans
from .ground_truth import GroundTruthFilter
from .index import InstanceIndex
from .tuples import TupleSampler


@dataclass(frozen=True)
class TuplePlan(BenchmarkPlan):
    """A benchmark of tuples: one class, one query and ``shots`` images an episode.

    Supports are named by the annotation ids of their images' largest instances.

    Attributes:
        ground_truth (str): what counts as ground truth, the text of a ``GroundTruthFilter``.
    """

    KIND: ClassVar[str] = "tuple"

    ground_truth: str

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ways != 1 or self.queries_per_class != 1:
            raise ValueError(
                f"tuples must have 1 class and 1 query, got {self.ways} and {self.queries_per_class}"
            )
        for episode in self.episodes:
            numbers = len(episode.supports[0]), len(episode.query_image_ids)
            if numbers != (self.shots, 1):
                raise ValueError(
                    f"episode {episode.id}: tuples must have {self.shots} supports and 1 query, got {numbers}"
                )

    @property
    def file_name(self) -> str:
        """A name that tells the plans of one data set apart."""
        what = f"tuples-{self.shots}of{self.max_shots}shot-{len(self.episodes)}"
        return f"{self._source()}-{what}-seed{self.seed}.json"

    def check(self, query_index: InstanceIndex, support_index: InstanceIndex, dataset: str) -> None:
        """As of any plan; the images of a tuple must also be different ones, and the query must have its class."""
        super().check(query_index, support_index, dataset)
        for episode in self.episodes:
            ((class_id,), (query_id,)) = episode.class_ids, episode.query_image_ids
            query = query_index.image_index(query_id)
            images = [support_index.locate(i)[0] for i in episode.supports[0]]
            files = [support_index.files[i] for i in images]
            query_file = query_index.files[query]
            if len(set(files)) < len(files) or query_file in files:
                raise ValueError(
                    f"episode {episode.id} of the plan must have different images as supports and query, got query "
                    f"{query_file} and supports {files}"
                )
            if class_id not in query_index.classes_in(query):
                raise ValueError(
                    f"episode {episode.id} of the plan must have a query with class {class_id}, got {query_file}"
                )


def make_tuple_plan(
    query_index: InstanceIndex,
    support_index: InstanceIndex,
    *,
    dataset: str,
    support_dataset: str,
    split: str,
    side: str,
    class_ids: Iterable[int],
    shots: int,
    max_shots: int,
    num_episodes: int,
    seed: int,
    ground_truth: str = "all",
) -> TuplePlan:
    """Draw tuples; each depends on the seed and its number alone.

    Args:
        query_index, support_index, dataset, support_dataset, split, side, class_ids: as of ``make_benchmark_plan``.
        shots: supports that are used, of ``max_shots``: plans that differ in ``shots`` only have the same classes and
            queries, and the supports of the smaller are the first of the larger one's.
        num_episodes: how many tuples. seed: the draw. ground_truth: of the indices, for the record.

    Raises:
        ValueError: an argument is out of its range, or no class has ``max_shots`` + 1 images.
    """
    if max_shots < shots or num_episodes < 1 or seed < 0:
        raise ValueError(
            "a plan of tuples must have at least 1 tuple, max_shots of at least shots and a seed of at least 0, got "
            f"{num_episodes}, {max_shots} for {shots} shots and {seed}"
        )
    sampler = TupleSampler(query_index, support_index, class_ids, shots=max_shots)
    episodes = []
    for number in range(num_episodes):
        rng = np.random.default_rng((seed, number))
        class_id = sampler.draw_class(rng)
        query, places = sampler.draw(rng, class_id)
        supports = tuple(support_index.annotation_id(*place) for place in places[:shots])
        query_ids = (query_index.dicts[query]["image_id"],)
        episodes.append(BenchmarkEpisode(number, (class_id,), (supports,), query_ids))
    return TuplePlan(
        *(dataset, support_dataset, split, side, 1, shots, max_shots, 1, seed),
        *(sampler.class_ids, tuple(episodes), ground_truth),
    )


def build_tuple_plans(*, ground_truth: GroundTruthFilter, **options: Any) -> list[TuplePlan]:
    """``build_benchmark_plans`` of tuples; ``options`` are its, and those of ``make_tuple_plan``."""
    make = functools.partial(make_tuple_plan, ground_truth=str(ground_truth))
    return build_benchmark_plans(ground_truth=ground_truth, make=make, **options)
