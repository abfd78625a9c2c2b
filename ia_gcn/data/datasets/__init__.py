import os

from .coco import COCO_LABELS, load_multilabel_coco, register_coco_2014, register_multilabel_coco
from .custom import load_multilabel_csv, register_custom, register_multilabel_csv
from .digit_scenes import DIGIT_LABELS, register_digit_scenes
from .open_images import register_open_images
from .shards import load_multilabel_shards, register_multilabel_shards
from .vg500 import register_vg_500
from .voc import VOC_LABELS, load_multilabel_voc, register_multilabel_voc, register_voc_2007

__all__ = [
    "COCO_LABELS",
    "DIGIT_LABELS",
    "VOC_LABELS",
    "load_multilabel_coco",
    "load_multilabel_csv",
    "load_multilabel_shards",
    "load_multilabel_voc",
    "register_custom",
    "register_multilabel_coco",
    "register_multilabel_csv",
    "register_multilabel_shards",
    "register_multilabel_voc",
]

_root = os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets"))
register_coco_2014(_root)
register_voc_2007(_root)
register_digit_scenes(_root)
register_vg_500(_root)
register_open_images(_root)
