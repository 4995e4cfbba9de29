"""Plans as files: what evaluation plans and benchmark plans share.

The hash is that of the content, not of the file's layout: the same seed gives the same hash on every machine. Image,
dataset category and annotation ids are those of the json files.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from ..files import canonical_sha256, write_json
from .index import InstanceIndex
from .typed_json import load_document

T = TypeVar("T", bound="PlanFile")
E = TypeVar("E")

_IDS, _ID_LISTS = tuple[int, ...], tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class PlanFile:
    """Base of the plans, which add ``class_ids``, ``episodes`` and what they are drawn with.

    Fields are text, integers, tuples of ids, and ``episodes``, a tuple of ``EPISODE``, a dataclass of integers,
    tuples of ids and tuples of such tuples with an ``id``, ``class_ids`` and ``supports``.

    Attributes:
        dataset (str), support_dataset (str): registered names.
        split (str): specification (see ``splits``). side (str): "base", "novel" or "all".
    """

    KIND: ClassVar[str]
    EPISODE: ClassVar[type]
    VERSION: ClassVar[int] = 1

    dataset: str
    support_dataset: str
    split: str
    side: str

    @cached_property
    def sha256(self) -> str:
        """Hash of the content in canonical form."""
        return canonical_sha256(self._content())

    def save(self, path: str | Path) -> None:
        """Write the plan atomically.

        Raises:
            OSError: the file cannot be written; an older plan of that name is left as it was.
        """
        write_json(path, self._content())

    @classmethod
    def load(cls: type[T], path: str | Path) -> T:
        """Read a plan.

        Raises:
            ValueError: the file is no such plan; the message names the file and what is wrong in it.
        """
        article = "an" if cls.KIND[0] in "aeiou" else "a"
        return load_document(
            path,
            cls._from_content,
            kind=f"{article} {cls.KIND} plan",
            format=cls._format(),
            version=cls.VERSION,
        )

    def check_classes(self) -> None:
        """Raise a ``ValueError`` unless class and episode ids are unique and episodes have classes of the plan."""
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
            episode_ids.add(episode.id)

    def check(self, query_index: InstanceIndex, support_index: InstanceIndex, dataset: str) -> None:
        """Raise a ``ValueError`` that names the culprit unless the plan fits these data.

        Args:
            query_index: of the data set that is searched. support_index: of the one that has the supports.
            dataset: name of the data set that is searched.
        """
        if self.dataset != dataset:
            raise ValueError(
                f"plan of another data set: it must be of {dataset!r}, got one of {self.dataset!r}"
            )
        for episode in self.episodes:
            try:
                self._check_queries(episode, query_index)
                for class_id, shots in zip(episode.class_ids, episode.supports):
                    for annotation_id in shots:
                        actual = support_index.class_of(annotation_id)
                        if actual != class_id:
                            raise ValueError(
                                f"support {annotation_id} must be of class {class_id}, got class {actual}"
                            )
            except ValueError as error:
                raise ValueError(
                    f"episode {episode.id} of the plan must fit the data set {dataset!r}: {error}"
                ) from error

    def _check_queries(self, episode: Any, query_index: InstanceIndex) -> None:
        raise NotImplementedError

    def _source(self) -> str:
        """The part of a file name that tells data sets, splits and sides apart."""
        source = "" if self.support_dataset == self.dataset else f"-from-{self.support_dataset}"
        split = re.sub(r"[^A-Za-z0-9_.]+", "_", self.split)
        if len(split) > 60:
            split = f"{split[:50]}_{canonical_sha256(self.split)[:8]}"
        return f"{self.dataset}{source}-{split}-{self.side}"

    @classmethod
    def _format(cls) -> str:
        return f"fewshot_d2/{cls.KIND}_plan"

    def _content(self) -> dict[str, Any]:
        body = {field.name: getattr(self, field.name) for field in fields(self)}
        body["episodes"] = [vars(episode) for episode in self.episodes]
        return {"format": self._format(), "version": self.VERSION, **body}

    @classmethod
    def _from_content(cls: type[T], content: Mapping[str, Any]) -> T:
        body = {key: value for key, value in content.items() if key not in ("format", "version")}
        _check_keys(cls, body)
        if not isinstance(body["episodes"], list):
            raise ValueError(f"episodes must be a list, got {type(body['episodes']).__name__}")
        episodes = [
            _episode(cls.EPISODE, row, f"episodes[{i}]") for i, row in enumerate(body["episodes"])
        ]
        kinds = {field.name: field.type for field in fields(cls) if field.name != "episodes"}
        values = {name: _parsed(kind, body[name], name) for name, kind in kinds.items()}
        return cls(**values, episodes=tuple(episodes))


def _episode(kind: type[E], row: Any, where: str) -> E:
    if not isinstance(row, dict):
        raise ValueError(f"{where} must be an object, got {row!r}")
    try:
        _check_keys(kind, row)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return kind(
        **{f.name: _parsed(f.type, row[f.name], f"{where}: {f.name}") for f in fields(kind)}
    )


def _check_keys(kind: type, content: Mapping[str, Any]) -> None:
    expected = {field.name for field in fields(kind)}
    if content.keys() != expected:
        raise ValueError(
            f"keys of {kind.__name__} must be complete, got missing "
            f"{sorted(expected - content.keys())}, unknown {sorted(content.keys() - expected)}"
        )


def _parsed(kind: Any, value: Any, what: str) -> Any:
    """A value of a json as the type of its field."""
    if kind is str:
        if not isinstance(value, str):
            raise ValueError(f"{what} must be text, got {value!r}")
        return value
    if kind is int:
        return _integers([value], what)[0]
    if kind == _IDS:
        return _integers(value, what)
    if kind != _ID_LISTS:
        raise TypeError(f"{what} must be text, an integer, ids or lists of ids, got {kind}")
    if not isinstance(value, list):
        raise ValueError(f"{what} must be one list a class, got {value!r}")
    return tuple(_integers(ids, what) for ids in value)


def _integers(values: Any, what: str) -> tuple[int, ...]:
    if not isinstance(values, list) or not all(type(value) is int for value in values):
        raise ValueError(f"{what} must be integers, got {values!r}")
    return tuple(values)
