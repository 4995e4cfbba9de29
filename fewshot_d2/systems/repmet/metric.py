"""The head of RepMet: embedding, representatives and posteriors (paper 3, spec 1.1-1.4).

Shapes: R ROIs, C features of the box head, D embedding, N trained classes, K classes of an episode, M modes.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.structures import Instances
from torch import Tensor, nn

from ...modeling.metric_learning import (
    detection_posteriors,
    hard_triplet_losses,
    margin_losses,
    squared_distances,
)
from ...structures import cat_padded
from .predictors import EpisodicOutputLayers

CLASS_LOSSES = ("softmax", "literal")
SCORES = ("softmax", "posterior")
MARGIN_UNITS = ("squared_distance", "distance")
# Inside the logarithm of the literal loss (spec 1.3, step 7).
_EPSILON = 1e-7


class MetricScores(NamedTuple):
    """What the head of RepMet says of R ROIs.

    Attributes:
        embeddings (Tensor[R, D]): of any length.
        distances (Tensor[R, K', M]): squared, to the modes of all classes that compete.
        auxiliary (Tensor[R, N + 1] or None): logits of the linear classifier, for the trained classes only.
        num_searched (int): K, the first of the K' classes; the others are never reported.
    """

    embeddings: Tensor
    distances: Tensor
    auxiliary: Tensor | None
    num_searched: int


class RepMetOutputLayers(EpisodicOutputLayers):
    """Embedding, representatives, posteriors (paper 3, spec 1.1-1.4); ``cls_score`` is the auxiliary classifier."""

    @configurable
    def __init__(
        self,
        input_shape: ShapeSpec,
        *,
        embedding_dim: int,
        num_modes: int,
        sigma: float,
        score_scale: float,
        class_loss: str,
        score: str,
        margin: float,
        margin_on: str,
        margin_weight: float,
        auxiliary_weight: float,
        support_modes: int,
        keep_base: bool,
        **kwargs: Any,
    ):
        """Add the values of MODEL.REPMET, see ``config``."""
        super().__init__(input_shape, **kwargs)
        for key, value, allowed in (
            ("CLASS_LOSS", class_loss, CLASS_LOSSES),
            ("SCORE", score, SCORES),
            ("MARGIN_ON", margin_on, MARGIN_UNITS),
        ):
            if value not in allowed:
                raise ValueError(f"REPMET.{key} must be one of {allowed}, got {value!r}")
        if sigma <= 0 or num_modes < 1 or embedding_dim < 0:
            raise ValueError(
                "REPMET.SIGMA must be above 0, NUM_MODES at least 1 and EMBEDDING_DIM at least 0, got "
                f"{sigma}, {num_modes} and {embedding_dim}"
            )
        self.sigma, self.score_scale, self.margin = sigma, score_scale, margin
        self.class_loss, self.score, self.margin_on = class_loss, score, margin_on
        self.margin_weight, self.auxiliary_weight = margin_weight, auxiliary_weight
        self.support_modes, self.keep_base = support_modes, keep_base
        dim = self.cls_score.in_features
        if embedding_dim:
            self.embedding = nn.Linear(dim, embedding_dim)
            nn.init.normal_(self.embedding.weight, std=0.01)
            nn.init.zeros_(self.embedding.bias)
            dim = embedding_dim
        # C_i + O_j: each class has its place, and the modes of all classes lie around it in the same way (spec 1.2).
        places, offsets = 0.1 * torch.randn(self.num_classes, 1, dim), torch.randn(num_modes, dim)
        self.representatives = nn.Parameter(places + 0.05 * offsets)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        """Read the keys."""
        node, parts = cfg.MODEL.REPMET, super().from_config(cfg, input_shape)
        class_weight, margin_weight, auxiliary_weight = node.LOSS_WEIGHTS
        return {
            **parts,
            "loss_weight": {**parts["loss_weight"], "loss_cls": class_weight},
            "margin_weight": margin_weight,
            "auxiliary_weight": auxiliary_weight,
            "embedding_dim": node.EMBEDDING_DIM,
            "num_modes": node.NUM_MODES,
            "sigma": node.SIGMA,
            "score_scale": node.SCORE_SCALE,
            "class_loss": node.CLASS_LOSS,
            "score": node.SCORE,
            "margin": node.MARGIN,
            "margin_on": node.MARGIN_ON,
            "support_modes": node.SUPPORT_MODES,
            "keep_base": node.KEEP_BASE,
        }

    def forward(
        self, x: Tensor, episode: dict[str, Tensor] | None = None
    ) -> tuple[MetricScores, Tensor]:
        """X (Tensor[R, C]) -> scores of the trained or the episode's classes, box deltas (Tensor[R, 4])."""
        x = x.flatten(start_dim=1)
        embeddings, deltas = self.embedding(x), self.bbox_pred(x)
        if episode is None:
            distances = squared_distances(embeddings, self.representatives)
            scores = MetricScores(embeddings, distances, self.cls_score(x), self.num_classes)
            return scores, deltas
        rivals = [episode, self._rivals(episode)] if self.keep_base else [episode]
        modes, filled = (
            cat_padded([e[name] for e in rivals]) for name in ("representatives", "filled")
        )
        distances = squared_distances(embeddings, modes, filled)
        return MetricScores(embeddings, distances, None, len(episode["filled"])), deltas

    def background_label(self, scores: MetricScores) -> int:
        """K', the number of classes that compete."""
        return scores.distances.shape[1]

    def class_losses(self, scores: MetricScores, labels: Tensor) -> Tensor:
        """Cross-entropy of the softmax of the scaled posteriors, or the literal one (spec 1.3)."""
        posteriors = detection_posteriors(scores.distances, self.sigma)
        if self.class_loss == "literal":
            return -(posteriors.gather(1, labels[:, None])[:, 0] + _EPSILON).log()
        return F.cross_entropy(self.score_scale * posteriors, labels, reduction="none")

    def other_losses(
        self, scores: MetricScores, labels: Tensor, weights: Tensor, foreground: Tensor
    ) -> dict[str, Tensor]:
        """Margin loss of the foreground and, for trained classes, the auxiliary classifier's."""
        distances = scores.distances
        if self.margin_on == "distance":
            distances = distances.clamp(min=1e-12).sqrt()
        # Background has no mode to be near to, and a class without modes is infinitely far: no weight undoes that.
        on_object = foreground > 0
        margins = margin_losses(distances[on_object], labels[on_object], self.margin)
        losses = {"loss_margin": (margins * foreground[on_object]).sum() * self.margin_weight}
        if scores.auxiliary is not None:
            auxiliary = F.cross_entropy(scores.auxiliary, labels, reduction="none")
            losses["loss_auxiliary"] = (auxiliary * weights).sum() * self.auxiliary_weight
        return losses

    def probabilities(self, scores: MetricScores) -> Tensor:
        """Tensor[R, K + 1]: softmax of the scaled posteriors, or the posteriors."""
        posteriors = detection_posteriors(scores.distances, self.sigma)
        if self.score == "softmax":
            posteriors = (self.score_scale * posteriors).softmax(dim=1)
        return torch.cat([posteriors[:, : scores.num_searched], posteriors[:, -1:]], dim=1)

    def trained_tensors(self) -> dict[str, Tensor]:
        """The trained classes as an episode's: {"representatives": Tensor[N, M, D], "filled": bool Tensor[N, M]}."""
        filled = torch.ones(
            self.representatives.shape[:2], dtype=torch.bool, device=self.representatives.device
        )
        return {"representatives": self.representatives, "filled": filled}

    def _rivals(self, episode: dict[str, Tensor]) -> dict[str, Tensor]:
        """The trained classes but those that the episode searches itself: none may compete with itself."""
        trained = self.trained_tensors()
        modes, searched = trained["representatives"], episode["representatives"]
        is_free = torch.ones(len(modes), dtype=torch.bool, device=modes.device)
        if searched.shape[1] >= modes.shape[1]:
            same = searched[:, None, : modes.shape[1]] == modes
            is_free = ~same.flatten(start_dim=2).all(dim=2).any(dim=0)
        return {name: tensor[is_free] for name, tensor in trained.items()}

    def episode_tensors(self, rois: list[Tensor], num_shots: list[int]) -> dict[str, Tensor]:
        """Every ROI is a mode of its class; where there are too many, their clusters are (spec 2.1).

        Args:
            rois (list[Tensor[Rk, C]]): the ROIs of each of the K classes; none leaves the class without a mode.
            num_shots: of each class; twice as many modes are allowed, and MODEL.REPMET.SUPPORT_MODES at least.

        Returns:
            {"representatives": Tensor[K, M, D], "filled": bool Tensor[K, M]}, M the most modes a class has.
        """
        modes = []
        for x, shots in zip(rois, num_shots, strict=True):
            embeddings = F.normalize(self.embedding(x), dim=1)
            limit = max(self.support_modes, 2 * shots)
            modes.append(embeddings if len(embeddings) < limit else cluster(embeddings, limit))
        ones = [torch.ones(1, len(m), dtype=torch.bool, device=m.device) for m in modes]
        return {
            "representatives": cat_padded([m[None] for m in modes]),
            "filled": cat_padded(ones),
        }


def cluster(embeddings: Tensor, num_clusters: int) -> Tensor:
    """Centres (Tensor[num_clusters, D]) of k-means on embeddings (Tensor[R, D], R >= num_clusters)."""
    # Slow to import, and only clustering needs it.
    from sklearn.cluster import KMeans

    points = embeddings.detach().cpu().double().numpy()
    centres = KMeans(num_clusters, n_init=10, random_state=0).fit(points).cluster_centers_
    return torch.from_numpy(centres).to(embeddings)


class ExternalOutputLayers(RepMetOutputLayers):
    """An embedding trained by triplets of ROIs on a finished detector (baseline-DML-external, paper 5.2).

    Nothing else is trained; start from the weights of baseline-FT.
    """

    trains_embedding_only = True

    def losses(
        self, predictions: tuple[MetricScores, Tensor], proposals: list[Instances]
    ) -> dict[str, Tensor]:
        """Batch-hard triplets of the trained classes' ROIs; the losses of an episode are those of RepMet."""
        scores, _ = predictions
        if scores.auxiliary is None:
            return super().losses(predictions, proposals)
        labels = torch.cat([p.gt_classes for p in proposals])
        background = self.background_label(scores)
        triplets = hard_triplet_losses(scores.embeddings, labels, self.margin, background)
        # A batch without a pair still has a gradient, of zero.
        return {
            "loss_triplet": triplets.sum() / max(len(triplets), 1) + 0 * scores.embeddings.sum()
        }
