"""Data sets in tar shards, by their index: a file of JSON lines beside them.

The first line describes the data set: label names, and name, number of images, size and SHA-256 of
each shard. Each further line is an image, shard after shard: where it is in its shard, and its
image_id and labels. So the shards are read for the images alone; see `write_shards`.
"""

from __future__ import annotations

import json
import posixpath
import re
from typing import Any, Dict, Iterator, List, NamedTuple, Sequence, Tuple

from detectron2.structures import BoxMode

from ...errors import InputError
from ...io.inputs import open_input
from ...io.shards import PREFIX, Member, Shard, is_remote, open_remote
from ...label_names import check_label_name
from .common import check_id, excerpt, register_multilabel

FORMAT = "ia_gcn tar shards, version 1"
# Of a data set dict, what an index has under the same names.
LABEL_LISTS = ("labels", "absent_labels", "ignored_labels")
BOX_MODES = (BoxMode.XYXY_ABS, BoxMode.XYWH_ABS)

# Of a shard and a file in it: no separator of folders, no name that is hidden.
SHARD_NAME = re.compile(r"\w[\w.-]{0,80}\.tar", re.ASCII)
FILE_NAME = re.compile(r"\w[\w.-]{0,80}", re.ASCII)
SHA256 = re.compile(r"[0-9a-f]{64}")
MAX_LINE = 2**26


class ShardInfo(NamedTuple):
    """What an index says of a shard."""

    name: str
    images: int
    size: int
    """In bytes."""
    sha256: str


class ShardIndex(NamedTuple):
    """The first line of an index."""

    label_names: List[str]
    shards: List[ShardInfo]


def is_shard_index(path: str) -> bool:
    return path.lower().endswith(".jsonl")


def shard_root(index_file: str, image_root: str) -> str:
    """The folder of an index's shards, in the form that images in shards have their names.

    Args:
        image_root: "": the folder of the index.
    """
    folder = image_root.removeprefix(PREFIX) or posixpath.dirname(index_file) or "."
    return f"{PREFIX}{folder}"


def register_multilabel_shards(
    name: str, index_file: str, image_root: str = "", label_names: Sequence[str] | None = None
) -> None:
    """Register a data set in tar shards.

    Args:
        name: for DATASETS.TRAIN and DATASETS.TEST.
        index_file: its index, local or of a kind that PathManager knows.
        image_root: folder of the shards, likewise; "": that of the index.
        label_names: in the order of the model's outputs; None: those of the index, read now.
    Raises:
        InputError: label_names is None and the index can't be read.
    """
    if label_names is None:
        label_names = shard_label_names(index_file)
    register_multilabel(
        name,
        lambda: load_multilabel_shards(index_file, image_root, label_names),
        label_names,
        index_file=index_file,
        image_root=shard_root(index_file, image_root),
    )


def shard_label_names(index_file: str) -> List[str]:
    """
    Raises:
        InputError: the index can't be read.
    """
    return read_shard_index(index_file).label_names


def read_shard_index(index_file: str) -> ShardIndex:
    """What is in the shards of an index, without the single images.

    Raises:
        InputError: it can't be read, or is none.
    """
    return _first_line(_lines(index_file), index_file)


def load_multilabel_shards(
    index_file: str, image_root: str, label_names: Sequence[str]
) -> List[Dict]:
    """Data set dicts of tar shards, in the order in which the images are in them.

    Args:
        index_file, image_root, label_names: see `register_multilabel_shards`.
    Returns:
        a dict per image, see `MultiLabelDatasetMapper`; its file_name is that of a `Member`.
    Raises:
        InputError: naming the index, the line, and what is wrong.
    """
    lines = _lines(index_file)
    index = _first_line(lines, index_file)
    unknown = sorted(set(index.label_names) - set(label_names))
    if unknown:
        raise InputError(f"{index_file}: unknown label name(s): {', '.join(unknown)}")
    numbers = {name: number for number, name in enumerate(label_names)}
    renumber = [numbers[name] for name in index.label_names]
    folder = shard_root(index_file, image_root).removeprefix(PREFIX)
    dicts = []
    for info in index.shards:
        shard = Shard(posixpath.join(folder, info.name), info.size)
        for _ in range(info.images):
            number, line = next(lines, (0, None))
            if not number:
                raise InputError(f"{index_file}: ends before the last image of {info.name}")
            dicts.append(_record(line, shard, renumber, f"{index_file}, line {number}"))
    if next(lines, None):
        raise InputError(f"{index_file}: has more images than its shards")
    ids = {record["image_id"] for record in dicts}
    if len(ids) < len(dicts) or len(set(map(type, ids))) > 1:
        raise InputError(f"{index_file}: image ids that occur twice, or are of two kinds")
    return dicts


