"""Your own data, registered from DATASETS.CUSTOM: COCO-format JSON or CSV."""

from __future__ import annotations

import csv
import hashlib
from functools import partial
from typing import Callable, Collection, Dict, List, Sequence, Tuple

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.file_io import PathManager

from ...errors import InputError
from ..stratified_split import stratified_split
from .coco import coco_label_names, load_multilabel_coco, register_multilabel_coco
from .common import join_inside, register_multilabel

HEADER = ["file", "labels"]


def register_custom(cfg: CfgNode) -> None:
    """Register the files that DATASETS.CUSTOM names and make them `cfg`'s data sets.

    With TRAIN and without TEST, a share of TRAIN is held out as custom_test, and SPLIT becomes a
    hash of what it has. Does nothing where DATASETS.CUSTOM names no file. Registering again
    replaces what was registered before.

    Raises:
        InputError: naming the key or the file.
    """
    custom = cfg.DATASETS.CUSTOM
    custom.SPLIT = ""
    if not custom.TRAIN and not custom.TEST:
        return
    if not 0 <= custom.HOLD_OUT < 1:
        raise InputError(f"DATASETS.CUSTOM.HOLD_OUT must be in [0, 1), not {custom.HOLD_OUT}")
    labels = list(custom.LABELS) or _label_names(custom.TRAIN or custom.TEST)
    if len(set(labels)) < len(labels):
        raise InputError(f"DATASETS.CUSTOM.LABELS names a label twice: {', '.join(labels)}")
    if custom.TRAIN and not custom.TEST and custom.HOLD_OUT:
        custom.SPLIT = _register_parts(custom, labels)
        cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("custom_train",), ("custom_test",)
        return
    cfg.DATASETS.TRAIN = _register("custom_train", custom.TRAIN, custom.IMAGE_ROOT, labels)
    test_root = custom.TEST_IMAGE_ROOT or custom.IMAGE_ROOT
    cfg.DATASETS.TEST = _register("custom_test", custom.TEST, test_root, labels)


def _register_parts(custom: CfgNode, labels: Sequence[str]) -> str:
    """Register TRAIN as two data sets; returns a hash of the image ids that are held out."""
    load_file = load_multilabel_csv if _is_csv(custom.TRAIN) else load_multilabel_coco
    load = partial(load_file, custom.TRAIN, custom.IMAGE_ROOT, labels)
    names = {d["image_id"]: [labels[label] for label in d["labels"]] for d in load()}
    held_out = stratified_split(names, custom.HOLD_OUT, custom.HOLD_OUT_SEED)
    if not held_out or len(held_out) == len(names):
        raise InputError(
            f"DATASETS.CUSTOM.HOLD_OUT {custom.HOLD_OUT}: {custom.TRAIN} has too few images for "
            f"two parts ({len(names)}); set DATASETS.CUSTOM.TEST, or HOLD_OUT 0.0 for no evaluation"
        )
    for name, ids in (("custom_train", set(names) - held_out), ("custom_test", held_out)):
        _forget(name)
        register_multilabel(
            name, partial(_load_part, load, ids), labels, image_root=custom.IMAGE_ROOT
        )
    return hashlib.sha256(repr(sorted(map(str, held_out))).encode()).hexdigest()[:16]


def _load_part(load: Callable[[], List[Dict]], image_ids: Collection) -> List[Dict]:
    return [record for record in load() if record["image_id"] in image_ids]


def _forget(name: str) -> None:
    if name in DatasetCatalog.list():
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def _is_csv(path: str) -> bool:
    return path.lower().endswith(".csv")


def _register(name: str, path: str, image_root: str, labels: Sequence[str]) -> Tuple[str, ...]:
    _forget(name)
    if not path:
        return ()
    if _is_csv(path):
        register_multilabel_csv(name, path, image_root, labels)
    else:
        register_multilabel_coco(name, path, image_root, labels)
    return (name,)


def _label_names(path: str) -> List[str]:
    if _is_csv(path):
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
