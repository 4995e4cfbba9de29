"""Loaders for training and evaluation, built on detectron2's."""

import logging
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import (
    DatasetCatalog,
    build_detection_test_loader,
    build_detection_train_loader,
)
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage

from ..structures import SupportFeatures
from .coco_json import contiguous_ids, dataset_categories, register_instances
from .dataset_mapper import EPISODIC_MAPPER_REGISTRY
from .episodes import EpisodeFactory, EpisodeStream, PlannedEpisodes, TrainingEpisodes
from .ground_truth import KEEP_ALL, GroundTruthFilter
from .images import TrainingImages
from .index import InstanceIndex
from .patch_pool import MinedEpisodes
from .plans import EvaluationPlan, make_plan
from .pool_episodes import PoolEpisodes
from .pseudo_labels import PseudoLabels
from .rank_lists import RankLists
from .sample_pool import SamplePool
from .splits import (
    check_same_classes,
    classes_of_side,
    images_without,
    restrict_to_classes,
    split_of,
)
from .tuples import TrainingTuples

logger = logging.getLogger(__name__)


def register_from_config(cfg: CfgNode) -> None:
    """Register the data sets of FEWSHOT.REGISTER; a name that exists already is left alone."""
    for row in cfg.FEWSHOT.REGISTER:
        if len(row) != 3:
            raise ValueError(f"FEWSHOT.REGISTER rows must be [name, json, images], got {row}")
        if row[0] not in DatasetCatalog.list():
            register_instances(*row)


def build_index(
    dataset: str,
    class_ids: Iterable[int] | None = None,
    ground_truth: GroundTruthFilter = KEEP_ALL,
    hidden_ids: Collection[int] = (),
) -> InstanceIndex:
    """Index a data set; with ``class_ids``, annotations of all other classes are *removed* first.

    So are those that are no ``ground_truth``, and before that images with any object of the classes ``hidden_ids``.
    """
    dicts, contiguous = DatasetCatalog.get(dataset), contiguous_ids(dataset)
    hidden = {contiguous[c] for c in hidden_ids if c in contiguous}
    dicts = ground_truth(images_without(dicts, hidden))
    if class_ids is not None:
        dicts = restrict_to_classes(dicts, {contiguous[c] for c in class_ids if c in contiguous})
    return InstanceIndex(dicts, {i: c for c, i in contiguous.items()})


def build_factory(
    dataset: str,
    support_dataset: str,
    class_ids: Iterable[int] | None = None,
    ground_truth: GroundTruthFilter = KEEP_ALL,
    hidden_ids: Collection[int] = (),
) -> EpisodeFactory:
    """Indices of queries and supports (see ``build_index``); one object where the two data sets are one.

    Raises:
        ValueError: the two data sets do not share their category ids, or mean other classes by them.
    """
    query_index = build_index(dataset, class_ids, ground_truth, hidden_ids)
    names = dataset_categories(dataset)
    support_index = query_index
    if support_dataset and support_dataset != dataset:
        support_index = build_index(support_dataset, class_ids, ground_truth, hidden_ids)
        # Classes go by their ids: under another name a novel one could be among the base classes' examples.
        own = dataset_categories(support_dataset)
        foreign = [c for c in support_index.class_ids if names.get(c) != own[c]]
        if foreign:
            raise ValueError(
                f"support data set {support_dataset} must have category ids and names of {dataset}, got "
                + ", ".join(f"{c}: {own[c]!r} for {names.get(c)!r}" for c in foreign[:5])
            )
    return EpisodeFactory(
        query_index, support_index, names=names, contiguous_ids=contiguous_ids(dataset)
    )


def plan_sources(
    *,
    dataset: str,
    support_dataset: str,
    split: str,
    sides: Iterable[str],
    ground_truth: GroundTruthFilter = KEEP_ALL,
) -> list[dict[str, Any]]:
    """What plans of either kind are drawn from, as their makers' arguments: one dict a side, indexed once.

    Sides without a class are left out with a warning.
    """
    classes = {side: classes_of_side(dataset, split, side) for side in sides}
    for side, class_ids in classes.items():
        if not class_ids:
            logger.warning("Split %r of %s has no %s class to test", split, dataset, side)
    factory = build_factory(dataset, support_dataset, ground_truth=ground_truth)
    shared = {
        "query_index": factory.query_index,
        "support_index": factory.support_index,
        "dataset": dataset,
        "support_dataset": support_dataset,
        "split": split,
    }
    return [
        {**shared, "side": side, "class_ids": class_ids}
        for side, class_ids in classes.items()
        if class_ids
    ]


