"""The label graph's formulas with the matrices written out."""

import numpy as np
import torch


def dense_normalized(adjacency):
    """D^-½ Aᵀ D^-½ with the matrices written out."""
    degrees = adjacency.sum(axis=1)
    root = np.diag([0.0 if degree == 0 else degree**-0.5 for degree in degrees])
    return root @ adjacency.T @ root


def dense_fused(lcm, presence):
    """Â_F of one image with the matrices written out: A_I = a aᵀ, A_F = A_S ⊙ A_I, normalised.

    Of tensors, so that autograd goes through; lcm (C, C), presence (C,) or None for a = 1.
    """
    presence = lcm.new_ones(len(lcm)) if presence is None else presence
    fused = lcm * torch.outer(presence, presence)
    degrees = fused.sum(dim=1)
    empty = degrees == 0
    root = torch.diag(degrees.masked_fill(empty, 1).pow(-0.5).masked_fill(empty, 0))
    return root @ fused.T @ root


def assert_close(actual, expected, tolerance=1e-10):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
