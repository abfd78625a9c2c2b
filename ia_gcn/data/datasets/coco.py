"""Data sets in COCO's JSON format, and MS-COCO 2014 itself."""

from __future__ import annotations

import json
import os
from typing import Dict, Iterable, List, Sequence, Set

from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from detectron2.structures import BoxMode

from ...errors import InputError
from ...io.inputs import open_input
from ...label_names import check_label_name
from .common import check_files_differ, check_id, excerpt, join_inside, register_multilabel

# In the order of COCO's category ids. (Peers' files are often in alphabetical order.)
COCO_LABELS = [category["name"] for category in COCO_CATEGORIES if category["isthing"]]


def register_multilabel_coco(
    name: str,
    json_file: str,
    image_root: str,
    label_names: Sequence[str] | None = None,
    unlabeled: str = "absent",
) -> None:
    """Register a data set in COCO's JSON format, or in that of LVIS, which extends it.

    An image has a label when it has an annotation of that category; boxes may be missing. What the
    other labels are, LVIS says of each image (Gupta, Dollár, Girshick: LVIS, 2019): those of its
    `neg_category_ids` have been looked for and are absent, and the rest is unknown. Those of its
    `not_exhaustive_category_ids` are present, in places that may not all be annotated; such a
    category without an annotation is ignored.

    Args:
        name: for DATASETS.TRAIN and DATASETS.TEST.
        json_file: with COCO's lists images, annotations and categories.
        image_root: folder that the file names are relative to.
        label_names: category names in the order of the model's outputs; None reads the JSON now
            and takes its categories in the order of their ids.
        unlabeled: DATASETS.CUSTOM.UNLABELED: what labels without an annotation are, absent or
            unknown, in images without `neg_category_ids`.
    Raises:
        InputError: label_names is None and the file can't be read.
    """
    if label_names is None:
        label_names = coco_label_names(json_file)
    register_multilabel(
        name,
        lambda: load_multilabel_coco(json_file, image_root, label_names, unlabeled),
        label_names,
        json_file=json_file,
        image_root=image_root,
    )


def coco_label_names(json_file: str) -> List[str]:
    """The names of a JSON's categories, in the order of their ids."""
    return list(_category_names(_read_json(json_file), json_file).values())


def load_multilabel_coco(
    json_file: str, image_root: str, label_names: Sequence[str], unlabeled: str = "absent"
) -> List[Dict]:
    """Data set dicts of a COCO-format JSON, in the order of the image ids.

    Args:
        json_file, image_root, label_names, unlabeled: see `register_multilabel_coco`. Where labels
            are unknown, the dicts have `absent_labels`.
    Returns:
        a dict per image, see `MultiLabelDatasetMapper`; category ids are indices in label_names.
    Raises:
        InputError: naming the file and what is wrong: not JSON, not COCO's form, an unknown
            category, an annotation of an image that is not there, an id or a file that occurs
            twice, a label that is both present and absent, or a file name that leads out of the
            root.
    """
    content = _read_json(json_file)
    index = {label: i for i, label in enumerate(label_names)}
    categories = _category_names(content, json_file)
    unknown = [label for label in categories.values() if label not in index]
    if unknown:
        raise InputError(f"{json_file}: unknown label name(s): {', '.join(unknown)}")

    dicts = {}
    for image in content["images"]:
        try:
            image_id, file_name = image["id"], _file_name(image)
        except (KeyError, TypeError):
            raise InputError(
                f"{json_file}: an image without id or file_name: {excerpt(image)}"
            ) from None
        check_id(image_id, "image", json_file)
        if image_id in dicts:
            raise InputError(f"{json_file}: image id {image_id} occurs twice")
        file_name = join_inside(image_root, file_name, f"{json_file}, image {image_id}")
        dicts[image_id] = {
            "file_name": file_name,
            "image_id": image_id,
            "labels": set(),
            "annotations": [],
            **_known_states(image, categories, index, unlabeled, json_file),
        }
    files = ((f"image {image_id}", d["file_name"]) for image_id, d in dicts.items())
    check_files_differ(files, json_file)
    for annotation in content["annotations"]:
        try:
            record = dicts[annotation["image_id"]]
            label = index[categories[annotation["category_id"]]]
        except (KeyError, TypeError):
            raise InputError(
                f"{json_file}: an annotation whose image_id or category_id is missing or unknown: "
                f"{excerpt(annotation)}"
            ) from None
        record["labels"].add(label)
        if "bbox" in annotation:
            record["annotations"].append(_box(annotation, label, json_file))
    for record in dicts.values():
        _settle_states(record, label_names, json_file)
    return [dicts[image_id] for image_id in _sorted_ids(dicts, "image", json_file)]


