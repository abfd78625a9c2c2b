"""VG-500: Visual Genome's 500 most frequent object names, see datasets/prepare_vg500.py."""

from __future__ import annotations

import os

from .coco import load_multilabel_coco
from .common import read_label_file, register_multilabel


def register_vg_500(root: str) -> None:
    """vg_500_train (98,249 images) and vg_500_test (10,000)."""
    folder = os.path.join(root, "vg500")
    label_file = os.path.join(folder, "labels.txt")
    for split in ("train", "test"):
        json_file = os.path.join(folder, f"annotations/{split}.json")
        register_multilabel(
            f"vg_500_{split}",
            lambda json_file=json_file: load_multilabel_coco(
                json_file, folder, read_label_file(label_file)
            ),
            label_file=label_file,
            json_file=json_file,
            image_root=folder,
        )
