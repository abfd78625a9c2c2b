"""Functions that all data set loaders share."""

from __future__ import annotations

import posixpath
from typing import Callable, Dict, List, Sequence

from detectron2.data import DatasetCatalog, MetadataCatalog

from ...errors import InputError


def join_inside(root: str, file_name, source: str) -> str:
    """`root`/`file_name`, where the file name comes from the annotation file `source`.

    Raises:
        InputError: the name is not a string, is absolute, or leads out of the root.
    """
    if not isinstance(file_name, str) or not file_name or "\0" in file_name:
        raise InputError(f"{source}: {file_name!r} is not a file name")
    normal = posixpath.normpath(file_name.replace("\\", "/"))
    if posixpath.isabs(normal) or normal.split("/")[0] == ".." or normal[1:2] == ":":
        raise InputError(f"{source}: the file name {file_name!r} leads out of the image root")
    return posixpath.join(root, normal)


def register_multilabel(
    name: str, load: Callable[[], List[Dict]], label_names: Sequence[str], **metadata
) -> None:
    """Register a data set with detectron2's two catalogs; nothing is read before it is asked for.

    Args:
        name: for DATASETS.TRAIN and DATASETS.TEST.
        load: returns the data set's dicts, see `MultiLabelDatasetMapper`.
        label_names: in the order of the model's outputs; kept as the metadata's `thing_classes`.
        metadata: further entries, such as json_file and image_root.
    """
    DatasetCatalog.register(name, load)
    MetadataCatalog.get(name).set(
        thing_classes=list(label_names), evaluator_type="multi_label", **metadata
    )
