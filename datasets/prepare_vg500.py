#!/usr/bin/env python3
"""Turn Visual Genome into VG-500: the 500 names that most of its objects have, as labels.

Put these from https://homes.cs.washington.edu/~ranjay/visualgenome/ into ROOT/vg500, unpacked:
  VG_100K/  VG_100K_2/     the pictures (all of them in either, or in ROOT/vg500 itself, will do;
                           so will links to where they are)
  objects.json             with the names of the objects
  image_data.json          with the sizes of the pictures

What the command leaves there:
  annotations/train.json  annotations/test.json   COCO's format
  labels.txt                                      a label a line, in alphabetical order

Names are compared in lower case. A picture without any of the labels stays in, with no label. The
same input makes the same bytes, whatever the order of its entries.

Examples:
  the published split; it has pictures that later releases of image_data.json lack:
    datasets/prepare_vg500.py --train-list train_list_500.txt --test-list test_list_500.txt \\
        --skip-missing
  a split of the same sizes, drawn by chance, and the boxes that an RPN learns from:
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
from ia_gcn.data.datasets.common import join_inside
from ia_gcn.errors import InputError

# The published split's numbers of pictures.
TRAIN_SIZE, TEST_SIZE = 98_249, 10_000
IMAGE_FOLDERS = ("VG_100K", "VG_100K_2", "")
# 2317468, 2317468.jpg or VG_100K/2317468.jpg
LISTED_PICTURE = re.compile(r"(?:.*[/\\])?(\d{1,18})(?:\.jpg)?", re.ASCII | re.IGNORECASE)


class Picture(NamedTuple):
    """What image_data.json says: the folder that its url names, and its size in pixels."""

    folder: str
    width: int
    height: int


class Object(NamedTuple):
    """Its distinct names, cleaned, and (x, y, w, h) in pixels, or None where boxes don't matter."""

    names: Tuple[str, ...]
    box: Tuple[float, ...] | None


def read_pictures(path: Path) -> Dict[int, Picture]:
    """The pictures of image_data.json by id.

    Raises:
        InputError: naming the file and what is wrong.
    """
    pictures = {}
    for image_id, entry in by_id(read_list(path), path).items():
        size = entry.get("width"), entry.get("height")
        if not all(type(side) is int and side > 0 for side in size):
            raise InputError(f"{path}: picture {image_id} has no width and height above 0")
        url = entry.get("url")
        if not isinstance(url, str) or "/" not in url:
            raise InputError(f"{path}: picture {image_id} has no url")
        file_name = join_inside("", f"{url.split('/')[-2]}/{image_id}.jpg", str(path))
        pictures[image_id] = Picture(posixpath.dirname(file_name), *size)
    return pictures


def read_objects(path: Path, aliases: Dict[str, str], with_boxes: bool) -> Dict[int, List[Object]]:
    """The objects of objects.json by their picture's id.

    Args:
        aliases: see `read_aliases`.
    Raises:
        InputError: naming the file and what is wrong.
    """
    known: Dict[Tuple[str, ...], Tuple[str, ...]] = {}

    def compact(entry: Dict) -> Dict | Object:
        if "names" not in entry:  # a picture, whose objects have been here before it
            progress.update()
            return entry
        names = entry["names"]
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise InputError(f"{path}: an object's names are not text: {str(entry)[:200]}")
        key = tuple(names)
        if key not in known:
            cleaned = {clean(name) for name in names} - {""}
            known[key] = tuple(sorted({aliases.get(name, name) for name in cleaned}))
        return Object(known[key], read_box(entry, path) if with_boxes else None)

    # Made compact as they are read: the file's 3.8 million objects would fill gigabytes as dicts.
    with tqdm(desc=path.name, unit=" pictures", disable=None) as progress:
        entries = read_list(path, compact)
    objects = {}
    for image_id, entry in by_id(entries, path).items():
        found = entry.get("objects")
        if not isinstance(found, list) or not all(isinstance(item, Object) for item in found):
            raise InputError(f"{path}: picture {image_id} has no list of objects with names")
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
        raise InputError(f"{path}: not a list of pictures")
    return content


