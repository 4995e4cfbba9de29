"""Evaluation plans: which query, classes and supports, fixed in a file and known by its SHA-256.

The hash is that of the content, not of the file's layout: the same seed gives the same hash on
every machine. Image, dataset category and annotation ids are those of the json files.
"""

import json
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..files import canonical_sha256, write_json
from .index import InstanceIndex
from .splits import SIDES

logger = logging.getLogger(__name__)

PROTOCOLS = ("present", "open")

_FORMAT = "fewshot_d2/evaluation_plan"
_VERSION = 1
_TEXTS = ("dataset", "support_dataset", "split", "side", "protocol")
_NUMBERS = ("shots", "seed", "run")


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
class EvaluationPlan:
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

    dataset: str
    support_dataset: str
    split: str
    side: str
    protocol: str
    shots: int
    seed: int
    run: int
    class_ids: tuple[int, ...]
    episodes: tuple[PlannedEpisode, ...]

    def __post_init__(self) -> None:
        _check_draw(self.side, self.protocol, shots=self.shots, seed=self.seed, run=self.run)
        known, episode_ids = set(self.class_ids), set()
        if len(known) != len(self.class_ids):
            raise ValueError(f"class_ids must be unique, got {self.class_ids}")
        for episode in self.episodes:
            classes = set(episode.class_ids)
            if episode.id in episode_ids:
                raise ValueError(f"episode ids must be unique, got {episode.id} twice")
            if not classes <= known or len(classes) != len(episode.class_ids):
                raise ValueError(
                    f"episode {episode.id}: class_ids must be unique and among the plan's, "
                    f"got {list(episode.class_ids)}"
                )
            shots = [len(ids) for ids in episode.supports]
            if shots != [self.shots] * len(episode.class_ids):
                raise ValueError(
                    f"episode {episode.id}: supports must be {self.shots} for each of its "
                    f"{len(episode.class_ids)} classes, got {shots}"
                )
            episode_ids.add(episode.id)

    @property
    def num_pairs(self) -> int:
        """How many (image, class) pairs are searched."""
        return sum(len(episode.class_ids) for episode in self.episodes)

    @cached_property
    def sha256(self) -> str:
        """Hash of the content in canonical form."""
        return canonical_sha256(self._content())

    @property
    def file_name(self) -> str:
        """A name that tells the plans of one data set apart."""
        source = "" if self.support_dataset == self.dataset else f"-from-{self.support_dataset}"
        split = re.sub(r"[^A-Za-z0-9_.]+", "_", self.split)
        if len(split) > 60:
            split = f"{split[:50]}_{canonical_sha256(self.split)[:8]}"
        what = f"{split}-{self.side}-{self.protocol}-{self.shots}shot-{len(self.episodes)}images"
        return f"{self.dataset}{source}-{what}-seed{self.seed}-run{self.run}.json"

    def save(self, path: str | Path) -> None:
        """Write the plan atomically.

        Raises:
            OSError: the file cannot be written; an older plan of that name is left as it was.
        """
        write_json(path, self._content())

    @classmethod
    def load(cls, path: str | Path) -> "EvaluationPlan":
        """Read a plan.

        Raises:
            ValueError: the file is not a plan; the message names the file and what is wrong in it.
        """
        try:
            return cls._from_content(json.loads(Path(path).read_bytes()))
        except ValueError as error:
            raise ValueError(f"{path} must be an evaluation plan, got: {error}") from error

    def check(self, query_index: InstanceIndex, support_index: InstanceIndex, dataset: str) -> None:
        """Raise a ``ValueError`` that names the culprit unless the plan fits these data.

        Args:
            query_index: of the data set that is searched. support_index: of the one that has the
                supports.
            dataset: name of the data set that is searched.
        """
        if self.dataset != dataset:
            raise ValueError(
                f"plan of another data set: it must be of {dataset!r}, got one of {self.dataset!r}"
            )
        for episode in self.episodes:
            try:
                self._check_episode(episode, query_index, support_index)
            except ValueError as error:
                raise ValueError(
                    f"episode {episode.id} of the plan must fit the data set {dataset!r}: {error}"
                ) from error

    def _check_episode(
        self, episode: PlannedEpisode, query_index: InstanceIndex, support_index: InstanceIndex
    ) -> None:
        in_image = query_index.classes_in(query_index.image_index(episode.image_id))
        absent = set(episode.class_ids) - set(in_image)
        if self.protocol == "present" and absent:
            raise ValueError(
                f"classes must be present in image {episode.image_id}, got also {sorted(absent)}"
            )
        for class_id, shots in zip(episode.class_ids, episode.supports):
            for annotation_id in shots:
                actual = support_index.class_of(annotation_id)
                if actual != class_id:
                    raise ValueError(
                        f"support {annotation_id} must be of class {class_id}, got class {actual}"
                    )

    def _content(self) -> dict[str, Any]:
        header = {key: getattr(self, key) for key in (*_TEXTS, *_NUMBERS, "class_ids")}
        episodes = [vars(episode) for episode in self.episodes]
        return {"format": _FORMAT, "version": _VERSION, **header, "episodes": episodes}

    @classmethod
    def _from_content(cls, content: Any) -> "EvaluationPlan":
        header = content if isinstance(content, dict) else {}
        if header.get("format") != _FORMAT or header.get("version") != _VERSION:
            raise ValueError(
                f"format must be {_FORMAT} version {_VERSION}, got {header.get('format')!r} "
                f"version {header.get('version')!r}"
            )
        body = {key: value for key, value in header.items() if key not in ("format", "version")}
        _check_keys(cls, body)
        for key in _TEXTS:
            if not isinstance(body[key], str):
                raise ValueError(f"{key} must be text, got {body[key]!r}")
        for key in _NUMBERS:
            _integers([body[key]], key)
        if not isinstance(body["episodes"], list):
            raise ValueError(f"episodes must be a list, got {type(body['episodes']).__name__}")
        body["class_ids"] = _integers(body["class_ids"], "class_ids")
        body["episodes"] = tuple(_episode(row, i) for i, row in enumerate(body["episodes"]))
        return cls(**body)


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
) -> EvaluationPlan:
    """Draw the supports of one evaluation run.

    Classes without any instance to draw a support from are left out with a warning.

    Args:
        query_index, support_index: one object, or indices of two data sets with the same categories.
        dataset, support_dataset: their names; if equal, supports come from other images than the
            query whenever another image has the class.
        split, side: where ``class_ids`` come from, for the record.
        class_ids: the classes to search.
        protocol: "present" (only images that have one of the classes, and only those) or "open".
        shots: supports a class. seed, run: the draw; runs differ in their supports only.
        max_images: at most this many images, the same ones for every run; 0 = all.

    Raises:
        ValueError: an argument is out of its range, or no episode remains.
    """
    _check_draw(side, protocol, shots=shots, seed=seed, run=run)
    classes = _searchable(class_ids, query_index, support_index)
    wanted = _queries(query_index, classes, protocol)
    if not wanted:
        raise ValueError(
            f"plan must have at least one episode, got none: {len(classes)} classes of side "
            f"{side!r} in {len(query_index.dicts)} images of {dataset!r}"
        )
    episodes, num_own = [], 0
    for image_index, chosen in _subset(wanted, seed, max_images):
        image_id = query_index.dicts[image_index]["image_id"]
        own = (support_index.image_index(image_id),) if support_dataset == dataset else ()
        num_own += sum(support_index.images_with(class_id) == own for class_id in chosen)
        supports = tuple(
            _draw(support_index, class_id, shots, key=(seed, run, image_id), exclude=own)
            for class_id in chosen
        )
        episodes.append(PlannedEpisode(len(episodes), image_id, chosen, supports))
    if num_own:
        logger.warning("%d pairs have supports out of the query: no other image has them", num_own)
    return EvaluationPlan(
        dataset, support_dataset, split, side, protocol, shots, seed, run, classes, tuple(episodes)
    )


