#!/usr/bin/env python3
"""Unpack the archives of MS-COCO 2014 and PASCAL VOC 2007 into the layout of datasets/README.md.

Download these with a browser (datasets/README.md says where), any of them, into one folder:
  train2014.zip  val2014.zip  annotations_trainval2014.zip
  VOCtrainval_06-Nov-2007.tar  VOCtest_06-Nov-2007.tar

Files that are already unpacked stay as they are, so the command can be repeated after a cut. At
the end it checks that every image that the annotations name is there.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tarfile
import zipfile
from pathlib import Path

from tqdm import tqdm

from ia_gcn.data.build import missing_images
from ia_gcn.data.datasets import COCO_LABELS, load_multilabel_coco, load_multilabel_voc
from ia_gcn.data.datasets.common import join_inside
from ia_gcn.errors import InputError

# Where an archive's content goes, and the folder inside the archive that is left out.
ARCHIVES = {
    "train2014.zip": ("coco", ""),
    "val2014.zip": ("coco", ""),
    "annotations_trainval2014.zip": ("coco", ""),
    "VOCtrainval_06-Nov-2007.tar": (".", "VOCdevkit/"),
    "VOCtest_06-Nov-2007.tar": (".", "VOCdevkit/"),
}


def unpack(archive: Path, target: Path, prefix: str) -> None:
    """Write the files of a .zip or .tar below `target`, without their leading `prefix`."""
    is_zip = archive.suffix == ".zip"
    with zipfile.ZipFile(archive) if is_zip else tarfile.open(archive) as opened:
        members = opened.infolist() if is_zip else opened.getmembers()
        for member in tqdm(members, desc=archive.name, unit="files"):
            name = member.filename if is_zip else member.name
            is_file = not member.is_dir() if is_zip else member.isfile()
            if not is_file or not name.startswith(prefix):
                continue
            path = Path(join_inside(str(target), name[len(prefix) :], str(archive)))
            size = member.file_size if is_zip else member.size
            if path.exists() and path.stat().st_size == size:
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            source = opened.open(member) if is_zip else opened.extractfile(member)
            with source, open(path, "wb") as file:
                shutil.copyfileobj(source, file)


def check(root: Path) -> int:
    """Print for each split that is there whether it is whole; the number of those that aren't."""
    splits = {}
    for split in ("train", "val"):
        json_file = root / f"coco/annotations/instances_{split}2014.json"
        if json_file.exists():
            images = str(root / f"coco/{split}2014")
            splits[f"coco_2014_{split}_multilabel"] = load_multilabel_coco(
                str(json_file), images, COCO_LABELS
            )
    for split in ("trainval", "test"):
        if (root / f"VOC2007/ImageSets/Main/{split}.txt").exists():
            splits[f"voc_2007_{split}_multilabel"] = load_multilabel_voc(
                str(root / "VOC2007"), split
            )
    incomplete = 0
    for name, dicts in splits.items():
        missing = missing_images(dicts)
        incomplete += bool(missing)
        verdict = f"{len(missing)} missing, such as {missing[0]}" if missing else "whole"
        print(f"{name}: {len(dicts)} images, {verdict}")
    return incomplete


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--archives", type=Path, required=True, help="folder of the downloads")
    parser.add_argument(
        "--root",
        type=Path,
        default=Path(os.getenv("DETECTRON2_DATASETS", "datasets")),
        help="where data sets live (default $DETECTRON2_DATASETS or else ./datasets)",
    )
    args = parser.parse_args()
    try:
        found = [name for name in ARCHIVES if (args.archives / name).exists()]
        if not found:
            raise InputError(f"{args.archives}: none of {', '.join(ARCHIVES)} is there")
        for name in found:
            folder, prefix = ARCHIVES[name]
            unpack(args.archives / name, args.root / folder, prefix)
        return 1 if check(args.root) else 0
    except (InputError, OSError, zipfile.BadZipFile, tarfile.TarError) as error:
        print(f"prepare_coco_voc: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