def by_id(entries: Iterable[Dict], path: Path) -> Dict[int, Dict]:
    """Entries by their picture's id, which older releases call id."""
    found = {}
    for entry in entries:
        image_id = entry.get("image_id", entry.get("id"))
        if type(image_id) is not int:
            raise InputError(f"{path}: a picture without an integer image_id: {str(entry)[:200]}")
        if image_id in found:
            raise InputError(f"{path}: picture {image_id} occurs twice")
        found[image_id] = entry
    return found


def read_box(entry: Dict, path: Path) -> Tuple[float, ...]:
    box = tuple(entry.get(key) for key in "xywh")
    # No picture is as large as this, and NaN is not less than anything.
    if not all(isinstance(value, (int, float)) and abs(value) < 1e9 for value in box):
        raise InputError(f"{path}: an object's x, y, w, h are not numbers: {str(entry)[:200]}")
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
    """The ids of a list with a picture a line; further columns are left aside.

    Raises:
        InputError: naming the file: it can't be read or is empty, a line names no picture, or a
            picture is listed twice.
    """
    ids: Dict[int, None] = {}
    for number, line in read_lines(path):
        match = LISTED_PICTURE.fullmatch(line.split()[0])
        if not match:
            raise InputError(f"{path}, line {number}: not a picture's id or file: {line[:200]!r}")
        image_id = int(match[1])
        if image_id in ids:
            raise InputError(f"{path}, line {number}: picture {image_id} is listed twice")
        ids[image_id] = None
    if not ids:
        raise InputError(f"{path}: names no picture")
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
    """A split of the published sizes, or of their ratio where there are too few pictures."""

    # A hash, so that neither the order nor a library's generator makes a difference.
    def place(image_id: int) -> bytes:
        return hashlib.sha256(f"{seed} {image_id}".encode()).digest()

    order = sorted(image_ids, key=place)
    share = TEST_SIZE / (TRAIN_SIZE + TEST_SIZE)
    test = max(1, min(TEST_SIZE, round(len(order) * share)))
    return {"train": order[test : test + TRAIN_SIZE], "test": order[:test]}


def find_pictures(root: Path, pictures: Dict[int, Picture]) -> Dict[int, str | None]:
    """Each picture's file name below `root`, None where it is in none of the folders."""

    # Each folder is listed once: a look-up per picture takes minutes on a network's disk.
    @cache
    def files(folder: str) -> set:
        return set(os.listdir(root / folder)) if (root / folder).is_dir() else set()

    found = {}
    for image_id, picture in pictures.items():
        name = f"{image_id}.jpg"
        folders = (picture.folder, *IMAGE_FOLDERS)
        folder = next((folder for folder in folders if name in files(folder)), None)
        found[image_id] = None if folder is None else posixpath.join(folder, name)
    return found


