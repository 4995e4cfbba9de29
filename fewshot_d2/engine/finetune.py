"""Fine-tuning a detector on the supports of one episode, and undoing it (RepMet paper 5.2, spec 2.3)."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from detectron2.config import CfgNode
from detectron2.utils.events import EventStorage
from torch import nn

from ..modeling.detector import FewShotDetector
from ..structures import SupportFeatures, SupportSet


@dataclass(frozen=True)
class FineTuning:
    """How an episode is trained on.

    Attributes:
        layers (str): what is tuned besides the classes, see ``episode_tuner`` of the detector.
        epochs (int): passes over the support pictures, one picture a step.
        base_lr, momentum, weight_decay (float): of SGD, at a constant rate.
        seed (int): of the order of pictures and of the sampled ROIs.
    """

    layers: str
    epochs: int
    base_lr: float
    momentum: float
    weight_decay: float
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 0 or self.base_lr <= 0:
            raise ValueError(
                "FEWSHOT.FINETUNE.EPOCHS must be at least 0 and BASE_LR above 0, got "
                f"{self.epochs} and {self.base_lr}"
            )

    @classmethod
    def from_cfg(cls, cfg: CfgNode) -> "FineTuning":
        """Read FEWSHOT.FINETUNE."""
        node = cfg.FEWSHOT.FINETUNE
        return cls(
            layers=node.LAYERS,
            epochs=node.EPOCHS,
            base_lr=node.BASE_LR,
            momentum=node.MOMENTUM,
            weight_decay=node.WEIGHT_DECAY,
            seed=max(cfg.SEED, 0),
        )


@contextlib.contextmanager
def fine_tuned(
    model: FewShotDetector, support_set: SupportSet, tuning: FineTuning
) -> Iterator[SupportFeatures]:
    """Within the context ``model`` is tuned to the episode; afterwards its weights are what they were, bit by bit.

    Yields:
        The tuned features of the support set.

    Raises:
        ValueError: the detector is in training mode or cannot be fine-tuned.
        FloatingPointError: the tuned weights are not finite; such a detector would find nothing, and say nothing.
    """
    if model.training or not hasattr(model, "episode_tuner"):
        raise ValueError(
            f"fine-tuning needs a detector in inference mode with an episode_tuner, got "
            f"{type(model).__name__}, training={model.training}"
        )
    with torch.no_grad():
        features = model.encode_support([support_set])
    # ROIs are sampled at random; an episode must not depend on those before it, nor training on either.
    with EventStorage(), torch.random.fork_rng():
        torch.manual_seed(tuning.seed)
        tuner = model.episode_tuner(support_set, tuning.layers)
        with _restored(tuner.parameters()) as weights:
            yield _tuned_features(tuner, weights, features, tuning)


@contextlib.contextmanager
def _restored(weights: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    saved = [p.detach().clone() for p in weights]
    try:
        yield weights
    finally:
        with torch.no_grad():
            for parameter, old in zip(weights, saved, strict=True):
                parameter.copy_(old)
                parameter.grad = None


def _tuned_features(
    tuner: object, weights: list[nn.Parameter], features: SupportFeatures, tuning: FineTuning
) -> SupportFeatures:
    """SGD over the support pictures, on ``weights`` and on the floating tensors of ``features``."""
    episode = {name: t.clone() for name, t in features.tensors.items()}
    classes = [t.requires_grad_() for t in episode.values() if t.is_floating_point()]
    optimizer = torch.optim.SGD(
        [*weights, *classes],
        lr=tuning.base_lr,
        momentum=tuning.momentum,
        weight_decay=tuning.weight_decay,
    )
    with torch.enable_grad():
        for _ in range(tuning.epochs):
            for number in torch.randperm(len(tuner)).tolist():
                total = sum(tuner.losses(number, episode).values())
                # Not backward(): layers that are not tuned must not gather gradients.
                gradients = torch.autograd.grad(total, [*weights, *classes], allow_unused=True)
                for parameter, gradient in zip([*weights, *classes], gradients, strict=True):
                    parameter.grad = gradient
                optimizer.step()
    if not all(torch.isfinite(t).all() for t in [*weights, *classes]):
        raise FloatingPointError(
            f"fine-tuning on classes {features.class_ids} has diverged: FEWSHOT.FINETUNE.BASE_LR must be lower, "
            f"got {tuning.base_lr}"
        )
    return replace(features, tensors={name: t.detach() for name, t in episode.items()})
