"""Label correlation matrices (LCMs) of a data set and of an image, and propagation along them.

B is the number of images, C of labels, d the dimension of a label embedding.
"""

from __future__ import annotations

import logging

import numpy as np
import torch
from torch import nn

from ..errors import InputError
from ..memory import check_memory

logger = logging.getLogger(__name__)

# Of an LCM, what is computed at once: some tens of megabytes.
PAIRS_AT_ONCE = 2_000_000
# What a graph takes for each pair of labels: its two buffers, and the counts that fill one of them.
BYTES_OF_A_PAIR = 12


def statistical_lcm(
    pair_counts, label_counts, threshold: float = 0.4, reweight: float = 0.25, out=None
):
    """The statistical LCM A_S, as the published ML-GCN weights were trained with.

    With P[i, j] = P(j|i) = pair_counts[i, j] / label_counts[i] and P[i, i] = 0, an edge is 1 where
    P >= τ and 0 elsewhere; then A_S = p · P / (Σᵢ P + 1e-6) + I, each column scaled by its own sum.
    (ML-GCN's Eq. 7-8 scale rows and weigh the diagonal 1 - p instead.) With τ = 0 there is no
    threshold and an edge is P itself, as ML-AGCN has it.

    Args:
        pair_counts: (C, C) array or tensor; [i, j] is the number of training images with both
            labels. The diagonal is ignored.
        label_counts: (C,) of the same kind; number of training images with label i. 0 is fine:
            such a label has no edge out.
        threshold: τ, in [0, 1].
        reweight: p, the sum of a column off the diagonal where it has an edge.
        out: a tensor (C, C) to write the result to, of any dtype; with tensors alone.
    Returns:
        (C, C), numpy or torch as pair_counts, float64 for integer counts, else of their dtype.
    Raises:
        ValueError: τ outside [0, 1], or shapes that do not fit.
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold must be in [0, 1], got {threshold}")
    if isinstance(pair_counts, np.ndarray):
        counts = torch.tensor(pair_counts), torch.tensor(label_counts)
        return statistical_lcm(*counts, threshold, reweight).numpy()
    if label_counts.ndim != 1 or pair_counts.shape != 2 * label_counts.shape:
        raise ValueError(
            f"pair_counts {tuple(pair_counts.shape)} and label_counts "
            f"{tuple(label_counts.shape)} do not fit"
        )
    dtype = pair_counts.dtype if pair_counts.is_floating_point() else torch.float64
    lcm = torch.empty_like(pair_counts, dtype=dtype) if out is None else out
    counts = label_counts.to(dtype).clamp(min=1)[:, None]
    # No column depends on another one.
    step = max(1, PAIRS_AT_ONCE // max(1, len(counts)))
    for start in range(0, len(counts), step):
        columns = slice(start, start + step)
        edges = pair_counts[:, columns] / counts
        if threshold:
            edges = edges >= threshold
        edges.diagonal(-start).fill_(0)
        weights = reweight / (edges.sum(dim=0).to(dtype) + 1e-6)
        lcm[:, columns] = edges * weights
    return lcm.fill_diagonal_(1)


def graph_scale(lcm: torch.Tensor, presence: torch.Tensor | None = None) -> torch.Tensor:
    """s = √(a / (A a)), the vector that normalises a graph A, or A ⊙ a aᵀ.

    Individual and fused LCM (IA-GCN Eq. 1-4) are A_I = a aᵀ and A_F = A_S ⊙ A_I, which is
    diag(a) A_S diag(a). Normalised as published with ML-GCN, Â = D^-½ Aᵀ D^-½ with
    D = diag(Σⱼ A[i, j]), that is Â_F = diag(s) A_Sᵀ diag(s): a vector per image is enough, and no
    C×C matrix per image is ever formed. With a = 1 it is A_S that is normalised, and s = D^-½.

    Args:
        lcm: A, (C, C) or (B, C, C), non-negative.
        presence: a, (C,) or (B, C) in [0, 1]. None: 1 everywhere.
    Returns:
        s, (C,) or (B, C), of A's dtype; 0 where a or the degree A a is 0.
    """
    if presence is None:
        presence = lcm.new_ones(lcm.shape[:-1])
    with torch.autocast(lcm.device.type, enabled=False):
        presence = presence.to(lcm.dtype)
        degree = torch.einsum("...ij,...j->...i", lcm, presence)
        # The square root has no gradient at 0.
        connected = (presence > 0) & (degree > 0)
        ratio = torch.where(connected, presence, 1) / torch.where(connected, degree, 1)
        return torch.where(connected, ratio.sqrt(), 0)


def propagate(nodes: torch.Tensor, lcm: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Â H = s ⊙ (Aᵀ (s ⊙ H)), with s from `graph_scale`.

    Args:
        nodes: H, (C, K) or (B, C, K).
        lcm: A, (C, C) or (B, C, C).
        scale: s, (C,) or (B, C).
    Returns:
        (C, K), or (B, C, K) if anything is of B images.
    """
    return scale[..., None] * propagate_scaled(nodes, lcm, scale)


