"""Feature reweighting (paper 3.2.3, spec A4): a graph of the supports of a class says how much each one counts.

K classes, S supports, F features of a node. Classes may have fewer supports than S: no edge leads to the missing ones.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# No edge of a node to itself, unless it has no other.
_NO_EDGE = 1e8


class LearnedAdjacency(nn.Module):
    """Edges by the difference of two nodes (eq. 9)."""

    def __init__(self, features: int, width: int, dropout: float):
        """Features of a node, least width nf of the layers, dropout after the first of them."""
        super().__init__()
        sizes = [features, 2 * width, 2 * width, width, width]
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in zip(sizes, sizes[1:], strict=False))
        self.dropout = nn.Dropout(dropout)
        self.last = nn.Linear(width, 1)

    def forward(self, nodes: Tensor, is_shot: Tensor) -> Tensor:
        """Nodes (Tensor[K, S, F]), of which some are there (bool[K, S]) -> Tensor[K, S, S], rows that sum to 1."""
        x = (nodes[:, :, None] - nodes[:, None]).abs()
        for number, layer in enumerate(self.layers):
            x = F.leaky_relu(layer(x))
            x = self.dropout(x) if number == 0 else x
        itself = torch.eye(nodes.shape[1], dtype=torch.bool, device=nodes.device)
        logits = self.last(x)[..., 0].float().masked_fill(itself, -_NO_EDGE)
        return logits.masked_fill(~is_shot[:, None], float("-inf")).softmax(dim=2)


class FeatureReweighting(nn.Module):
    """Blocks of graph convolutions (eq. 8), each of which adds its output to the features of the nodes."""

    def __init__(self, channels: int, *, blocks: int, width: int, dropout: float):
        """Channels of a support's pooled map, number L and width nf of the blocks."""
        super().__init__()
        sizes = [channels + number * (width // 2) for number in range(blocks + 1)]
        self.adjacencies = nn.ModuleList(LearnedAdjacency(f, width, dropout) for f in sizes)
        outputs = [*[width // 2] * blocks, 1]
        self.convolutions = nn.ModuleList(
            nn.Linear(2 * f, o) for f, o in zip(sizes, outputs, strict=True)
        )

    def forward(self, pooled: Tensor, is_shot: Tensor) -> Tensor:
        """Weights (Tensor[K, S], in (0, 1), 0 where there is no support) of pooled maps (Tensor[K, S, C])."""
        nodes, out = pooled, pooled[..., :0]
        for adjacency, convolution in zip(self.adjacencies, self.convolutions, strict=True):
            nodes = torch.cat([nodes, F.leaky_relu(out)], dim=2)
            neighbours = adjacency(nodes, is_shot).to(nodes.dtype) @ nodes
            out = convolution(torch.cat([nodes, neighbours], dim=2))
        return out[..., 0].sigmoid() * is_shot
