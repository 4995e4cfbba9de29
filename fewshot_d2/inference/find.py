"""Search pictures for the classes of a support set and write what was found: read ahead, written behind, in order."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from ..predictor import FewShotPredictor, Query
from .pipeline import mapped_ahead
from .result_folder import Found, ResultFolder
from .sources import Picture

# Of skipped pictures, that are shown at the end; a file lists them all.
_NUM_REASONS = 5


@dataclass
class Summary:
    """What a run found.

    Attributes:
        num_images, num_skipped (int): pictures searched, and pictures that could not be read.
        counts (list[int]): detections of each class above its threshold.
        images_with (list[int]): pictures with at least one.
        skipped (list[str]): the first few reasons.
    """

    counts: list[int]
    images_with: list[int]
    num_images: int = 0
    num_skipped: int = 0
    skipped: list[str] = field(default_factory=list)

    def add(self, counts: Sequence[int]) -> None:
        """Count a picture."""
        self.num_images += 1
        self.counts = [a + b for a, b in zip(self.counts, counts, strict=True)]
        self.images_with = [a + (b > 0) for a, b in zip(self.images_with, counts, strict=True)]

    def skip(self, reason: str) -> None:
        """Count a picture that could not be read."""
        self.num_skipped += 1
        self.skipped = [*self.skipped, reason][:_NUM_REASONS]


def find(
    predictor: FewShotPredictor,
    pictures: Iterable[Picture],
    folder: ResultFolder,
    *,
    progress: Callable[[Iterator[Query]], Iterable[Query]] = iter,
) -> Summary:
    """Search all pictures; those that cannot be read are skipped and listed.

    Args:
        predictor: with supports. pictures: read and held a few at a time; picture n has the image id n, from 1.
        folder: where results go. progress: passes on what it is given, one picture at a time, and may tell of it.
    """
    summary = Summary([0] * len(folder.class_ids), [0] * len(folder.class_ids))

    def drawn(numbered: tuple[int, Query]) -> Found | Query:
        image_id, query = numbered
        if query.error is not None:
            return query
        picture = query.source
        return folder.draw(image_id, picture.name, picture.stem, query.image, query.instances)

    with folder.writing() as (add, skip):
        queries = progress(predictor.search(pictures, Picture.read))
        for result in mapped_ahead(drawn, enumerate(queries, start=1), ahead=2):
            if isinstance(result, Found):
                add(result)
                summary.add(result.counts)
            else:
                skip(result.source.name, str(result.error))
                summary.skip(str(result.error))
    return summary
