"""Your own data, registered from DATASETS.CUSTOM: COCO-format JSON or CSV."""

from __future__ import annotations

import csv
from typing import Dict, List, Sequence, Tuple

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.file_io import PathManager

from ...errors import InputError
from .coco import coco_label_names, register_multilabel_coco
from .common import join_inside, register_multilabel

HEADER = ["file", "labels"]


def register_custom(cfg: CfgNode) -> None:
    """Register the files that DATASETS.CUSTOM names and make them `cfg`'s data sets.

    Does nothing where it names none. Registering again replaces what was registered before.

    Raises:
        InputError: naming the key or the file.
    """
    custom = cfg.DATASETS.CUSTOM
    if not custom.TRAIN and not custom.TEST:
        return
    labels = list(custom.LABELS) or _label_names(custom.TRAIN or custom.TEST)
    if len(set(labels)) < len(labels):
        raise InputError(f"DATASETS.CUSTOM.LABELS names a label twice: {', '.join(labels)}")
    cfg.DATASETS.TRAIN = _register("custom_train", custom.TRAIN, custom.IMAGE_ROOT, labels)
    test_root = custom.TEST_IMAGE_ROOT or custom.IMAGE_ROOT
    cfg.DATASETS.TEST = _register("custom_test", custom.TEST, test_root, labels)


def _register(name: str, path: str, image_root: str, labels: Sequence[str]) -> Tuple[str, ...]:
    if name in DatasetCatalog.list():
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    if not path:
        return ()
    if path.lower().endswith(".csv"):
        register_multilabel_csv(name, path, image_root, labels)
    else:
        register_multilabel_coco(name, path, image_root, labels)
    return (name,)


def _label_names(path: str) -> List[str]:
    if path.lower().endswith(".csv"):
        names = sorted({label for _, labels in read_csv(path) for label in labels})
    else:
        names = coco_label_names(path)
    if not names:
        raise InputError(f"{path} is empty: it names no label")
    return names


def register_multilabel_csv(
    name: str, csv_file: str, image_root: str, label_names: Sequence[str] | None = None
) -> None:
    """Register a data set given as CSV, see `read_csv`.

    Args:
        name: for DATASETS.TRAIN and DATASETS.TEST.
        csv_file: its path.
        image_root: folder that the file names are relative to.
        label_names: in the order of the model's outputs; None: all that the file names, sorted.
    Raises:
        InputError: without `label_names`, the file can't be read or names none.
    """
    if label_names is None:
        label_names = _label_names(csv_file)
    register_multilabel(
        name,
        lambda: load_multilabel_csv(csv_file, image_root, label_names),
        label_names,
        csv_file=csv_file,
        image_root=image_root,
    )


def load_multilabel_csv(csv_file: str, image_root: str, label_names: Sequence[str]) -> List[Dict]:
    """Data set dicts of a CSV, in the file's order; image_id is the file name as written.

    Raises:
        InputError: naming the file and what is wrong: an unknown label name, an image that is
            listed twice, a file name that leads out of the root, or see `read_csv`.
    """
    index = {label: i for i, label in enumerate(label_names)}
    rows = read_csv(csv_file)
    unknown = sorted({label for _, labels in rows for label in labels} - set(label_names))
    if unknown:
        raise InputError(f"{csv_file}: unknown label name(s): {', '.join(unknown)}")
    if len({file_name for file_name, _ in rows}) < len(rows):
        raise InputError(f"{csv_file}: an image is listed twice")
    return [
        {
            "file_name": join_inside(image_root, file_name, csv_file),
            "image_id": file_name,
            "labels": sorted({index[label] for label in labels}),
        }
        for file_name, labels in rows
    ]


def read_csv(csv_file: str) -> List[Tuple[str, List[str]]]:
    """The (file name, labels) of each line `file,label;label;...`; no label is fine.

    A first line `file,labels` is a header; empty lines are skipped.

    Raises:
        InputError: the file can't be read, or a line has other than two columns.
    """
    rows = []
    try:
        with PathManager.open(csv_file, "r", encoding="utf-8-sig", newline="") as file:
            for number, row in enumerate(csv.reader(file), start=1):
                if not row or (number == 1 and [cell.strip().lower() for cell in row] == HEADER):
                    continue
                if len(row) != 2 or not row[0].strip():
                    raise InputError(f"{csv_file}, line {number}: not file,label;label")
                labels = [label.strip() for label in row[1].split(";")]
                rows.append((row[0].strip(), [label for label in labels if label]))
    except OSError as error:
        raise InputError(f"{csv_file}: {error.strerror or error}") from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"{csv_file}: not CSV: {error}") from None
    return rows
