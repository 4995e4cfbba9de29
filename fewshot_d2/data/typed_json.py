"""Reading JSON that any program may have written: each helper gives a value of its type or raises a ``ValueError``.

``what`` and ``where`` say in the message which value of the file is meant.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
XYXY = tuple[float, float, float, float]


def load_document(
    path: str | Path,
    parse: Callable[[Mapping[str, Any]], T],
    *,
    kind: str,
    format: str,
    version: int,
) -> T:
    """Read a file and parse its content.

    Args:
        parse: called with the object at the top of the file; may raise a ``ValueError``.
        kind: "a rank-list file" or the like, for the message.
        format, version: what the keys of these names must hold.

    Raises:
        ValueError: the file is none of this kind; the message names the file and what is wrong in it.
    """
    try:
        content = json.loads(Path(path).read_bytes())
        header = content if isinstance(content, dict) else {}
        if header.get("format") != format or header.get("version") != version:
            raise ValueError(
                f"format must be {format} version {version}, got {header.get('format')!r} version "
                f"{header.get('version')!r}"
            )
        return parse(header)
    # Python's JSON reader gives up on thousands of brackets with an error of its own.
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} must be {kind}, got: {error}") from error


def record(kind: type, value: Any, where: str) -> Mapping[str, Any]:
    """An object that has the fields of the dataclass ``kind`` and no others."""
    expected = {field.name for field in fields(kind)}
    if not isinstance(value, dict) or value.keys() != expected:
        raise ValueError(f"{where} must be an object of {sorted(expected)}, got {str(value)[:80]}")
    return value


def box(value: Any, where: str) -> XYXY:
    """Four numbers; whether they are a box is for ``has_area`` to say."""
    numbers = [number(v, f"{where}: box") for v in sequence(value, f"{where}: box")]
    if len(numbers) != 4:
        raise ValueError(f"{where}: box must be four numbers XYXY, got {numbers}")
    return tuple(numbers)


def number(value: Any, what: str) -> float:
    """An integer or a float, as a float."""
    if type(value) not in (int, float):
        raise ValueError(f"{what} must be a number, got {value!r}")
    try:
        return float(value)
    except OverflowError as error:
        raise ValueError(f"{what} must fit a float, got {str(value)[:30]}...") from error


def typed(kind: type[T], value: Any, what: str) -> T:
    """A value of exactly this type: ``True`` is no integer."""
    if type(value) is not kind:
        raise ValueError(f"{what} must be of type {kind.__name__}, got {value!r}")
    return value


def sequence(value: Any, what: str) -> Sequence[Any]:
    """A list of anything."""
    if not isinstance(value, list):
        raise ValueError(f"{what} must be a list, got {str(value)[:80]}")
    return value


def has_area(xyxy: XYXY) -> bool:
    """Whether numbers, NaN and infinity among them, are a box."""
    return all(map(math.isfinite, xyxy)) and xyxy[0] < xyxy[2] and xyxy[1] < xyxy[3]


def is_falling(scores: Sequence[float]) -> bool:
    """Whether scores are finite and none is above the one before it."""
    return all(map(math.isfinite, scores)) and all(a >= b for a, b in zip(scores, scores[1:]))
