"""GCNs over the labels, whose output rows are the labels' classifiers.

B, C, D and d are the numbers of images, labels, feature channels and embedding dimensions.
"""

from __future__ import annotations

from functools import partial
from typing import Callable, Dict, Sequence, Tuple

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from torch import nn

from ..graph_conv import AdaptiveGraphConv, GraphConv, graph_layers
from ..label_graph import LabelGraph, graph_scale
from .base import LABEL_HEAD_REGISTRY, PooledHead


class LabelGCNHead(PooledHead):
    """ŷ = M x, with classifiers M that a GCN makes of the label embeddings (IA-GCN Eq. 6).

    On the statistical LCM, M is the same for all images; on image-dependent LCMs A_S ⊙ a aᵀ there
    is an M for each image, which is never formed. There is no activation after the last layer: with
    a ReLU both factors of M x would be non-negative and every probability at least ½.

    Attributes:
        layers: graph convolutions, from d over the hidden dimensions to D.
        bias: (C,), or None.
    """

    uses = frozenset({"presence"})
    needs = frozenset({"label_graph"})

    def __init__(
        self,
        *,
        feature_dim: int,
        num_labels: int,
        embedding_dim: int,
        hidden_dims: Sequence[int],
        negative_slope: float,
        layer: Callable[[int, int], nn.Module],
        bias: bool = False,
        **kwargs,
    ):
        """
        Args:
            feature_dim: D, the output dimension of the last layer.
            num_labels, embedding_dim: C and d.
            hidden_dims: output dimensions of the layers before the last, in order.
            negative_slope: of the LeakyReLU between layers; 0 for a ReLU.
            layer: makes a graph convolution of an input and an output dimension.
            bias: add a number per label to the logits.
            kwargs: those of PooledHead.
        """
        super().__init__(**kwargs)
        self.negative_slope = negative_slope
        dims = [embedding_dim, *hidden_dims, feature_dim]
        self.layers = nn.ModuleList(map(layer, dims, dims[1:]))
        self.bias = nn.Parameter(torch.zeros(num_labels)) if bias else None
        self.register_buffer("fixed_classifiers", None, persistent=False)

    @classmethod
    def from_config(cls, cfg, input_shape):
        return {
            **super().from_config(cfg, input_shape),
            "embedding_dim": cfg.MODEL.LABEL_EMBEDDINGS.DIM,
            "hidden_dims": cfg.MODEL.LABEL_GCN.HIDDEN_DIMS,
            "negative_slope": cfg.MODEL.LABEL_GCN.NEGATIVE_SLOPE,
            "bias": cfg.MODEL.LABEL_GCN.BIAS,
        }

    def forward(
        self,
        features: Dict[str, torch.Tensor],
        masks: Dict[str, torch.Tensor | None],
        *,
        label_graph: LabelGraph,
        presence: torch.Tensor | None = None,
    ) -> Dict[str, torch.Tensor]:
        """See `LabelHead`; with presence a, the graph is A_S ⊙ a aᵀ of each image, else A_S."""
        label_graph.check_filled()
        x = self.image_features(features, masks)
        if presence is not None:
            logits = self.image_dependent_logits(x, label_graph, presence)
        elif self.fixed_classifiers is not None:
            logits = x @ self.fixed_classifiers.T
        else:
            logits = x @ self.classifiers(label_graph).T
        return {"logits": logits if self.bias is None else logits + self.bias}

    def classifiers(
        self, label_graph: LabelGraph, presence: torch.Tensor | None = None
    ) -> torch.Tensor:
        """M (C, D), or (B, C, D) with presence (B, C)."""
        raise NotImplementedError

    def image_dependent_logits(
        self, x: torch.Tensor, label_graph: LabelGraph, presence: torch.Tensor
    ) -> torch.Tensor:
        """(B, C): M x for x (B, D) and presence a (B, C), without the classifiers M (B, C, D)."""
        raise NotImplementedError

    @torch.no_grad()
    def fix_classifiers(self, label_graph: LabelGraph) -> None:
        # In full precision, so that it can be used with and without autocast.
        with torch.autocast(label_graph.lcm.device.type, enabled=False):
            self.fixed_classifiers = self.classifiers(label_graph)

    def train(self, mode: bool = True):
        if mode:
            self.fixed_classifiers = None
        return super().train(mode)

    def _load_from_state_dict(self, *args, **kwargs):
        self.fixed_classifiers = None
        super()._load_from_state_dict(*args, **kwargs)


