"""Support sets from what a user types, and changing them: functions from support sets to new ones.

A class is known by its name; ids are for result files, and stay what they are when other classes come and go.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..decoding import printable
from ..structures import Support, SupportSet

SPECIFICATION = "IMAGE:x,y,w,h:CLASS, IMAGE:mask=FILE:CLASS or IMAGE::CLASS (the whole image)"

_MASK = "mask="


@dataclass(frozen=True)
class SupportSpecification:
    """An example as it is written on a command line.

    Attributes:
        image (str): file. class_name (str).
        box (tuple or None): XYWH in pixels of the image, after its EXIF tag has turned it.
        mask (str or None): file of an image that is white where the example is.
    """

    image: str
    class_name: str
    box: tuple[float, ...] | None = None
    mask: str | None = None

    @classmethod
    def parse(cls, text: str) -> "SupportSpecification":
        """Read ``SPECIFICATION``; file names may have colons, class names may not.

        Raises:
            ValueError: it is of none of these forms.
        """
        parts = text.rsplit(":", 2)
        if len(parts) != 3 or not parts[0] or not parts[2].strip():
            raise _unreadable(text)
        image, region, name = parts[0], parts[1].strip(), parts[2].strip()
        if not region:
            return cls(image, name)
        if region.startswith(_MASK) and len(region) > len(_MASK):
            return cls(image, name, mask=region.removeprefix(_MASK))
        try:
            box = tuple(float(number) for number in region.split(","))
        except ValueError as error:
            raise _unreadable(text) from error
        if len(box) != 4:
            raise _unreadable(text)
        return cls(image, name, box=box)

    def read(self, *, negative: bool = False) -> Support:
        """Read the example.

        Raises:
            ValueError: an unreadable file, or a box or mask that does not fit; names the file.
        """
        corners = None
        if self.box is not None:
            x, y, width, height = self.box
            corners = [x, y, x + width, y + height]
        return Support.from_file(self.image, corners, self.mask, negative=negative)


def _unreadable(text: str) -> ValueError:
    return ValueError(f"support must be {SPECIFICATION}, got '{printable(text)}'")


def support_set_of(texts: Iterable[str]) -> SupportSet:
    """The examples of some specifications, classes in the order of their first example."""
    examples: dict[str, list[Support]] = {}
    for specification in map(SupportSpecification.parse, texts):
        examples.setdefault(specification.class_name, []).append(specification.read())
    return SupportSet(list(range(1, len(examples) + 1)), list(examples), list(examples.values()))


def merged(sets: Sequence[SupportSet]) -> SupportSet:
    """All examples of all sets; classes of one name become one. Later classes get a new id where theirs is taken."""
    ids: dict[str, int] = {}
    examples: dict[str, list[Support]] = {}
    for support_set in sets:
        for class_id, name, shots in _rows(support_set):
            if name not in ids:
                taken = set(ids.values())
                ids[name] = class_id if class_id not in taken else max(taken) + 1
            examples.setdefault(name, []).extend(shots)
    return SupportSet(list(ids.values()), list(ids), list(examples.values()))


def with_negatives(support_set: SupportSet, texts: Iterable[str]) -> SupportSet:
    """With examples of what must not be found, each of a class that is there."""
    examples = [list(shots) for shots in support_set.examples]
    for specification in map(SupportSpecification.parse, texts):
        k = position_of(support_set, specification.class_name)
        examples[k].append(specification.read(negative=True))
    return SupportSet(list(support_set.class_ids), list(support_set.class_names), examples)


def without(support_set: SupportSet, name: str, shot: int | None = None) -> SupportSet:
    """Without a class, or without one of its examples, counted from 1 as a contact sheet does.

    Raises:
        ValueError: no such class or example, or nothing would be left of the set or of the class.
    """
    k = position_of(support_set, name)
    if shot is None:
        rows = [row for i, row in enumerate(_rows(support_set)) if i != k]
        if not rows:
            raise ValueError(
                f"a support set must keep a class, got {name!r} to remove, its only one"
            )
        return SupportSet(*(list(column) for column in zip(*rows, strict=True)))
    shots = list(support_set.examples[k])
    if not 1 <= shot <= len(shots):
        raise ValueError(f"example of {name!r} must be in 1..{len(shots)}, got {shot}")
    del shots[shot - 1]
    examples = [shots if i == k else row for i, row in enumerate(support_set.examples)]
    return SupportSet(list(support_set.class_ids), list(support_set.class_names), examples)


def renamed(support_set: SupportSet, old: str, new: str) -> SupportSet:
    """With another name for a class; its id stays.

    Raises:
        ValueError: no such class, or another one has the new name already (``merged`` joins classes).
    """
    k = position_of(support_set, old)
    if not new.strip() or ":" in new or (new != old and new in support_set.class_names):
        raise ValueError(f"new name must be a free one without a colon, got {new!r}")
    names = [new if i == k else name for i, name in enumerate(support_set.class_names)]
    return SupportSet(list(support_set.class_ids), names, list(support_set.examples))


def position_of(support_set: SupportSet, name: str) -> int:
    """Where a class stands in the set.

    Raises:
        ValueError: it is not there.
    """
    if name not in support_set.class_names:
        raise ValueError(f"class must be one of {support_set.class_names}, got {name!r}")
    return support_set.class_names.index(name)


def _rows(support_set: SupportSet) -> Iterable[tuple[int, str, list[Support]]]:
    return zip(support_set.class_ids, support_set.class_names, support_set.examples, strict=True)
