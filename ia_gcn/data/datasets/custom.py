"""Your own data, registered from DATASETS.CUSTOM: COCO-format JSON, CSV or tar shards."""

from __future__ import annotations

import csv
import hashlib
import os
from functools import partial
from typing import Callable, Collection, Dict, List, NamedTuple, Sequence, Tuple

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from ...errors import InputError
from ...io.inputs import open_input
from ...label_names import check_label_name
from ..stratified_split import stratified_split
from .coco import coco_label_names, load_multilabel_coco, register_multilabel_coco
from .common import check_files_differ, join_inside, register_multilabel
from .shards import (
    is_shard_index,
    load_multilabel_shards,
    register_multilabel_shards,
    shard_label_names,
    shard_root,
)

HEADER = ["file", "labels"]
# In front of a label that is known to be absent.
ABSENT = "!"


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
    for label in custom.LABELS:
        check_label_name(label, "DATASETS.CUSTOM.LABELS")
    labels = list(custom.LABELS) or file_label_names(custom.TRAIN or custom.TEST)
    if len(set(labels)) < len(labels):
        raise InputError(f"DATASETS.CUSTOM.LABELS names a label twice: {', '.join(labels)}")
    if custom.TRAIN and not custom.TEST and custom.HOLD_OUT:
        custom.SPLIT = _register_parts(custom, labels)
        cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("custom_train",), ("custom_test",)
        return
    test_root = custom.TEST_IMAGE_ROOT or custom.IMAGE_ROOT
    how = labels, custom.UNLABELED
    cfg.DATASETS.TRAIN = _register("custom_train", custom.TRAIN, custom.IMAGE_ROOT, *how)
    cfg.DATASETS.TEST = _register("custom_test", custom.TEST, test_root, *how)


def _register_parts(custom: CfgNode, labels: Sequence[str]) -> str:
    """Register TRAIN as two data sets; returns a hash of the image ids that are held out."""
    where = custom.TRAIN, custom.IMAGE_ROOT
    image_root = shard_root(*where) if is_shard_index(custom.TRAIN) else custom.IMAGE_ROOT
    load = partial(load_multilabel_file, *where, labels, custom.UNLABELED)
    names = {d["image_id"]: _known_names(d, labels) for d in load()}
    held_out = stratified_split(names, custom.HOLD_OUT, custom.HOLD_OUT_SEED)
    if not held_out or len(held_out) == len(names):
        raise InputError(
            f"DATASETS.CUSTOM.HOLD_OUT {custom.HOLD_OUT}: {custom.TRAIN} has too few images for "
            f"two parts ({len(names)}); set DATASETS.CUSTOM.TEST, or HOLD_OUT 0.0 for no evaluation"
        )
    for name, ids in (("custom_train", set(names) - held_out), ("custom_test", held_out)):
        _forget(name)
        register_multilabel(name, partial(_load_part, load, ids), labels, image_root=image_root)
    return hashlib.sha256(repr(sorted(map(str, held_out))).encode()).hexdigest()[:16]


def _known_names(record: Dict, labels: Sequence[str]) -> List[str]:
    """By what an image is stratified: its labels, and where others are unknown the absent ones."""
    present = [labels[label] for label in record["labels"]]
    return present + [f"{ABSENT}{labels[label]}" for label in record.get("absent_labels", ())]


def _load_part(load: Callable[[], List[Dict]], image_ids: Collection) -> List[Dict]:
    return [record for record in load() if record["image_id"] in image_ids]


def _forget(name: str) -> None:
    if name in DatasetCatalog.list():
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def _is_csv(path: str) -> bool:
    return path.lower().endswith(".csv")


def _register(
    name: str, path: str, image_root: str, labels: Sequence[str], unlabeled: str
) -> Tuple[str, ...]:
    _forget(name)
    if not path:
        return ()
    if is_shard_index(path):
        register_multilabel_shards(name, path, image_root, labels)
    else:
        register = register_multilabel_csv if _is_csv(path) else register_multilabel_coco
        register(name, path, image_root, labels, unlabeled)
    return (name,)


def load_multilabel_file(
    path: str, image_root: str, label_names: Sequence[str], unlabeled: str = "absent"
) -> List[Dict]:
    """`load_multilabel_csv` of a path that ends in .csv, `load_multilabel_shards` of one in .jsonl,
    else `load_multilabel_coco`."""
    if is_shard_index(path):
        return load_multilabel_shards(path, image_root, label_names)
    load = load_multilabel_csv if _is_csv(path) else load_multilabel_coco
    return load(path, image_root, label_names, unlabeled)


def file_label_names(path: str) -> List[str]:
    """All labels that a CSV names, sorted; a JSON's categories, in the order of their ids; or those
    of shards, in their order.

    Raises:
        InputError: it can't be read or names none.
    """
    if is_shard_index(path):
        names = shard_label_names(path)
    elif _is_csv(path):
        names = sorted({label for row in read_csv(path) for label in (*row.labels, *row.absent)})
    else:
        names = coco_label_names(path)
    if not names:
        raise InputError(f"{path} is empty: it names no label")
    return names


