from ..io.images import UnreadableImage
from . import datasets
from .augmentation import Cutout, MultiScaleCrop, RandAugment, RandomResizedCrop, Warp
from .build import (
    build_multilabel_test_loader,
    build_multilabel_train_loader,
    get_label_names,
    get_multilabel_dicts,
    get_test_dicts,
)
from .dataset_mapper import MultiLabelDatasetMapper
from .datasets import (
    register_custom,
    register_multilabel_coco,
    register_multilabel_csv,
    register_multilabel_shards,
    register_multilabel_voc,
)
from .label_embeddings import glove_embeddings, label_embeddings, name_embeddings
from .label_statistics import (
    LabelGraphSummary,
    LabelStatistics,
    cached_label_statistics,
    count_labels,
    count_states,
    label_matrices,
    summarize_label_graph,
)
from .proposals import add_proposals

__all__ = [
    "Cutout",
    "LabelGraphSummary",
    "LabelStatistics",
    "MultiLabelDatasetMapper",
    "MultiScaleCrop",
    "RandAugment",
    "RandomResizedCrop",
    "UnreadableImage",
    "Warp",
    "add_proposals",
    "build_multilabel_test_loader",
    "build_multilabel_train_loader",
    "cached_label_statistics",
    "count_labels",
    "count_states",
    "datasets",
    "get_label_names",
    "get_multilabel_dicts",
    "get_test_dicts",
    "glove_embeddings",
    "label_embeddings",
    "label_matrices",
    "name_embeddings",
    "register_custom",
    "register_multilabel_coco",
    "register_multilabel_csv",
    "register_multilabel_shards",
    "register_multilabel_voc",
    "summarize_label_graph",
]
