"""Work done ahead in threads, in order and bounded: reading before the model, writing behind it."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

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
