"""Searching the images of rank lists for the instances of their queries (SPIL, paper 3.1, eq. 4)."""

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader
from detectron2.evaluation import inference_context
from detectron2.structures import BoxMode, Instances
from detectron2.utils import comm
from torch.utils.data import Dataset
from tqdm import tqdm

from ..data.dataset_mapper import EpisodicDatasetMapper
from ..data.episodes import Episode
from ..data.index import InstanceIndex
from ..data.loaders import build_mapper, pool_indices
from ..data.pseudo_labels import PseudoLabels, ScoredBox
from ..data.rank_lists import RankLists
from ..modeling.detector import FewShotDetector
from ..structures import SupportFeatures, SupportSet

logger = logging.getLogger(__name__)

# Queries that are encoded at once: bounds the memory.
_QUERIES_AT_ONCE = 16

Found = dict[tuple[int, int], tuple[ScoredBox, ...]]


class CandidateImages(Dataset):
    """The images that rank lists name, each once, as mapped query dicts with ``places``.

    ``places`` are (rank list, position of the image in it) for all lists that name the image. An image that cannot be
    read gives ``{"error": message}``.
    """

    def __init__(self, rank_lists: RankLists, index: InstanceIndex, mapper: EpisodicDatasetMapper):
        """Sort the candidates by image."""
        self.index, self.mapper = index, mapper
        places: dict[int, list[tuple[int, int]]] = {}
        for row, rank_list in enumerate(rank_lists):
            for position, candidate in enumerate(rank_list.candidates):
                places.setdefault(candidate.image_id, []).append((row, position))
        self.places = sorted(places.items())

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, number: int) -> dict[str, Any]:
        image_id, places = self.places[number]
        record = self.index.dicts[self.index.image_index(image_id)]
        try:
            query = self.mapper(Episode(record, (), (), (), (), (0, number), number))
        except (OSError, ValueError) as error:
            return {"error": str(error)}
        return {**query, "places": places}


def search_candidates(
    cfg: CfgNode,
    model: FewShotDetector,
    rank_lists: RankLists,
    *,
    stage: int,
    threshold: float,
) -> PseudoLabels:
    """Find the instance of each query in the images of its list; all queries of an image in one pass.

    Args:
        cfg: keys of the mapper, FEWSHOT.SELF_PACED.BOXES_PER_IMAGE and the loader's.
        model: any few-shot detector with ROI heads of detectron2. rank_lists: at least one has a candidate.
        stage, threshold: of the labels that are made.

    Returns:
        The same labels in every process.

    Raises:
        ValueError: a list has an image or box that the data sets have not, or a query's image cannot be read.
    """
    query_index, index = pool_indices(rank_lists)
    rank_lists.check(query_index, index)
    mapper = build_mapper(cfg, is_train=False)
    images = CandidateImages(rank_lists, index, mapper)
    loader = build_detection_test_loader(
        images, mapper=None, num_workers=cfg.DATALOADER.NUM_WORKERS
    )
    boxes_per_image = cfg.FEWSHOT.SELF_PACED.BOXES_PER_IMAGE
    found: Found = {}
    with inference_context(model), torch.no_grad(), _detections_limited(model, boxes_per_image):
        features = encode_queries(model, rank_lists, query_index, mapper)
        for (query,) in tqdm(loader, desc=f"candidates for stage {stage}", unit="img"):
            if "error" in query:
                logger.error("Left out: %s", query["error"])
                continue
            rows = [row for row, _ in query["places"]]
            result = model([{**query, "support_features": features[rows]}])[0]["instances"]
            best = _best_boxes(result.to("cpu"), len(rows), boxes_per_image)
            found.update(zip(query["places"], best, strict=True))
    found = {place: boxes for part in comm.all_gather(found) for place, boxes in part.items()}
    return PseudoLabels(
        stage=stage,
        threshold=threshold,
        rank_lists_sha256=rank_lists.sha256,
        found=tuple(
            tuple(found.get((row, position), ()) for position in range(len(rank_list.candidates)))
            for row, rank_list in enumerate(rank_lists)
        ),
    )


def encode_queries(
    model: FewShotDetector,
    rank_lists: RankLists,
    index: InstanceIndex,
    mapper: EpisodicDatasetMapper,
) -> SupportFeatures:
    """Features of every query from its own crop alone, in the order of the lists (spec B3, item 16)."""
    parts = []
    for start in range(0, len(rank_lists), _QUERIES_AT_ONCE):
        rows = rank_lists.lists[start : start + _QUERIES_AT_ONCE]
        examples = []
        for row in rows:
            record = index.dicts[index.image_index(row.image_id)]
            annotation = {"bbox": list(row.box), "bbox_mode": BoxMode.XYXY_ABS}
            examples.append(mapper.support_augmentation.shots([mapper.support(record, annotation)]))
        ids = [row.query_id for row in rows]
        parts.append(model.encode_support([SupportSet(ids, list(map(str, ids)), examples)]))
    return SupportFeatures.cat(parts)


def _best_boxes(found: Instances, num_classes: int, number: int) -> list[tuple[ScoredBox, ...]]:
    """The best boxes of each class, best first."""
    found = found[found.scores.argsort(descending=True, stable=True)]
    rows: list[list[ScoredBox]] = [[] for _ in range(num_classes)]
    for box, score, k in zip(
        found.pred_boxes.tensor.tolist(),
        found.scores.tolist(),
        found.pred_classes.tolist(),
        strict=True,
    ):
        if len(rows[k]) < number:
            rows[k].append(ScoredBox(tuple(box), score))
    return [tuple(row) for row in rows]


@contextlib.contextmanager
def _detections_limited(model: FewShotDetector, number: int) -> Iterator[None]:
    """No more detections a class than are kept: masks of the others would be made for nothing."""
    predictor = model.roi_heads.box_predictor
    before = predictor.test_topk_per_image
    predictor.test_topk_per_image = number
    try:
        yield
    finally:
        predictor.test_topk_per_image = before
