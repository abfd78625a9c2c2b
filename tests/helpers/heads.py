"""Label heads on vectors, for tests of what a head does behind its pooling, and their formulas."""

import numpy as np
import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ia_gcn import add_ia_gcn_config
from ia_gcn.modeling import GlobalPooling
from tests.helpers.label_graphs import dense_fused

NUM_LABELS, EMBEDDING_DIM, FEATURE_DIM = 5, 6, 4
SHAPES = {"res4": ShapeSpec(channels=3, stride=16), "res5": ShapeSpec(channels=4, stride=32)}


class HeadOnVectors(nn.Module):
    """A pooled head of x (B, D) instead of a feature map, with a label graph of its own."""

    def __init__(self, head, label_graph=None):
        super().__init__()
        self.head = head
        self.label_graph = label_graph

    def forward(self, x, presence=None):
        context = {} if self.label_graph is None else {"label_graph": self.label_graph}
        if presence is not None:
            context["presence"] = presence
        (name,) = self.head.in_features
        return self.head({name: x[:, :, None, None]}, {name: None}, **context)["logits"]

    def classifiers(self, presence=None):
        return self.head.classifiers(self.label_graph, presence)

    def fix_classifiers(self):
        self.head.fix_classifiers(self.label_graph)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("head"), name)


def on_vectors(head_class, label_graph=None, **options):
    """A `HeadOnVectors` of a class with these options, and those that follow from the graph."""
    if label_graph is not None:
        options["num_labels"], options["embedding_dim"] = label_graph.embeddings.shape
    head = head_class(in_feature="map", pooling=GlobalPooling("max"), **options)
    return HeadOnVectors(head, label_graph)


def fill(graph, seed=0):
    rng = np.random.default_rng(seed)
    num_labels, dim = graph.embeddings.shape
    presence = (rng.random((40, num_labels)) < 0.4).astype(np.int64)
    pair_counts = presence.T @ presence
    graph.fill(pair_counts.diagonal().copy(), pair_counts, rng.normal(size=(num_labels, dim)))


def make_features(batch=3, dtype=torch.float32):
    return torch.randn(batch, FEATURE_DIM, generator=torch.Generator().manual_seed(1)).to(dtype)


def make_presence(dtype=torch.float64):
    """Of three images: with some labels absent for sure, with all, and one like any other."""
    presence = torch.rand(3, NUM_LABELS, dtype=dtype, generator=torch.Generator().manual_seed(2))
    presence[0, [1, 3]] = 0
    presence[1] = 0
    return presence


def matmul(a, b):
    """Of lists of rows."""
    return [[sum(u * v for u, v in zip(row, column)) for column in zip(*b)] for row in a]


def dense_classifiers(head, presence=None):
    """M (C, D) of one image, Eq. 5 with Â_F written out."""
    graph, nodes = dense_fused(head.label_graph.lcm, presence), head.label_graph.embeddings
    for i, layer in enumerate(head.layers):
        nodes = nodes if i == 0 else torch.where(nodes > 0, nodes, head.negative_slope * nodes)
        nodes = graph @ nodes @ layer.weight
    return nodes


def dense_logits(head, x, presence=None):
    """ŷ = M x (+ b), one image after the other; presence (B, C), None for A_S."""
    presence = [None] * len(x) if presence is None else presence
    logits = torch.stack([dense_classifiers(head, a) @ image for a, image in zip(presence, x)])
    return logits if head.bias is None else logits + head.bias


class RecordSizes(TorchDispatchMode):
    """Keeps the number of elements of every tensor that is made while it is active."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        outputs = out if isinstance(out, (tuple, list)) else [out]
        self.sizes += [value.numel() for value in outputs if isinstance(value, torch.Tensor)]
        return out


def count_passes(head):
    """A list that grows by one with every pass over the graph."""
    passes = []
    head.layers[-1].register_forward_hook(lambda *args: passes.append(None))
    return passes


def load(head):
    head.load_state_dict(head.state_dict())


def make_cfg(name, num_labels=NUM_LABELS):
    cfg = get_cfg()
    add_ia_gcn_config(cfg)
    cfg.MODEL.LABEL_HEAD.NAME = name
    cfg.MODEL.LABEL_HEAD.NUM_LABELS = num_labels
    return cfg
