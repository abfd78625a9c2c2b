#!/usr/bin/env python3
"""Turn Visual Genome into VG-500: the 500 names that most of its objects have, as labels.

Put these from https://homes.cs.washington.edu/~ranjay/visualgenome/ into ROOT/vg500, unpacked:
  VG_100K/  VG_100K_2/     the images (all of them in either, or in ROOT/vg500 itself, will do;
                           so will links to where they are)
  objects.json             with the names of the objects
  image_data.json          with the sizes of the images

What the command leaves there:
  annotations/train.json  annotations/test.json   COCO's format
  labels.txt                                      a label a line, in alphabetical order

Names are compared in lower case. An image without any of the labels stays in, with no label. The
same input makes the same bytes, whatever the order of its entries.

Examples:
  the published split; it has images that later releases of image_data.json lack:
    datasets/prepare_vg500.py --train-list train_list_500.txt --test-list test_list_500.txt \\
        --skip-missing
  a split of the same sizes, drawn at random, and the boxes that an RPN learns from:
    datasets/prepare_vg500.py --boxes
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import posixpath
import re
import sys
import tempfile
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Callable, Dict, Iterable, Iterator, List, NamedTuple, Sequence, Tuple

from tqdm import tqdm

from ia_gcn.data.build import MAX_LISTED
from ia_gcn.data.datasets.common import excerpt, join_inside
from ia_gcn.data.datasets.writing import write_coco
from ia_gcn.errors import InputError
from ia_gcn.io.files import write_text_atomically

# The published split's numbers of images.
TRAIN_SIZE, TEST_SIZE = 98_249, 10_000
IMAGE_FOLDERS = ("VG_100K", "VG_100K_2", "")
# 2317468, 2317468.jpg or VG_100K/2317468.jpg
LISTED_IMAGE = re.compile(r"(?:.*[/\\])?(\d{1,18})(?:\.jpg)?", re.ASCII | re.IGNORECASE)


class SourceImage(NamedTuple):
    """What image_data.json says: the folder that its url names, and its size in pixels."""

    folder: str
    width: int
    height: int


class Object(NamedTuple):
    """Its distinct names, cleaned, and (x, y, w, h) in pixels, or None where boxes don't matter."""

    names: Tuple[str, ...]
    box: Tuple[float, ...] | None


def read_images(path: Path) -> Dict[int, SourceImage]:
    """The images of image_data.json by id.

    Raises:
        InputError: naming the file and what is wrong.
    """
    images = {}
    for image_id, entry in by_id(read_list(path), path).items():
        size = entry.get("width"), entry.get("height")
        if not all(type(side) is int and side > 0 for side in size):
            raise InputError(f"{path}: image {image_id} has no width and height above 0")
        url = entry.get("url")
        if not isinstance(url, str) or "/" not in url:
            raise InputError(f"{path}: image {image_id} has no url")
        file_name = join_inside("", f"{url.split('/')[-2]}/{image_id}.jpg", str(path))
        images[image_id] = SourceImage(posixpath.dirname(file_name), *size)
    return images


def read_objects(path: Path, aliases: Dict[str, str], with_boxes: bool) -> Dict[int, List[Object]]:
    """The objects of objects.json by their image's id.

    Args:
        aliases: see `read_aliases`.
    Raises:
        InputError: naming the file and what is wrong.
    """
    known: Dict[Tuple[str, ...], Tuple[str, ...]] = {}

    def compact(entry: Dict) -> Dict | Object:
        if "names" not in entry:  # an image, whose objects have been here before it
            progress.update()
            return entry
        names = entry["names"]
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise InputError(f"{path}: an object's names are not text: {excerpt(entry)}")
        key = tuple(names)
        if key not in known:
            cleaned = {clean(name) for name in names} - {""}
            known[key] = tuple(sorted({aliases.get(name, name) for name in cleaned}))
        return Object(known[key], read_box(entry, path) if with_boxes else None)

    # Made compact as they are read: the file's 3.8 million objects would fill gigabytes as dicts.
    with tqdm(desc=path.name, unit=" images", disable=None) as progress:
        entries = read_list(path, compact)
    objects = {}
    for image_id, entry in by_id(entries, path).items():
        found = entry.get("objects")
        if not isinstance(found, list) or not all(isinstance(item, Object) for item in found):
            raise InputError(f"{path}: image {image_id} has no list of objects with names")
        objects[image_id] = found
    return objects


