"""Label nodes: from a feature map to one vector per label, which a graph over labels then mixes.

B, C, D, d and K are the numbers of images, labels, feature channels, embedding dimensions and node
dimensions.
"""

from __future__ import annotations

from typing import Tuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from .pooling import masked_softmax

# How many labels `SemanticAttention` scores together. Their products with every cell are the
# largest tensors of it.
LABELS_AT_ONCE = 16


def class_activation(scores: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """M = σ(scores): how much of each label every cell shows.

    Args:
        scores: of the labels in every cell, (B, C, H, W).
        mask: (B, 1, H, W) bool, or None for all.
    Returns:
        (B, C, H, W) in [0, 1]; 0 where the mask is false.
    """
    activation = scores.sigmoid()
    return activation if mask is None else activation.masked_fill(~mask, 0)


def activation_nodes(activation: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """V = M F: a label's node is the sum of the cells' features, weighted by its activation there
    (the semantic attention module of ADD-GCN).

    As published it is a sum and no mean: the larger the image, the larger the nodes.

    Args:
        activation: M of `class_activation`, (B, C, H, W).
        features: F, (B, K, H, W).
    Returns:
        (B, C, K).
    """
    return torch.einsum("bcp,bkp->bck", activation.flatten(2), features.flatten(2))


class SemanticAttention(nn.Module):
    """Attention of each label's embedding to the cells of a map, by low-rank bilinear products
    (the semantic decoupling of SSGRL; SALGL).

    A cell x and a label's embedding e have the score a = wᵀ W₃ tanh((W₁ x) ⊙ (W₂ e)); a label's
    node is the mean of the cells weighted by the softmax of its scores.

    Nothing stands between W₃ and w but the biases of the two layers, which are the same for all
    cells and cancel in the softmax: they are left out, and wᵀ W₃ is multiplied first. That is
    exact, and instead of a product of B·C·HW vectors with a matrix there is one with a vector.
    """

    def __init__(self, feature_dim: int, embedding_dim: int, hidden_dim: int):
        """
        Args:
            feature_dim, embedding_dim: D and d.
            hidden_dim: of the products.
        """
        super().__init__()
        self.of_cells = nn.Linear(feature_dim, hidden_dim, bias=False)
        self.of_labels = nn.Linear(embedding_dim, hidden_dim, bias=False)
        self.hidden = nn.Linear(hidden_dim, hidden_dim, bias=False)
        self.score = nn.Linear(hidden_dim, 1, bias=False)

    def forward(
        self, features: torch.Tensor, embeddings: torch.Tensor, mask: torch.Tensor | None
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            features: (B, D, H, W).
            embeddings: e, (C, d).
            mask: (B, 1, H, W) bool, or None for all.
        Returns:
            the nodes, (B, C, D), and the weights of the cells, (B, C, H, W).
        """
        tokens = features.flatten(2).mT
        cells, labels = self.of_cells(tokens), self.of_labels(embeddings)
        weight = (self.score.weight @ self.hidden.weight)[0]
        # Of some labels at a time, and computed again for the gradient: the products of all labels
        # with all cells would be the largest tensor of a training.
        score = _checkpointed if self.training else _scores
        scores = [score(cells, part, weight) for part in labels.split(LABELS_AT_ONCE)]
        scores = torch.cat(scores, dim=1).unflatten(2, features.shape[2:])
        attention = masked_softmax(scores, mask)
        return attention.flatten(2) @ tokens, attention


def _scores(cells: torch.Tensor, labels: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """(B, P, K), (C, K) and (K,) to (B, C, P)."""
    return (cells[:, None] * labels[:, None]).tanh() @ weight


def _checkpointed(*tensors: torch.Tensor) -> torch.Tensor:
    return checkpoint(_scores, *tensors, use_reentrant=False)
