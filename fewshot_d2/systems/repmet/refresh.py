"""Representatives by k-means while training (spec 1.2): what the recovered original configuration does every epoch."""

from typing import Any

import torch
import torch.distributed as dist
from detectron2.engine import HookBase
from detectron2.structures import pairwise_iou
from detectron2.utils import comm
from torch import Tensor

from .metric import cluster

RULES = ("none", "first_epoch", "every_epoch")
# Ground-truth objects of each class that are wanted, and least IoU of a proposal with one (original code).
_OBJECTS_A_CLASS, _LEAST_IOU = 200, 0.7


class RefreshRepresentatives(HookBase):
    """Before an epoch, the clusters of what proposals on each class embed to become its representatives.

    Classes with fewer such proposals than modes keep what they have (the original sets them to zero). Whatever the
    optimizer has gathered stays.
    """

    def __init__(self, model: Any, images: Any, *, batch_size: int, rule: str):
        """Take what trains.

        Args:
            model (RepMet): with representatives. images (TrainingImages): numbered, in epochs.
            batch_size: of all processes. rule: "first_epoch" or "every_epoch".

        Raises:
            ValueError: the model has no representatives or training has no epochs of base images.
        """
        if not hasattr(model.predictor, "representatives") or not hasattr(images, "epoch_of"):
            raise ValueError(
                "REPMET.KMEANS must be 'none' unless CLASSIFIER is 'representatives' and FEWSHOT.TRAIN_ON "
                f"'base_images', got {rule!r}"
            )
        self.model, self.images, self.batch_size, self.rule = model, images, batch_size, rule

    def before_step(self) -> None:
        """Refresh where an epoch begins; a run that is resumed there does the same."""
        first = self.trainer.iter * self.batch_size
        epoch = self.images.epoch_of(first)
        is_new = first == 0 or self.images.epoch_of(first - self.batch_size) != epoch
        if is_new and (first == 0 or self.rule == "every_epoch"):
            self.refresh(first)

    @torch.no_grad()
    def refresh(self, first: int) -> None:
        """Cluster embeddings of the epoch's images from number ``first`` on, until there are enough."""
        modes = self.model.predictor.representatives
        gathered: list[list[Tensor]] = [[] for _ in modes]
        num_objects = [0] * len(modes)
        self.model.eval()
        number = first
        while min(num_objects) < _OBJECTS_A_CLASS and (
            self.images.epoch_of(number) == self.images.epoch_of(first)
        ):
            for label, embeddings in self._embeddings_on_objects(self.images[number]):
                gathered[label].append(embeddings)
                num_objects[label] += 1
            number += 1
        self.model.train()
        for label, parts in enumerate(gathered):
            if sum(len(part) for part in parts) >= modes.shape[1]:
                modes[label] = cluster(torch.cat(parts), modes.shape[1])
        if comm.get_world_size() > 1:
            # Replicas must stay one model, and clusters may differ much where embeddings differ in their last bit.
            dist.broadcast(modes.data, src=0)

    def _embeddings_on_objects(self, query: dict[str, Any]) -> list[tuple[int, Tensor]]:
        """(label, Tensor[R, D]) of every object that proposals cover."""
        (described,) = self.model.describe_queries([query])
        truth = query["instances"].to(self.model.device)
        covering = pairwise_iou(truth.gt_boxes, described.proposals.proposal_boxes) >= _LEAST_IOU
        embeddings = torch.nn.functional.normalize(
            self.model.predictor.embedding(described.x), dim=1
        )
        return [
            (label, embeddings[on_object])
            for label, on_object in zip(truth.gt_classes.tolist(), covering, strict=True)
            if on_object.any()
        ]