def read_list(path: Path, object_hook: Callable | None = None) -> List[Dict]:
    """A JSON file that is a list of dicts; object_hook as in `json.load`."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            content = json.load(file, object_hook=object_hook)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON: {error}") from None
    if not isinstance(content, list) or not all(isinstance(entry, dict) for entry in content):
        raise InputError(f"{path}: not a list of images")
    return content


def by_id(entries: Iterable[Dict], path: Path) -> Dict[int, Dict]:
    """Entries by their image's id, which older releases call id."""
    found = {}
    for entry in entries:
        image_id = entry.get("image_id", entry.get("id"))
        if type(image_id) is not int:
            raise InputError(f"{path}: an image without an integer image_id: {excerpt(entry)}")
        if image_id in found:
            raise InputError(f"{path}: image {image_id} occurs twice")
        found[image_id] = entry
    return found


def read_box(entry: Dict, path: Path) -> Tuple[float, ...]:
    box = tuple(entry.get(key) for key in "xywh")
    # No image is as large as this, and NaN is not less than anything.
    if not all(isinstance(value, (int, float)) and abs(value) < 1e9 for value in box):
        raise InputError(f"{path}: an object's x, y, w, h are not numbers: {excerpt(entry)}")
    return box


def clean(name: str) -> str:
    return " ".join(name.lower().split())


def read_aliases(path: Path) -> Dict[str, str]:
    """Canonical names by synonym, from lines of synonyms that begin with the canonical one.

    As is usual with Visual Genome's file, a line whose first name has become a synonym of another
    adds to that one, and of two lines with the same synonym the later one counts.

    Raises:
        InputError: the file can't be read.
    """
    aliases: Dict[str, str] = {}
    for _, line in read_lines(path):
        names = [name for name in map(clean, line.split(",")) if name]
        if names:
            aliases.update(dict.fromkeys(names, aliases.get(names[0], names[0])))
    return aliases


def read_image_list(path: Path) -> List[int]:
    """The ids of a list with an image a line; further columns are left aside.

    Raises:
        InputError: naming the file: it can't be read or is empty, a line names no image, or a
            image is listed twice.
    """
    ids: Dict[int, None] = {}
    for number, line in read_lines(path):
        match = LISTED_IMAGE.fullmatch(line.split()[0])
        if not match:
            raise InputError(f"{path}, line {number}: not an image's id or file: {line[:200]!r}")
        image_id = int(match[1])
        if image_id in ids:
            raise InputError(f"{path}, line {number}: image {image_id} is listed twice")
        ids[image_id] = None
    if not ids:
        raise InputError(f"{path}: names no image")
    return list(ids)


def read_lines(path: Path) -> List[Tuple[int, str]]:
    """The lines that are not empty, and their numbers."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            return [(n, line.strip()) for n, line in enumerate(file, start=1) if line.strip()]
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not text") from None


def split_by_seed(image_ids: Iterable[int], seed: int) -> Dict[str, List[int]]:
    """A split of the published sizes, or of their ratio where there are too few images."""

    # A hash, so that neither the order nor a library's generator makes a difference.
    def place(image_id: int) -> bytes:
        return hashlib.sha256(f"{seed} {image_id}".encode()).digest()

    order = sorted(image_ids, key=place)
    share = TEST_SIZE / (TRAIN_SIZE + TEST_SIZE)
    test = max(1, min(TEST_SIZE, round(len(order) * share)))
    return {"train": order[test : test + TRAIN_SIZE], "test": order[:test]}


def find_images(root: Path, images: Dict[int, SourceImage]) -> Dict[int, str | None]:
    """Each image's file name below `root`, None where it is in none of the folders."""

    # Each folder is listed once: a look-up per image takes minutes on a network's disk.
    @cache
    def files(folder: str) -> set:
        return set(os.listdir(root / folder)) if (root / folder).is_dir() else set()

    found = {}
    for image_id, image in images.items():
        name = f"{image_id}.jpg"
        folders = (image.folder, *IMAGE_FOLDERS)
        folder = next((folder for folder in folders if name in files(folder)), None)
        found[image_id] = None if folder is None else posixpath.join(folder, name)
    return found


