"""Searching the training images for patches with a high loss (OS2D spec 1.14), as a hook of the trainer.

A model that can be mined has ``hard_patches(batched_inputs)``: for each query with ``instances`` and
``support_features`` a dict of tensors with ``boxes`` (float[M, 4], XYXY in pixels of the query tensor, which they may
leave), ``losses`` (float[M]), ``kind`` (int[M], position in ``KINDS``) and ``classes`` (int[M], of the episode).
"""

import logging
import time
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.evaluation import inference_context
from detectron2.utils import comm
from torch import Tensor, nn
from torchvision.ops import batched_nms

from ..data.episodes import Episode
from ..data.loaders import EpisodicTrainLoader
from ..data.patch_pool import KINDS, HardPatch, MinedEpisodes, PatchPool
from ..structures import SupportFeatures

logger = logging.getLogger(__name__)

_FIELDS = ("boxes", "losses", "kind", "classes")


class HardPatchMining(HookBase):
    """After every PERIOD iterations write a new pool and let the loader begin anew with it."""

    def __init__(self, cfg: CfgNode, model: nn.Module, loader: EpisodicTrainLoader):
        """Take the model itself, not what several processes wrap it in.

        Raises:
            ValueError: the model cannot be mined.
        """
        if not hasattr(model, "hard_patches"):
            raise ValueError(
                f"FEWSHOT.MINING needs a model with hard_patches, got {type(model).__name__}"
            )
        self.node, self.model, self.loader = cfg.FEWSHOT.MINING, model, loader
        self.episodes: MinedEpisodes = loader.episodes

    def after_step(self) -> None:
        """Mine if it is due; the last iteration needs no pool any more."""
        iteration = self.trainer.iter + 1
        if iteration % self.node.PERIOD or iteration >= self.trainer.max_iter:
            return
        start = time.perf_counter()
        gathered = comm.gather(self.mine(iteration))
        if comm.is_main_process():
            pool = PatchPool(iteration, tuple(patch for part in gathered for patch in part))
            path = pool.save(self.episodes.folder)
            counts = {kind: sum(p.kind == kind for p in pool.patches) for kind in KINDS}
            logger.info("%s: %s in %.0f s", path, counts, time.perf_counter() - start)
        comm.synchronize()
        self.loader.restart()

    def mine(self, iteration: int) -> list[HardPatch]:
        """The patches of this process's share of the images, image after image; the model is in inference mode."""
        rng = np.random.default_rng((self.episodes.seed, iteration, 7))
        images = self.episodes.images
        if 0 < self.node.IMAGES < len(images):
            images = sorted(rng.choice(images, self.node.IMAGES, replace=False).tolist())
        pool = self.episodes.class_ids
        number = min(self.node.NUM_CLASSES, len(pool))
        others = rng.choice(pool, number, replace=False).tolist()
        scales = rng.uniform(*self.node.SCALES, (len(images), self.node.NUM_SCALES))
        features: dict[int, SupportFeatures] = {}
        patches: list[HardPatch] = []
        with inference_context(self.model), torch.no_grad():
            for i in range(comm.get_rank(), len(images), comm.get_world_size()):
                classes = self._searched(images[i], others)
                parts = [self._encoded(class_id, iteration, features) for class_id in classes]
                encoded = SupportFeatures.cat(parts)
                patches += self._of_image(images[i], classes, encoded, scales[i].tolist())
        return patches

    def _searched(self, image_index: int, others: Iterable[int]) -> list[int]:
        """The image's own classes, then the drawn ones."""
        usable = set(self.episodes.class_ids)
        own = [c for c in self.episodes.factory.query_index.classes_in(image_index) if c in usable]
        return [*own, *(c for c in others if c not in own)]

    def _encoded(
        self, class_id: int, iteration: int, features: dict[int, SupportFeatures]
    ) -> SupportFeatures:
        """Features of one class, whose examples are drawn and encoded once in a search."""
        if class_id not in features:
            factory, mapper = self.episodes.factory, self.episodes.mapper
            key = (self.episodes.seed, iteration, class_id, 8)
            places = factory.support_index.draw_support(
                np.random.default_rng(key), class_id, self.episodes.num_shots
            )
            episode = factory.build(0, (class_id,), [places], key=key, episode_id=0)
            features[class_id] = self.model.encode_support([mapper.support_set(episode)]).to("cpu")
        return features[class_id]

    def _of_image(
        self,
        image_index: int,
        classes: list[int],
        encoded: SupportFeatures,
        scales: Iterable[float],
    ) -> list[HardPatch]:
        """Patches of one image at all scales; one that cannot be read has none."""
        episode = self.episodes.factory.build(
            image_index, tuple(classes), [], key=(0,), episode_id=image_index
        )
        found = []
        for scale in scales:
            try:
                query = self.episodes.mapper.scaled(episode, scale)
            except ValueError as error:
                logger.error("Not mined: %s", error)
                return []
            (result,) = self.model.hard_patches([{**query, "support_features": encoded}])
            found.append(_in_original_pixels(_checked(result, len(classes)), query))
        joined = {name: torch.cat([part[name] for part in found]) for name in _FIELDS}
        return self._worst(joined, episode)

    def _worst(self, found: Mapping[str, Tensor], episode: Episode) -> list[HardPatch]:
        kept = worst_patches(
            found["boxes"],
            found["losses"],
            found["kind"],
            nms_iou=self.node.NMS_IOU,
            number=self.node.KEPT,
        )
        return [
            HardPatch(
                image_id=episode.query["image_id"],
                class_id=episode.class_ids[int(found["classes"][i])],
                window=tuple(found["boxes"][i].round().long().tolist()),
                loss=float(found["losses"][i]),
                kind=KINDS[int(found["kind"][i])],
            )
            for i in kept.tolist()
        ]


