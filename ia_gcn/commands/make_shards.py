"""Write a data set as tar shards, for data that is large or is read over a network.

A shard is a tar file with some thousand images, as they are, and beside each a .json with its
image_id and labels: the form of webdataset, which can read them too. OUT gets 000000.tar,
000001.tar, ... and index.jsonl, which has the labels of all images and where they are, so that a
training reads the shards for the images alone.

Images are put into the order of a hash of their ids. The same data gives the same bytes. After an
interruption, the same command goes on: shards that are there are kept.

Examples:
  a registered data set:
    tools/make_shards.py digit_scenes_train shards/train
  your own data, as DATASETS.CUSTOM names it, in shards of 1 GB:
    tools/make_shards.py custom_train shards/train --shard-size 1GB \\
        DATASETS.CUSTOM.TRAIN train.csv DATASETS.CUSTOM.IMAGE_ROOT photos
  a training on shards:
    tools/train_net.py --config-file configs/Custom/small.yaml \\
        DATASETS.CUSTOM.TRAIN shards/train/index.jsonl DATASETS.CUSTOM.TEST shards/test/index.jsonl
  are all shards there and whole? (reads them; exit status 1 if not)
    tools/make_shards.py --check shards/train/index.jsonl
  the same of shards that are elsewhere than their index:
    tools/make_shards.py --check train.jsonl DATASETS.CUSTOM.IMAGE_ROOT https://example.com/train
"""

from __future__ import annotations

import argparse
import re
from typing import Sequence

from ..data import get_label_names
from ..data.build import check_images_exist, load_multilabel_dicts, shorten
from ..data.datasets.shard_writing import check_shards, check_webdataset, write_shards
from ..data.datasets.shards import is_shard_index, read_shard_index
from ..engine import setup_cfg
from ..errors import InputError
from .common import make_parser, run

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}


def byte_size(text: str) -> int:
    """An argparse type: such as 256MB."""
    match = re.fullmatch(r"(\d{1,12}) ?([KMG]?)B?", text, re.IGNORECASE)
    if not match or not int(match[1]):
        raise argparse.ArgumentTypeError(f"{text} is not a size such as 256MB or 1GB")
    return int(match[1]) * UNITS[match[2].upper()]


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = make_parser(__doc__)
    parser.add_argument("name", metavar="NAME", nargs="?", help="a registered data set")
    parser.add_argument("out", metavar="OUT", nargs="?", help="a folder for the shards")
    parser.add_argument(
        "--shard-size",
        type=byte_size,
        default="256MB",
        metavar="SIZE",
        help="of the images in a shard (256MB)",
    )
    parser.add_argument("--check", metavar="INDEX", help="read and check the shards of an index")
    parser.add_argument("opts", metavar="KEY VALUE", nargs="*", help="config keys and values")
    # Intermixed, so that options may stand between OUT and the keys.
    args = parser.parse_intermixed_args(argv)
    if args.check:
        opts = [arg for arg in (args.name, args.out, *args.opts) if arg is not None]
        return run("make_shards", lambda: check(args.check, opts))
    if args.out is None:
        parser.error("NAME and OUT, or --check INDEX")
    go_on = "the same command goes on"
    return run("make_shards", lambda: make(args.name, args.out, args.shard_size, args.opts), go_on)


def make(name: str, out: str, shard_size: int, opts: Sequence[str]) -> None:
    """Write the shards of a registered data set, and say how many there are."""
    check_webdataset()
    setup_cfg("", ["MODEL.DEVICE", "cpu", "DATASETS.CUSTOM.HOLD_OUT", 0.0, *opts])
    label_names, dicts = get_label_names([name]), load_multilabel_dicts(name)
    check_images_exist(name, dicts, max_unreadable=0)
    index_file = write_shards(dicts, label_names, out, shard_size)
    shards = read_shard_index(index_file).shards
    gigabytes = sum(shard.size for shard in shards) / 1e9
    print(f"{index_file}: {len(dicts):,} images in {len(shards):,} shards, {gigabytes:,.2f} GB")


def check(index_file: str, opts: Sequence[str]) -> int:
    """Print which shards of an index are missing or damaged; returns the exit status."""
    if not is_shard_index(index_file):
        raise InputError(f"--check {index_file}: not an index, whose name ends in .jsonl")
    cfg = setup_cfg("", ["MODEL.DEVICE", "cpu", *opts])
    problems = check_shards(index_file, cfg.DATASETS.CUSTOM.IMAGE_ROOT)
    number = len(read_shard_index(index_file).shards)
    if problems:
        listed = shorten([f"{path} ({why})" for path, why in problems.items()])
        raise InputError(f"{len(problems)} of {number} shards are missing or damaged: {listed}")
    print(f"{index_file}: all {number:,} shards are whole")
    return 0
