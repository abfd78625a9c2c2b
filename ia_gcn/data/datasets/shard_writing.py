"""Writing data sets as tar shards, in the form of webdataset, and checking them."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import tarfile
from pathlib import Path
from typing import BinaryIO, Dict, Iterator, List, NamedTuple, Sequence

from detectron2.structures import BoxMode
from tqdm import tqdm

from ...errors import InputError
from ...io.files import check_writable, remove_unfinished, write_atomically, write_text_atomically
from ...io.inputs import check_regular, open_input
from ...io.shards import MAX_LENGTH, is_remote, open_remote
from .common import check_id
from .shards import (
    BOX_MODES,
    FORMAT,
    LABEL_LISTS,
    PREFIX,
    ShardInfo,
    read_shard_index,
    shard_root,
)

logger = logging.getLogger(__name__)

# The names of the files that are written; a pattern, and one.
SHARDS, INDEX = "[0-9]" * 6 + ".tar", "index.jsonl"
# What webdataset and others know a file's kind by; a file with another ending gets .img.
ENDINGS = {
    *("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm", "pbm", "jp2"),
    "avif",
}
BLOCK = 2**20


class ShardImage(NamedTuple):
    """An image that is to be written."""

    file_name: str
    """Where it comes from."""
    length: int
    """In bytes."""
    key: str
    """In the shards, the name of its files without their endings."""
    ending: str
    labels: Dict
    """What the index has of it, but for the place."""

    @property
    def name(self) -> str:
        return f"{self.key}.{self.ending}"

    def json(self) -> bytes:
        return _compact(self.labels).encode()


def write_shards(
    dataset_dicts: Sequence[Dict], label_names: Sequence[str], folder: str, shard_size: int
) -> str:
    """Write images and labels as tar shards, each beside an image a .json with its labels.

    The files of the images are copied as they are. Their order is that of a hash of image_id: it
    looks random, so that images of a shard are alike by chance only, and depends on nothing else.
    The same images and labels give the same bytes. A shard that is in the folder already, with the
    same files, lengths and labels, is kept.

    Args:
        dataset_dicts: see `MultiLabelDatasetMapper`; what else is in them, such as masks, is left
            out.
        label_names: of the labels, by their indices.
        folder: for 000000.tar, 000001.tar, ..., and the index, which is written last.
        shard_size: bytes after which a shard ends, at the next image.
    Returns:
        the path of the index. A warning names shards in the folder that it doesn't list.
    Raises:
        InputError: webdataset is not installed, an id occurs twice, or an image is larger than
            MAX_LENGTH or changed meanwhile.
        OSError: an image can't be read, or the folder can't be written to.
    """
    check_webdataset()
    check_writable(folder)
    for name in (SHARDS, INDEX):
        remove_unfinished(folder, name)
    index = Path(folder) / INDEX
    parts = list(plan_shards(dataset_dicts, shard_size))
    shards, lines = [], []
    total = sum(map(len, parts))
    # Without a terminal, no bar.
    with tqdm(total=total, desc="writing", unit=" images", disable=None) as progress:
        for number, images in enumerate(parts):
            path = index.with_name(f"{number:06d}.tar")
            places = find_members(path, images)
            if places is None:
                # It would be that of other shards.
                index.unlink(missing_ok=True)
                write_shard(path, images)
                places = find_members(path, images)
            for image, offset in zip(images, places):
                place = {"file": image.name, "offset": offset, "length": image.length}
                lines.append(_compact({**place, **image.labels}))
            size = path.stat().st_size
            with open(path, "rb") as file:
                shards.append(ShardInfo(path.name, len(images), size, hash_file(file, size)))
            progress.update(len(images))
    first = {
        "format": FORMAT,
        "label_names": list(label_names),
        "shards": [shard._asdict() for shard in shards],
    }
    with write_text_atomically(index) as file:
        file.writelines(f"{line}\n" for line in (_compact(first), *lines))
    others = {path.name for path in Path(folder).glob(SHARDS)} - {shard.name for shard in shards}
    if others:
        logger.warning(
            f"{folder}: {len(others)} shard(s) of an earlier run, {min(others)} to {max(others)}, "
            "are not in the index and can be removed"
        )
    return str(index)


def check_webdataset() -> None:
    """
    Raises:
        InputError: webdataset is not installed.
    """
    if importlib.util.find_spec("webdataset") is None:
        raise InputError('needs webdataset: pip install "ia_gcn[shards]" or pip install webdataset')


def plan_shards(dataset_dicts: Sequence[Dict], shard_size: int) -> Iterator[List[ShardImage]]:
    """The images of each shard, see `write_shards`."""
    ids = [record["image_id"] for record in dataset_dicts]
    for image_id in ids:
        check_id(image_id, "image", "the data set")
    if len(set(ids)) < len(ids) or len(set(map(type, ids))) > 1:
        raise InputError("the data set has image ids that occur twice, or are of two kinds")
    order = sorted(dataset_dicts, key=lambda record: _hash(record["image_id"]))
    part, size = [], 0
    for number, record in enumerate(tqdm(order, "file sizes", leave=False, disable=None)):
        image = _image(record, number)
        part.append(image)
        size += image.length
        if size >= shard_size:
            yield part
            part, size = [], 0
    if part:
        yield part


def _hash(image_id) -> bytes:
    return hashlib.sha256(json.dumps(image_id).encode()).digest()


def _image(record: Dict, number: int) -> ShardImage:
    file_name = record["file_name"]
    with open_input(file_name, "rb") as file:
        length = file.seek(0, os.SEEK_END)
    if length > MAX_LENGTH:
        raise InputError(f"{file_name}: larger than the {MAX_LENGTH:,} bytes an image may have")
    ending = os.path.splitext(file_name)[1].lower().removeprefix(".")
    ending = ending if ending in ENDINGS else "img"
    labels = {"image_id": record["image_id"]}
    for key in LABEL_LISTS:
        if key in record:
            labels[key] = sorted({int(label) for label in record[key]})
    if record.get("annotations"):
        labels["annotations"] = [_box(box) for box in record["annotations"]]
    # The labels are in the name, so that no image of another data set is taken for this one.
    digits = hashlib.sha256(_compact(labels).encode()).hexdigest()[:8]
    return ShardImage(file_name, length, f"{number:09d}-{digits}", ending, labels)


def _box(box: Dict) -> Dict:
    bbox, mode = [float(x) for x in box["bbox"]], box["bbox_mode"]
    if mode not in BOX_MODES:
        bbox, mode = list(BoxMode.convert(bbox, mode, BoxMode.XYXY_ABS)), BoxMode.XYXY_ABS
    return {
        "bbox": bbox,
        "bbox_mode": int(mode),
        "category_id": int(box["category_id"]),
        "iscrowd": int(bool(box.get("iscrowd"))),
    }


def write_shard(path: Path, images: Sequence[ShardImage]) -> None:
    """
    Raises:
        InputError: an image has another size than before.
        OSError: see `write_shards`.
    """
    import webdataset

    # Else the time would be in it.
    options = {"encoder": False, "mtime": 0, "user": "", "group": ""}
    with write_atomically(path) as file, webdataset.TarWriter(file, **options) as writer:
        for image in images:
            with open_input(image.file_name, "rb") as source:
                content = source.read(image.length + 1)
            if len(content) != image.length:
                raise InputError(f"{image.file_name} was changed meanwhile")
            writer.write({"__key__": image.key, image.ending: content, "json": image.json()})


def find_members(path: Path, images: Sequence[ShardImage]) -> List[int] | None:
    """The offset of each image in a shard; None where there is none of these images and labels."""
    if not path.is_file():
        return None
    offsets: Dict[str, int] = {}
    expected = {image.name: image.length for image in images}
    labels = {f"{image.key}.json": image.json() for image in images}
    try:
        with tarfile.open(path, "r:") as file:
            for member in file:
                content = labels.pop(member.name, None)
                length = expected.pop(member.name, None) if content is None else len(content)
                if not member.isreg() or member.size != length:
                    return None
                if content is not None and file.extractfile(member).read() != content:
                    return None
                offsets[member.name] = member.offset_data
    except tarfile.TarError:
        return None
    return None if expected or labels else [offsets[image.name] for image in images]


def hash_file(file: BinaryIO, most: int, progress: tqdm | None = None) -> str:
    """The SHA-256 of a file's next bytes, at most so many, as hexadecimal digits."""
    digest = hashlib.sha256()
    while block := file.read(min(BLOCK, most)):
        digest.update(block)
        most -= len(block)
        if progress is not None:
            progress.update(len(block))
    return digest.hexdigest()


