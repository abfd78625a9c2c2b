"""Writing data sets in the forms that DATASETS.CUSTOM reads."""

from __future__ import annotations

import csv
import json
import os
import posixpath
from pathlib import Path
from typing import Callable, Dict, Iterable, List, Sequence

from detectron2.structures import BoxMode

from ...errors import InputError
from ...io.files import write_text_atomically
from .custom import ABSENT, HEADER


def write_multilabel_file(
    path: str, dataset_dicts: Sequence[Dict], label_names: Sequence[str], image_root: str
) -> None:
    """Write data set dicts as CSV or as JSON in COCO's and LVIS's format, as the name ends.

    Args:
        path: with an ending of WRITERS.
        dataset_dicts: with `absent_labels` and without ignored ones, as of `hide_labels`.
        label_names: the categories, whose ids are from 1 on.
        image_root: folder that the file names will be relative to.
    Raises:
        InputError: a file name leads out of the root, or a name can't be in a CSV.
        OSError: it can't be written.
    """
    names = [posixpath.relpath(d["file_name"], image_root or ".") for d in dataset_dicts]
    for name in names:
        if name.startswith("../"):
            raise InputError(f"{path}: the image {name} is not in {image_root or 'this folder'}")
    WRITERS[os.path.splitext(path)[1].lower()](path, dataset_dicts, names, label_names)


def _write_csv(
    path: str, dataset_dicts: Sequence[Dict], file_names: List[str], label_names: Sequence[str]
) -> None:
    for name in label_names:
        if ";" in name or name[0] in (ABSENT, '"') or name != name.strip():
            raise InputError(f"{path}: the label {name!r} can't be in a CSV; write a JSON")
    for name in file_names:
        if name[0] == '"' or name != name.strip():
            raise InputError(f"{path}: the file name {name!r} can't be in a CSV; write a JSON")
    with write_text_atomically(path) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(HEADER)
        for record, file_name in zip(dataset_dicts, file_names):
            present = [label_names[i] for i in record["labels"]]
            absent = [f"{ABSENT}{label_names[i]}" for i in record["absent_labels"]]
            writer.writerow([file_name, ";".join([*present, *absent])])


def _write_json(
    path: str, dataset_dicts: Sequence[Dict], file_names: List[str], label_names: Sequence[str]
) -> None:
    annotations = (
        annotation for record in dataset_dicts for annotation in _coco_annotations(record)
    )
    write_coco(
        path,
        images=map(_coco_image, dataset_dicts, file_names),
        annotations=({"id": n, **entry} for n, entry in enumerate(annotations, start=1)),
        categories=({"id": n, "name": name} for n, name in enumerate(label_names, start=1)),
    )


def _coco_image(record: Dict, file_name: str) -> Dict:
    absent = [label + 1 for label in record["absent_labels"]]
    return {"id": record["image_id"], "file_name": file_name, "neg_category_ids": absent}


def _coco_annotations(record: Dict) -> Iterable[Dict]:
    """One for each box, and one for each label without any."""
    boxes = record.get("annotations", ())
    for box in boxes:
        bbox = BoxMode.convert(box["bbox"], box["bbox_mode"], BoxMode.XYWH_ABS)
        yield {
            "image_id": record["image_id"],
            "category_id": box["category_id"] + 1,
            "bbox": list(bbox),
            "iscrowd": box.get("iscrowd", 0),
        }
    for label in sorted(set(record["labels"]) - {box["category_id"] for box in boxes}):
        yield {"image_id": record["image_id"], "category_id": label + 1}


WRITERS: Dict[str, Callable] = {".json": _write_json, ".csv": _write_csv}


def write_coco(path: str | Path, **lists: Iterable[Dict]) -> None:
    """A JSON in COCO's form, an entry a line, of entries that need not all be in memory."""
    with write_text_atomically(path) as file:
        before = "{"
        for key, entries in lists.items():
            file.write(f'{before}"{key}":[')
            for number, entry in enumerate(entries):
                file.write(",\n" if number else "\n")
                file.write(json.dumps(entry, separators=(",", ":")))
            before = "],\n"
        file.write("]}\n")