def _file_name(image: Dict) -> str:
    # LVIS v1 has no file_name, but http://images.cocodataset.org/train2017/000000391895.jpg
    if "file_name" not in image and isinstance(image["coco_url"], str):
        return "/".join(image["coco_url"].split("/")[-2:])
    return image["file_name"]


def _known_states(
    image: Dict, categories: Dict[int, str], index: Dict[str, int], unlabeled: str, json_file: str
) -> Dict[str, Set[int]]:
    """The absent and ignored labels that LVIS's keys name, as sets; nothing without any."""
    states: Dict[str, Set[int]] = {}
    if "neg_category_ids" in image or unlabeled == "unknown":
        states["absent_labels"] = set()
    for key, name in (
        ("neg_category_ids", "absent_labels"),
        ("not_exhaustive_category_ids", "ignored_labels"),
    ):
        if key not in image:
            continue
        try:
            if not isinstance(image[key], list):
                raise TypeError
            states[name] = {index[categories[category_id]] for category_id in image[key]}
        except (KeyError, TypeError):
            raise InputError(
                f"{json_file}, image {image['id']}: {key} is not a list of category ids: "
                f"{excerpt(image[key])}"
            ) from None
    return states


def _settle_states(record: Dict, label_names: Sequence[str], json_file: str) -> None:
    """Make lists of a dict's sets, each label in one of them.

    Raises:
        InputError: a label is both present and absent.
    """
    present, ignored = record["labels"], record.get("ignored_labels", set())
    absent = record.get("absent_labels", set())
    if present & absent:
        label = label_names[min(present & absent)]
        raise InputError(
            f"{json_file}, image {record['image_id']}: {label!r} has an annotation and is in "
            "neg_category_ids"
        )
    record["labels"] = sorted(present)
    if "ignored_labels" in record:
        record["ignored_labels"] = sorted(ignored - present)
    if "absent_labels" in record:
        record["absent_labels"] = sorted(absent - ignored)


def _read_json(json_file: str) -> Dict:
    try:
        with open_input(json_file, encoding="utf-8-sig") as file:
            content = json.load(file)
    except OSError as error:
        raise InputError(f"{json_file}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{json_file}: not JSON: {error}") from None
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise InputError(f"{json_file}: not in COCO's form: it has no list {key!r}")
    return content


def _category_names(content: Dict, json_file: str) -> Dict[int, str]:
    """Names by category id, in the order of the ids."""
    names: Dict[int, str] = {}
    ids: Dict[str, int] = {}
    for category in content["categories"]:
        try:
            category_id, name = category["id"], category["name"]
        except (KeyError, TypeError):
            raise InputError(
                f"{json_file}: a category without id or name: {excerpt(category)}"
            ) from None
        check_id(category_id, "category", json_file)
        if category_id in names:
            raise InputError(f"{json_file}: category id {category_id} occurs twice")
        check_label_name(name, f"{json_file}, category {category_id}")
        if name in ids:
            raise InputError(
                f"{json_file}: the name {name} occurs twice: categories {ids[name]} and "
                f"{category_id}"
            )
        names[category_id], ids[name] = name, category_id
    return {
        category_id: names[category_id] for category_id in _sorted_ids(names, "category", json_file)
    }


def _sorted_ids(ids: Iterable, kind: str, json_file: str) -> List:
    try:
        return sorted(ids)
    except TypeError:
        raise InputError(f"{json_file}: {kind} ids are of two kinds, numbers and text") from None


def _box(annotation: Dict, label: int, json_file: str) -> Dict:
    bbox = annotation["bbox"]
    numbers = isinstance(bbox, list) and all(isinstance(value, (int, float)) for value in bbox)
    # No image is as large as this, and NaN is not less than anything.
    if not numbers or len(bbox) != 4 or not all(abs(value) < 1e9 for value in bbox):
        raise InputError(f"{json_file}: a bbox is not [x, y, width, height]: {excerpt(bbox)}")
    return {
        "bbox": bbox,
        "bbox_mode": BoxMode.XYWH_ABS,
        "category_id": label,
        "iscrowd": int(bool(annotation.get("iscrowd"))),
    }


def register_coco_2014(root: str) -> None:
    """coco_2014_train_multilabel (82,783 images) and coco_2014_val_multilabel (40,504)."""
    for split in ("train", "val"):
        register_multilabel_coco(
            f"coco_2014_{split}_multilabel",
            os.path.join(root, f"coco/annotations/instances_{split}2014.json"),
            os.path.join(root, f"coco/{split}2014"),
            COCO_LABELS,
        )
