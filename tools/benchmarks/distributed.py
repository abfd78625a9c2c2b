"""Prediction by the processes of a Ray cluster on this machine, beside one process."""

from __future__ import annotations

import argparse
import inspect
import os
import time
from collections import deque
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Callable, Dict, Iterator, List, NamedTuple, Sequence

from tqdm import tqdm

from ia_gcn.inference import MultiLabelPredictor, predict_dataset, predict_files
from ia_gcn.inference.distributed import joined_cluster
from ia_gcn.inference.parts import Job

from .arguments import positive
from .cpu import EFFICIENTNET, save_checkpoint
from .loading import rate_rows, write_photos
from .measuring import Table


class Times(NamedTuple):
    start: float
    """Seconds until each worker has done a part."""
    images: float
    """Seconds for all images, as fast as from then on."""


def predict_in_process(predictor: MultiLabelPredictor, files: Sequence[str], args) -> Times:
    """As tools/predict.py does."""
    start = time.perf_counter()
    deque(predict_files(predictor, files, batch_size=args.batch, num_workers=args.threads), 0)
    return Times(0, time.perf_counter() - start)


def predict_by_workers(files: Sequence[str], job: Job, workers: int, args) -> Times:
    """As tools/predict_distributed.py does, with as many cores in all."""
    start = time.perf_counter()
    share = {"workers": workers, "cpus_per_worker": args.threads / workers, "gpus_per_worker": 0}
    with TemporaryDirectory(dir=args.folder) as output:
        done = [
            (progress.images, time.perf_counter() - start)
            for progress in predict_dataset(files, output, job, **share)
        ]
    (before, begin), (_, end) = done[workers], done[-1]
    return Times(begin, (end - begin) * len(files) / (len(files) - before))


def measure_in_turn(calls: Dict[str, Callable[[], Times]], rounds: int) -> Dict[str, List[Times]]:
    """`rounds` times each in turn, after a round for warming up."""
    times = {name: [] for name in calls}
    with tqdm(total=(rounds + 1) * len(calls), leave=False, disable=None) as bar:
        for number in range(rounds + 1):
            for name, call in calls.items():
                found = call()
                if number > 0:
                    times[name].append(found)
                bar.update()
    return times


def run_distributed(args) -> Iterator[Table]:
    """Count the images per second of tools/predict.py and tools/predict_distributed.py.

    An EfficientNet-Lite0 of random weights predicts the same JPEGs, on the same number of cores
    (--threads): by threads of this process, by one worker with all cores, and by a worker per core.
    The rate of workers is counted once each of them has done a part. What comes before, mostly the
    start of their processes, is a column of its own; the start of Ray itself is in neither.
    """
    with TemporaryDirectory(dir=args.folder) as folder, joined_cluster(None):
        weights = os.path.join(folder, "model.pth")
        save_checkpoint(weights, EFFICIENTNET, args.size, [])
        predictor = MultiLabelPredictor(weights, device="cpu")
        photos = write_photos(Path(folder), args.photos)
        files = [photos[i % len(photos)] for i in range(args.num)]
        names = tuple(predictor.label_names)
        thresholds = (0.5,) * len(names)
        job = Job(weights, names, thresholds, batch_size=args.batch, part_size=args.part)
        calls = {"predict.py": partial(predict_in_process, predictor, files, args)}
        for workers in sorted({1, args.threads}):
            name = f"predict_distributed.py, workers: {workers}"
            calls[name] = partial(predict_by_workers, files, job, workers, args)
        times = measure_in_turn(calls, args.rounds)
    rows = rate_rows({name: [x.images for x in found] for name, found in times.items()}, args.num)
    for row, found in zip(rows, times.values()):
        row["until each worker has done a part"] = f"{median(x.start for x in found):.3g} s"
    yield Table(
        f"Prediction: tf_efficientnet_lite0, {args.size}×{args.size} pixels, {args.threads} cores",
        rows,
        f"{args.num} JPEGs of about 640×480 pixels, in parts of {args.part}.",
    )


def add_distributed(subcommands, common: argparse.ArgumentParser) -> None:
    parser = subcommands.add_parser(
        "distributed-prediction",
        help="prediction by several processes beside one",
        description=inspect.getdoc(run_distributed),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[common],
    )
    parser.set_defaults(run=run_distributed)
    parser.add_argument("--num", type=positive, default=2048, help="images (default 2048)")
    parser.add_argument(
        "--photos", type=positive, default=64, help="how many of them differ (default 64)"
    )
    parser.add_argument("--part", type=positive, default=128, help="images of a part (default 128)")
    parser.add_argument("--batch", type=positive, default=16, help="images in a batch (default 16)")
    parser.add_argument(
        "--size", type=positive, default=192, help="a view's height and width (default 192)"
    )
    parser.add_argument("--folder", help="for the files (default: of temporary ones)")
