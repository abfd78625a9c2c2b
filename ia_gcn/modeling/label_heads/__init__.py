from .add_gcn import ADDGCNHead
from .base import (
    CONTEXT,
    LABEL_HEAD_REGISTRY,
    LabelHead,
    PooledHead,
    build_label_head,
    head_in_features,
    one_in_feature,
)
from .c_tran import CTranHead
from .csra import CSRAHead
from .gcn import AdaptiveGCNHead, GCNHead
from .label_queries import MLDecoderHead, Query2LabelHead
from .linear import LinearHead
from .recurrent import RecurrentHead
from .scene_graph import SALGLHead
from .semantic_graph import SSGRLHead
from .srn import SRNHead
from .tdrg import TDRGHead

__all__ = [
    "CONTEXT",
    "LABEL_HEAD_REGISTRY",
    "ADDGCNHead",
    "AdaptiveGCNHead",
    "CSRAHead",
    "CTranHead",
    "GCNHead",
    "LabelHead",
    "LinearHead",
    "MLDecoderHead",
    "PooledHead",
    "Query2LabelHead",
    "RecurrentHead",
    "SALGLHead",
    "SRNHead",
    "SSGRLHead",
    "TDRGHead",
    "build_label_head",
    "head_in_features",
    "one_in_feature",
]
