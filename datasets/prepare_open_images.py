#!/usr/bin/env python3
"""Make a data set of Open Images' image-level labels, of which each image has some known ones.

Put these from https://storage.googleapis.com/openimages/web/download_v7.html into ROOT/open_images:
  oidv7-class-descriptions.csv  oidv7-classes-trainable.txt
  oidv7-train-annotations-human-imagelabels.csv   and those of val and test, as many as you want
  train/ or train_0/ ... train_f/, validation/, test/   the images, or links to where they are
Files of V6 will do, too.

What the command leaves there:
  labels.txt                                           a label a line, in the list's order
  annotations/train.npz ... of each split that has a CSV   which labels are present, which absent

Labels that people have verified are present or absent as they said; where they disagree, and
wherever nobody was asked, a label is unknown. A split that was made before from the same files and
images is left as it is, so that an interrupted run can be repeated.

Examples:
  what people have verified, of the images that are there:
    datasets/prepare_open_images.py --skip-missing
  labels of boxes and, from a confidence of 0.8 on, those of machines are present, too; this takes
  ...-annotations-bbox.csv and ...-annotations-machine-imagelabels.csv:
    datasets/prepare_open_images.py --boxes --machine 0.8
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import sys
from functools import partial
from pathlib import Path
from typing import Dict, List

import numpy as np

from ia_gcn.commands.common import make_parser, probability, run
from ia_gcn.data.build import MAX_LISTED
from ia_gcn.data.datasets.open_images import (
    by_box,
    by_machine,
    by_people,
    file_name,
    made_with,
    read_classes,
    read_label_csv,
    settle,
    write_open_images,
)
from ia_gcn.errors import InputError
from ia_gcn.io.files import write_text_atomically

# What Open Images calls a split in the names of its files, and where its images can be.
SPLITS = {
    "train": ("train", ["train", *(f"train_{digit}" for digit in "0123456789abcdef")]),
    "val": ("val|validation", ["validation", "val"]),
    "test": ("test", ["test"]),
}
IMAGE = re.compile(r"[0-9a-f]{16}\.jpg")


def find_file(folder: Path, name: str) -> Path | None:
    """The file whose name is this regular expression, with anything or nothing and - before it.

    Raises:
        InputError: there are several.
    """
    pattern = re.compile(rf"(?:.*-)?(?:{name})")
    found = sorted(path for path in folder.iterdir() if pattern.fullmatch(path.name))
    if len(found) > 1:
        raise InputError(f"{folder}: several files for one: {', '.join(p.name for p in found)}")
    return found[0] if found else None


def need_file(folder: Path, name: str) -> Path:
    """`find_file`, where there must be one."""
    found = find_file(folder, name)
    if found is None:
        raise InputError(f"{folder}: no file ...{name}; see --help")
    return found


def find_images(root: Path, folders: List[str]) -> Dict[str, np.ndarray]:
    """The ids of the images in each of the folders that there are, sorted, uint64."""
    found = {}
    for folder in folders:
        if (root / folder).is_dir():
            names = (entry.name for entry in os.scandir(root / folder))
            ids = [int(name[:16], 16) for name in names if IMAGE.fullmatch(name)]
            found[folder] = np.sort(np.array(ids, np.uint64))
    return found


def prepare_split(
    split: str,
    index: Dict[str, int],
    label_names: List[str],
    classes: List[Path],
    args: argparse.Namespace,
) -> None:
    """Make a split, unless it is there."""
    target = args.root / "open_images"
    source = args.source or target
    name, folders = SPLITS[split]
    judges = {need_file(source, f"(?:{name})-annotations-human-imagelabels.csv"): by_people}
    if args.boxes:
        judges[need_file(source, f"(?:{name})-annotations-bbox.csv")] = by_box
    if args.machine is not None:
        machine = need_file(source, f"(?:{name})-annotations-machine-imagelabels.csv")
        judges[machine] = partial(by_machine, threshold=args.machine)
    images = find_images(target, folders)
    settings = {
        "machine": args.machine,
        "images": {
            folder: hashlib.sha256(ids.tobytes()).hexdigest() for folder, ids in images.items()
        },
        "files": {
            path.name: [path.stat().st_size, path.stat().st_mtime_ns]
            for path in (*classes, *judges)
        },
    }
    path = target / "annotations" / f"{split}.npz"
    if made_with(str(path)) == settings:
        print(f"{path}: is there, of the same files")
        return

    parts = [read_label_csv(str(file), index, judge) for file, judge in judges.items()]
    known = settle(*map(np.concatenate, zip(*parts)))
    folder_of_image = np.full(len(known.image_ids), len(images), np.uint8)
    for number, ids in enumerate(images.values()):
        folder_of_image[np.isin(known.image_ids, ids)] = number
    there = folder_of_image < len(images)
    missing = known.image_ids[~there]
    if len(missing) and not args.skip_missing:
        listed = ", ".join(file_name(image_id) for image_id in missing[:MAX_LISTED].tolist())
        raise InputError(
            f"{len(missing)} of {len(there)} images are not in {target}, {' or '.join(folders)}: "
            f"{listed}{' ...' if len(missing) > MAX_LISTED else ''} "
            "(--skip-missing leaves them out)"
        )
    if not there.any():
        raise InputError(f"{target}: no image for the {split} split")
    known = known.pick(there)
    where = list(images), folder_of_image[there]
    write_open_images(str(path), known, *where, label_names, settings)
    print(
        f"{path}: {len(known.image_ids)} images, {len(known.present)} labels present, "
        f"{len(known.absent)} absent; {len(missing)} images left out that are not there"
    )


def prepare(args: argparse.Namespace) -> None:
    """Make labels.txt and all splits of which there are labels."""
    target = args.root / "open_images"
    source = args.source or target
    if not source.is_dir():
        raise InputError(f"{source}: no such folder; see --help")
    classes = [
        need_file(source, name) for name in ("classes-trainable.txt", "class-descriptions.csv")
    ]
    names = read_classes(*map(str, classes))
    splits = [
        split
        for split, (name, _) in SPLITS.items()
        if find_file(source, f"(?:{name})-annotations-human-imagelabels.csv")
    ]
    if not splits:
        raise InputError(f"{source}: no file ...-annotations-human-imagelabels.csv; see --help")
    target.mkdir(parents=True, exist_ok=True)
    with write_text_atomically(target / "labels.txt") as file:
        file.writelines(f"{name}\n" for name in names.values())
    index = {mid: number for number, mid in enumerate(names)}
    for split in splits:
        prepare_split(split, index, list(names.values()), classes, args)


def main() -> int:
    """Returns the exit status."""
    parser = make_parser(__doc__)
    parser.add_argument(
        "--root",
        type=Path,
        default=Path(os.getenv("DETECTRON2_DATASETS", "datasets")).expanduser(),
        help="where data sets live (default $DETECTRON2_DATASETS or else ./datasets)",
    )
    parser.add_argument("--source", type=Path, help="folder of the CSVs (ROOT/open_images)")
    parser.add_argument(
        "--boxes", action="store_true", help="labels of boxes are present, whatever else is said"
    )
    parser.add_argument(
        "--machine",
        type=probability,
        metavar="CONFIDENCE",
        help="labels that a machine found with at least this confidence are present, unless people "
        "say otherwise",
    )
    parser.add_argument(
        "--skip-missing", action="store_true", help="leave out images that are not there"
    )
    args = parser.parse_args()
    return run("prepare_open_images", lambda: prepare(args))


if __name__ == "__main__":
    sys.exit(main())
