"""The detector of OS2D: class images and queries through one backbone, matched densely (paper 3).

N queries, K classes, S shots, R class images of a chunk, n = H W places of a map.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import ImageList, Instances
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ...modeling.detector import FewShotDetector, Pairs
from ...structures import SupportFeatures, SupportSet
from . import geometry
from .detections import Candidates, Merging
from .matchers import AlignedMatcher, Matches, WindowMatcher, unit_maps
from .objective import Objective, Targets
from .patches import hard_patches
from .scales import Scales
from .targets import GroundTruth

MATCHERS = ("aligned", "window")


@dataclass
class LabelledMatches:
    """The matches of one query of a batch with what is known about them.

    Attributes:
        query: its number. classes, rows (int64[R]): of each class image, in the query's support and in the batch's.
        matches: of R class images. targets: theirs. anchors (Tensor[n, 4]).
    """

    query: int
    classes: Tensor
    rows: Tensor
    matches: Matches
    targets: Targets
    anchors: Tensor


@META_ARCH_REGISTRY.register()
class OS2D(FewShotDetector):
    """Figure 2 of the paper. FEWSHOT.PAIRS_PER_CHUNK class images are matched at once."""

    @configurable
    def __init__(
        self,
        *,
        matcher: nn.Module,
        feature: str,
        scales: Scales,
        objective: Objective,
        merging: Merging,
        is_backbone_norm_frozen: bool,
        patch_size: int,
        **kwargs: Any,
    ):
        """Add to the shell.

        Args:
            matcher: an ``AlignedMatcher`` or a ``WindowMatcher``. feature: map of the backbone that it compares.
            scales, objective, merging: how images are resized, what is learned, what becomes of all boxes.
            is_backbone_norm_frozen: batch norms of the backbone keep their statistics in training.
            patch_size: side in pixels of the patches of ``hard_patches``.

        Raises:
            ValueError: there is no such map, or its stride is not 16.
        """
        super().__init__(**kwargs)
        shapes = self.backbone.output_shape()
        if feature not in shapes or shapes[feature].stride != geometry.STRIDE:
            strides = {name: shape.stride for name, shape in shapes.items()}
            raise ValueError(
                f"MODEL.OS2D.FEATURE must be a map of the backbone at stride {geometry.STRIDE}, "
                f"got {feature!r} of {strides}"
            )
        self.matcher, self.feature = matcher, feature
        self.scales, self.objective, self.merging = scales, objective, merging
        self.is_backbone_norm_frozen = is_backbone_norm_frozen
        self.patch_size = patch_size

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Read the keys.

        Raises:
            ValueError: an unknown choice.
        """
        node = cfg.MODEL.OS2D
        for key, allowed in (("MATCHER", MATCHERS), ("TRANSFORM", tuple(geometry.IDENTITY))):
            if node[key] not in allowed:
                raise ValueError(f"MODEL.OS2D.{key} must be one of {allowed}, got {node[key]!r}")
        matcher = WindowMatcher()
        if node.MATCHER == "aligned":
            matcher = AlignedMatcher(
                form=node.TRANSFORM,
                inverse=node.INVERSE,
                is_norm_frozen=node.FREEZE_TRANSFORM_NORM,
            )
        parts = super().from_config(cfg)
        return {
            **parts,
            "matcher": matcher,
            "feature": node.FEATURE,
            "scales": Scales(
                class_size=node.CLASS_SIZE,
                image_size=node.IMAGE_SIZE,
                by_exemplars=node.SCALE_BY_EXEMPLARS,
                max_image_size=node.MAX_IMAGE_SIZE,
                pyramid=tuple(node.PYRAMID),
                divisibility=parts["backbone"].size_divisibility,
            ),
            "objective": Objective(
                loss=node.LOSS,
                margins=tuple(node.MARGINS),
                negatives_per_positive=node.NEGATIVES_PER_POSITIVE,
                negative_weight=node.NEGATIVE_WEIGHT,
                localization_weight=node.LOCALIZATION_WEIGHT,
                iou_thresholds=tuple(node.IOU_THRESHOLDS),
                remap_thresholds=tuple(node.REMAP_THRESHOLDS) if node.REMAP_TARGETS else None,
            ),
            "merging": Merging(
                score_threshold=node.SCORE_THRESHOLD,
                iou_threshold=node.NMS_IOU,
                chunk=node.NMS_CHUNK,
                before=node.PRE_NMS_TOPK,
                after=max(cfg.TEST.DETECTIONS_PER_IMAGE, 0),
            ),
            "is_backbone_norm_frozen": node.FREEZE_BACKBONE_NORM,
            "patch_size": node.PATCH_SIZE,
        }

    def train(self, mode: bool = True) -> "OS2D":
        """As of any module, but for the norms of the backbone."""
        super().train(mode)
        if self.is_backbone_norm_frozen:
            for module in self.backbone.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def encode_support(self, support_sets: Sequence[SupportSet]) -> SupportFeatures:
        """Tensors of the matcher, {name: Tensor[K, S, ...]}, zero where a class has fewer than S shots.

        "valid" (Tensor[K, S]) is 1 where there is a shot, "sizes" (Tensor[K, S]) the square root of its area in pixels.
        """
        classes = [shots for support_set in support_sets for shots in support_set.positives()]
        crops = [self.support_crop(shot).image for shots in classes for shot in shots]
        if self.input_format == "BGR":
            crops = [crop.flip(0) for crop in crops]
        places = [(k, s) for k, shots in enumerate(classes) for s in range(len(shots))]
        shape = len(classes), max(map(len, classes), default=1)
        of_size = defaultdict(list)
        for number, crop in enumerate(crops):
            of_size[self.scales.class_image(tuple(crop.shape[1:]))].append(number)
        tensors = {name: self.pixel_mean.new_zeros(shape) for name in ("valid", "sizes")}
        for size, numbers in of_size.items():
            for start in range(0, len(numbers), self.pairs_per_chunk):
                chosen = numbers[start : start + self.pairs_per_chunk]
                images = torch.stack([self._resized(crops[i], size) for i in chosen])
                encoded = self.matcher.encode(self.backbone(images)[self.feature], size)
                encoded["valid"] = images.new_ones(len(chosen))
                areas = [crops[i].shape[1] * crops[i].shape[2] for i in chosen]
                encoded["sizes"] = images.new_tensor(areas).sqrt()
                index = torch.tensor([places[i] for i in chosen], device=self.device).unbind(1)
                for name, values in encoded.items():
                    if name not in tensors:
                        tensors[name] = values.new_zeros(*shape, *values.shape[1:])
                    tensors[name].index_put_(index, values)
        return self.support_features(tensors, support_sets)

    def contrast_features(self, support_sets: Sequence[SupportSet]) -> dict[str, Tensor]:
        """The first example's cells: what is compared."""
        return {"cells": self.encode_support(support_sets).tensors["cells"][:, 0]}

    def forward(self, batched_inputs: list[dict[str, Any]]) -> dict[str, Tensor] | list[dict]:
        """Losses in training, ``[{"instances": Instances}]`` in inference; see ``structures``."""
        support, pairs = self.gather_supports(batched_inputs)
        if self.training:
            return self.losses(batched_inputs, support, pairs)
        return [
            {"instances": self.detect(x, support, pairs.rows_of(query))}
            for query, x in enumerate(batched_inputs)
        ]

    def detect(self, query: dict[str, Any], support: SupportFeatures, rows: list[int]) -> Instances:
        """Search the classes at the given rows in one query, in its original pixels."""
        original = query["height"], query["width"]
        found = [
            self.merging.candidates(matches, classes, size, original)
            for matches, classes, _, size in self._searched(query, support, rows)
        ]
        nothing = Candidates.none(self.device)
        return self.merging.detections(Candidates.cat([nothing, *found]), original)

    @torch.no_grad()
    def score_maps(self, query: dict[str, Any], support: SupportFeatures) -> list[Tensor]:
        """Scores of all R class images on each level, before boxes are merged: Tensor[R, H, W] a level."""
        of_level = defaultdict(list)
        rows = list(range(len(support)))
        for matches, _, shape, size in self._searched(query, support, rows):
            of_level[size].append(matches.scores.unflatten(1, shape))
        return [torch.cat(parts) for parts in of_level.values()]

    def _searched(
        self, query: dict[str, Any], support: SupportFeatures, rows: list[int]
    ) -> Iterator[tuple[Matches, Tensor, tuple[int, int], tuple[int, int]]]:
        """A chunk of class images on a level at a time: matches, their classes, sizes of the map and of the image."""
        classes, row, shot = self._images_of(support, rows)
        exemplars = support.tensors["sizes"][row, shot].tolist()
        given, original = tuple(query["image"].shape[1:]), (query["height"], query["width"])
        sizes = self.scales.levels(given, original, exemplars)
        maps = [self._features([self._resized(query["image"], size)]) for size in sizes]
        numbers = torch.arange(len(row), device=self.device)
        for chunk in numbers.split(self.pairs_per_chunk) if len(row) else ():
            images = {n: support.tensors[n][row[chunk], shot[chunk]] for n in self.matcher.tensors}
            for features, size in zip(maps, sizes, strict=True):
                matches = self.matcher(images, features, [len(chunk)])
                yield matches, classes[chunk], tuple(features.shape[2:]), size

    def losses(
        self, batched_inputs: list[dict[str, Any]], support: SupportFeatures, pairs: Pairs
    ) -> dict[str, Tensor]:
        """Losses of a batch, whose queries may differ in size; each is searched for its own classes."""
        _, number = torch.tensor(support.class_ids, device=self.device).unique(return_inverse=True)
        matched = list(self._matched(batched_inputs, support, pairs))
        return self.objective.losses(
            [of_query.matches for of_query in matched],
            [of_query.targets for of_query in matched],
            [of_query.anchors for of_query in matched],
            [number[of_query.rows] for of_query in matched],
        )

    def hard_patches(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Tensor]]:
        """Patches of each query around places with a loss (spec 1.14); see ``patches.hard_patches``.

        Queries are searched at the size that they have; class positions are those of their own supports.
        """
        was_training = self.training
        self.eval()
        results: list[dict[str, Tensor]] = [{} for _ in batched_inputs]
        with torch.no_grad():
            support, pairs = self.gather_supports(batched_inputs)
            for found in self._matched(batched_inputs, support, pairs):
                results[found.query] = hard_patches(
                    self.objective,
                    found.matches,
                    found.targets,
                    found.anchors,
                    found.classes,
                    image_size=tuple(batched_inputs[found.query]["image"].shape[1:]),
                    patch_size=self.patch_size,
                )
        self.train(was_training)
        return results

    def _matched(
        self, batched_inputs: list[dict[str, Any]], support: SupportFeatures, pairs: Pairs
    ) -> Iterator[LabelledMatches]:
        """Each query with its own classes and ground truth; those of one size pass the matcher together."""
        of_size = defaultdict(list)
        for query, x in enumerate(batched_inputs):
            of_size[tuple(x["image"].shape[1:])].append(query)
        for queries in of_size.values():
            images = [self._normalized(batched_inputs[q]["image"].to(self.device)) for q in queries]
            features = self._features(images)
            anchors = geometry.anchors(tuple(features.shape[2:]), self.device)
            chosen = [self._images_of(support, pairs.rows_of(query)) for query in queries]
            row, shot = (torch.cat([part[i] for part in chosen]) for i in (1, 2))
            class_images = {name: support.tensors[name][row, shot] for name in self.matcher.tensors}
            counts = [len(classes) for classes, _, _ in chosen]
            joined = self.matcher(class_images, features, counts)
            parts = zip(*(tensor.split(counts) for tensor in vars(joined).values()), strict=True)
            for query, tensors, (classes, rows, _) in zip(queries, parts, chosen, strict=True):
                truth = GroundTruth.of(batched_inputs[query]["instances"], self.device)
                matches = Matches(*tensors)
                targets = self._targets(matches, anchors, truth, classes)
                yield LabelledMatches(query, classes, rows, matches, targets, anchors)

    def _targets(
        self, matches: Matches, anchors: Tensor, truth: GroundTruth, classes: Tensor
    ) -> Targets:
        """Targets of class images: an object counts for each image of its class."""
        image, box = (classes[:, None] == truth.classes).nonzero(as_tuple=True)
        of_images = GroundTruth(truth.boxes[box], image, truth.difficult[box])
        return self.objective.targets(matches.boxes, anchors, of_images)

    def _images_of(
        self, support: SupportFeatures, rows: list[int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The R class images of the classes at ``rows``: positions in ``rows``, rows and shots, each int64[R]."""
        row = torch.tensor(rows, dtype=torch.int64, device=self.device)
        classes, shot = support.tensors["valid"][row].nonzero(as_tuple=True)
        return classes, row[classes], shot

    def _features(self, images: list[Tensor]) -> Tensor:
        """The compared map of normalised images of one size as the matcher takes it, Tensor[N, C, H, W]."""
        batch = ImageList.from_tensors(images, self.backbone.size_divisibility)
        return unit_maps(self.backbone(batch.tensor)[self.feature])

    def _resized(self, image: Tensor, size: tuple[int, int]) -> Tensor:
        """Normalised pixels of an image (uint8[3, h, w]) at another size, with antialiasing."""
        pixels = image.to(self.device, torch.float32)
        if tuple(image.shape[1:]) != size:
            pixels = F.interpolate(pixels[None], size, mode="bilinear", antialias=True)[0]
            # As images of 8 bits are resized.
            pixels = pixels.round().clamp(0, 255)
        return self._normalized(pixels)
