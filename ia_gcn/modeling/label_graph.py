"""The statistical label correlation matrix (LCM), its normalisation, and the module that holds it.

C is the number of labels, d the dimension of a label embedding.
"""

from __future__ import annotations

import logging

import numpy as np
import torch
from torch import nn

from ..errors import InputError

logger = logging.getLogger(__name__)


def statistical_lcm(pair_counts, label_counts, threshold: float = 0.4, reweight: float = 0.25):
    """The statistical LCM A_S, as the published ML-GCN weights were trained with.

    With P[i, j] = P(j|i) = pair_counts[i, j] / label_counts[i] and P[i, i] = 0, an edge is 1 where
    P >= τ and 0 elsewhere; then A_S = p · P / (Σᵢ P + 1e-6) + I, each column scaled by its own sum.
    (ML-GCN's Eq. 7-8 scale rows and weigh the diagonal 1 - p instead.)

    Args:
        pair_counts: (C, C) array or tensor; [i, j] is the number of training images with both
            labels. The diagonal is not looked at.
        label_counts: (C,) of the same kind; number of training images with label i. 0 is fine:
            such a label has no edge out.
        threshold: τ, in (0, 1].
        reweight: p, the sum of a column off the diagonal where it has an edge.
    Returns:
        (C, C), numpy or torch as pair_counts, float64 for integer counts, else of their dtype.
    Raises:
        ValueError: τ outside (0, 1], or shapes that do not fit.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold must be in (0, 1], got {threshold}")
    if isinstance(pair_counts, np.ndarray):
        counts = torch.tensor(pair_counts), torch.tensor(label_counts)
        return statistical_lcm(*counts, threshold, reweight).numpy()
    if label_counts.ndim != 1 or pair_counts.shape != 2 * label_counts.shape:
        raise ValueError(
            f"pair_counts {tuple(pair_counts.shape)} and label_counts "
            f"{tuple(label_counts.shape)} do not fit"
        )
    dtype = pair_counts.dtype if pair_counts.is_floating_point() else torch.float64
    conditional = pair_counts.to(dtype) / label_counts.to(dtype).clamp(min=1)[:, None]
    edges = (conditional >= threshold).to(dtype).fill_diagonal_(0)
    edges = reweight * edges / (edges.sum(dim=0) + 1e-6)
    return edges.fill_diagonal_(1)


def normalize_adjacency(adjacency):
    """Â = D^-½ Aᵀ D^-½ with D = diag(Σⱼ A[i, j]), as published with ML-GCN.

    Args:
        adjacency: A, (C, C) array or tensor of non-negative floats. A row that sums to 0 stays 0.
    Returns:
        Â, (C, C) of the same kind and dtype.
    """
    if isinstance(adjacency, np.ndarray):
        return normalize_adjacency(torch.tensor(adjacency)).numpy()
    degree = adjacency.sum(dim=1)
    scale = torch.where(degree > 0, degree, torch.inf).rsqrt()
    return scale[:, None] * adjacency.T * scale


class LabelGraph(nn.Module):
    """What a model knows about its labels before it sees an image: statistics and embeddings.

    They are buffers, so a checkpoint is complete in itself. A graph is *bare* until `fill` or a
    checkpoint fills it in: it then has no edges and random embeddings, enough to count a model's
    parameters or to time it.

    Attributes:
        label_counts: (C,) int64, training images with label i.
        pair_counts: (C, C) int64, training images with labels i and j.
        embeddings: (C, d) float32, H⁽⁰⁾.
        adjacency: (C, C) float32, Â of the statistical LCM; follows from the counts.
    """

    def __init__(self, num_labels: int, embedding_dim: int, threshold: float, reweight: float):
        """
        Args:
            num_labels: C.
            embedding_dim: d.
            threshold, reweight: τ and p of `statistical_lcm`.
        """
        super().__init__()
        if not 0 < threshold <= 1:
            raise InputError(f"MODEL.LABEL_GRAPH.THRESHOLD must be in (0, 1], not {threshold}")
        self.threshold = threshold
        self.reweight = reweight
        generator = torch.Generator().manual_seed(0)
        embeddings = torch.randn(num_labels, embedding_dim, generator=generator)
        self.register_buffer("label_counts", torch.zeros(num_labels, dtype=torch.int64))
        self.register_buffer("pair_counts", torch.zeros(num_labels, num_labels, dtype=torch.int64))
        self.register_buffer("embeddings", embeddings)
        self.register_buffer("adjacency", torch.eye(num_labels), persistent=False)
        self._known_filled = False
        self._warned = False

    @property
    def is_bare(self) -> bool:
        """Whether nothing was filled in: a training set has at least one label somewhere."""
        return not bool(self.label_counts.any())

    @torch.no_grad()
    def fill(self, label_counts, pair_counts, embeddings) -> None:
        """Take the statistics (C,), (C, C) and the embeddings (C, d), arrays or tensors.

        Raises:
            ValueError: a shape is not the graph's; nothing is taken then.
        """
        values = {
            "label_counts": label_counts,
            "pair_counts": pair_counts,
            "embeddings": embeddings,
        }
        for name, value in values.items():
            expected = tuple(getattr(self, name).shape)
            if tuple(value.shape) != expected:
                raise ValueError(f"{name}: expected shape {expected}, got {tuple(value.shape)}")
        for name, value in values.items():
            value = torch.tensor(value) if isinstance(value, np.ndarray) else value
            getattr(self, name).copy_(value)
        self._update_adjacency()

    def check_filled(self) -> None:
        """Refuse to train a bare graph, and say once that it is bare in evaluation.

        Raises:
            RuntimeError: the module is in training mode and bare.
        """
        if self._known_filled:
            return
        if not self.is_bare:
            self._known_filled = True
        elif self.training:
            raise RuntimeError(
                "the label graph is bare: call LabelGraph.fill, as ia_gcn.engine.Trainer does, or "
                "load a checkpoint before training"
            )
        elif not self._warned:
            logger.warning(
                "The label graph is bare (no edges, random embeddings): the scores mean nothing."
            )
            self._warned = True

    def _update_adjacency(self) -> None:
        lcm = statistical_lcm(self.pair_counts, self.label_counts, self.threshold, self.reweight)
        self.adjacency.copy_(normalize_adjacency(lcm))

    def _load_from_state_dict(self, *args, **kwargs):
        super()._load_from_state_dict(*args, **kwargs)
        self._update_adjacency()
        self._known_filled = False

    def extra_repr(self) -> str:
        num_labels, embedding_dim = self.embeddings.shape
        return f"labels={num_labels}, dim={embedding_dim}, τ={self.threshold}, p={self.reweight}"
