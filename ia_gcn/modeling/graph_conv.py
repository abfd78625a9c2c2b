"""Graph convolutions over labels or regions."""

from __future__ import annotations

import math
from typing import Iterable, Tuple

import torch
import torch.nn.functional as F
from torch import nn

from .label_graph import propagate_scaled


class GraphConv(nn.Module):
    """Aᵀ (s ⊙ H) W: a graph convolution Â H W (IA-GCN Eq. 5) without activation and outer factor.

    Of Â = diag(s) Aᵀ diag(s) the outer s is missing. A (Leaky)ReLU lets it through, s being
    positive, and `graph_layers` merges it with the inner s of the next layer: of the nodes of every
    image, which take most of the memory, a layer then keeps one copy fewer. No bias.
    """

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
            lcm: A, (C, C) or (B, C, C).
            scale: s, (C,) or (B, C).
        Returns:
            (C, out_dim) or (B, C, out_dim).
        """
        in_dim, out_dim = self.weight.shape
        shared_by_images = nodes.dim() <= scale.dim()
        # The graph goes over the narrower side, but over no image's nodes that a product made for
        # all images would do for.
        if in_dim < out_dim and not shared_by_images:
            return propagate_scaled(nodes, lcm, scale) @ self.weight
        return propagate_scaled(nodes @ self.weight, lcm, scale)

    def scores(self, nodes, x, lcm, scale) -> torch.Tensor:
        """Aᵀ (s ⊙ (H (W x))): the scores of the classifiers Aᵀ (s ⊙ H) W without making them.

        Args:
            nodes: H, (C, in_dim) or (B, C, in_dim).
            x: (B, out_dim).
            lcm, scale: as in `forward`.
        Returns:
            (B, C).
        """
        projected = torch.einsum("...ck,...k->...c", nodes, x @ self.weight.T)
        return propagate_scaled(projected[..., None], lcm, scale)[..., 0]

    def extra_repr(self) -> str:
        return "{}, {}".format(*self.weight.shape)


def graph_layers(
    layers: Iterable[GraphConv],
    nodes: torch.Tensor,
    lcm: torch.Tensor,
    scale: torch.Tensor,
    negative_slope: float = 0.0,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """H ← f(Â H W) for each layer in turn, f a LeakyReLU, but for a factor.

    Args:
        layers: L of them.
        nodes, lcm, scale: H⁽⁰⁾, A and s, as `GraphConv` takes them.
        negative_slope: of f; 0 for a ReLU.
    Returns:
        G with H⁽ᴸ⁾ = s ⊙ G, or H⁽⁰⁾ itself if there is no layer;
        the factor with which G enters another layer: s ⊙ s, or s.
    """
    factor = scale
    for layer in layers:
        # What a layer returns is its own: overwritten, it is kept once for both passes.
        nodes = F.leaky_relu(layer(nodes, lcm, factor), negative_slope, inplace=True)
        factor = scale * scale
    return nodes, factor