def _lines(index_file: str) -> Iterator[Tuple[int, Any]]:
    """Each line's number, from 1 on, and content."""
    number = 0
    try:
        is_elsewhere = is_remote(index_file)
        with open_remote(index_file) if is_elsewhere else open_input(index_file, "rb") as file:
            while text := file.readline(MAX_LINE):
                number += 1
                if len(text) == MAX_LINE:
                    raise InputError(f"{index_file}, line {number}: too long")
                yield number, json.loads(text.decode())
    except OSError as error:
        raise InputError(f"{index_file}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{index_file}, line {number}: not JSON in UTF-8: {error}") from None


def _first_line(lines: Iterator[Tuple[int, Any]], index_file: str) -> ShardIndex:
    _, content = next(lines, (0, None))
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise InputError(f"{index_file}: no index of tools/make_shards.py ({FORMAT})")
    names, shards = content.get("label_names"), content.get("shards")
    if not isinstance(names, list) or not isinstance(shards, list) or not names:
        raise InputError(f"{index_file}, line 1: no list of label_names, or of shards")
    for name in names:
        check_label_name(name, f"{index_file}, line 1")
    if len(set(names)) < len(names):
        raise InputError(f"{index_file}, line 1: names a label twice")
    for shard in shards:
        if not _is_shard_info(shard):
            raise InputError(f"{index_file}, line 1: can't be a shard: {excerpt(shard)}")
    if len({shard["name"] for shard in shards}) < len(shards):
        raise InputError(f"{index_file}, line 1: names a shard twice")
    return ShardIndex(
        names, [ShardInfo(*(shard[key] for key in ShardInfo._fields)) for shard in shards]
    )


def _is_shard_info(shard: Any) -> bool:
    return (
        isinstance(shard, dict)
        and _matches(SHARD_NAME, shard.get("name"))
        and _matches(SHA256, shard.get("sha256"))
        and _is_count(shard.get("images"))
        and _is_count(shard.get("size"))
    )


def _record(line: Any, shard: Shard, renumber: Sequence[int], place: str) -> Dict:
    if not isinstance(line, dict):
        raise InputError(f"{place}: not an image: {excerpt(line)}")
    check_id(line.get("image_id"), "image", place)
    name, offset, length = (line.get(key) for key in ("file", "offset", "length"))
    if not _matches(FILE_NAME, name) or not _is_count(offset) or not _is_count(length):
        raise InputError(f"{place}: no file, offset and length: {excerpt(line)}")
    member = Member(shard, offset, length, name)
    if not member.fits():
        raise InputError(f"{place}: {name} is outside of {shard.path}, or too large")
    record = {"file_name": member.path, "image_id": line["image_id"], "labels": []}
    for key in LABEL_LISTS:
        if key in line:
            if not _are_labels(line[key], len(renumber)):
                raise InputError(f"{place}: {key} can't be labels: {excerpt(line[key])}")
            record[key] = sorted(renumber[label] for label in line[key])
    if "annotations" in line:
        boxes = line["annotations"]
        if not isinstance(boxes, list) or not all(_is_box(box, len(renumber)) for box in boxes):
            raise InputError(f"{place}: annotations can't be boxes: {excerpt(boxes)}")
        record["annotations"] = [
            {
                "bbox": box["bbox"],
                "bbox_mode": BoxMode(box["bbox_mode"]),
                "category_id": renumber[box["category_id"]],
                "iscrowd": box["iscrowd"],
            }
            for box in boxes
        ]
    return record


def _matches(pattern: re.Pattern, value: Any) -> bool:
    return isinstance(value, str) and bool(pattern.fullmatch(value))


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**53


def _are_labels(value: Any, num_labels: int) -> bool:
    return (
        isinstance(value, list)
        and all(type(label) is int and 0 <= label < num_labels for label in value)
        and len(set(value)) == len(value)
    )


def _is_box(box: Any, num_labels: int) -> bool:
    if not isinstance(box, dict) or not _are_labels([box.get("category_id")], num_labels):
        return False
    bbox = box.get("bbox")
    return (
        isinstance(bbox, list)
        and len(bbox) == 4
        # No image is as large as this, and NaN is not less than anything.
        and all(type(x) in (int, float) and abs(x) < 1e9 for x in bbox)
        and type(box.get("bbox_mode")) is int
        and box["bbox_mode"] in BOX_MODES
        and box.get("iscrowd") in (0, 1)
    )
