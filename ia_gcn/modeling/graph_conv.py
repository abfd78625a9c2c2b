"""Graph convolutions over labels or regions."""

from __future__ import annotations

import math

import torch
from torch import nn

from .label_graph import propagate


class GraphConv(nn.Module):
    """H⁽ˡ⁺¹⁾ = Â H⁽ˡ⁾ W⁽ˡ⁾ (IA-GCN Eq. 5 without its activation), no bias."""

    def __init__(self, in_dim: int, out_dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(in_dim, out_dim))
        # Published with ML-GCN; its scale goes by the output, not the input dimension.
        bound = 1 / math.sqrt(out_dim)
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, nodes: torch.Tensor, lcm: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """
        Args:
            nodes: H, (C, in_dim) or (B, C, in_dim).
            lcm, scale: A and s, Â = diag(s) Aᵀ diag(s); see `propagate`.
        Returns:
            (C, out_dim) or (B, C, out_dim).
        """
        in_dim, out_dim = self.weight.shape
        shared_by_images = nodes.dim() <= scale.dim()
        # The graph goes over the narrower side, but over no image's nodes that a product made for
        # all images would do for.
        if in_dim < out_dim and not shared_by_images:
            return propagate(nodes, lcm, scale) @ self.weight
        return propagate(nodes @ self.weight, lcm, scale)

    def scores(self, nodes, x, lcm, scale) -> torch.Tensor:
        """Â (H (W x)): the scores of the classifiers Â H W without making them.

        Args:
            nodes: H, (C, in_dim) or (B, C, in_dim).
            x: (B, out_dim).
            lcm, scale: as in `forward`.
        Returns:
            (B, C).
        """
        projected = torch.einsum("...ck,...k->...c", nodes, x @ self.weight.T)
        return propagate(projected[..., None], lcm, scale)[..., 0]

    def extra_repr(self) -> str:
        return "{}, {}".format(*self.weight.shape)
