"""Instance search from a config: describe the images of a data set once, describe queries, rank (SPIL spec B5)."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader
from detectron2.utils import comm
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from ..data.dataset_mapper import EpisodicDatasetMapper
from ..data.episodes import Episode
from ..data.index import InstanceIndex, same_images
from ..data.loaders import build_index, build_mapper
from ..data.rank_lists import RankList, RankLists
from ..files import canonical_sha256
from ..retrieval import ExactIndex, FaissIndex, GalleryRegions, VectorIndex, rank
from ..retrieval.describer import RegionDescriber, build_describer

logger = logging.getLogger(__name__)

# To be raised when the same config gives other regions or vectors than before.
_VERSION = 1
# Images of a file of regions: what is lost when describing is interrupted.
_IMAGES_PER_FILE = 500
# Keys of FEWSHOT.RETRIEVAL that regions and vectors do not depend on, ...
_OF_THE_INDEX = ("DEPTH", "INDEX", "NUM_PROBES")
# ... and those of MODEL that they do, besides the weights. Not all of MODEL: regions are to outlast new keys.
_OF_THE_NETWORK = (
    *("META_ARCHITECTURE", "BACKBONE", "RESNETS", "FPN", "DEFORMABLE", "TORCHVISION", "TIMM"),
    *("PROPOSAL_GENERATOR", "ANCHOR_GENERATOR", "RPN", "PIXEL_MEAN", "PIXEL_STD"),
)


def describe_boxes(
    cfg: CfgNode,
    index: InstanceIndex,
    boxes: Mapping[int, Tensor],
    *,
    describer: RegionDescriber | None = None,
) -> dict[int, Tensor]:
    """What boxes look like to the search of a config, for ``retrieval.rerank`` (spec 35).

    Queries and candidates are described alike: the mean of the maps FEWSHOT.RETRIEVAL.LAYERS over the box, with L2
    norm 1 each, so the cosine of two vectors is what the search ranks by.

    Args:
        cfg: of configs/retrieval, the one that the rank lists were made with.
        index: of the data set that has the images (``pool_indices`` or ``build_index``).
        boxes: {image id: float[n, 4]}, XYXY in pixels of the original image, n >= 0; clipped to the image.
        describer: of ``build_describer(cfg)``, to save building it once more.

    Returns:
        {image id: float32[n, D]} in the order given, on the CPU.

    Raises:
        ValueError: an image is unknown or cannot be read, or a box has no area in it; the message says which.
    """
    describer = build_describer(cfg) if describer is None else describer
    mapper = build_mapper(cfg, is_train=False)
    described = {}
    for image_id, of_image in tqdm(boxes.items(), desc="boxes", unit="img"):
        query = _mapped(mapper, index.dicts[index.image_index(image_id)])
        described[image_id] = describer.vectors(query, torch.as_tensor(of_image).reshape(-1, 4))
    return described


def describe_gallery(
    cfg: CfgNode,
    index: InstanceIndex,
    folder: str | Path,
    *,
    describer: RegionDescriber | None = None,
) -> GalleryRegions | None:
    """Find and describe the regions of all images of a data set; what was described before is read instead.

    They are kept in ``folder``/regions-<hash>, in a file for each 500 images. The hash is of the config, the weights
    and the images, so that others get a folder of their own, and one that is not complete is completed. Several
    processes share the images and need a folder that all of them see.

    Args:
        index: of the data set. describer: of ``build_describer(cfg)``, to save building it once more.

    Returns:
        In the order of the images; those that cannot be read are logged and have no regions. None off the main process.

    Raises:
        ValueError: no image can be read.
    """
    describer = build_describer(cfg) if describer is None else describer
    folder = Path(folder) / f"regions-{_gallery_sha256(cfg, index, describer)[:16]}"
    _describe_missing(cfg, index, folder, describer)
    comm.synchronize()
    if not comm.is_main_process():
        return None
    parts = [GalleryRegions.load(path) for path in sorted(folder.glob("*.pt"))]
    if not parts:
        raise ValueError(f"images that are searched must be readable, got {len(index.dicts)} bad")
    gallery = GalleryRegions.cat(parts)
    logger.info(
        "%s: %d regions of %d images; %d images left out",
        *(folder, len(gallery), len(gallery.rows), len(index.dicts) - len(gallery.rows)),
    )
    return gallery


def search_regions(
    cfg: CfgNode,
    *,
    dataset: str,
    query_dataset: str,
    queries: Sequence[RankList],
    folder: str | Path,
    describer: RegionDescriber | None = None,
) -> RankLists | None:
    """Rank the images of a data set for queries, as FEWSHOT.RETRIEVAL says.

    Args:
        dataset, query_dataset: registered names.
        queries: of ``query_dataset``, without candidates. One whose image cannot be read is logged and left out.
        folder: keeps the regions of ``dataset``, see ``describe_gallery``.
        describer: of ``build_describer(cfg)``, to save building it once more.

    Returns:
        The lists; a query's own image is in none of its own, also where the two data sets have different ids for it.
        None off the main process, with which the others share the images.

    Raises:
        ValueError: no image of the gallery or no query can be read.
    """
    describer = build_describer(cfg) if describer is None else describer
    index = query_index = build_index(dataset, class_ids=())
    if query_dataset != dataset:
        query_index = build_index(query_dataset, class_ids=())
    gallery = describe_gallery(cfg, index, folder, describer=describer)
    if gallery is None:
        return None
    queries, vectors = _described_queries(cfg, query_index, queries, describer)
    own = own_images(query_index, index)
    vector_index = gallery.fill(build_vector_index(cfg))
    found = rank(
        gallery,
        vectors,
        queries,
        depth=cfg.FEWSHOT.RETRIEVAL.DEPTH,
        index=vector_index,
        skip=[own[query.image_id] for query in queries],
    )
    return RankLists(dataset, query_dataset, _method(cfg, describer), found)


def build_vector_index(cfg: CfgNode) -> VectorIndex:
    """The empty index that FEWSHOT.RETRIEVAL.INDEX names: "exact" or a factory string of faiss."""
    node = cfg.FEWSHOT.RETRIEVAL
    if node.INDEX == "exact":
        return ExactIndex(device=cfg.MODEL.DEVICE)
    return FaissIndex(node.INDEX, num_probes=node.NUM_PROBES)


class _GalleryImages(Dataset):
    """The images of a data set as mapped query dicts; ``{"error": message}`` for one that cannot be read."""

    def __init__(self, index: InstanceIndex, mapper: EpisodicDatasetMapper):
        self.dicts, self.mapper = index.dicts, mapper

    def __len__(self) -> int:
        return len(self.dicts)

    def __getitem__(self, number: int) -> dict[str, Any]:
        try:
            return _mapped(self.mapper, self.dicts[number])
        except (OSError, ValueError) as error:
            return {"error": str(error)}


def _mapped(mapper: EpisodicDatasetMapper, record: dict[str, Any]) -> dict[str, Any]:
    """Read and resize an image as the mapper does it in tests."""
    return mapper(Episode(record, (), (), (), (), (0,), 0))


def _describe_missing(
    cfg: CfgNode, index: InstanceIndex, folder: Path, describer: RegionDescriber
) -> None:
    """Write the files of regions that are not there, those of this process."""
    starts = range(0, len(index.dicts), _IMAGES_PER_FILE)
    # Shared out before looking: another process may be writing already.
    starts = starts[comm.get_rank() :: comm.get_world_size()]
    missing = [s for s in starts if not _regions_file(folder, s).exists()]
    numbers = [n for s in missing for n in range(s, min(s + _IMAGES_PER_FILE, len(index.dicts)))]
    loader = build_detection_test_loader(
        _GalleryImages(index, build_mapper(cfg, is_train=False)),
        mapper=None,
        sampler=numbers,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
    )
    images = zip(tqdm(loader, desc="regions", unit="img"), numbers)
    for start, rows in groupby(images, key=lambda row: row[1] - row[1] % _IMAGES_PER_FILE):
        parts = list(_gallery_parts((query for (query,), _ in rows), describer))
        if parts:
            GalleryRegions.cat(parts).save(_regions_file(folder, start))


def _regions_file(folder: Path, start: int) -> Path:
    return folder / f"{start:09d}.pt"


def _gallery_parts(
    queries: Iterator[dict[str, Any]], describer: RegionDescriber
) -> Iterator[GalleryRegions]:
    for query in queries:
        if "error" in query:
            logger.error("Left out: %s", query["error"])
            continue
        boxes, vectors = describer.regions(query)
        yield GalleryRegions(torch.full((len(boxes),), query["image_id"]), boxes, vectors)


def _gallery_sha256(cfg: CfgNode, index: InstanceIndex, describer: RegionDescriber) -> str:
    """Hash of all that regions and vectors depend on."""
    model, node = cfg.MODEL.clone(), cfg.FEWSHOT.RETRIEVAL.clone()
    model.defrost()
    node.defrost()
    # Weights count by what they are, not by where.
    model.TORCHVISION.WEIGHTS = model.TIMM.WEIGHTS = ""
    for key in _OF_THE_INDEX:
        del node[key]
    content = {
        "version": [_VERSION, _IMAGES_PER_FILE],
        "weights": describer.state_sha256(),
        "model": {key: str(model[key]) for key in _OF_THE_NETWORK},
        "config": [str(node), cfg.FEWSHOT.RESIZE_RULE, cfg.FEWSHOT.MAPPER],
        "input": [cfg.INPUT.FORMAT, cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST],
        "images": [_fingerprint(record) for record in index.dicts],
    }
    return canonical_sha256(content)


def _fingerprint(record: Mapping[str, Any]) -> list[Any]:
    """What changes when a picture does: its name, sizes and time of change, nothing if the file is missing."""
    values = [record[key] for key in ("image_id", "file_name", "height", "width")]
    path = Path(record["file_name"])
    if not path.is_file():
        return values
    state = path.stat()
    return [*values, state.st_size, state.st_mtime_ns]


def _described_queries(
    cfg: CfgNode, index: InstanceIndex, queries: Sequence[RankList], describer: RegionDescriber
) -> tuple[list[RankList], Tensor]:
    """The queries that can be read, and their vectors (float32[Q, D])."""
    kept, vectors = [], []
    mapper = build_mapper(cfg, is_train=False)
    for query in tqdm(queries, desc="queries"):
        try:
            image = _mapped(mapper, index.dicts[index.image_index(query.image_id)])
            vectors.append(describer.vectors(image, torch.tensor([query.box])))
            kept.append(query)
        except (OSError, ValueError) as error:
            logger.error("Query %d is left out: %s", query.query_id, error)
    if not kept:
        raise ValueError(f"queries must be readable, got {len(queries)} that are not")
    logger.info("%d queries; %d left out", len(kept), len(queries) - len(kept))
    return kept, torch.cat(vectors)


def own_images(query_index: InstanceIndex, index: InstanceIndex) -> Mapping[int, list[int]]:
    """{image id in the data set of the queries: ids of the same file in the one that is searched}."""
    same = same_images(query_index, index)
    return {
        record["image_id"]: [index.dicts[other]["image_id"] for other in same.get(i, ())]
        for i, record in enumerate(query_index.dicts)
    }


def _method(cfg: CfgNode, describer: RegionDescriber) -> str:
    node = cfg.FEWSHOT.RETRIEVAL
    return (
        f"fewshot_d2: {node.REGIONS} regions, at most {node.NUM_REGIONS} an image; mean of {'+'.join(node.LAYERS)}; "
        f"index {node.INDEX}; weights {describer.state_sha256()[:16]}"
    )
