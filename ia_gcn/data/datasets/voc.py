"""Data sets in PASCAL VOC's format, and VOC 2007 itself."""

from __future__ import annotations

import os
import xml.etree.ElementTree as ET
from typing import Dict, List

from detectron2.data.datasets.pascal_voc import CLASS_NAMES
from detectron2.structures import BoxMode

from ...errors import InputError
from ...io.inputs import open_input
from .common import check_files_differ, excerpt, join_inside, register_multilabel

VOC_LABELS = list(CLASS_NAMES)


def register_multilabel_voc(name: str, root: str, split: str, year: int) -> None:
    """Register a split of PASCAL VOC.

    Args:
        name: for DATASETS.TRAIN and DATASETS.TEST.
        root: the folder with Annotations, ImageSets and JPEGImages, such as VOC2007.
        split: a file's name in ImageSets/Main, such as trainval.
        year: 2007 or 2012, kept in the metadata.
    """
    register_multilabel(
        name,
        lambda: load_multilabel_voc(root, split),
        VOC_LABELS,
        dirname=root,
        split=split,
        year=year,
    )


def load_multilabel_voc(root: str, split: str) -> List[Dict]:
    """Data set dicts of a VOC split, in the order of the split's file.

    A label of which an image has only "difficult" objects is ignored: neither present nor absent.

    Returns:
        a dict per image, see `MultiLabelDatasetMapper`; image_id is the file's name without ending.
    Raises:
        InputError: naming the file: one is missing, is not VOC's XML, has an unknown label name,
            or an image is listed twice.
    """
    split_file = os.path.join(root, "ImageSets", "Main", f"{split}.txt")
    try:
        with open_input(split_file, encoding="utf-8-sig") as file:
            # A class's own file has a second column.
            image_ids = {n: line.split()[0] for n, line in enumerate(file, 1) if line.strip()}
    except OSError as error:
        raise InputError(f"{split_file}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise InputError(f"{split_file}: not text") from None
    files = (
        (f"line {number}", join_inside("", image_id, split_file))
        for number, image_id in image_ids.items()
    )
    check_files_differ(files, split_file)
    return [_load_image(root, image_id, split_file) for image_id in image_ids.values()]


def _load_image(root: str, image_id: str, split_file: str) -> Dict:
    xml_file = join_inside(os.path.join(root, "Annotations"), f"{image_id}.xml", split_file)
    present, difficult, boxes = set(), set(), []
    try:
        with open_input(xml_file, "rb") as file:
            objects = ET.parse(file, ET.XMLParser(target=_Annotation())).findall("object")
    except OSError as error:
        raise InputError(f"{xml_file}: {error.strerror or error}") from None
    # An encoding that is unknown or can't be used is a LookupError or ValueError.
    except (ET.ParseError, LookupError, ValueError) as error:
        raise InputError(f"{xml_file}: not XML: {error}") from None
    for item in objects:
        label_name = (item.findtext("name") or "").strip()
        if label_name not in VOC_LABELS:
            raise InputError(f"{xml_file}: unknown label name {excerpt(label_name)}")
        label = VOC_LABELS.index(label_name)
        is_difficult = (item.findtext("difficult") or "0").strip() == "1"
        (difficult if is_difficult else present).add(label)
        boxes.append(_box(item, label, xml_file))
    return {
        "file_name": join_inside(os.path.join(root, "JPEGImages"), f"{image_id}.jpg", split_file),
        "image_id": image_id,
        "labels": sorted(present),
        "ignored_labels": sorted(difficult - present),
        "annotations": boxes,
    }


class _Annotation(ET.TreeBuilder):
    """VOC's files define no entities, with which a short file can be made into gigabytes."""

    def doctype(self, name, pubid, system):
        raise ValueError("it has a DOCTYPE")


def _box(item: ET.Element, label: int, xml_file: str) -> Dict:
    try:
        corners = [
            float(item.findtext(f"bndbox/{key}")) for key in ("xmin", "ymin", "xmax", "ymax")
        ]
    except (TypeError, ValueError):
        raise InputError(f"{xml_file}: an object without a bndbox of four numbers") from None
    # No image is as large as this, and NaN is not less than anything.
    if not all(abs(corner) < 1e9 for corner in corners):
        raise InputError(f"{xml_file}: a bndbox is not of pixels: {excerpt(corners)}")
    # VOC counts pixels from 1 and includes the last one: [xmin - 1, xmax) from 0.
    corners = [corners[0] - 1, corners[1] - 1, corners[2], corners[3]]
    return {"bbox": corners, "bbox_mode": BoxMode.XYXY_ABS, "category_id": label}


def register_voc_2007(root: str) -> None:
    """voc_2007_trainval_multilabel (5,011 images) and voc_2007_test_multilabel (4,952)."""
    for split in ("trainval", "test"):
        register_multilabel_voc(
            f"voc_2007_{split}_multilabel", os.path.join(root, "VOC2007"), split, 2007
        )