def _queries(
    index: InstanceIndex, classes: tuple[int, ...], protocol: str
) -> list[tuple[int, tuple[int, ...]]]:
    """(image index, classes to search in it) of the images that are worth an episode."""
    queries = []
    for image_index in range(len(index.dicts)):
        in_image = set(index.classes_in(image_index))
        chosen = classes if protocol == "open" else tuple(c for c in classes if c in in_image)
        if chosen:
            queries.append((image_index, chosen))
    return queries


def _draw(
    index: InstanceIndex, class_id: int, shots: int, *, key: tuple[int, ...], exclude: tuple
) -> tuple[int, ...]:
    # Keyed by image and class, so that neither the other episodes nor their order matter.
    rng = np.random.default_rng((*key, class_id))
    places = index.draw_support(rng, class_id, shots, exclude)
    return tuple(index.annotation_id(*place) for place in places)


def _check_draw(side: str, protocol: str, *, shots: int, seed: int, run: int) -> None:
    if side not in SIDES or protocol not in PROTOCOLS:
        raise ValueError(
            f"side must be one of {SIDES} and protocol one of {PROTOCOLS}, "
            f"got {side!r} and {protocol!r}"
        )
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


def _check_keys(kind: type, content: Mapping[str, Any]) -> None:
    expected = {field.name for field in fields(kind)}
    if content.keys() != expected:
        raise ValueError(
            f"keys of {kind.__name__} must be complete, got missing "
            f"{sorted(expected - content.keys())}, unknown {sorted(content.keys() - expected)}"
        )


def _integers(values: Any, what: str) -> tuple[int, ...]:
    if not isinstance(values, list) or not all(type(value) is int for value in values):
        raise ValueError(f"{what} must be integers, got {values!r}")
    return tuple(values)


def _episode(row: Any, position: int) -> PlannedEpisode:
    where = f"episodes[{position}]"
    if not isinstance(row, dict):
        raise ValueError(f"{where} must be an object, got {row!r}")
    try:
        _check_keys(PlannedEpisode, row)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    _integers([row["id"], row["image_id"]], f"{where}: id and image_id")
    if not isinstance(row["supports"], list):
        raise ValueError(f"{where}: supports must be one list a class, got {row['supports']!r}")
    return PlannedEpisode(
        id=row["id"],
        image_id=row["image_id"],
        class_ids=_integers(row["class_ids"], f"{where}: class_ids"),
        supports=tuple(_integers(ids, f"{where}: supports") for ids in row["supports"]),
    )
