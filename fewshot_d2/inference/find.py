"""Search pictures for the classes of a support set and write what was found: read ahead, written behind, in order."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from ..predictor import FewShotPredictor, Query
from .pipeline import mapped_ahead
from .result_folder import Found, ResultFolder
from .sources import Picture

# Bytes of masks that may wait to be written: those of a photo of 12 megapixels are a gigabyte.
_WAITING_MASKS = 100 << 20
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
            Nothing is left of a query's pixels and detections when they are written.
        folder: where results go. progress: passes on what it is given, one picture at a time, and may tell of it.
    """
    summary = Summary([0] * len(folder.class_ids), [0] * len(folder.class_ids))

    def drawn(item: tuple[int, Query] | Found) -> Found | Query:
        if isinstance(item, Found) or item[1].error is not None:
            return item if isinstance(item, Found) else item[1]
        image_id, query = item
        name, stem = query.source.name, query.source.stem
        found = folder.draw(image_id, name, stem, query.image, query.instances)
        query.image = query.instances = query.tensor = None
        return found

    def waiting() -> Iterator[tuple[int, Query] | Found]:
        for item in enumerate(progress(predictor.search(pictures, Picture.read)), start=1):
            yield drawn(item) if _mask_bytes(item[1]) > _WAITING_MASKS else item

    with folder.writing() as (add, skip):
        for result in mapped_ahead(drawn, waiting(), ahead=2):
            if isinstance(result, Found):
                add(result)
                summary.add(result.counts)
            else:
                skip(result.source.name, str(result.error))
                summary.skip(str(result.error))
    return summary


def _mask_bytes(query: Query) -> int:
    found = query.instances
    return found.pred_masks.numel() if found is not None and found.has("pred_masks") else 0