def check_shards(index_file: str, image_root: str = "") -> Dict[str, str]:
    """Read all shards of an index.

    Args:
        index_file, image_root: see `register_multilabel_shards`.
    Returns:
        why, by its path, for each shard that is missing or not what the index says.
    Raises:
        InputError: the index can't be read.
    """
    folder = shard_root(index_file, image_root).removeprefix(PREFIX)
    shards = read_shard_index(index_file).shards
    problems = {}
    total = sum(shard.size for shard in shards)
    with tqdm(total=total, desc="checking", unit="B", unit_scale=True, disable=None) as progress:
        for shard in shards:
            path = os.path.join(folder, shard.name)
            try:
                with _open(path) as file:
                    # One byte more, to see whether it is larger.
                    found = hash_file(file, shard.size + 1, progress)
            # PathManager's handlers raise errors of any kind.
            except Exception as error:
                problems[path] = getattr(error, "strerror", None) or str(error)
                continue
            if found != shard.sha256:
                problems[path] = "damaged: its SHA-256 is not that of the index"
    return problems


def _open(path: str) -> BinaryIO:
    if is_remote(path):
        return open_remote(path)
    check_regular(path)
    return open(path, "rb")


def _compact(content: Dict) -> str:
    return json.dumps(content, separators=(",", ":"))