def build_plans(
    *,
    dataset: str,
    support_dataset: str,
    split: str,
    sides: Iterable[str],
    runs: int,
    **options: Any,
) -> list[EvaluationPlan]:
    """Plans of runs 0, 1, ... that differ in their supports, side after side; none for a side without classes.

    Args:
        dataset, support_dataset, split, sides, options: as of ``make_plan``.
    """
    sources = plan_sources(
        dataset=dataset, support_dataset=support_dataset, split=split, sides=sides
    )
    return [make_plan(**source, run=run, **options) for source in sources for run in range(runs)]


def build_training_episodes(
    cfg: CfgNode,
) -> TrainingEpisodes | TrainingTuples | TrainingImages | PoolEpisodes:
    """What a config trains on. Novel classes are removed before anything is indexed."""
    register_from_config(cfg)
    if cfg.FEWSHOT.TRAIN_ON == "rank_lists":
        return build_pool_episodes(cfg)
    if len(cfg.DATASETS.TRAIN) != 1:
        raise ValueError(f"DATASETS.TRAIN must be one name, got {cfg.DATASETS.TRAIN}")
    dataset = cfg.DATASETS.TRAIN[0]
    if cfg.FEWSHOT.SPLIT != "all":
        check_same_classes(dataset, cfg.DATASETS.TEST)
    split = split_of(dataset, cfg.FEWSHOT.SPLIT)
    ground_truth = GroundTruthFilter.from_cfg(cfg)
    hidden = split.novel if cfg.FEWSHOT.EXCLUDE_NOVEL_IMAGES else ()
    supports = cfg.FEWSHOT.SUPPORT.DATASET_TRAIN
    factory = build_factory(dataset, supports, split.base, ground_truth, hidden)
    mapper, seed = build_mapper(cfg, is_train=True), max(cfg.SEED, 0)
    if cfg.FEWSHOT.TRAIN_ON == "base_images":
        episodes = TrainingImages(
            factory, mapper, per_class=cfg.FEWSHOT.IMAGES_PER_CLASS, seed=seed
        )
        _check_num_classes(cfg, len(episodes.class_ids))
    elif cfg.FEWSHOT.TRAIN_ON == "tuples":
        episodes = TrainingTuples(factory, mapper, num_shots=cfg.FEWSHOT.NUM_SHOTS, seed=seed)
    else:
        kind, keys = TrainingEpisodes, {}
        if cfg.FEWSHOT.MINING.PERIOD:
            kind, keys = MinedEpisodes, _mining_keys(cfg)
        episodes = kind(
            factory,
            mapper,
            num_ways=cfg.FEWSHOT.NUM_WAYS,
            num_absent_ways=cfg.FEWSHOT.NUM_ABSENT_WAYS,
            num_shots=cfg.FEWSHOT.NUM_SHOTS,
            seed=seed,
            exclude_query=cfg.FEWSHOT.SUPPORT.EXCLUDE_QUERY,
            **keys,
        )
    logger.info(
        "Training %s: %s, %d images, %d base classes, seed %d",
        *(cfg.FEWSHOT.TRAIN_ON, dataset, len(episodes.images), len(episodes.class_ids), seed),
    )
    return episodes


def _mining_keys(cfg: CfgNode) -> dict[str, Any]:
    return {
        "folder": Path(cfg.OUTPUT_DIR) / "hard_patches",
        "period": cfg.FEWSHOT.MINING.PERIOD,
        "batch_size": cfg.SOLVER.IMS_PER_BATCH,
    }


def build_pool_episodes(cfg: CfgNode) -> PoolEpisodes:
    """The rank lists of FEWSHOT.SELF_PACED at the stage of its LABELS, without any annotation of the data sets."""
    node, seed = cfg.FEWSHOT.SELF_PACED, max(cfg.SEED, 0)
    rank_lists = RankLists.load(node.RANK_LISTS)
    labels = PseudoLabels.load(node.LABELS) if node.LABELS else None
    pool = SamplePool(
        rank_lists,
        labels,
        num_positives=cfg.FEWSHOT.NUM_SHOTS,
        seed=seed,
        max_shared=node.MAX_SHARED,
        min_side=node.MIN_SIDE,
    )
    mapper = build_mapper(cfg, is_train=True)
    if getattr(mapper, "with_masks", False):
        raise ValueError(
            "rank lists have no masks: MODEL.MASK_ON must be False, or FEWSHOT.MAPPER one that makes them such as "
            f"SuperpixelMapper, got {cfg.FEWSHOT.MAPPER}"
        )
    episodes = PoolEpisodes(
        pool,
        rank_lists,
        *pool_indices(rank_lists),
        mapper,
        with_negatives=cfg.FEWSHOT.NUM_ABSENT_WAYS > 0,
    )
    logger.info(
        "Training rank_lists: %s, SHA-256 %s, %d queries, stage %d, seed %d",
        *(node.RANK_LISTS, rank_lists.sha256, len(rank_lists), pool.stage, seed),
    )
    return episodes


