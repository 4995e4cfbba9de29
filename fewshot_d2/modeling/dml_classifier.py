"""RepMet's classifier: distance metric learning with several representatives a class (paper 3, 4.1, eq. 4 and 5).

Shapes: B images, N classes, M modes a class (the paper's K), F features of the backbone, D dimensions of the embedding.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from torch import Tensor, nn
from torchvision import models

from ..checkpoint import load_weights
from .metric_learning import margin_losses, mixture_log_posteriors, squared_distances

# Heads of Inception and GoogLeNet whose losses the paper does not have.
_AUXILIARY_HEADS = ("AuxLogits", "aux1", "aux2")


class PooledBackbone(nn.Module):
    """A classification model without its last layer, as ``bottom_up``, for which the solver has keys of its own."""

    def __init__(self, bottom_up: nn.Module, num_features: int):
        """Take a model that returns Tensor[B, F] and F."""
        super().__init__()
        self.bottom_up, self.num_features = bottom_up, num_features

    def forward(self, images: Tensor) -> Tensor:
        """Images (Tensor[B, 3, H, W], normalised) -> features (Tensor[B, F])."""
        return self.bottom_up(images)


def torchvision_pooled(name: str, weights: str) -> PooledBackbone:
    """A torchvision classifier without its last fully connected layer and without auxiliary heads.

    Raises:
        ValueError: the model is unknown, does not end in such a layer, or its weights do not fit.
    """
    try:
        model = models.get_model(name, weights=None)
    except ValueError as error:
        raise ValueError(f"MODEL.DML.BACKBONE must be a torchvision model: {error}") from error
    load_weights(model, weights)
    for head in _AUXILIARY_HEADS:
        if hasattr(model, head):
            setattr(model, head, None)
            model.aux_logits = False
    linears = [path for path, m in model.named_modules() if isinstance(m, nn.Linear)]
    if not linears:
        raise ValueError(f"MODEL.DML.BACKBONE must end in a fully connected layer, got {name}")
    parent, _, last = linears[-1].rpartition(".")
    num_features = model.get_submodule(linears[-1]).in_features
    setattr(model.get_submodule(parent), last, nn.Identity())
    return PooledBackbone(model, num_features)


def timm_pooled(name: str, weights: str) -> PooledBackbone:
    """A timm classifier without its last layer; needs the extra ``timm``."""
    import timm

    model = timm.create_model(name, pretrained=False)
    load_weights(model, weights)
    model.reset_classifier(0)
    # Some models widen their features once more behind the pooling.
    return PooledBackbone(model, getattr(model, "head_hidden_size", None) or model.num_features)


_LIBRARIES = {"torchvision": torchvision_pooled, "timm": timm_pooled}


@META_ARCH_REGISTRY.register()
class DMLClassifier(nn.Module):
    """A closed-set classifier whose classes are mixtures in a learned embedding.

    1. Backbone -> F pooled features.
    2. Embedding module: FC, batch norm, ReLU, FC; L2-normalised (paper 4.1).
    3. Squared distances to all representatives -> posteriors of eq. 5.

    Training sums their cross-entropy and the margin of eq. 4, as the paper does; a known PyTorch re-implementation has
    the margin alone (``loss_weights`` (0, 1)).
    """

    @configurable
    def __init__(
        self,
        *,
        backbone: PooledBackbone,
        num_classes: int,
        num_modes: int,
        hidden_dim: int,
        embedding_dim: int,
        sigma: float,
        margin: float,
        loss_weights: tuple[float, float],
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
    ):
        """Build the embedding module and random representatives.

        Args:
            backbone: gives Tensor[B, F].
            num_classes, num_modes: N and M. hidden_dim, embedding_dim: width of the first layer, and D.
            sigma: width of a mode. margin: alpha of eq. 4, in squared distances.
            loss_weights: of the cross-entropy and of the margin.
            pixel_mean, pixel_std: of the three channels, in the mapper's order.
        """
        super().__init__()
        if num_classes < 2 or num_modes < 1:
            raise ValueError(
                "MODEL.DML.NUM_CLASSES must be at least 2 and NUM_MODES at least 1, got "
                f"{num_classes} and {num_modes}"
            )
        self.backbone = backbone
        self.embedding = nn.Sequential(
            nn.Linear(backbone.num_features, hidden_dim),
            nn.BatchNorm1d(hidden_dim),
            nn.ReLU(),
            nn.Linear(hidden_dim, embedding_dim),
        )
        # Random unit vectors, in high dimensions all about as far from each other: no class starts with neighbours.
        modes = torch.randn(num_classes, num_modes, embedding_dim)
        self.representatives = nn.Parameter(F.normalize(modes, dim=-1))
        self.sigma, self.margin, self.loss_weights = sigma, margin, loss_weights
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), False)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Read the keys."""
        node = cfg.MODEL.DML
        if node.LIBRARY not in _LIBRARIES:
            raise ValueError(
                f"MODEL.DML.LIBRARY must be of {tuple(_LIBRARIES)}, got {node.LIBRARY!r}"
            )
        return {
            "backbone": _LIBRARIES[node.LIBRARY](node.BACKBONE, node.WEIGHTS),
            "num_classes": node.NUM_CLASSES,
            "num_modes": node.NUM_MODES,
            "hidden_dim": node.HIDDEN_DIM,
            "embedding_dim": node.EMBEDDING_DIM,
            "sigma": node.SIGMA,
            "margin": node.MARGIN,
            "loss_weights": tuple(node.LOSS_WEIGHTS),
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
        }

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """Losses in training, results of each image in inference.

        Args:
            batched_inputs: B dicts with ``image`` (Tensor[3, S, S], 0..255) and, in training, ``label`` (0..N-1).

        Returns:
            ``{"loss_cls", "loss_margin"}``, or B dicts with ``log_posteriors`` (Tensor[N]) and ``embedding``
            (Tensor[D], a unit vector).
        """
        embeddings = self.embed(self.preprocess(batched_inputs))
        distances = squared_distances(embeddings, self.representatives)
        if self.training:
            labels = [x["label"] for x in batched_inputs]
            return self.losses(distances, torch.tensor(labels, device=distances.device))
        rows = zip(mixture_log_posteriors(distances, self.sigma), embeddings, strict=True)
        return [{"log_posteriors": log_p, "embedding": embedding} for log_p, embedding in rows]

    def preprocess(self, batched_inputs: list[dict[str, Any]]) -> Tensor:
        """Stack and normalise: Tensor[B, 3, S, S]."""
        images = torch.stack([x["image"] for x in batched_inputs]).to(self.pixel_mean.device)
        return (images - self.pixel_mean) / self.pixel_std

    def embed(self, images: Tensor) -> Tensor:
        """Normalised images (Tensor[B, 3, S, S]) -> unit vectors (Tensor[B, D])."""
        return F.normalize(self.embedding(self.backbone(images)), dim=1)

    def losses(self, distances: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Means over the batch of eq. 5's cross-entropy and of eq. 4, weighted.

        Args:
            distances (Tensor[B, N, M]): squared. labels (Tensor[B]): 0..N-1.
        """
        class_weight, margin_weight = self.loss_weights
        log_posteriors = mixture_log_posteriors(distances, self.sigma)
        return {
            "loss_cls": class_weight * F.nll_loss(log_posteriors, labels),
            "loss_margin": margin_weight * margin_losses(distances, labels, self.margin).mean(),
        }
