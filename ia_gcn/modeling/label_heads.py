"""Label heads: from x, the feature of the whole image, to one logit per label.

B, C, D and d are the numbers of images, labels, feature channels and embedding dimensions.
"""

from __future__ import annotations

from functools import partial
from typing import Callable, Dict, Tuple

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.utils.registry import Registry
from torch import nn

from ..errors import InputError
from .graph_conv import AdaptiveGraphConv, GraphConv, graph_layers
from .label_graph import LabelGraph, graph_scale

LABEL_HEAD_REGISTRY = Registry("LABEL_HEAD")
LABEL_HEAD_REGISTRY.__doc__ = """
Registry for label heads: modules that map x (B, D) to logits (B, C).

A registered class is called as `Head(cfg, feature_dim)`. What it needs to know about the labels
of the training set it holds in a `LabelGraph`, as `label_graph`, which the trainer finds and fills.
With MODEL.LABEL_GRAPH.IMAGE_DEPENDENT its forward also gets a, how likely each image's regions find
each label to be there: `head(x, presence)`, presence (B, C) in [0, 1].
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

    def forward(self, x: torch.Tensor, presence: torch.Tensor | None = None) -> torch.Tensor:
        """x (B, D) to logits (B, C).

        Its label graph has no edges, and I ⊙ a aᵀ is I again once it is normalised: what
        `presence` says makes no difference.
        """
        return self.classifier(x)


@LABEL_HEAD_REGISTRY.register()
class GCNHead(nn.Module):
    """A GCN over the labels whose output rows M are their classifiers, ŷ = M x (IA-GCN Eq. 5-6).

    On the statistical LCM alone it is ML-GCN, with one M for all images; on image-dependent LCMs
    it is IA-GCN's global branch, with an M per image that is never formed. LeakyReLU between layers
    and none after the last: with one there, both factors of M x would be non-negative and every
    probability at least ½.
    """

    @configurable
    def __init__(
        self,
        *,
        feature_dim: int,
        label_graph: LabelGraph,
        hidden_dims,
        negative_slope: float,
        bias: bool = False,
        layer: Callable[[int, int], nn.Module] = GraphConv,
    ):
        """
        Args:
            feature_dim: D, the output dimension of the last layer.
            label_graph: A_S and H⁽⁰⁾.
            hidden_dims: output dimensions of the layers before the last, in order.
            negative_slope: of the LeakyReLU between layers.
            bias: add a number per label to the logits.
            layer: makes a graph convolution of an input and an output dimension.
        """
        super().__init__()
        self.label_graph = label_graph
        self.negative_slope = negative_slope
        num_labels, embedding_dim = label_graph.embeddings.shape
        dims = [embedding_dim, *hidden_dims, feature_dim]
        self.layers = nn.ModuleList(map(layer, dims, dims[1:]))
        self.bias = nn.Parameter(torch.zeros(num_labels)) if bias else None
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
            "bias": cfg.MODEL.LABEL_GCN.BIAS,
        }

    def forward(self, x: torch.Tensor, presence: torch.Tensor | None = None) -> torch.Tensor:
        """
        Args:
            x: (B, D).
            presence: a, (B, C) in [0, 1], for the image-dependent LCMs A_S ⊙ a aᵀ; None for A_S.
        Returns:
            logits, (B, C).
        """
        self.label_graph.check_filled()
        if presence is None:
            cached = not (torch.is_grad_enabled() or self.training)
            classifiers = self._cached_classifiers() if cached else self.classifiers()
            logits = x @ classifiers.T
        else:
            logits = self.image_dependent_logits(x, presence)
        return logits if self.bias is None else logits + self.bias

    def image_dependent_logits(self, x: torch.Tensor, presence: torch.Tensor) -> torch.Tensor:
        """(B, C): M x for x (B, D) and presence a (B, C), without the classifiers M (B, C, D)."""
        lcm, scale = self.label_graph.lcm, graph_scale(self.label_graph.lcm, presence)
        nodes, factor = self._hidden_nodes(scale)
        return scale * self.layers[-1].scores(nodes, x, lcm, factor)

    def classifiers(self, presence: torch.Tensor | None = None) -> torch.Tensor:
        """M (C, D), or (B, C, D) with presence (B, C); computed anew."""
        lcm, scale = self.label_graph.lcm, graph_scale(self.label_graph.lcm, presence)
        nodes, factor = self._hidden_nodes(scale)
        return scale[..., None] * self.layers[-1](nodes, lcm, factor)

    def _hidden_nodes(self, scale: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """The nodes before the last layer and the factor to enter it with, of `graph_layers`."""
        graph = self.label_graph
        layers = self.layers[:-1]
        return graph_layers(layers, graph.embeddings, graph.lcm, scale, self.negative_slope)

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
            with torch.autocast(self.label_graph.lcm.device.type, enabled=False):
                self._cached = key, self.classifiers()
        return self._cached[1]


@LABEL_HEAD_REGISTRY.register()
class AdaptiveGCNHead(GCNHead):
    """ML-AGCN: a GCN head whose label graph, A + B + C, is learned (Eq. 3-7).

    A is the statistical LCM, normalised; without threshold in the paper's configs. B and C follow
    from each layer's label features and not from the image, so that M is the same for all images.

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
            kwargs: those of GCNHead.
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
    def from_config(cls, cfg, feature_dim):
        return {
            **super().from_config(cfg, feature_dim),
            "graphs": cfg.MODEL.ADAPTIVE_GCN.GRAPHS,
            "weights": cfg.MODEL.ADAPTIVE_GCN.WEIGHTS,
            "attention_slope": cfg.MODEL.ADAPTIVE_GCN.ATTENTION_SLOPE,
            "similarity_norm": cfg.MODEL.ADAPTIVE_GCN.SIMILARITY_NORM,
        }

    def classifiers(self, presence: torch.Tensor | None = None) -> torch.Tensor:
        """M (C, D), or (B, C, D) with presence (B, C); computed anew."""
        relative = None if presence is None else self._relative_scale(presence)
        nodes, topology = self._last_input(relative)
        return self.layers[-1](nodes, topology, relative)

    def image_dependent_logits(self, x: torch.Tensor, presence: torch.Tensor) -> torch.Tensor:
        """As GCNHead's."""
        relative = self._relative_scale(presence)
        nodes, topology = self._last_input(relative)
        return self.layers[-1].scores(nodes, x, topology, relative)

    def _relative_scale(self, presence: torch.Tensor) -> torch.Tensor:
        """r = s(a) / s(1), (B, C)."""
        lcm = self.label_graph.lcm
        return graph_scale(lcm, presence) / graph_scale(lcm)

    def _last_input(
        self, relative: torch.Tensor | None
    ) -> Tuple[torch.Tensor, Dict[str, torch.Tensor]]:
        """Nodes that the last layer gets, (C, K), or (B, C, K) with r; and its graphs."""
        lcm, scale = self.label_graph.lcm, graph_scale(self.label_graph.lcm)
        statistical = scale[:, None] * lcm.T * scale
        # The features that B and C follow from, and the nodes of the images.
        features = nodes = self.label_graph.embeddings
        for layer in self.layers[:-1]:
            topology = layer.topology(features, statistical)
            if relative is not None:
                nodes = F.leaky_relu(layer(nodes, topology, relative), self.negative_slope)
            features = F.leaky_relu(layer(features, topology), self.negative_slope)
        topology = self.layers[-1].topology(features, statistical)
        return features if relative is None else nodes, topology
