"""A static and a dynamic graph over label nodes that attention makes of the feature map."""

from __future__ import annotations

from typing import Dict

import torch
from detectron2.config import configurable
from torch import nn

from ..dynamic_graph import DynamicGraph, StaticGraph
from ..label_nodes import activation_nodes, class_activation
from ..label_readout import LabelReadout
from ..pooling import masked_max
from .base import LABEL_HEAD_REGISTRY, LabelHead, one_in_feature


@LABEL_HEAD_REGISTRY.register()
class ADDGCNHead(LabelHead):
    """ADD-GCN (Ye et al., ECCV 2020).

    A linear classifier scores every cell of the feature map for every label. Weighted by the
    sigmoid of its scores, the cells become a label's node v (semantic attention). A static graph,
    the same for all images, and a dynamic one, each image's own, mix the nodes:

        H = V + static(V),    Z = V + dynamic(H),

    with residuals as released. The logits are the mean of two: the highest score of a label's
    cells, and what a classifier for each label says of its row of Z.
    """

    has_attention = True

    @configurable
    def __init__(
        self,
        *,
        in_feature: str,
        feature_dim: int,
        num_labels: int,
        node_dim: int,
        static_graph: bool = True,
        dynamic_graph: bool = True,
    ):
        """
        Args:
            in_feature: name of the feature map.
            feature_dim, num_labels, node_dim: D, C and K.
            static_graph, dynamic_graph: False to leave the graph out: then H = V, or Z = H.
        """
        super().__init__()
        self.in_features = (in_feature,)
        self.classifiers = nn.Conv2d(feature_dim, num_labels, 1, bias=False)
        self.transform = nn.Conv2d(feature_dim, node_dim, 1)
        self.static_graph = StaticGraph(num_labels, node_dim) if static_graph else None
        self.dynamic_graph = DynamicGraph(num_labels, node_dim, node_dim) if dynamic_graph else None
        self.readout = LabelReadout(num_labels, node_dim)

    @classmethod
    def from_config(cls, cfg, input_shape):
        in_feature = one_in_feature(cfg, input_shape)
        return {
            "in_feature": in_feature,
            "feature_dim": input_shape[in_feature].channels,
            "num_labels": cfg.MODEL.LABEL_HEAD.NUM_LABELS,
            "node_dim": cfg.MODEL.ADD_GCN.NODE_DIM,
            "static_graph": cfg.MODEL.ADD_GCN.STATIC_GRAPH,
            "dynamic_graph": cfg.MODEL.ADD_GCN.DYNAMIC_GRAPH,
        }

    def forward(self, features, masks) -> Dict[str, torch.Tensor]:
        (name,) = self.in_features
        scores = self.classifiers(features[name])
        activation = class_activation(scores, masks[name])
        nodes = activation_nodes(activation, self.transform(features[name]))
        logits = (masked_max(scores, masks[name]) + self.readout(self.mix(nodes))) / 2
        return {"logits": logits, "attention": activation}

    def mix(self, nodes: torch.Tensor) -> torch.Tensor:
        """Z of V, (B, C, K)."""
        mixed = nodes
        if self.static_graph is not None:
            mixed = nodes + self.static_graph(nodes)
        if self.dynamic_graph is not None:
            # The context of an image is the mean of its labels' nodes.
            mixed = nodes + self.dynamic_graph(mixed, mixed.mean(dim=1))
        return mixed
