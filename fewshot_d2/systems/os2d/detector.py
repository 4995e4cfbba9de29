"""The detector of OS2D: class images and queries through one backbone, matched densely (paper 3).

N queries, K classes, S shots, R class images of a chunk, n = H W places of a map.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
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
from .class_images import ClassImages, LabelledMatches
from .detections import Candidates, Merging
from .matchers import AlignedMatcher, Matches, WindowMatcher, unit_maps
from .objective import Objective
from .patches import hard_patches
from .scales import Scales, Size
from .targets import GroundTruth

MATCHERS = ("aligned", "window")


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
        class_step: int,
        **kwargs: Any,
    ):
        """Add to the shell.

        Args:
            matcher: an ``AlignedMatcher`` or a ``WindowMatcher``. feature: map of the backbone that it compares.
            scales, objective, merging: how images are resized, what is learned, what becomes of all boxes.
            is_backbone_norm_frozen: batch norms of the backbone keep their statistics in training.
            patch_size: side in pixels of the patches of ``hard_patches``.
            class_step: in training, sides of class images are multiples of it; 0 = not.

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
        self.patch_size, self.class_step = patch_size, class_step

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
            "class_step": node.TRAIN_CLASS_STEP,
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
        of_size = defaultdict(list)
        for number, crop in enumerate(crops):
            of_size[self._class_size(tuple(crop.shape[1:]))].append(number)
        shape = len(classes), max(map(len, classes), default=1)
        places = [k * shape[1] + s for k, shots in enumerate(classes) for s in range(len(shots))]
        tensors: dict[str, Tensor] = {}
        for size, numbers in of_size.items():
            for start in range(0, len(numbers), self.pairs_per_chunk):
                chosen = numbers[start : start + self.pairs_per_chunk]
                index = torch.tensor([places[i] for i in chosen], device=self.device)
                for name, values in self._encoded([crops[i] for i in chosen], size).items():
                    if name not in tensors:
                        tensors[name] = values.new_zeros(shape[0] * shape[1], *values.shape[1:])
                    tensors[name].index_copy_(0, index, values)
        tensors = {name: values.unflatten(0, shape) for name, values in tensors.items()}
        return self.support_features(tensors, support_sets)

    def _encoded(self, crops: list[Tensor], size: Size) -> dict[str, Tensor]:
        """Tensors (each Tensor[B, ...]) of B class images (uint8[3, h, w]) resized to one size."""
        images = torch.stack([self._resized(crop, size) for crop in crops])
        encoded = self.matcher.encode(self.backbone(images)[self.feature], size)
        areas = [crop.shape[1] * crop.shape[2] for crop in crops]
        return {
            **encoded,
            "sizes": images.new_tensor(areas).sqrt(),
            "valid": images.new_ones(len(crops)),
        }

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
        waiting, found = Candidates.none(self.device), [Candidates.none(self.device)]
        for images, classes, levels in self._searched(query, support, rows):
            new = [
                self.merging.candidates(matches, classes, images, size, original)
                for matches, _, size in levels
            ]
            joined = Candidates.cat([waiting, *new])
            # Merged at once, so that of many classes only detections are kept; the last one may have further images.
            is_last = joined.classes == classes[-1]
            found.append(self.merging.survivors(joined[~is_last]))
            waiting = joined[is_last]
        found.append(self.merging.survivors(waiting))
        return self.merging.detections(Candidates.cat(found), original)

    @torch.no_grad()
    def score_maps(self, query: dict[str, Any], support: SupportFeatures) -> list[Tensor]:
        """Scores of all R class images on each level, before boxes are merged: Tensor[R, H, W] a level."""
        chunks = [
            [matches.scores.unflatten(1, shape) for matches, shape, _ in levels]
            for _, _, levels in self._searched(query, support, list(range(len(support))))
        ]
        return [torch.cat(parts) for parts in zip(*chunks, strict=True)]

    def explain(self, query: dict[str, Any], support: SupportFeatures) -> dict[str, Tensor]:
        """The first class's best scores on each level, Tensor[H, W]; where they come from: ``pred_corners``."""
        maps = self.score_maps(query, support[[0]])
        levels = zip(self.scales.pyramid, maps, strict=True)
        return {f"score, level {level:g}": scores.amax(dim=0) for level, scores in levels}

    def _searched(
        self, query: dict[str, Any], support: SupportFeatures, rows: list[int]
    ) -> Iterator[tuple[Tensor, Tensor, list[tuple[Matches, Size, Size]]]]:
        """A chunk of class images at a time: their numbers, their classes, and on each level matches and two sizes.

        The sizes are those of the map and of the image.
        """
        found = ClassImages.of(support.tensors["valid"].cpu(), rows)
        row, shot = found.rows.to(self.device), found.shots.to(self.device)
        exemplars = support.tensors["sizes"][row, shot].tolist()
        given, original = tuple(query["image"].shape[1:]), (query["height"], query["width"])
        sizes = self.scales.levels(given, original, exemplars)
        maps = [self._features([self._resized(query["image"], size)]) for size in sizes]
        classes, numbers = found.classes.to(self.device), torch.arange(len(row), device=self.device)
        for chunk in numbers.split(self.pairs_per_chunk) if len(row) else ():
            images = {n: support.tensors[n][row[chunk], shot[chunk]] for n in self.matcher.tensors}
            levels = [
                (self.matcher(images, features, [len(chunk)]), tuple(features.shape[2:]), size)
                for features, size in zip(maps, sizes, strict=True)
            ]
            yield chunk, classes[chunk], levels

    def losses(
        self, batched_inputs: list[dict[str, Any]], support: SupportFeatures, pairs: Pairs
    ) -> dict[str, Tensor]:
        """Losses of a batch, whose queries may differ in size; each is searched for its own classes."""
        _, number = torch.tensor(support.class_ids).unique(return_inverse=True)
        matched = list(self._matched(batched_inputs, support, pairs))
        return self.objective.losses(
            [of_query.matches for of_query in matched],
            [of_query.targets for of_query in matched],
            [of_query.anchors for of_query in matched],
            [number[of_query.rows] for of_query in matched],
        )

    def hard_patches(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Tensor]]:
        """Patches of each query around places with a loss (spec 1.14); see ``patches.hard_patches``.

        Queries are searched at the size that they have, a chunk of class images at a time; class positions are those
        of their own supports.
        """
        was_training = self.training
        self.eval()
        with torch.no_grad():
            support, pairs = self.gather_supports(batched_inputs)
            valid = support.tensors["valid"].cpu()
            results = [
                self._hard_patches(x, support, ClassImages.of(valid, pairs.rows_of(query)))
                for query, x in enumerate(batched_inputs)
            ]
        self.train(was_training)
        return results

    def _hard_patches(
        self, x: dict[str, Any], support: SupportFeatures, images: ClassImages
    ) -> dict[str, Tensor]:
        """Those of one query."""
        features = self._features([self._normalized(x["image"].to(self.device))])
        size, parts = tuple(x["image"].shape[1:]), []
        for chunk in images.split(self.pairs_per_chunk):
            (found,) = self._labelled([x], features, [chunk], support)
            arguments = found.matches, found.targets, found.anchors, chunk.classes.to(self.device)
            sides = {"image_size": size, "patch_size": self.patch_size}
            parts.append(hard_patches(self.objective, *arguments, **sides))
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _matched(
        self, batched_inputs: list[dict[str, Any]], support: SupportFeatures, pairs: Pairs
    ) -> Iterator[LabelledMatches]:
        """Each query with its own classes and ground truth; those of one size pass the matcher together."""
        of_size = defaultdict(list)
        for query, x in enumerate(batched_inputs):
            of_size[tuple(x["image"].shape[1:])].append(query)
        valid = support.tensors["valid"].cpu()
        for queries in of_size.values():
            inputs = [batched_inputs[query] for query in queries]
            features = self._features(
                [self._normalized(x["image"].to(self.device)) for x in inputs]
            )
            chosen = [ClassImages.of(valid, pairs.rows_of(query)) for query in queries]
            yield from self._labelled(inputs, features, chosen, support)

    def _labelled(
        self,
        inputs: list[dict[str, Any]],
        features: Tensor,
        chosen: list[ClassImages],
        support: SupportFeatures,
    ) -> Iterator[LabelledMatches]:
        """Queries of one size, by their maps (Tensor[N, C, H, W]), with the class images chosen for each of them."""
        anchors = geometry.anchors(tuple(features.shape[2:]), self.device)
        counts = [len(images.rows) for images in chosen]
        most = support.tensors["valid"].shape[1]
        # One axis: the gradient is added up without sorting, as it would be for two indices.
        index = torch.cat([images.rows * most + images.shots for images in chosen]).to(self.device)
        tensors = {
            n: support.tensors[n].flatten(0, 1).index_select(0, index) for n in self.matcher.tensors
        }
        joined = self.matcher(tensors, features, counts)
        parts = zip(*(tensor.split(counts) for tensor in vars(joined).values()), strict=True)
        for x, of_query, images in zip(inputs, parts, chosen, strict=True):
            truth = GroundTruth.of(x["instances"], images.classes).to(self.device)
            matches = Matches(*of_query)
            targets = self.objective.targets(matches.boxes, anchors, truth)
            yield LabelledMatches(images.rows, matches, targets, anchors)

    def _class_size(self, size: Size) -> Size:
        """Of a class image, (height, width)."""
        return self.scales.class_image(size, self.class_step if self.training else 0)

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
