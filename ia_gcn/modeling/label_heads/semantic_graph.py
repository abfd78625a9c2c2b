"""A gated graph over label nodes that the labels' embeddings pick from the feature map."""

from __future__ import annotations

from typing import Dict

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from torch import nn

from ..gated_graph import GatedGraph
from ..label_graph import LabelGraph
from ..label_nodes import SemanticAttention
from ..label_readout import LabelReadout
from .base import LABEL_HEAD_REGISTRY, LabelHead, one_in_feature


@LABEL_HEAD_REGISTRY.register()
class SSGRLHead(LabelHead):
    """SSGRL (Chen et al., ICCV 2019); with a graph of classifiers, KGGR (TPAMI 2022).

    The feature map is halved, by the mean over every 2×2 cells. Each label's embedding attends to
    its cells, which makes the label's node v. A gated graph on the conditional probabilities of the
    training set, P(j|i) for i ≠ j, turns the nodes into states h. With a classifier for each label,

        f = tanh(W (h ‖ v) + b),    ŷ_c = w_cᵀ f_c + b_c.

    In KGGR, another gated graph starts from these w, also as nodes of the labels, and what it
    makes of them, W' (h' ‖ w) + b', are the classifiers. Its paper has no code: where it leaves a
    choice, this is the same as for the features, but for the tanh.
    """

    needs = frozenset({"label_graph"})

    has_attention = True

    @configurable
    def __init__(
        self,
        *,
        in_feature: str,
        feature_dim: int,
        num_labels: int,
        embedding_dim: int,
        hidden_dim: int,
        output_dim: int,
        steps: int,
        classifier_graph: bool = False,
    ):
        """
        Args:
            in_feature: name of the feature map.
            feature_dim, num_labels, embedding_dim: D, C and d.
            hidden_dim: of `SemanticAttention`.
            output_dim: dimension of f.
            steps: of the gated graphs.
            classifier_graph: whether there is KGGR's second one.
        """
        super().__init__()
        self.in_features = (in_feature,)
        self.attention = SemanticAttention(feature_dim, embedding_dim, hidden_dim)
        self.graph = GatedGraph(feature_dim, steps)
        self.output = nn.Linear(2 * feature_dim, output_dim)
        self.readout = LabelReadout(num_labels, output_dim)
        self.classifier_graph = self.classifier_output = None
        if classifier_graph:
            self.classifier_graph = GatedGraph(output_dim, steps)
            self.classifier_output = nn.Linear(2 * output_dim, output_dim)

    @classmethod
    def from_config(cls, cfg, input_shape):
        in_feature = one_in_feature(cfg, input_shape)
        return {
            "in_feature": in_feature,
            "feature_dim": input_shape[in_feature].channels,
            "num_labels": cfg.MODEL.LABEL_HEAD.NUM_LABELS,
            "embedding_dim": cfg.MODEL.LABEL_EMBEDDINGS.DIM,
            "hidden_dim": cfg.MODEL.SSGRL.HIDDEN_DIM,
            "output_dim": cfg.MODEL.SSGRL.OUTPUT_DIM,
            "steps": cfg.MODEL.SSGRL.STEPS,
            "classifier_graph": cfg.MODEL.SSGRL.CLASSIFIER_GRAPH,
        }

    def forward(self, features, masks, *, label_graph: LabelGraph) -> Dict[str, torch.Tensor]:
        label_graph.check_filled()
        (name,) = self.in_features
        halved, cells = halve(features[name], masks[name])
        shown = None if masks[name] is None else cells > 0
        nodes, attention = self.attention(halved, label_graph.embeddings, shown)
        probabilities = label_graph.conditional_probabilities()
        states = self.graph(nodes, probabilities)
        label_features = self.output(torch.cat([states, nodes], dim=2)).tanh()
        if self.classifier_graph is None:
            logits = self.readout(label_features)
        else:
            classifiers = self.classifiers(probabilities)
            logits = (label_features * classifiers).sum(dim=2) + self.readout.bias
        # Each cell's share of what its four look at.
        attention = F.interpolate(attention / cells.clamp(min=1), scale_factor=2.0, mode="nearest")
        height, width = features[name].shape[2:]
        attention = attention[:, :, :height, :width]
        if masks[name] is not None:
            attention = attention.masked_fill(~masks[name], 0)
        return {"logits": logits, "attention": attention}

    def classifiers(self, probabilities: torch.Tensor) -> torch.Tensor:
        """KGGR's w_c, (C, K); probabilities (C, C)."""
        weights = self.readout.weight[None, :, :, 0]
        states = self.classifier_graph(weights, probabilities)
        return self.classifier_output(torch.cat([states, weights], dim=2))[0]


def halve(features: torch.Tensor, mask: torch.Tensor | None):
    """Means over every 2×2 cells, of those that show the image.

    Args:
        features: (B, D, H, W).
        mask: (B, 1, H, W) bool, or None for all.
    Returns:
        (B, D, ⌈H/2⌉, ⌈W/2⌉), and how many cells each is the mean of, (B or 1, 1, ⌈H/2⌉, ⌈W/2⌉).
    """
    shown = features.new_ones((1, 1, *features.shape[2:])) if mask is None else mask
    counts = _sums(shown.to(features.dtype))
    shown_features = features if mask is None else features.masked_fill(~mask, 0)
    return _sums(shown_features) / counts.clamp(min=1), counts


def _sums(x: torch.Tensor) -> torch.Tensor:
    """Over every 2×2 cells; an odd last row or column is by itself."""
    height, width = x.shape[2:]
    return 4 * F.avg_pool2d(F.pad(x, (0, width % 2, 0, height % 2)), 2)