def pool_indices(rank_lists: RankLists) -> tuple[InstanceIndex, InstanceIndex]:
    """Images of the queries and of what is searched, without annotations."""
    query_index = build_index(rank_lists.query_dataset, class_ids=())
    if rank_lists.dataset == rank_lists.query_dataset:
        return query_index, query_index
    return query_index, build_index(rank_lists.dataset, class_ids=())


def _check_num_classes(cfg: CfgNode, actual: int) -> None:
    if actual != cfg.MODEL.ROI_HEADS.NUM_CLASSES:
        raise ValueError(
            f"MODEL.ROI_HEADS.NUM_CLASSES must be the {actual} base classes that have instances in "
            f"{cfg.DATASETS.TRAIN[0]}, got {cfg.MODEL.ROI_HEADS.NUM_CLASSES}"
        )


def build_mapper(cfg: CfgNode, *, is_train: bool) -> Any:
    """The mapper that FEWSHOT.MAPPER names."""
    return EPISODIC_MAPPER_REGISTRY.get(cfg.FEWSHOT.MAPPER)(cfg, is_train)


class EpisodicTrainLoader:
    """Endless batches that start at the trainer's iteration.

    The loader is built when the first batch is asked for. By then a checkpoint has been loaded, so a resumed run
    reads the same episodes as one that was never interrupted.
    """

    def __init__(self, cfg: CfgNode):
        """Read and index the data set; nothing is loaded yet."""
        self.episodes = build_training_episodes(cfg)
        self.total_batch_size = cfg.SOLVER.IMS_PER_BATCH
        self.num_workers = cfg.DATALOADER.NUM_WORKERS
        self._is_stale = False

    def restart(self) -> None:
        """Drop what workers have read ahead: the next batch is read anew, because the episodes have changed."""
        self._is_stale = True

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        while True:
            self._is_stale = False
            for batch in open_batches(
                self.episodes,
                start=get_event_storage().iter * self.total_batch_size,
                batch_size=self.total_batch_size,
                num_workers=self.num_workers,
            ):
                yield batch
                if self._is_stale:
                    break


def open_batches(
    episodes: Any, *, start: int, batch_size: int, num_workers: int
) -> Iterator[list[dict[str, Any]]]:
    """Endless batches of this process, from episode ``start`` on; ``batch_size`` is that of all processes."""
    stream = EpisodeStream(episodes, start=start, batch_size=batch_size // comm.get_world_size())
    loader = build_detection_train_loader(
        stream,
        mapper=None,
        total_batch_size=batch_size,
        aspect_ratio_grouping=False,
        num_workers=num_workers,
    )
    # Opening a DataLoader draws a number, which a run that is not resumed here would not do.
    with torch.random.fork_rng(devices=[]):
        return iter(loader)


class EpisodicTestLoader:
    """Batches of one planned query; episodes that cannot be read are logged and left out."""

    def __init__(
        self,
        cfg: CfgNode,
        plan: EvaluationPlan,
        factory: EpisodeFactory,
        features: SupportFeatures | None = None,
    ):
        """Check the plan against the indices of its data sets (``build_factory``) and open it.

        Args:
            features: of all classes of a plan with fixed supports; queries come with these instead of the supports.
        """
        plan.check(factory.query_index, factory.support_index, plan.dataset)
        mapper = build_mapper(cfg, is_train=False)
        episodes = PlannedEpisodes(plan, factory, mapper, with_supports=features is None)
        self.features = features
        self._classes = {episode.id: episode.class_ids for episode in plan.episodes}
        self.loader = build_detection_test_loader(
            episodes, mapper=None, num_workers=cfg.DATALOADER.NUM_WORKERS
        )

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        for batch in self.loader:
            readable = [query for query in batch if "error" not in query]
            for query in batch:
                if "error" in query:
                    logger.error("Left out: %s", query["error"])
            if readable:
                yield [*map(self._with_features, readable)]

    def _with_features(self, query: dict[str, Any]) -> dict[str, Any]:
        if self.features is None:
            return query
        rows = [self.features.class_ids.index(c) for c in self._classes[query["episode_id"]]]
        return {**query, "support_features": self.features[rows]}
