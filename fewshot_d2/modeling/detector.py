"""The shell that every system shares: images in, supports encoded once, results per query out."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.engine import HookBase
from detectron2.modeling import Backbone, build_backbone
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import ImageList, Instances
from torch import Tensor, nn

from ..structures import SupportFeatures, SupportSet
from ..transforms import SupportCrop


@dataclass(frozen=True)
class Pairs:
    """P (query, class) pairs of a batch: the axis that the heads see as "images".

    Attributes:
        query (list[int]): position of the query in the batch.
        episode_class (list[int]): 0..K-1 within the query's episode.
        support (list[int]): row of the batch's ``SupportFeatures``.
    """

    query: list[int]
    episode_class: list[int]
    support: list[int]

    def __len__(self) -> int:
        return len(self.query)

    def chunks(self, size: int) -> Iterator["Pairs"]:
        """Cut into runs of at most ``size`` pairs."""
        for start in range(0, len(self), size):
            part = slice(start, start + size)
            yield Pairs(self.query[part], self.episode_class[part], self.support[part])

    def images(self, queries: ImageList) -> ImageList:
        """The queries as heads see them that take one "image" a pair; they read the sizes only."""
        return ImageList(queries.tensor, [queries.image_sizes[query] for query in self.query])

    def rows_of(self, query: int) -> list[int]:
        """Rows of the batch's ``SupportFeatures`` that are searched in a query."""
        return [row for of, row in zip(self.query, self.support, strict=True) if of == query]

    def of_query(self, tensor: Tensor) -> Tensor:
        """Row by query (N, ...) -> row by pair (P, ...), without a copy where all pairs are of one query."""
        if len(set(self.query)) == 1:
            return tensor[self.query[0]].expand(len(self), *tensor.shape[1:])
        return tensor[self.query]

    def targets(
        self, batched_inputs: Sequence[dict[str, Any]], device: torch.device
    ) -> list[Instances]:
        """Ground truth of each pair: the query's instances of that class, relabelled 0 = match."""
        targets = []
        for query, episode_class in zip(self.query, self.episode_class, strict=True):
            instances = batched_inputs[query]["instances"]
            chosen = instances[instances.gt_classes == episode_class].to(device)
            chosen.gt_classes = torch.zeros_like(chosen.gt_classes)
            targets.append(chosen)
        return targets


