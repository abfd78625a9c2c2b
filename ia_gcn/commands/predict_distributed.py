"""Predict the labels of millions of images, by many processes or machines (Ray Data).

INPUT is what tools/predict.py takes: a file; a folder, for all images in it and below; a pattern;
or - for a list of files on standard input, one a line. It may also be a Parquet file with a column
of the bytes of image files, a folder of such files, or the index.jsonl of tar shards
(tools/make_shards.py). All workers read them by these names.

Each worker has a model of its own: one per GPU where there are GPUs, else one per 8 cores or fewer.

Writes a folder of Parquet files, part-00000.parquet and so on, with a row for each image in the
order given:
  file           its name
  labels         list of strings, the highest probability first
  probabilities  list of float32, of these labels
  error          why it could not be read, or null; the exit status is then 1
  scores         with --scores: list of float32, of all labels in the model's order
The names of all labels are in the schema's metadata.

The same command goes on with what is missing, after an interruption for example. A part whose
worker is lost is made again. The rows are the same, bit for bit, with any number of workers.

It needs pip install -e ".[ray]".

Examples:
  folders, by all GPUs or cores of this machine:
    tools/predict_distributed.py --weights model.pth photos more --output labels
  images in Parquet, with an exported model:
    tools/predict_distributed.py --weights model.onnx shards/ --output labels \\
        --image-column jpeg --name-column url
  the files of a list, by a cluster that `ray start` has made:
    tools/predict_distributed.py --weights model.pth - --output labels --address auto < files.txt
  by 4 processes with 2 cores each, all probabilities:
    tools/predict_distributed.py --weights model.pth photos --output labels --scores \\
        --workers 4 --cpus-per-worker 2
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from contextlib import closing, redirect_stdout
from itertools import chain
from typing import Iterator, List, Sequence

from tqdm import tqdm

from ..errors import InputError
from ..extensions import import_extensions
from ..inference import load_predictor, predict_dataset
from ..inference.distributed import Progress
from ..inference.parts import Job, Source, find_sources
from ..io.parquet import Columns
from .common import add_import_option, make_parser, positive_int, run
from .predict import add_threshold_options, label_thresholds, read_standard_input

# What names of images in tar shards begin with; `ia_gcn.io.shards` needs detectron2.
TAR = "tar://"


def predict_distributed(args: argparse.Namespace) -> int:
    """Returns the exit status: 1 if a file could not be read."""
    columns = Columns(args.image_column, args.name_column)
    sources = list(chain.from_iterable(read_sources(name, columns) for name in args.inputs))
    if not sources:
        raise InputError("there are no images")
    if args.weights.endswith(".onnx") and any(str(x).startswith(TAR) for x in sources):
        raise InputError("tar shards need a checkpoint: a .onnx file does not read them")
    import_extensions(args.imports)
    # What is wrong with the model is said here and not by a worker.
    predictor = load_predictor(
        args.weights, config_file=args.config_file, device="cpu", precision=args.precision
    )
    job = Job(
        weights=args.weights,
        label_names=tuple(predictor.label_names),
        thresholds=tuple(label_thresholds(args, predictor.label_names).tolist()),
        top_k=args.top_k,
        with_scores=args.scores,
        config_file=args.config_file,
        precision=args.precision,
        imports=tuple(args.imports),
        columns=columns,
        batch_size=args.batch_size,
        part_size=args.images_per_part,
    )
    del predictor
    results = predict_dataset(
        sources,
        args.output,
        job,
        workers=args.workers,
        cpus_per_worker=args.cpus_per_worker,
        gpus_per_worker=args.gpus_per_worker,
        address=args.address,
    )
    # What Ray says there of a lost worker is said below.
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), closing(results):
        progress = watch(results)
    what = f"{progress.total} images, {progress.unreadable} could not be read"
    if progress.lost:
        what += f"; {progress.lost} parts were made again, as their workers were lost"
    print(f"predict-distributed: {what}", file=sys.stderr)
    return 1 if progress.unreadable else 0


def read_sources(name: str, columns: Columns) -> List[Source]:
    """What an INPUT stands for, with the files that are listed on standard input.

    Raises:
        InputError: see `find_sources`; or what is there is an image, or says what is known of one.
    """
    if name != "-":
        return find_sources(name, columns)
    inputs = read_standard_input()
    for item in inputs:
        if not isinstance(item.file, str) or item.known:
            what = f"{item.place}: known labels are" if item.known else "-: a single image is"
            raise InputError(f"{what} for tools/predict.py")
    return [item.file for item in inputs]


def watch(results: Iterator[Progress]) -> Progress:
    """The last, once all is done; with a bar on a terminal."""
    progress = next(results)
    # The rate is that of this run, without the parts that were there before.
    bar = tqdm(
        total=progress.total,
        initial=progress.images,
        unit=" images",
        smoothing=0,
        leave=False,
        disable=None,
    )
    with bar:
        for progress in results:
            bar.update(progress.images - bar.n)
    return progress


def share_of(text: str) -> float:
    """An argparse type: a number above 0."""
    if not 0 < float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return float(text)


def share_or_none(text: str) -> float:
    """An argparse type: 0 or a number above."""
    return float(text) and share_of(text)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument(
        "inputs", metavar="INPUT", nargs="+", help="file, folder, pattern, index or -"
    )
    parser.add_argument(
        "--weights", required=True, metavar="FILE", help="the checkpoint, or a .onnx file"
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="write there")
    parser.add_argument(
        "--config-file", default="", metavar="FILE", help="instead of the checkpoint's own config"
    )
    add_threshold_options(parser)
    parser.add_argument("--scores", action="store_true", help="write those of all labels, too")
    parser.add_argument(
        "--image-column",
        default=Columns().image,
        metavar="NAME",
        help="of Parquet files: bytes, or a struct with a field bytes (image); a.b is field b of a",
    )
    parser.add_argument(
        "--name-column",
        metavar="NAME",
        help="of Parquet files: names of the images (file, if there is one, or else PATH:ROW)",
    )
    parser.add_argument(
        "--precision", choices=("fp32", "bf16"), default="fp32", help="of the backbone (fp32)"
    )
    parser.add_argument("--batch-size", type=positive_int, default=16, metavar="N", help="(16)")
    parser.add_argument(
        "--images-per-part", type=positive_int, default=4096, metavar="N", help="(4096)"
    )
    parser.add_argument(
        "--workers", type=positive_int, metavar="N", help="processes (as many as fit)"
    )
    parser.add_argument(
        "--cpus-per-worker",
        type=share_of,
        metavar="N",
        help="cores, each with a thread; may be below 1 (an equal share, 8 at most without a GPU)",
    )
    parser.add_argument(
        "--gpus-per-worker",
        type=share_or_none,
        metavar="N",
        help="may be below 1, for several workers on a GPU; 0: on CPUs (1 where there are GPUs)",
    )
    parser.add_argument(
        "--address",
        metavar="HOST:PORT",
        help="of a Ray cluster to join, or auto ($RAY_ADDRESS, or else this machine alone)",
    )
    add_import_option(parser)
    # Intermixed, so that options may stand between the inputs.
    return parser.parse_intermixed_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status; invalid user input is reported in one line."""
    args = parse_arguments(argv)
    go_on = "the same command goes on"
    return run("predict-distributed", lambda: predict_distributed(args), go_on)
