"""Base and novel classes, and the boundary that keeps novel labels out of training.

Class ids here are *dataset category ids* (those of the json, with holes); only
``restrict_to_classes`` takes contiguous ids, because it works on detectron2's dataset dicts.
"""

import difflib
import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .coco_json import DatasetDict, dataset_categories

SIDES = ("base", "novel", "all")

_FORMS = (
    '"all", "every_4th:1" to "every_4th:4", "part:1/2" or another part, "novel:dog,cat,17" or '
    '"file:split.json"'
)
# The keys of a dataset dict that training needs. Others (say, panoptic files) could carry novel
# labels.
_IMAGE_KEYS = ("file_name", "height", "width", "image_id")


@dataclass(frozen=True)
class ClassSplit:
    """Which classes may be trained on and which are kept for testing.

    Attributes:
        base (tuple[int, ...]), novel (tuple[int, ...]): dataset category ids, ascending, disjoint.
    """

    base: tuple[int, ...]
    novel: tuple[int, ...]

    def __post_init__(self) -> None:
        both = sorted(set(self.base) & set(self.novel))
        if both:
            raise ValueError(f"base and novel classes must be disjoint, got {both} in both")


def resolve_split(spec: str, category_ids: Sequence[int], names: Sequence[str]) -> ClassSplit:
    """Turn a split specification into class ids.

    Args:
        spec: "all" (every class is base); "every_4th:i", i = 1..4 (of the classes sorted by id,
            novel are the i-th, the (i+4)-th, ...); "part:i/n", i = 1..n (sorted by id and cut into n parts, as
            equal as can be, novel is the i-th); "novel:dog,cat,17" (names or ids, names win);
            "file:path.json", a file ``{"novel": [names or ids], "base": [optional]}``; without
            "base", all other classes are base.
        category_ids, names: all classes of the data set.

    Raises:
        ValueError: the specification has no such form, or a class in it does not exist.
    """
    classes = _Classes(category_ids, names)
    kind, _, argument = spec.partition(":")
    if spec == "all":
        return classes.split(novel=())
    if kind == "every_4th" and argument in ("1", "2", "3", "4"):
        return classes.split(novel=sorted(category_ids)[int(argument) - 1 :: 4])
    if kind == "part":
        return classes.split(novel=_part(sorted(category_ids), argument, spec))
    if kind == "novel" and argument:
        return classes.split(novel=classes.find(argument.split(","), f"split {spec!r}"))
    if kind == "file" and argument:
        return _read_split(Path(argument), classes)
    raise ValueError(f"split must be {_FORMS}, got {spec!r}")


def _part(ascending: Sequence[int], argument: str, spec: str) -> Sequence[int]:
    number, _, parts = argument.partition("/")
    if not (number.isdecimal() and parts.isdecimal() and 1 <= int(number) <= int(parts)):
        raise ValueError(f"split must be {_FORMS}, got {spec!r}")
    total, number, parts = len(ascending), int(number), int(parts)
    return ascending[total * (number - 1) // parts : total * number // parts]


def split_of(name: str, spec: str) -> ClassSplit:
    """Resolve a specification for a registered data set."""
    categories = dataset_categories(name)
    return resolve_split(spec, list(categories), list(categories.values()))


def check_side(side: str) -> None:
    """Raise a ``ValueError`` unless ``side`` is one of ``SIDES``."""
    if side not in SIDES:
        raise ValueError(f"side must be one of {SIDES}, got {side!r}")


def classes_of_side(name: str, spec: str, side: str) -> tuple[int, ...]:
    """The classes of one side of a registered data set; side "all" is every class it has."""
    check_side(side)
    if side == "all":
        return tuple(sorted(dataset_categories(name)))
    return getattr(split_of(name, spec), side)


def check_same_classes(train: str, tests: Iterable[str]) -> None:
    """A split such as "every_4th:1" means other classes where the categories are others.

    Raises:
        ValueError: a data set of ``tests`` has other categories than ``train``; names both.
    """
    for test in tests:
        if test != train and dataset_categories(test) != dataset_categories(train):
            raise ValueError(
                f"a split needs the same categories for training and testing, got {len(dataset_categories(train))} "
                f"in {train} and {len(dataset_categories(test))} others in {test}"
            )


def restrict_to_classes(
    dicts: Iterable[DatasetDict], contiguous_ids: Collection[int]
) -> list[DatasetDict]:
    """Copies of the dataset dicts in which only annotations of the given classes exist.

    Annotations of all other classes are removed, not hidden, so that nothing downstream can see
    them. Images that have none left stay, without annotations. The originals are not changed.
    """
    keep = frozenset(contiguous_ids)
    return [
        {
            **{key: record[key] for key in _IMAGE_KEYS if key in record},
            "annotations": [
                dict(annotation)
                for annotation in record.get("annotations", ())
                if annotation["category_id"] in keep
            ],
        }
        for record in dicts
    ]


def images_without(
    dicts: Iterable[DatasetDict], contiguous_ids: Collection[int]
) -> list[DatasetDict]:
    """The dataset dicts without any annotation of the given classes, crowds and small objects included.

    Annotations without area are gone since the file was read.
    """
    if not contiguous_ids:
        return list(dicts)
    return [
        record
        for record in dicts
        if not any(a["category_id"] in contiguous_ids for a in record.get("annotations", ()))
    ]


class _Classes:
    """The classes of a data set, to be found by name or id."""

    def __init__(self, category_ids: Sequence[int], names: Sequence[str]):
        self.ids = sorted(category_ids)
        self.by_name: dict[str, list[int]] = {}
        for category_id, name in zip(category_ids, names):
            self.by_name.setdefault(name, []).append(category_id)

    def split(self, novel: Iterable[int], base: Iterable[int] | None = None) -> ClassSplit:
        novel = set(novel)
        base = set(self.ids) - novel if base is None else set(base)
        return ClassSplit(base=tuple(sorted(base)), novel=tuple(sorted(novel)))

    def find(self, wanted: Iterable[str | int], where: str) -> list[int]:
        return [self._find_one(item, where) for item in wanted]

    def _find_one(self, wanted: str | int, where: str) -> int:
        text = str(wanted).strip()
        if isinstance(wanted, str) and text in self.by_name:
            found = self.by_name[text]
            if len(found) > 1:
                raise ValueError(
                    f"{where}: class {text!r} must be one, got ids {found}; give the id"
                )
            return found[0]
        if text.isdecimal() and int(text) in self.ids:
            return int(text)
        close = difflib.get_close_matches(text, self.by_name, n=3, cutoff=0.5)
        hint = f"close: {', '.join(close)}" if close else f"there are {len(self.ids)} others"
        raise ValueError(f"{where}: classes must exist in the data set, got {text!r} ({hint})")


def _read_split(path: Path, classes: _Classes) -> ClassSplit:
    try:
        content = json.loads(path.read_bytes())
    # Python's JSON reader gives up on thousands of brackets with an error of its own.
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} must be a JSON file with a list 'novel', got: {error}") from error
    if (
        not isinstance(content, dict)
        or not set(content) <= {"novel", "base"}
        or "novel" not in content
    ):
        raise ValueError(f"{path} must have a list 'novel' and may have a list 'base', got others")
    sides = {}
    for side, wanted in content.items():
        if not isinstance(wanted, list) or not all(type(item) in (str, int) for item in wanted):
            raise ValueError(f"{path}: {side!r} must be a list of names or ids, got {wanted!r}")
        sides[side] = classes.find(wanted, str(path))
    try:
        return classes.split(**sides)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
