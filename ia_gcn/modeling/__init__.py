from .backbone import TimmBackbone, build_resnet10_backbone, build_timm_backbone
from .features import ImageFeatures
from .graph_conv import (
    AdaptiveGraphConv,
    GraphConv,
    attention_graph,
    graph_layers,
    similarity_graph,
)
from .instance_aware import InstanceAwareRecognizer
from .label_graph import LabelGraph, graph_scale, propagate, statistical_lcm
from .label_heads import (
    LABEL_HEAD_REGISTRY,
    AdaptiveGCNHead,
    CSRAHead,
    GCNHead,
    LabelHead,
    LinearHead,
    PooledHead,
    build_label_head,
    head_in_features,
    one_in_feature,
)
from .losses import (
    MULTI_LABEL_LOSS_REGISTRY,
    AsymmetricLoss,
    MultiLabelBCE,
    MultiLabelCriterion,
    asymmetric_loss,
    build_multi_label_loss,
    multi_label_bce,
)
from .pooling import (
    GlobalPooling,
    MeanROIPooler,
    masked_max,
    masked_mean,
    masked_softmax,
    valid_cells,
)
from .recognizer import MultiLabelRecognizer
from .region_heads import (
    RegionGCN,
    Regions,
    VariationalROIHeads,
    gaussian_kl,
    region_affinity,
)

__all__ = [
    "LABEL_HEAD_REGISTRY",
    "MULTI_LABEL_LOSS_REGISTRY",
    "AdaptiveGCNHead",
    "AdaptiveGraphConv",
    "AsymmetricLoss",
    "CSRAHead",
    "GCNHead",
    "GlobalPooling",
    "GraphConv",
    "ImageFeatures",
    "InstanceAwareRecognizer",
    "LabelGraph",
    "LabelHead",
    "LinearHead",
    "MeanROIPooler",
    "MultiLabelBCE",
    "MultiLabelCriterion",
    "MultiLabelRecognizer",
    "PooledHead",
    "RegionGCN",
    "Regions",
    "TimmBackbone",
    "VariationalROIHeads",
    "asymmetric_loss",
    "attention_graph",
    "build_label_head",
    "build_multi_label_loss",
    "build_resnet10_backbone",
    "build_timm_backbone",
    "gaussian_kl",
    "graph_layers",
    "graph_scale",
    "head_in_features",
    "masked_max",
    "masked_mean",
    "masked_softmax",
    "multi_label_bce",
    "one_in_feature",
    "propagate",
    "region_affinity",
    "similarity_graph",
    "statistical_lcm",
    "valid_cells",
]
