"""From the queries' features to the labels' logits."""

from __future__ import annotations

import math

import torch
from torch import nn


class LabelReadout(nn.Module):
    """A linear classifier for each label, on the feature of the query that the label belongs to.

    Of K queries, each has a group of g = ⌈C / K⌉ labels: label j is the (j mod g)-th of query
    ⌊j / g⌋, which is ML-Decoder's group-wise layer. With K = C each label has a query of its own:
    the diagonal of a linear layer of all of them.

    Attributes:
        weight: (K, D, g). A last group that is not full leaves some of it unused.
        bias: (C,).
    """

    def __init__(self, num_labels: int, dim: int, num_queries: int | None = None):
        """
        Args:
            num_labels: C.
            dim: D.
            num_queries: K; None: C.
        """
        super().__init__()
        num_queries = num_queries or num_labels
        group_size = -(-num_labels // num_queries)
        bound = 1 / math.sqrt(dim)
        self.weight = nn.Parameter(torch.empty(num_queries, dim, group_size))
        self.bias = nn.Parameter(torch.empty(num_labels))
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    @property
    def group_size(self) -> int:
        """g."""
        return self.weight.shape[2]

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Features of the queries, (B, K, D), to logits (B, C)."""
        return self.of_labels(torch.einsum("bkd,kdg->bkg", features, self.weight)) + self.bias

    def of_labels(self, values: torch.Tensor) -> torch.Tensor:
        """Values of the groups' labels, (B, K, g, ...), as those of the labels, (B, C, ...)."""
        return values.flatten(1, 2)[:, : len(self.bias)]
