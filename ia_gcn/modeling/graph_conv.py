"""Graph convolutions over labels."""

from __future__ import annotations

import math

import torch
from torch import nn


class GraphConv(nn.Module):
    """H⁽ˡ⁺¹⁾ = Â H⁽ˡ⁾ W⁽ˡ⁾ (IA-GCN Eq. 5 without its activation), no bias."""

    def __init__(self, in_dim: int, out_dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(in_dim, out_dim))
        # Published with ML-GCN; its scale goes by the output, not the input dimension.
        bound = 1 / math.sqrt(out_dim)
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, nodes: torch.Tensor, adjacency: torch.Tensor) -> torch.Tensor:
        """
        Args:
            nodes: H, (C, in_dim).
            adjacency: Â, (C, C).
        Returns:
            (C, out_dim).
        """
        return adjacency @ (nodes @ self.weight)

    def extra_repr(self) -> str:
        return "{}, {}".format(*self.weight.shape)