def leave_out(missing: Sequence[str], where: Path, skip_missing: bool) -> None:
    """Say how many images are missing, if there are any.

    Raises:
        InputError: naming some; skip_missing is False.
    """
    if not missing:
        return
    if skip_missing:
        print(f"left out {len(missing)} images that are not in {where}")
        return
    more = f" and {len(missing) - MAX_LISTED} more" if len(missing) > MAX_LISTED else ""
    raise InputError(
        f"{len(missing)} images are not in {where}: {', '.join(missing[:MAX_LISTED])}{more} "
        "(--skip-missing leaves them out)"
    )


def choose_labels(counts: Counter, number: int, source: Path) -> List[str]:
    """The `number` names with the most objects, in alphabetical order.

    Raises:
        InputError: naming `source`: it has too few names, or one that can't be a line of text.
    """
    if len(counts) < number:
        raise InputError(f"{source}: {len(counts)} names in all, fewer than --labels {number}")
    labels = sorted(sorted(counts, key=lambda name: (-counts[name], name))[:number])
    for label in labels:
        if not label.isprintable():
            raise InputError(f"{source}: the name {label!r} is not printable text")
    return labels


def label_annotations(
    objects: Dict[int, List[Object]], image_ids: Iterable[int], index: Dict[str, int]
) -> Iterator[Dict]:
    """COCO's annotations, one for each image and label; `index` has the labels' ids."""
    for image_id in image_ids:
        names = {name for item in objects.get(image_id, []) for name in item.names}
        for label in sorted(names & index.keys()):
            yield {"image_id": image_id, "category_id": index[label]}


def box_annotations(
    objects: Dict[int, List[Object]],
    image_ids: Iterable[int],
    index: Dict[str, int],
    images: Dict[int, SourceImage],
) -> Iterator[Dict]:
    """COCO's annotations, one for each object and label, without a box where none is left of it."""
    for image_id in image_ids:
        for item in objects.get(image_id, []):
            bbox = clip(item.box, images[image_id])
            for name in item.names:
                if name in index:
                    annotation = {"image_id": image_id, "category_id": index[name]}
                    yield {**annotation, "bbox": bbox} if bbox else annotation


def clip(box: Tuple[float, ...], image: SourceImage) -> List[float] | None:
    """[x, y, w, h] of the part of a box that is inside the image; None where there is none."""
    x, y, w, h = box
    left, top = max(x, 0), max(y, 0)
    width, height = min(x + w, image.width) - left, min(y + h, image.height) - top
    return [left, top, width, height] if width > 0 and height > 0 else None


def choose_images(
    args: argparse.Namespace, source: Path, target: Path
) -> Tuple[Dict[str, List[int]], Dict[int, SourceImage], Dict[int, str | None]]:
    """The ids of each split, sorted, and by id the images and their file names.

    Raises:
        InputError: a file is broken, images are missing, or a split has none.
    """
    images = read_images(source / "image_data.json")
    listed = None
    if args.train_list:
        train, test = read_image_list(args.train_list), read_image_list(args.test_list)
        twice = set(train).intersection(test)
        if twice:
            raise InputError(f"{args.test_list}: image {min(twice)} is in {args.train_list}, too")
        listed = {"train": train, "test": test}
        wanted = [*train, *test]
        unknown = [str(image_id) for image_id in wanted if image_id not in images]
        leave_out(unknown, source / "image_data.json", args.skip_missing)
        images = {image_id: images[image_id] for image_id in wanted if image_id in images}
    file_names = find_images(target, images)
    missing = [f"{images[i].folder}/{i}.jpg" for i, name in file_names.items() if name is None]
    leave_out(missing, target, args.skip_missing)
    there = {image_id for image_id, name in file_names.items() if name is not None}
    splits = {}
    for split, image_ids in (listed or split_by_seed(there, args.seed)).items():
        splits[split] = sorted(there.intersection(image_ids))
        if not splits[split]:
            raise InputError(f"{target}: no image for the {split} split")
    return splits, images, file_names


