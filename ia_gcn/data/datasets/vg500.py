"""VG-500: Visual Genome's 500 most frequent object names, see datasets/prepare_vg500.py."""

from __future__ import annotations

import os
from typing import Dict, List

from detectron2.data import DatasetCatalog, MetadataCatalog

from ...errors import InputError
from ...io.inputs import open_input
from ...label_names import check_label_name
from .coco import load_multilabel_coco


def register_vg_500(root: str) -> None:
    """vg_500_train (98,249 images) and vg_500_test (10,000).

    The labels are read from a file that comes with the data: in place of `thing_classes`, the
    metadata has `label_file`, which `get_label_names` reads.
    """
    folder = os.path.join(root, "vg500")
    label_file = os.path.join(folder, "labels.txt")
    for split in ("train", "test"):
        json_file = os.path.join(folder, f"annotations/{split}.json")

        def load(json_file: str = json_file) -> List[Dict]:
            return load_multilabel_coco(json_file, folder, read_label_file(label_file))

        DatasetCatalog.register(f"vg_500_{split}", load)
        MetadataCatalog.get(f"vg_500_{split}").set(
            label_file=label_file,
            evaluator_type="multi_label",
            json_file=json_file,
            image_root=folder,
        )


def read_label_file(label_file: str) -> List[str]:
    """The label names of a labels.txt, one a line.

    Raises:
        InputError: the file is not there or can't be read, is empty, names a label twice, or a
            line can't be the name of one.
    """
    try:
        with open_input(label_file, encoding="utf-8-sig") as file:
            lines = {n: line.strip() for n, line in enumerate(file, start=1) if line.strip()}
    except FileNotFoundError:
        raise InputError(f"{label_file}: no such file; run datasets/prepare_vg500.py") from None
    except OSError as error:
        raise InputError(f"{label_file}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise InputError(f"{label_file}: not text") from None
    for number, label in lines.items():
        check_label_name(label, f"{label_file}, line {number}")
    labels = list(lines.values())
    if not labels or len(set(labels)) < len(labels):
        raise InputError(f"{label_file}: empty, or names a label twice")
    return labels