def register_multilabel_csv(
    name: str,
    csv_file: str,
    image_root: str,
    label_names: Sequence[str] | None = None,
    unlabeled: str = "absent",
) -> None:
    """Register a data set given as CSV, see `read_csv`.

    Args:
        name: for DATASETS.TRAIN and DATASETS.TEST.
        csv_file: its path.
        image_root: folder that the file names are relative to.
        label_names: in the order of the model's outputs; None: all that the file names, sorted.
        unlabeled: DATASETS.CUSTOM.UNLABELED: what labels that an image does not name are, absent
            or unknown.
    Raises:
        InputError: without `label_names`, the file can't be read or names none.
    """
    if label_names is None:
        label_names = file_label_names(csv_file)
    register_multilabel(
        name,
        lambda: load_multilabel_csv(csv_file, image_root, label_names, unlabeled),
        label_names,
        csv_file=csv_file,
        image_root=image_root,
    )


def load_multilabel_csv(
    csv_file: str, image_root: str, label_names: Sequence[str], unlabeled: str = "absent"
) -> List[Dict]:
    """Data set dicts of a CSV, in the file's order; image_id is the file name as written.

    Args:
        csv_file, image_root, label_names, unlabeled: see `register_multilabel_csv`. Where labels
            are unknown, the dicts have `absent_labels`.
    Raises:
        InputError: naming the file and what is wrong: an unknown label name, an image that is
            listed twice, a file name that leads out of the root, or see `read_csv`.
    """
    index = {label: i for i, label in enumerate(label_names)}
    rows = read_csv(csv_file)
    named = {label for row in rows for label in (*row.labels, *row.absent)}
    unknown = sorted(named - set(label_names))
    if unknown:
        raise InputError(f"{csv_file}: unknown label name(s): {', '.join(unknown)}")
    dicts = [
        {
            "file_name": join_inside(image_root, row.file_name, f"{csv_file}, line {row.line}"),
            "image_id": row.file_name,
            "labels": sorted({index[label] for label in row.labels}),
        }
        for row in rows
    ]
    if unlabeled == "unknown":
        for record, row in zip(dicts, rows):
            record["absent_labels"] = sorted({index[label] for label in row.absent})
    files = ((f"line {row.line}", d["file_name"]) for row, d in zip(rows, dicts))
    check_files_differ(files, csv_file)
    return dicts


class CsvRow(NamedTuple):
    """An image of a CSV; `line` counts from 1."""

    file_name: str
    labels: List[str]
    absent: List[str]
    line: int


def read_csv(csv_file: str) -> List[CsvRow]:
    """The rows `file,label;!label;...` of a CSV in UTF-8; no label is fine.

    A label behind a ! is known to be absent, so that no label's name can begin with one.
    A first line `file,labels` is a header. Empty lines, empty columns after the second, and blanks
    around names, labels and columns are skipped.

    Raises:
        InputError: the file can't be read; or naming the line: it has other than two columns, looks
            like another header, has a label that is both present and absent, or one that can't be
            a label (see `check_label_name`).
    """
    rows: List[CsvRow] = []
    line = 1
    try:
        with open_input(csv_file, encoding="utf-8-sig", newline="") as file:
            # A blank before a quote would make the quote a part of the name.
            reader = csv.reader(file, skipinitialspace=True)
            for cells in reader:
                place = f"{csv_file}, line {line}"
                cells = [cell.strip() for cell in cells]
                while cells and not cells[-1] and (len(cells) > 2 or not any(cells)):
                    cells.pop()
                if cells and (line > 1 or [cell.lower() for cell in cells] != HEADER):
                    rows.append(_csv_row(cells, place, line))
                line = reader.line_num + 1
    except OSError as error:
        raise InputError(f"{csv_file}: {error.strerror or error}") from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"{csv_file}: not CSV in UTF-8: {error}") from None
    endings = [os.path.splitext(row.file_name)[1] for row in rows[:2]]
    if len(endings) == 2 and endings[1] and not endings[0]:
        raise InputError(
            f"{csv_file}, line {rows[0].line}: {rows[0].file_name!r} has no ending, unlike "
            f"{rows[1].file_name!r}; is it a header? A header is file,labels"
        )
    return rows


def _csv_row(cells: List[str], place: str, line: int) -> CsvRow:
    if len(cells) != 2 or not cells[0]:
        raise InputError(
            f"{place}: not file,label;label: a comma after the file, a semicolon between labels"
        )
    file_name, labels = cells[0], [label.strip() for label in cells[1].split(";")]
    labels = [label for label in labels if label]
    for name in (file_name, *labels):
        if name.startswith('"'):
            raise InputError(f"{place}: {name[:100]!r} begins with a quote that encloses no column")
    absent = [label[len(ABSENT) :].strip() for label in labels if label.startswith(ABSENT)]
    labels = [label for label in labels if not label.startswith(ABSENT)]
    for label in (*labels, *absent):
        check_label_name(label, place)
        if label.startswith(ABSENT):
            raise InputError(
                f"{place}: a label whose name begins with {ABSENT} can't be in a CSV, where "
                f"{ABSENT}label is one that is known to be absent; write the data as JSON"
            )
    both = sorted(set(labels).intersection(absent))
    if both:
        raise InputError(f"{place}: {both[0]!r} is both present and absent ({ABSENT}{both[0]})")
    return CsvRow(file_name, labels, absent, line)
