"""Label heads: from x, the feature of the whole image, to one logit per label.

B, C, D and d are the numbers of images, labels, feature channels and embedding dimensions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.utils.registry import Registry
from torch import nn

from ..errors import InputError
from .graph_conv import GraphConv
from .label_graph import LabelGraph

LABEL_HEAD_REGISTRY = Registry("LABEL_HEAD")
LABEL_HEAD_REGISTRY.__doc__ = """
Registry for label heads: modules that map x (B, D) to logits (B, C).

A registered class is called as `Head(cfg, feature_dim)`. What it needs to know about the labels
of the training set it holds in a `LabelGraph`, which the trainer finds and fills.
"""


def build_label_head(cfg: CfgNode, feature_dim: int) -> nn.Module:
    """The head that MODEL.LABEL_HEAD.NAME asks for, on features of dimension D = feature_dim."""
    if cfg.MODEL.LABEL_HEAD.NUM_LABELS < 1:
        raise InputError(
            "MODEL.LABEL_HEAD.NUM_LABELS is not set; ia_gcn.engine.setup_cfg takes it from the "
            "data set"
        )
    return LABEL_HEAD_REGISTRY.get(cfg.MODEL.LABEL_HEAD.NAME)(cfg, feature_dim)


@LABEL_HEAD_REGISTRY.register()
class LinearHead(nn.Module):
    """One linear classifier per label, with bias: the "ResNet-101" row of the papers' tables."""

    @configurable
    def __init__(self, *, feature_dim: int, num_labels: int):
        super().__init__()
        self.classifier = nn.Linear(feature_dim, num_labels)

    @classmethod
    def from_config(cls, cfg, feature_dim):
        return {"feature_dim": feature_dim, "num_labels": cfg.MODEL.LABEL_HEAD.NUM_LABELS}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (B, D) to logits (B, C)."""
        return self.classifier(x)


@LABEL_HEAD_REGISTRY.register()
class GCNHead(nn.Module):
    """ML-GCN: a GCN over the labels whose output rows are their classifiers (Eq. 5-6 of IA-GCN).

    LeakyReLU between layers and none after the last: its rows are classifiers, and with one both
    factors of M x would be non-negative and every probability at least ½.
    """

    @configurable
    def __init__(
        self, *, feature_dim: int, label_graph: LabelGraph, hidden_dims, negative_slope: float
    ):
        """
        Args:
            feature_dim: D, the output dimension of the last layer.
            label_graph: Â and H⁽⁰⁾.
            hidden_dims: output dimensions of the layers before the last, in order.
            negative_slope: of the LeakyReLU between layers.
        """
        super().__init__()
        self.label_graph = label_graph
        self.negative_slope = negative_slope
        dims = [label_graph.embeddings.shape[1], *hidden_dims, feature_dim]
        self.layers = nn.ModuleList(
            GraphConv(in_dim, out_dim) for in_dim, out_dim in zip(dims, dims[1:])
        )
        self._cached = None

    @classmethod
    def from_config(cls, cfg, feature_dim):
        return {
            "feature_dim": feature_dim,
            "label_graph": LabelGraph(
                cfg.MODEL.LABEL_HEAD.NUM_LABELS,
                cfg.MODEL.LABEL_EMBEDDINGS.DIM,
                cfg.MODEL.LABEL_GRAPH.THRESHOLD,
                cfg.MODEL.LABEL_GRAPH.REWEIGHT,
            ),
            "hidden_dims": cfg.MODEL.LABEL_GCN.HIDDEN_DIMS,
            "negative_slope": cfg.MODEL.LABEL_GCN.NEGATIVE_SLOPE,
        }

    def classifiers(self) -> torch.Tensor:
        """M (C, D), computed anew."""
        nodes = self.label_graph.embeddings
        for layer in self.layers[:-1]:
            nodes = F.leaky_relu(layer(nodes, self.label_graph.adjacency), self.negative_slope)
        return self.layers[-1](nodes, self.label_graph.adjacency)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (B, D) to logits (B, C), ŷ = M x."""
        self.label_graph.check_filled()
        if torch.is_grad_enabled() or self.training:
            return x @ self.classifiers().T
        return x @ self._cached_classifiers().T

    def train(self, mode: bool = True):
        self._cached = None
        return super().train(mode)

    def _cached_classifiers(self) -> torch.Tensor:
        """M, computed once for as long as no weight or buffer changes: it asks for no image.

        Moved or overwritten in place, a tensor changes its address or its version; but what is
        written through `.data` is not seen before the next `eval()`.
        """
        tensors = [*self.parameters(), *self.buffers()]
        key = [(tensor.data_ptr(), tensor._version) for tensor in tensors]
        if self._cached is None or self._cached[0] != key:
            # In full precision, to serve with and without autocast.
            with torch.autocast(self.layers[0].weight.device.type, enabled=False):
                self._cached = key, self.classifiers()
        return self._cached[1]
