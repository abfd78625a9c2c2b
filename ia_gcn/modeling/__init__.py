from .backbone import build_resnet10_backbone
from .graph_conv import GraphConv
from .label_graph import LabelGraph, normalize_adjacency, statistical_lcm
from .label_heads import LABEL_HEAD_REGISTRY, GCNHead, LinearHead, build_label_head
from .losses import (
    MULTI_LABEL_LOSS_REGISTRY,
    MultiLabelBCE,
    build_multi_label_loss,
    multi_label_bce,
)
from .meta_arch import MultiLabelRecognizer
from .pooling import GlobalPooling, valid_cells

__all__ = [
    "LABEL_HEAD_REGISTRY",
    "MULTI_LABEL_LOSS_REGISTRY",
    "GCNHead",
    "GlobalPooling",
    "GraphConv",
    "LabelGraph",
    "LinearHead",
    "MultiLabelBCE",
    "MultiLabelRecognizer",
    "build_label_head",
    "build_multi_label_loss",
    "build_resnet10_backbone",
    "multi_label_bce",
    "normalize_adjacency",
    "statistical_lcm",
    "valid_cells",
]
