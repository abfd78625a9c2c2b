"""Reading images from tar shards, beside loose files."""

from __future__ import annotations

import argparse
import inspect
import os
import shutil
from collections import deque
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Callable, Dict, Iterator, List

from detectron2.utils.file_io import PathManager

from ia_gcn.data import MultiLabelDatasetMapper, build_multilabel_train_loader
from ia_gcn.data.datasets.shard_writing import write_shards
from ia_gcn.data.datasets.shards import load_multilabel_shards, read_shard_index
from ia_gcn.engine import setup_cfg

from .arguments import positive
from .loading import rate_rows, write_photos
from .measuring import Table, measure
from .networks import CONFIGS

LABELS = ["label"]


def read_only(record: Dict) -> Dict:
    """A mapper that reads an image's bytes, and does nothing with them."""
    with PathManager.open(record["file_name"], "rb") as file:
        return {"length": len(file.read())}


def write_data(folder: Path, args) -> tuple:
    """Photos as loose files and in shards: their dicts, and the paths of the shards."""
    photos = write_photos(folder, args.photos)
    # Each is a file of its own for the system.
    files = [shutil.copy(photos[i % len(photos)], folder / f"c{i:06}.jpg") for i in range(args.num)]
    for photo in photos:
        os.remove(photo)
    loose = [{"file_name": f, "image_id": f, "labels": [0]} for f in map(str, files)]
    out = folder / "shards"
    index = write_shards(loose, LABELS, str(out), args.shard_size * 10**6)
    paths = [str(out / info.name) for info in read_shard_index(index).shards]
    return loose, load_multilabel_shards(index, "", LABELS), paths


def build_calls(loose: List[Dict], sharded: List[Dict], mapper: Callable, args) -> Dict:
    """What is timed, by the name of a row: an epoch of the training's loader."""
    batches = args.num // args.batch

    def epoch(dicts: List[Dict], window: int) -> None:
        loader = build_multilabel_train_loader(
            dicts,
            mapper=mapper,
            seed=0,
            batch_size=args.batch,
            num_workers=0,
            max_unreadable=0,
            shard_window=window,
            shard_streams=args.streams,
        )
        deque(islice(loader, batches), 0)

    return {
        "loose files": partial(epoch, loose, 0),
        "shards, all mixed (SHARD_WINDOW 0)": partial(epoch, sharded, 0),
        f"shards, SHARD_WINDOW {args.window}": partial(epoch, sharded, args.window),
    }


def read_by_webdataset(paths: List[str], buffer: int) -> None:
    """An epoch of webdataset's own stream, with its shuffle buffer."""
    import webdataset

    stream = webdataset.WebDataset(paths, shardshuffle=len(paths), seed=0, empty_check=False)
    deque(stream.shuffle(buffer), 0)


def forget(paths: List[str]) -> None:
    """Have the system forget the files that it keeps in memory."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def run_shards(args) -> Iterator[Table]:
    """Count the images per second of one process, from loose files and from tar shards.

    Twice: of reading alone, and of training batches (decoded, cropped, collated); and each with
    files that the system has in memory, and with files that it first has to read from the disk.
    webdataset's own stream is timed for reading alone; its shuffle buffer has as many images as
    there are in the shards of a window.
    """
    cfg = setup_cfg(str(CONFIGS / "resnet101.yaml"), ["INPUT.IMAGE_SIZE", [args.size, args.size]])
    views = {"Reading alone": read_only, "Training batches": MultiLabelDatasetMapper(cfg, True)}
    with TemporaryDirectory(dir=args.folder) as folder:
        loose, sharded, paths = write_data(Path(folder), args)
        # What is not on the disk yet can't be forgotten.
        os.sync()
        gigabytes = sum(map(os.path.getsize, paths)) / 1e9
        note = f"{args.num} JPEGs, {gigabytes:.2f} GB in {len(paths)} shards."
        files = [*paths, *(record["file_name"] for record in loose)]
        places = {"in memory": lambda: None, "on the disk": partial(forget, files)}
        for what, mapper in views.items():
            calls = build_calls(loose, sharded, mapper, args)
            if mapper is read_only:
                buffer = args.window * args.num // len(paths)
                calls["webdataset's stream"] = partial(read_by_webdataset, paths, buffer)
            for where, before in places.items():
                seconds = measure(calls, args.rounds, f"{what}, {where}", before)
                yield Table(f"{what}, files {where}", rate_rows(seconds, args.num), note)


def add_shards(subcommands, common: argparse.ArgumentParser) -> None:
    parser = subcommands.add_parser(
        "shards",
        help="reading from tar shards beside loose files",
        description=inspect.getdoc(run_shards),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[common],
    )
    # Images per core are those of one thread.
    parser.set_defaults(run=run_shards, threads=1)
    parser.add_argument(
        "--num", type=positive, default=1024, help="images, a multiple of the batch (default 1024)"
    )
    parser.add_argument(
        "--photos", type=positive, default=64, help="how many of them differ (default 64)"
    )
    parser.add_argument("--batch", type=positive, default=16, help="images in a batch (default 16)")
    parser.add_argument(
        "--size", type=positive, default=448, help="a view's height and width (default 448)"
    )
    parser.add_argument(
        "--shard-size", type=positive, default=8, metavar="MB", help="of a shard (default 8)"
    )
    parser.add_argument("--window", type=positive, default=4, help="SHARD_WINDOW (default 4)")
    parser.add_argument("--streams", type=positive, default=1, help="SHARD_STREAMS (default 1)")
    parser.add_argument("--folder", help="for the files (default: of temporary ones)")