class FewShotDetector(nn.Module):
    """Base of the meta-architectures. A subclass writes ``encode_support`` and ``forward``.

    Attributes:
        uses_negatives (bool): whether ``encode_support`` has a use for negative examples.
        trains_all (bool): whether the losses of a step reach all trainable weights. Otherwise several processes look
            for those that have no gradient, as they would wait for it.
    """

    uses_negatives = False
    trains_all = True

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        support_crop: SupportCrop,
        input_format: str,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        pairs_per_chunk: int,
    ):
        """Store the shared parts.

        Args:
            backbone: shared by queries and supports.
            support_crop: cuts and resizes supports; its size is the side of the support canvas.
            input_format: channel order of the query images, "BGR" or "RGB".
            pixel_mean, pixel_std: per channel, in the order of ``input_format``.
            pairs_per_chunk: (query, class) pairs that pass the heads at once in inference.
        """
        super().__init__()
        self.backbone = backbone
        self.support_crop = support_crop
        self.input_format = input_format
        self.pairs_per_chunk = pairs_per_chunk
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), False)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Read the shared keys."""
        return {"backbone": build_backbone(cfg), **cls.input_from_config(cfg)}

    @staticmethod
    def input_from_config(cfg: CfgNode) -> dict[str, Any]:
        """The shared keys without the backbone, for a system that has its own."""
        return {
            "support_crop": SupportCrop.from_cfg(cfg),
            "input_format": cfg.INPUT.FORMAT,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "pairs_per_chunk": cfg.FEWSHOT.PAIRS_PER_CHUNK,
        }

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.pixel_mean.device

    @property
    def object_levels(self) -> list[str]:
        """Maps of the backbone whose cells pre-training on objects classifies: all of them."""
        return list(self.backbone.output_shape())

    def encode_support(self, support_sets: Sequence[SupportSet]) -> SupportFeatures:
        """Features of all classes of all sets, set after set; independent of any query."""
        raise NotImplementedError

    def training_hooks(self, episodes: Any, batch_size: int) -> list[HookBase]:
        """Hooks of this system alone.

        Args:
            episodes: what is trained on, mapped queries by number. batch_size: queries a step in all processes.
        """
        return []

    def describe_queries(self, batched_inputs: Sequence[dict[str, Any]]) -> list[Any]:
        """What ``search`` takes, one a query: what is worth computing once for many searches; here, nothing."""
        return list(batched_inputs)

    def search(self, query: Any, support: SupportFeatures) -> Instances:
        """Detect all classes of ``support`` in a query of ``describe_queries``, in original query pixels."""
        return self([{**query, "support_features": support}])[0]["instances"]

    def explain(self, query: Any, support: SupportFeatures) -> dict[str, Tensor]:
        """What a system can show of how it searches a query of ``describe_queries`` for the first class; here, nothing.

        Returns:
            Some of "attention" (Tensor[H, W, S, h, w]), how much each cell of the query looks at each cell of each
            support, as of images without padding, and any other names of maps of the query (Tensor[H, W]). If its
            detections have ``pred_corners``, these are maps of scores, one a level: grids are drawn beside the best.
        """
        return {}

    def tunes_description(self, layers: str) -> bool:
        """Whether fine-tuning ``layers`` changes what ``describe_queries`` gives: it may, where nothing is known."""
        return True

    def contrast_features(self, support_sets: Sequence[SupportSet]) -> dict[str, Tensor]:
        """What pre-training on pairs compares, {name: Tensor[K, ...]}: as ``encode_support`` if not overridden."""
        return self.encode_support(support_sets).tensors

    def preprocess(self, batched_inputs: Sequence[dict[str, Any]]) -> ImageList:
        """Normalise and batch the queries, padded right and below to the backbone's divisibility."""
        images = [self._normalized(x["image"].to(self.device)) for x in batched_inputs]
        return ImageList.from_tensors(images, self.backbone.size_divisibility)

    def preprocess_supports(
        self, support_sets: Sequence[SupportSet]
    ) -> tuple[Tensor, list[tuple[int, int]], list[int]]:
        """Crop, normalise and pad the positive supports to the square canvas.

        Returns:
            Tensor[sum of shots, 3, size, size]; the (height, width) of each crop in it; shots of each class.
        """
        classes = [shots for support_set in support_sets for shots in support_set.positives()]
        crops = [self.support_crop(shot) for shots in classes for shot in shots]
        size = self.support_crop.size
        canvas = self.pixel_mean.new_zeros(len(crops), 3, size, size)
        for target, crop in zip(canvas, crops, strict=True):
            image = crop.image.to(self.device)
            if self.input_format == "BGR":
                image = image.flip(0)
            target[:, : image.shape[1], : image.shape[2]] = self._normalized(image)
        return canvas, [crop.image_size for crop in crops], [len(shots) for shots in classes]

    def gather_supports(
        self, batched_inputs: Sequence[dict[str, Any]]
    ) -> tuple[SupportFeatures, Pairs]:
        """Encode each distinct ``support`` of the batch once, or take ``support_features``.

        Raises:
            ValueError: a query without support, or features of another system.
        """
        key = "support_features" if "support_features" in batched_inputs[0] else "support"
        sources, pairs = self.distinct_supports(batched_inputs, key)
        if key == "support":
            return self.encode_support(sources), pairs
        features = SupportFeatures.cat(sources).to(self.device)
        if features.system != type(self).__name__:
            raise ValueError(
                f"support features must be made by {type(self).__name__}, got {features.system!r}"
            )
        return features, pairs

    def distinct_supports(
        self, batched_inputs: Sequence[dict[str, Any]], key: str
    ) -> tuple[list[Any], Pairs]:
        """Each distinct object that the queries have under ``key`` once, and the pairs that follow."""
        sources: dict[int, SupportSet | SupportFeatures] = {}
        for x in batched_inputs:
            if x.get(key) is None:
                raise ValueError(
                    f"every query must have {key!r}, got none for {x.get('file_name', 'a query')}"
                )
            sources.setdefault(id(x[key]), x[key])
        lengths = (len(source) for source in sources.values())
        starts = dict(zip(sources, itertools.accumulate(lengths, initial=0), strict=False))
        triples = [
            (query, k, starts[id(x[key])] + k)
            for query, x in enumerate(batched_inputs)
            for k in range(len(x[key]))
        ]
        pairs = Pairs(*([triple[i] for triple in triples] for i in range(3)))
        return list(sources.values()), pairs

    def support_features(
        self, tensors: dict[str, Tensor], support_sets: Sequence[SupportSet]
    ) -> SupportFeatures:
        """The tensors of all classes of all sets, with the classes' names."""
        return SupportFeatures(
            tensors=tensors,
            class_ids=[c for s in support_sets for c in s.class_ids],
            class_names=[name for s in support_sets for name in s.class_names],
            system=type(self).__name__,
        )

    def postprocess(
        self,
        pair_results: Sequence[Instances],
        pairs: Pairs,
        batched_inputs: Sequence[dict[str, Any]],
    ) -> list[dict[str, Instances]]:
        """Join the pairs of each query; boxes and masks in original query pixels."""
        per_query: list[list[Instances]] = [[] for _ in batched_inputs]
        for result, query, k in zip(pair_results, pairs.query, pairs.episode_class, strict=True):
            result.pred_classes = torch.full_like(result.pred_classes, k)
            per_query[query].append(result)
        return [
            {"instances": detector_postprocess(Instances.cat(results), x["height"], x["width"])}
            for results, x in zip(per_query, batched_inputs, strict=True)
        ]

    def _normalized(self, image: Tensor) -> Tensor:
        return (image - self.pixel_mean) / self.pixel_std
