"""Graphs over labels with learned edges: the same ones for all images, or each image's own.

B, C, K and G are the numbers of images, labels, node dimensions and context dimensions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import InputError

# Of every LeakyReLU of ADD-GCN and TDRG.
NEGATIVE_SLOPE = 0.2


class StaticGraph(nn.Module):
    """f(f(A V) W): a graph A over the labels that is a parameter (ADD-GCN's static graph).

    f is a LeakyReLU; W has a bias.
    """

    def __init__(self, num_labels: int, node_dim: int):
        """
        Args:
            num_labels, node_dim: C and K.
        """
        super().__init__()
        self.adjacency = nn.Linear(num_labels, num_labels, bias=False)
        self.transform = nn.Linear(node_dim, node_dim)

    def forward(self, nodes: torch.Tensor) -> torch.Tensor:
        """V (B, C, K) to (B, C, K)."""
        mixed = torch.einsum("ij,bjk->bik", self.adjacency.weight, nodes)
        return F.leaky_relu(self.transform(F.leaky_relu(mixed, NEGATIVE_SLOPE)), NEGATIVE_SLOPE)


class DynamicGraph(nn.Module):
    """f(f(Aᵀ V) W): a graph A over the labels that follows from each image (ADD-GCN, TDRG).

    An image's context x becomes g = f(batch norm(W_g x)), and the edge from label i to label j is
    A_ij = σ(w_iᵀ (g ‖ v_j) + b_i). f is a LeakyReLU; W_g and W have a bias.
    """

    def __init__(self, num_labels: int, node_dim: int, context_dim: int):
        """
        Args:
            num_labels, node_dim, context_dim: C, K and G.
        """
        super().__init__()
        self.context = nn.Linear(context_dim, context_dim)
        self.norm = nn.BatchNorm1d(context_dim)
        self.edges = nn.Linear(context_dim + node_dim, num_labels)
        self.transform = nn.Linear(node_dim, node_dim)

    def adjacency(self, nodes: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """A, (B, C, C); arguments as those of `forward`."""
        if self.training and len(context) < 2:
            raise InputError(
                "SOLVER.IMS_PER_BATCH: the dynamic graph has a batch norm over the images, and "
                "is trained on two or more at once (in each process, and in each of the parts of "
                "SOLVER.ACCUMULATE_STEPS)"
            )
        context = F.leaky_relu(self.norm(self.context(context)), NEGATIVE_SLOPE)
        # w_iᵀ (g ‖ v_j) in two parts: g is the same for all j.
        of_context, of_nodes = self.edges.weight.split([context.shape[1], nodes.shape[2]], dim=1)
        scores = F.linear(context, of_context, self.edges.bias)[:, :, None]
        return (scores + torch.einsum("ik,bjk->bij", of_nodes, nodes)).sigmoid()

    def forward(self, nodes: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """
        Args:
            nodes: V, (B, C, K).
            context: x of each image, (B, G).
        Returns:
            (B, C, K).
        Raises:
            InputError: a batch of one image in training, which the batch norm can't have.
        """
        mixed = self.adjacency(nodes, context).mT @ nodes
        return F.leaky_relu(self.transform(F.leaky_relu(mixed, NEGATIVE_SLOPE)), NEGATIVE_SLOPE)
