"""A gated recurrent network over the labels of a graph.

B, C and K are the numbers of images, labels and node dimensions.
"""

from __future__ import annotations

import torch
from torch import nn


class GatedGraph(nn.Module):
    """A gated graph network (Li et al., ICLR 2016) over the labels, as SSGRL and SALGL have it.

    In each step, a label's message m is the sum of the other labels' states h, weighted by its row
    of the graph A, beside the sum weighted by its column, and a gated unit updates its state:

        m = A h ‖ Aᵀ h                    or, in one direction, A h
        z = σ(W_z m + U_z h)
        r = σ(W_r m + U_r h)
        h ← (1 - z) ⊙ h + z ⊙ tanh(W_h m + U_h (r ⊙ h))

    Every W and U has a bias.
    """

    def __init__(self, dim: int, steps: int, both_directions: bool = True):
        """
        Args:
            dim: K.
            steps: 0 or more.
            both_directions: whether messages go against the edges, too.
        """
        super().__init__()
        self.steps = steps
        self.both_directions = both_directions
        message_dim = 2 * dim if both_directions else dim
        self.update_message = nn.Linear(message_dim, dim)
        self.update_state = nn.Linear(dim, dim)
        self.reset_message = nn.Linear(message_dim, dim)
        self.reset_state = nn.Linear(dim, dim)
        self.new_message = nn.Linear(message_dim, dim)
        self.new_state = nn.Linear(dim, dim)

    def forward(self, nodes: torch.Tensor, adjacency: torch.Tensor) -> torch.Tensor:
        """
        Args:
            nodes: h at the start, (B, C, K).
            adjacency: A, (C, C) or (B, C, C).
        Returns:
            h after the last step, (B, C, K).
        """
        for _ in range(self.steps):
            messages = propagate(adjacency, nodes)
            if self.both_directions:
                messages = torch.cat([messages, propagate(adjacency.mT, nodes)], dim=2)
            update = (self.update_message(messages) + self.update_state(nodes)).sigmoid()
            reset = (self.reset_message(messages) + self.reset_state(nodes)).sigmoid()
            new = (self.new_message(messages) + self.new_state(reset * nodes)).tanh()
            nodes = (1 - update) * nodes + update * new
        return nodes


def propagate(adjacency: torch.Tensor, nodes: torch.Tensor) -> torch.Tensor:
    """A h: (C, C) or (B, C, C) and (B, C, K) to (B, C, K)."""
    # With a graph for all images an einsum is one matrix product; matmul's gradient is B×C×C.
    return torch.einsum("...ij,...jk->...ik", adjacency, nodes)