def propagate_scaled(nodes: torch.Tensor, lcm: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Aᵀ (s ⊙ H), arguments and shape as those of `propagate`."""
    # An einsum of a (C, C) with a (B, C, K) is one matrix product; matmul may copy it B times.
    return torch.einsum("...ij,...ik->...jk", lcm, scale[..., None] * nodes)


class LabelGraph(nn.Module):
    """Label embeddings and label statistics of the training set.

    They are buffers, so a checkpoint is complete in itself. A graph is *bare* until `fill` or a
    checkpoint fills it in: it then has no edges and random embeddings, enough to count a model's
    parameters or to time it.

    Attributes:
        label_counts: (C,) int64, training images with label i.
        pair_counts: (C, C) int32, training images with labels i and j.
        embeddings: (C, d) float32, H⁽⁰⁾.
        lcm: (C, C) float32, the statistical LCM A_S; follows from the counts.
    """

    def __init__(
        self,
        num_labels: int,
        embedding_dim: int,
        threshold: float = 0.4,
        reweight: float = 0.25,
        *,
        statistics: bool = True,
    ):
        """
        Args:
            num_labels: C.
            embedding_dim: d.
            threshold, reweight: τ and p of `statistical_lcm`.
            statistics: False for the embeddings alone, without anything of C×C.
        Raises:
            InputError: τ outside [0, 1], or there is not enough memory for the statistics.
        """
        super().__init__()
        if not 0 <= threshold <= 1:
            raise InputError(f"MODEL.LABEL_GRAPH.THRESHOLD must be in [0, 1], not {threshold}")
        self.threshold = threshold
        self.reweight = reweight
        generator = torch.Generator().manual_seed(0)
        embeddings = torch.randn(num_labels, embedding_dim, generator=generator)
        self.has_statistics = statistics
        if statistics:
            check_memory(
                BYTES_OF_A_PAIR * num_labels**2,
                "MODEL.LABEL_HEAD.NAME: a head with a label graph, of all pairs of "
                f"{num_labels} labels,",
            )
            counts = torch.zeros(num_labels, num_labels, dtype=torch.int32)
            self.register_buffer("label_counts", torch.zeros(num_labels, dtype=torch.int64))
            self.register_buffer("pair_counts", counts)
            self.register_buffer("lcm", torch.eye(num_labels), persistent=False)
        self.register_buffer("embeddings", embeddings)
        self._known_filled = False
        self._warned = False

    @property
    def is_bare(self) -> bool:
        """Whether nothing was filled in: a training set has at least one label somewhere."""
        if self.has_statistics:
            return not bool(self.label_counts.any())
        return not self._known_filled

    @torch.no_grad()
    def fill(self, label_counts, pair_counts, embeddings) -> None:
        """Take the statistics (C,), (C, C) and the embeddings (C, d), arrays or tensors.

        A graph without statistics takes None for them.

        Raises:
            ValueError: a shape is not the graph's; nothing is taken then.
        """
        values = {"embeddings": embeddings}
        if self.has_statistics:
            values.update(label_counts=label_counts, pair_counts=pair_counts)
        for name, value in values.items():
            expected = tuple(getattr(self, name).shape)
            if tuple(value.shape) != expected:
                raise ValueError(f"{name}: expected shape {expected}, got {tuple(value.shape)}")
        for name, value in values.items():
            if isinstance(value, np.ndarray):
                # torch warns of arrays that can't be written to.
                value = torch.from_numpy(np.require(value, requirements="W"))
            getattr(self, name).copy_(value)
        self._update()

    def conditional_probabilities(self) -> torch.Tensor:
        """P with P[i, j] = P(j|i) and P[i, i] = 0, (C, C) float32; 0 where label i never occurs."""
        counts = self.label_counts.clamp(min=1)[:, None]
        probabilities = self.pair_counts.to(self.lcm.dtype) / counts
        # Not fill_diagonal_, which torch.onnx can't take.
        itself = torch.eye(len(counts), dtype=torch.bool, device=counts.device)
        return probabilities.masked_fill(itself, 0)

    def check_filled(self) -> None:
        """Refuse to train with a bare graph; in evaluation, warn once that it is bare.

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

    def _update(self) -> None:
        # Without statistics, a bare graph cannot be recognised.
        self._known_filled = not self.has_statistics
        if self.has_statistics:
            counts = self.pair_counts, self.label_counts
            statistical_lcm(*counts, self.threshold, self.reweight, out=self.lcm)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if self.has_statistics or f"{prefix}embeddings" in state_dict:
            self._update()

    def extra_repr(self) -> str:
        num_labels, embedding_dim = self.embeddings.shape
        return f"labels={num_labels}, dim={embedding_dim}, τ={self.threshold}, p={self.reweight}"
