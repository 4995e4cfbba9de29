"""Work done ahead in threads, in order and bounded: reading before the model, writing behind it."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def mapped_ahead(
    function: Callable[[Item], Result], items: Iterable[Item], *, ahead: int, workers: int = 1
) -> Iterator[Result]:
    """``map`` in threads: results in the order of the items, at most ``ahead`` + 1 of them waiting.

    Exceptions of ``function`` are raised where its result would have been. Whoever stops early leaves at most
    ``ahead`` items read too far.
    """
    if ahead < 1 or workers < 1:
        raise ValueError(f"ahead and workers must be at least 1, got {ahead} and {workers}")
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[Future[Result]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


class Background:
    """Calls that nobody waits for, until too many are unfinished; a context manager that ends with all of them done.

    The first exception is raised by a later ``submit`` or at the end.
    """

    def __init__(self, *, workers: int = 1, ahead: int = 8):
        """Start ``workers`` threads; ``submit`` waits while more than ``ahead`` calls are unfinished."""
        self._pool = ThreadPoolExecutor(workers)
        self._waiting: deque[Future] = deque()
        self._ahead = ahead

    def submit(self, function: Callable[..., Any], *args: Any) -> None:
        """Call ``function(*args)`` in a thread."""
        self._waiting.append(self._pool.submit(function, *args))
        while len(self._waiting) > self._ahead:
            self._waiting.popleft().result()

    def __enter__(self) -> "Background":
        return self

    def __exit__(self, kind: type | None, *_: Any) -> None:
        if kind is not None:
            for future in self._waiting:
                future.cancel()
        self._pool.shutdown(wait=True)
        if kind is None:
            for future in self._waiting:
                future.result()
