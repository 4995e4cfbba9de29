"""How supports enhance one map of the query (paper 3.2.1, 3.2.2; spec A3, A5).

N queries, K classes, S supports, P (query, class) pairs; C,H,W query map, h,w support map, D = C / 2. Maps as tokens
are Tensor[..., H * W, channels].
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .reweighting import FeatureReweighting

SIMILARITIES = ("gap", "image", "global")


class PooledFusion(nn.Module):
    """The baseline (eq. 3): the mean of the pooled supports is added everywhere."""

    def encode(self, maps: Tensor, is_shot: Tensor) -> dict[str, Tensor]:
        """Support maps (Tensor[K, S, C, h, w]), of which some are there (bool[K, S]) -> {"vector": Tensor[K, C]}."""
        return {"vector": torch.einsum("ksc,ks->kc", maps.mean(dim=(3, 4)), uniform(is_shot))}

    def describe(self, features: Tensor) -> dict[str, Tensor]:
        """What is worth computing once a query: nothing but the map (Tensor[N, C, H, W])."""
        return {"map": features}

    def forward(
        self, query: dict[str, Tensor], support: dict[str, Tensor], is_shot: Tensor
    ) -> Tensor:
        """Enhanced map, Tensor[P, C, H, W]; everything is row by pair."""
        return query["map"] + support["vector"][:, :, None, None]


class SimilarityFusion(nn.Module):
    """The spatial similarity module with the weights of its supports (eq. 4 to 6 and 11).

    Attention is never whole in memory, which is exact.
    """

    def __init__(
        self,
        channels: int,
        *,
        dropout: float,
        is_global: bool,
        reweighting: FeatureReweighting | None,
        normalize_weights: bool,
        temperature: float = 0.0,
    ):
        """Build the four convolutions; the last one is zero, so that at first the query is left as it is.

        Args:
            channels: C. dropout: of the output. is_global: one softmax over all supports (eq. 6).
            reweighting: gives the weights; None = supports count alike.
            normalize_weights: whether weights are divided by their sum.
            temperature: 0 = attention by products (eq. 4); else by cosines, divided by this, of projections that start
                alike, so that a cell first attends to what looks like it.
        """
        super().__init__()
        half = channels // 2
        self.theta, self.phi, self.g = (nn.Conv2d(channels, half, 1) for _ in range(3))
        if temperature:
            self.phi.load_state_dict(self.theta.state_dict())
        self.out = nn.Linear(half, channels)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        self.dropout = nn.Dropout(dropout)
        self.is_global, self.reweighting = is_global, reweighting
        self.normalize_weights, self.by_cosines = normalize_weights, temperature > 0
        self.attention_scale = 1 / temperature if temperature else half**-0.5

    def encode(self, maps: Tensor, is_shot: Tensor) -> dict[str, Tensor]:
        """What does not depend on a query.

        Args:
            maps (Tensor[K, S, C, h, w]): of the supports. is_shot (bool[K, S]): which of them are there.

        Returns:
            {"keys": Tensor[K, S, h * w, D], "values": the same, "weights": Tensor[K, S]}.
        """
        weights = uniform(is_shot)
        if self.reweighting is not None:
            weights = self.reweighting(maps.mean(dim=(3, 4)), is_shot)
        if self.normalize_weights:
            # Sigmoids may all be as good as zero, and gradients of a division by still less would overflow.
            weights = weights.float()
            weights = weights / weights.sum(dim=1, keepdim=True).clamp(min=1e-12)
        keys, values = (
            _tokens(conv(maps.flatten(0, 1))).unflatten(0, is_shot.shape)
            for conv in (self.phi, self.g)
        )
        if self.by_cosines:
            keys = F.normalize(keys, dim=-1)
        return {"keys": keys, "values": values, "weights": weights}

    def describe(self, features: Tensor) -> dict[str, Tensor]:
        """What is worth computing once a query: the map (Tensor[N, C, H, W]) and its "theta" (Tensor[N, H * W, D])."""
        theta = _tokens(self.theta(features))
        if self.by_cosines:
            theta = F.normalize(theta, dim=-1)
        return {"map": features, "theta": theta}

    def forward(
        self, query: dict[str, Tensor], support: dict[str, Tensor], is_shot: Tensor
    ) -> Tensor:
        """Enhanced map, Tensor[P, C, H, W]; everything is row by pair."""
        features, weights = query["map"], support["weights"]
        keys, values, mask = support["keys"], support["values"], None
        if self.is_global:
            mask = is_shot.repeat_interleave(keys.shape[2], dim=1)[:, None, None]
            mask = None if is_shot.all() else mask
            keys, values = keys.flatten(1, 2)[:, None], values.flatten(1, 2)[:, None]
            weights = weights.new_ones(len(weights), 1)
        added = self.added(query["theta"], keys, values, weights, mask)
        total = weights.sum(dim=1)[:, None, None, None]
        return total * features + added.transpose(1, 2).view_as(features)

    def added(
        self, theta: Tensor, keys: Tensor, values: Tensor, weights: Tensor, mask: Tensor | None
    ) -> Tensor:
        """What supports add to the query's tokens: Tensor[P, H * W, C].

        Args:
            theta (Tensor[P, H * W, D]), keys, values (Tensor[P, S, h * w, D]), weights (Tensor[P, S]).
            mask (bool[P, 1, 1, h * w] or None): support tokens that are there.
        """
        theta = theta[:, None].expand(-1, keys.shape[1], -1, -1)
        attended = F.scaled_dot_product_attention(
            theta, keys, values, attn_mask=mask, scale=self.attention_scale
        )
        return self.weighted(attended, weights)

    def weighted(self, attended: Tensor, weights: Tensor) -> Tensor:
        """The sum over supports (Tensor[P, H * W, C]) of attended tokens (Tensor[P, S, H * W, D])."""
        similar = self.dropout(self.out(F.relu(standardized(attended))))
        return torch.einsum("ps,psqc->pqc", weights, similar)

    def attention(self, theta: Tensor, keys: Tensor) -> Tensor:
        """The attention itself, which ``added`` never has in memory, for pictures: Tensor[P, S, H * W, h * w].

        It sums to 1 over each support, or over all of them where attention is global.

        Args:
            theta (Tensor[P, H * W, D]), keys (Tensor[P, S, h * w, D]).
        """
        logits = theta[:, None] @ keys.transpose(2, 3) * self.attention_scale
        if not self.is_global:
            return logits.softmax(dim=-1)
        return (
            logits.movedim(1, 2)
            .flatten(2)
            .softmax(dim=-1)
            .unflatten(2, keys.shape[1:3])
            .movedim(2, 1)
        )


def standardized(tokens: Tensor) -> Tensor:
    """Tokens without mean and by their unbiased deviation, over the last axis (spec A3, 4)."""
    deviation, mean = torch.std_mean(tokens.float(), dim=-1, keepdim=True)
    return (tokens - mean) / (deviation + 1e-6)


def uniform(is_shot: Tensor) -> Tensor:
    """Weights of a mean over the supports that are there, Tensor[K, S]."""
    return is_shot / is_shot.sum(dim=1, keepdim=True)


def _tokens(maps: Tensor) -> Tensor:
    # Attention wants the channels of a token side by side.
    return maps.flatten(2).transpose(1, 2).contiguous()