@LABEL_HEAD_REGISTRY.register()
class GCNHead(LabelGCNHead):
    """A GCN on the LCM (IA-GCN Eq. 5): ML-GCN, and the global branch of IA-GCN."""

    @configurable
    def __init__(self, **kwargs):
        """
        Args:
            kwargs: those of LabelGCNHead but for layer.
        """
        super().__init__(layer=GraphConv, **kwargs)

    def classifiers(self, label_graph, presence=None):
        scale = graph_scale(label_graph.lcm, presence)
        nodes, factor = self._hidden_nodes(label_graph, scale)
        return scale[..., None] * self.layers[-1](nodes, label_graph.lcm, factor)

    def image_dependent_logits(self, x, label_graph, presence):
        scale = graph_scale(label_graph.lcm, presence)
        nodes, factor = self._hidden_nodes(label_graph, scale)
        return scale * self.layers[-1].scores(nodes, x, label_graph.lcm, factor)

    def _hidden_nodes(
        self, label_graph: LabelGraph, scale: torch.Tensor
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        """The nodes before the last layer and the factor to enter it with, of `graph_layers`."""
        layers = self.layers[:-1]
        return graph_layers(
            layers, label_graph.embeddings, label_graph.lcm, scale, self.negative_slope
        )


@LABEL_HEAD_REGISTRY.register()
class AdaptiveGCNHead(LabelGCNHead):
    """A GCN on a label graph that is learned, A + B + C (ML-AGCN Eq. 3-7).

    A is the statistical LCM, normalised; without threshold in the paper's configs. B and C follow
    from each layer's label features and are independent of the image, and so is M.

    With image-dependent LCMs all three are scaled as A is: with s of `graph_scale`, Â becomes
    diag(r) Â diag(r) with r = s(a) / s(1), and so do B and C. Their features are those of a = 1.
    """

    @configurable
    def __init__(
        self,
        *,
        graphs: str = "ABC",
        weights: str = "per_graph",
        attention_slope: float = 0.2,
        similarity_norm: str = "row",
        **kwargs,
    ):
        """
        Args:
            graphs, weights, attention_slope, similarity_norm: of `AdaptiveGraphConv`.
            kwargs: those of LabelGCNHead but for layer.
        """
        layer = partial(
            AdaptiveGraphConv,
            graphs=graphs,
            weights=weights,
            attention_slope=attention_slope,
            similarity_norm=similarity_norm,
        )
        super().__init__(layer=layer, **kwargs)

    @classmethod
    def from_config(cls, cfg, input_shape):
        return {
            **super().from_config(cfg, input_shape),
            "graphs": cfg.MODEL.ADAPTIVE_GCN.GRAPHS,
            "weights": cfg.MODEL.ADAPTIVE_GCN.WEIGHTS,
            "attention_slope": cfg.MODEL.ADAPTIVE_GCN.ATTENTION_SLOPE,
            "similarity_norm": cfg.MODEL.ADAPTIVE_GCN.SIMILARITY_NORM,
        }

    def classifiers(self, label_graph, presence=None):
        relative = None if presence is None else _relative_scale(label_graph, presence)
        nodes, topology = self._last_input(label_graph, relative)
        return self.layers[-1](nodes, topology, relative)

    def image_dependent_logits(self, x, label_graph, presence):
        relative = _relative_scale(label_graph, presence)
        nodes, topology = self._last_input(label_graph, relative)
        return self.layers[-1].scores(nodes, x, topology, relative)

    def _last_input(
        self, label_graph: LabelGraph, relative: torch.Tensor | None
    ) -> Tuple[torch.Tensor, Dict[str, torch.Tensor]]:
        """Nodes that the last layer gets, (C, K), or (B, C, K) with r; and its graphs."""
        lcm, scale = label_graph.lcm, graph_scale(label_graph.lcm)
        statistical = scale[:, None] * lcm.T * scale
        # The features that B and C follow from, and the nodes of the images.
        features = nodes = label_graph.embeddings
        for layer in self.layers[:-1]:
            topology = layer.topology(features, statistical)
            if relative is not None:
                nodes = F.leaky_relu(layer(nodes, topology, relative), self.negative_slope)
            features = F.leaky_relu(layer(features, topology), self.negative_slope)
        topology = self.layers[-1].topology(features, statistical)
        return features if relative is None else nodes, topology


def _relative_scale(label_graph: LabelGraph, presence: torch.Tensor) -> torch.Tensor:
    """r = s(a) / s(1), (B, C)."""
    return graph_scale(label_graph.lcm, presence) / graph_scale(label_graph.lcm)