def prepare(args: argparse.Namespace) -> None:
    """Read everything, refuse what is broken, and only then write."""
    if bool(args.train_list) != bool(args.test_list):
        raise InputError("--train-list and --test-list go together")
    if args.labels < 1:
        raise InputError(f"--labels must be at least 1, not {args.labels}")
    target = args.root / "vg500"
    source = args.source or target
    aliases = read_aliases(args.aliases) if args.aliases else {}
    splits, images, file_names = choose_images(args, source, target)
    objects = read_objects(source / "objects.json", aliases, args.boxes)
    counts = Counter(
        name
        for image_ids in splits.values()
        for image_id in image_ids
        for item in objects.get(image_id, [])
        for name in item.names
    )
    labels = choose_labels(counts, args.labels, source / "objects.json")
    index = {label: number for number, label in enumerate(labels, start=1)}

    (target / "annotations").mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".vg500_", dir=target) as temporary:
        made = Path(temporary)
        for split, image_ids in splits.items():
            progress = tqdm(image_ids, split, unit=" images", disable=None)
            if args.boxes:
                annotations = box_annotations(objects, progress, index, images)
            else:
                annotations = label_annotations(objects, progress, index)
            write_coco(
                made / f"{split}.json",
                images=(
                    {
                        "id": image_id,
                        "file_name": file_names[image_id],
                        "width": images[image_id].width,
                        "height": images[image_id].height,
                    }
                    for image_id in image_ids
                ),
                annotations=({"id": n, **entry} for n, entry in enumerate(annotations, start=1)),
                categories=({"id": number, "name": label} for label, number in index.items()),
            )
        with write_text_atomically(made / "labels.txt") as file:
            file.writelines(f"{label}\n" for label in labels)
        for split in splits:
            os.replace(made / f"{split}.json", target / "annotations" / f"{split}.json")
        # Last: where it is, the rest is, too.
        os.replace(made / "labels.txt", target / "labels.txt")
    rarest = min(labels, key=lambda label: counts[label])
    print(
        f"{target}: {len(splits['train'])} training and {len(splits['test'])} test images, "
        f"{len(labels)} labels of {counts[rarest]} objects ({rarest}) or more"
    )


def main() -> int:
    """Returns the exit status; invalid user input is reported in one line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--root",
        type=Path,
        default=Path(os.getenv("DETECTRON2_DATASETS", "datasets")).expanduser(),
        help="where data sets live (default $DETECTRON2_DATASETS or else ./datasets)",
    )
    parser.add_argument(
        "--source", type=Path, help="folder of objects.json and image_data.json (ROOT/vg500)"
    )
    for split in ("train", "test"):
        parser.add_argument(
            f"--{split}-list",
            type=Path,
            metavar="FILE",
            help=f"the {split} split's images, one a line: 2317468, 2317468.jpg or "
            "VG_100K/2317468.jpg, then anything (default: a random split)",
        )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the random split (0)")
    parser.add_argument(
        "--labels", type=int, default=500, metavar="N", help="number of labels (500)"
    )
    parser.add_argument(
        "--aliases",
        type=Path,
        metavar="FILE",
        help="Visual Genome's object_alias.txt: per line synonyms, parted by commas, of its first "
        "name, which takes their place",
    )
    parser.add_argument(
        "--boxes",
        action="store_true",
        help="write each object's box, clipped to the image, instead of one entry for each "
        "image and label",
    )
    parser.add_argument(
        "--skip-missing",
        action="store_true",
        help="leave out images that are not there, or that are listed and not in "
        "image_data.json, and say how many",
    )
    try:
        prepare(parser.parse_args())
    except (InputError, OSError) as error:
        print(f"prepare_vg500: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