def worst_patches(
    boxes: Tensor, losses: Tensor, kind: Tensor, *, nms_iou: float, number: int
) -> Tensor:
    """The patches with the highest losses that do not overlap a worse one of their kind too much.

    Args:
        boxes (float[M, 4]), losses (float[M]), kind (int[M]): M patches. nms_iou: largest overlap.
        number: patches a kind.

    Returns:
        int[at most number x kinds]: their positions, kind after kind, the worst first. A loss of 0 is none.
    """
    order = losses.argsort(descending=True, stable=True)
    order = order[losses[order] > 0]
    # Many anchors and classes propose one and the same window.
    rows = torch.cat([boxes, kind[:, None].to(boxes)], dim=1)[order].numpy()
    first = np.sort(np.unique(rows, axis=0, return_index=True)[1])
    order = order[torch.from_numpy(first)]
    kept = order[batched_nms(boxes[order], losses[order], kind[order], nms_iou)]
    parts = [kept[kind[kept] == k][:number] for k in range(len(KINDS))]
    return torch.cat(parts)


def _checked(result: Mapping[str, Tensor], num_classes: int) -> dict[str, Tensor]:
    """The tensors on the CPU, if they fit each other."""
    tensors = {name: result[name].detach().float().cpu() for name in _FIELDS}
    lengths = {name: len(tensor) for name, tensor in tensors.items()}
    classes, kind = tensors["classes"], tensors["kind"]
    if len(set(lengths.values())) > 1 or tensors["boxes"].shape[1:] != (4,):
        raise ValueError(f"hard_patches must give M boxes XYXY, losses, ..., got {lengths}")
    for name, values, limit in (("classes", classes, num_classes), ("kind", kind, len(KINDS))):
        if len(values) and not 0 <= values.min() <= values.max() < limit:
            raise ValueError(f"hard_patches must give {name} in 0..{limit - 1}, got others")
    if not all(torch.isfinite(tensor).all() for tensor in tensors.values()):
        raise ValueError("hard_patches must give finite boxes and losses, got others")
    return tensors


def _in_original_pixels(result: dict[str, Tensor], query: Mapping[str, Any]) -> dict[str, Tensor]:
    height, width = query["image"].shape[1:]
    scale = torch.tensor([query["width"] / width, query["height"] / height] * 2)
    return {**result, "boxes": result["boxes"] * scale}