def leave_out(missing: Sequence[str], where: Path, skip_missing: bool) -> None:
    """Say how many pictures are missing, if there are any.

    Raises:
        InputError: naming some; skip_missing is False.
    """
    if not missing:
        return
    if skip_missing:
        print(f"left out {len(missing)} pictures that are not in {where}")
        return
    more = f" and {len(missing) - MAX_LISTED} more" if len(missing) > MAX_LISTED else ""
    raise InputError(
        f"{len(missing)} pictures are not in {where}: {', '.join(missing[:MAX_LISTED])}{more} "
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
    """COCO's annotations, one for each picture and label; `index` has the labels' ids."""
    for image_id in image_ids:
        names = {name for item in objects.get(image_id, []) for name in item.names}
        for label in sorted(names & index.keys()):
            yield {"image_id": image_id, "category_id": index[label]}


def box_annotations(
    objects: Dict[int, List[Object]],
    image_ids: Iterable[int],
    index: Dict[str, int],
    pictures: Dict[int, Picture],
) -> Iterator[Dict]:
    """COCO's annotations, one for each object and label, without a box where none is left of it."""
    for image_id in image_ids:
        for item in objects.get(image_id, []):
            bbox = clip(item.box, pictures[image_id])
            for name in item.names:
                if name in index:
                    annotation = {"image_id": image_id, "category_id": index[name]}
                    yield {**annotation, "bbox": bbox} if bbox else annotation


def clip(box: Tuple[float, ...], picture: Picture) -> List[float] | None:
    """[x, y, w, h] of the part of a box that is inside the picture; None where there is none."""
    x, y, w, h = box
    left, top = max(x, 0), max(y, 0)
    width, height = min(x + w, picture.width) - left, min(y + h, picture.height) - top
    return [left, top, width, height] if width > 0 and height > 0 else None


def write_coco(path: Path, **lists: Iterable[Dict]) -> None:
    """A JSON in COCO's form, an entry a line, of entries that need not all be in memory."""
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        before = "{"
        for key, entries in lists.items():
            file.write(f'{before}"{key}":[')
            for number, entry in enumerate(entries):
                file.write(",\n" if number else "\n")
                file.write(json.dumps(entry, separators=(",", ":")))
            before = "],\n"
        file.write("]}\n")


def choose_pictures(
    args: argparse.Namespace, source: Path, target: Path
) -> Tuple[Dict[str, List[int]], Dict[int, Picture], Dict[int, str | None]]:
    """The ids of each split, sorted, and by id the pictures and their file names.

    Raises:
        InputError: a file is broken, pictures are missing, or a split has none.
    """
    pictures = read_pictures(source / "image_data.json")
    listed = None
    if args.train_list:
        train, test = read_image_list(args.train_list), read_image_list(args.test_list)
        twice = set(train).intersection(test)
        if twice:
            raise InputError(f"{args.test_list}: picture {min(twice)} is in {args.train_list}, too")
        listed = {"train": train, "test": test}
        wanted = [*train, *test]
        unknown = [str(image_id) for image_id in wanted if image_id not in pictures]
        leave_out(unknown, source / "image_data.json", args.skip_missing)
        pictures = {image_id: pictures[image_id] for image_id in wanted if image_id in pictures}
    file_names = find_pictures(target, pictures)
    missing = [f"{pictures[i].folder}/{i}.jpg" for i, name in file_names.items() if name is None]
    leave_out(missing, target, args.skip_missing)
    there = {image_id for image_id, name in file_names.items() if name is not None}
    splits = {}
    for split, image_ids in (listed or split_by_seed(there, args.seed)).items():
        splits[split] = sorted(there.intersection(image_ids))
        if not splits[split]:
            raise InputError(f"{target}: no picture for the {split} split")
    return splits, pictures, file_names


def prepare(args: argparse.Namespace) -> None:
    """Read everything, refuse what is broken, and only then write."""
    if bool(args.train_list) != bool(args.test_list):
        raise InputError("--train-list and --test-list go together")
    if args.labels < 1:
        raise InputError(f"--labels must be at least 1, not {args.labels}")
    target = args.root / "vg500"
    source = args.source or target
    aliases = read_aliases(args.aliases) if args.aliases else {}
    splits, pictures, file_names = choose_pictures(args, source, target)
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
            progress = tqdm(image_ids, split, unit=" pictures", disable=None)
            if args.boxes:
                annotations = box_annotations(objects, progress, index, pictures)
            else:
                annotations = label_annotations(objects, progress, index)
            write_coco(
                made / f"{split}.json",
                images=(
                    {
                        "id": image_id,
                        "file_name": file_names[image_id],
                        "width": pictures[image_id].width,
                        "height": pictures[image_id].height,
                    }
                    for image_id in image_ids
                ),
                annotations=({"id": n, **entry} for n, entry in enumerate(annotations, start=1)),
                categories=({"id": number, "name": label} for label, number in index.items()),
            )
        with open(made / "labels.txt", "w", encoding="utf-8", newline="\n") as file:
            file.writelines(f"{label}\n" for label in labels)
        for split in splits:
            os.replace(made / f"{split}.json", target / "annotations" / f"{split}.json")
        # Last: where it is, the rest is, too.
        os.replace(made / "labels.txt", target / "labels.txt")
    rarest = min(labels, key=lambda label: counts[label])
    print(
        f"{target}: {len(splits['train'])} training and {len(splits['test'])} test pictures, "
        f"{len(labels)} labels of {counts[rarest]} objects ({rarest}) or more"
    )


def main() -> int:
    """Returns the exit status; what the user can put right is said in one line."""
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
            help=f"the {split} split's pictures, one a line: 2317468, 2317468.jpg or "
            "VG_100K/2317468.jpg, then anything (default: a split drawn by chance)",
        )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the split drawn by chance (0)"
    )
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
        help="write each object's box, clipped to the picture, instead of one entry for each "
        "picture and label",
    )
    parser.add_argument(
        "--skip-missing",
        action="store_true",
        help="leave out pictures that are not there, or that are listed and not in "
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
