"""Predict the labels of images, with a trained model's checkpoint or its ONNX export.

INPUT is a file; a folder, for all images in it and below; a pattern such as 'photos/*.jpg'; or -
for standard input: an image, or a list of files, one a line. URLs are not downloaded. A file
that is named twice is predicted twice.

A C-Tran, or a model with a label prior (tools/fit_label_prior.py), can be told which labels are
there and which are not, and uses it for the others: with --known for all images, and for one image
with a line of the list that is JSON
  {"file": "a.jpg", "known": {"fork": true, "cup": false}}
and comes before --known. Their probabilities are 1 and 0, and the image's record has the same
"known".

Writes a record for each image, in the order given, as JSON Lines
  {"file": "a.jpg", "labels": [{"label": "cat", "probability": 0.93}, ...]}
with the highest probability first, or as CSV: file,label,probability,error with a line for each
label, and one without label for an image that has none. A file that can't be read becomes a record
with the error, {"file": "b.jpg", "error": "..."}; the exit status is then 1.

With --regions, of a model with a region branch, a record has
  "regions": [{"box": [x0, y0, x1, y1], "weight": 1.2, "label": "cat", "probability": 0.8}, ...]
in the image's pixels, the best by objectness first, each with its likeliest label.

A model that tools/export_model.py wrote as .onnx needs onnxruntime, and neither torch nor
detectron2, except for --draw. On a CPU it is the faster way to serve a small network, and its int8
form (tools/export_model.py --format onnx --int8 IMAGE...) the fastest, at a small cost in mAP:
docs/results/serving.md has figures.

Examples:
  a file:
    tools/predict.py --weights output/demo/model_best.pth photo.jpg
  folders, into a table and drawn:
    tools/predict.py --weights model.pth photos more --output labels.csv --draw labelled
  all labels, whatever their probability, of the images that a command lists:
    find . -name '*.png' | tools/predict.py --weights model.pth - --threshold 0
  an image of another program's:
    curl -sL https://example.org/photo.jpg | tools/predict.py --weights model.onnx -
  what else is in a photo that shows a fork and no cup:
    tools/predict.py --weights c_tran.pth photo.jpg --known fork=yes --known cup=no
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import sys
from collections import Counter
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    BinaryIO,
    Callable,
    Dict,
    Iterator,
    List,
    NamedTuple,
    Sequence,
    TextIO,
    Tuple,
)

import numpy as np
from tqdm import tqdm

from ..errors import InputError
from ..extensions import import_extensions
from ..inference import FilePrediction, OnnxPredictor, find_images, load_predictor, predict_files
from ..inference.files import default_workers, map_ahead
from ..inference.known_labels import check_known
from ..io.files import write_text_atomically
from ..io.images import source_name, turn_to_decode
from ..io.inputs import check_regular
from ..memory import share_freed_memory
from .common import (
    add_import_option,
    make_parser,
    non_negative_int,
    positive_int,
    probability,
    run,
)

if TYPE_CHECKING:
    from ..inference import MultiLabelPredictor


class Input(NamedTuple):
    """A file to predict."""

    file: str | BinaryIO
    known: Dict[str, bool] | None = None
    """What is known of this image, before --known."""
    place: str = ""
    """Where that was read, for a message."""


def predict(args: argparse.Namespace) -> int:
    """Returns the exit status: 1 if a file could not be read."""
    inputs = find_inputs(args.inputs)
    files = [item.file for item in inputs]
    names = [source_name(file) for file in files]
    drawings = drawing_paths(args.draw, names) if args.draw else []
    check_overwrites_none([args.output, *drawings] if args.output else drawings, names)
    import_extensions(args.imports)
    predictor = open_predictor(args)
    known_of_all = dict(args.known)
    check_known(predictor, known_of_all, "--known")
    for item in inputs:
        check_known(predictor, item.known, item.place)
    share_freed_memory()
    threshold = label_thresholds(args, predictor.label_names)
    results = predict_files(
        predictor,
        files,
        known=({**known_of_all, **(item.known or {})} for item in inputs),
        batch_size=args.batch_size,
        num_workers=args.num_workers,
    )
    if args.draw:
        os.makedirs(args.draw, exist_ok=True)
        results = draw_each(results, files, drawings, threshold, args)
    failed = 0
    # Without a terminal, no bar.
    bar = tqdm(results, total=len(files), unit=" images", leave=False, disable=None)
    with open_output(args.output) as stream, bar:
        write = WRITERS[args.format](stream)
        for result in bar:
            failed += result.error is not None
            # The bar and a record must not share a line of a terminal.
            with tqdm.external_write_mode(stream):
                write(result.record(threshold, args.top_k, args.regions))
                stream.flush()
    print(f"predict: {len(files)} images, {failed} could not be read", file=sys.stderr)
    return 1 if failed else 0


def find_inputs(inputs: Sequence[str]) -> List[Input]:
    """The files that INPUT... stands for, in order.

    A name without a file or image is returned itself, and becomes a record with the error.

    Raises:
        InputError: one is a URL, or a line of standard input begins with { and is not of its form.
    """
    files: List[Input] = []
    for name in inputs:
        files += read_standard_input() if name == "-" else map(Input, find_images(name))
    return files


def read_standard_input() -> List[Input]:
    """The files that are listed there, or the one image whose bytes are there."""
    content = sys.stdin.buffer.read()
    # Images have this byte, and names of files can't.
    if b"\0" in content:
        image = io.BytesIO(content)
        image.name = "-"
        return [Input(image)]
    lines = enumerate(content.splitlines(), start=1)
    return [read_line(line, f"standard input, line {number}") for number, line in lines if line]


def read_line(line: bytes, place: str) -> Input:
    """A name of a file, or JSON with one and with known labels.

    Raises:
        InputError: the line begins with { and is not {"file": name, "known": {label: true or
            false}}, of which known may be missing.
    """
    if not line.startswith(b"{"):
        # Names of files need not be text.
        return Input(os.fsdecode(line))
    try:
        record = json.loads(line)
        file, known = record.pop("file"), record.pop("known", {})
        # A name that is not text has escapes, as in what `open_output` writes.
        usable = isinstance(file, str) and file and b"\0" not in os.fsencode(file)
        if record or not usable or not isinstance(known, dict):
            raise ValueError
    # A RecursionError is of JSON that is nested deeply.
    except (KeyError, RecursionError, ValueError):
        raise InputError(
            f'{place} begins with {{ and is not {{"file": "a.jpg", "known": {{"fork": true}}}}; '
            "the name of a file that begins so is written as ./{"
        ) from None
    return Input(file, known, place)


def open_predictor(args: argparse.Namespace) -> MultiLabelPredictor | OnnxPredictor:
    """The predictor of --weights, which does what the other options ask for."""
    if args.draw and not (find_spec("torch") and find_spec("detectron2")):
        raise InputError("--draw needs torch and detectron2; a .onnx file does not")
    predictor = load_predictor(args.weights, config_file=args.config_file, device=args.device)
    if args.regions and not predictor.has_regions:
        raise InputError(f"--regions: the model in {args.weights} has no region branch")
    return predictor


def draw_each(
    results: Iterator[FilePrediction],
    files: Sequence[str | BinaryIO],
    paths: Sequence[str],
    threshold: np.ndarray,
    args: argparse.Namespace,
) -> Iterator[FilePrediction]:
    """`results`, each once its image and labels are drawn, by threads."""
    from ..data.dataset_mapper import read_image
    from ..visualization import draw_label_bars, thumbnail

    def draw(item) -> FilePrediction:
        result, file, path = item
        if result.prediction is not None:
            labels = result.prediction.above(threshold, args.top_k)
            with turn_to_decode(file):
                image = thumbnail(read_image(file))
            draw_label_bars(image, labels, path)
        return result

    items = zip(results, files, paths)
    return map_ahead(draw, items, args.num_workers, args.batch_size)


def json_lines_writer(stream: TextIO) -> Callable[[Dict], None]:
    def write(record: Dict) -> None:
        stream.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")

    return write


def csv_writer(stream: TextIO) -> Callable[[Dict], None]:
    rows = csv.writer(stream, lineterminator="\n")
    rows.writerow(("file", "label", "probability", "error"))

    def write(record: Dict) -> None:
        file, labels = record["file"], record.get("labels", [])
        rows.writerows((file, label["label"], label["probability"], "") for label in labels)
        if not labels:
            rows.writerow((file, "", "", record.get("error", "")))

    return write


WRITERS = {"jsonl": json_lines_writer, "csv": csv_writer}


@contextmanager
def open_output(path: str | None) -> Iterator[TextIO]:
    """The file, which is there once it is complete, or standard output without one, in UTF-8.

    After Ctrl-C or SIGTERM it is there with what was finished. A file name that is not text itself
    is written with escapes, which JSON reads again.
    """
    if path:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        interrupt = None
        with write_text_atomically(path, errors="backslashreplace") as stream:
            try:
                yield stream
            except KeyboardInterrupt as error:
                interrupt = error
        if interrupt is not None:
            raise interrupt
    else:
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace", newline="\n")
        yield sys.stdout


def label_thresholds(args: argparse.Namespace, label_names: Sequence[str]) -> np.ndarray:
    """(C,), by --threshold and --thresholds."""
    threshold = np.full(len(label_names), args.threshold)
    if args.thresholds:
        for label, value in read_thresholds(args.thresholds, label_names).items():
            threshold[label_names.index(label)] = value
    return threshold


def read_thresholds(path: str, label_names: Sequence[str]) -> Dict[str, float]:
    """Of some labels, from JSON, {"label": threshold}, or from CSV, label,threshold.

    Raises:
        InputError: there is no such file, or it has anything else in it.
    """
    try:
        check_regular(path)
        with open(path, encoding="utf-8-sig", newline="") as file:
            if path.lower().endswith(".json"):
                rows = list(json.load(file).items())
            else:
                rows = [row for row in csv.reader(file) if row]
                if rows and rows[0][:2] == ["label", "threshold"]:
                    # evaluate_predictions.py's operating_points.csv has more columns, and no
                    # threshold for a label without positives.
                    rows = [row[:2] for row in rows[1:] if row[1:2] != [""]]
        thresholds = {label: probability(value) for label, value in rows}
    except OSError as error:
        raise InputError(f"--thresholds {path}: {error.strerror or error}") from None
    except (argparse.ArgumentTypeError, AttributeError, TypeError, ValueError, csv.Error) as error:
        raise InputError(
            f"--thresholds {path}: neither JSON, {{label: threshold}}, nor CSV, label,threshold, "
            f"with thresholds of 0 to 1: {error}"
        ) from None
    unknown = sorted(set(thresholds) - set(label_names))
    if unknown:
        raise InputError(f"--thresholds {path}: the model has no label {unknown[0]!r}")
    return thresholds


def known_label(text: str) -> Tuple[str, bool]:
    """An argparse type: LABEL=yes or LABEL=no."""
    label, _, there = text.rpartition("=")
    if not label or there not in ("yes", "no"):
        raise argparse.ArgumentTypeError(f"{text} is neither LABEL=yes nor LABEL=no")
    return label, there == "yes"


def drawing_paths(folder: str, files: Sequence[str]) -> List[str]:
    """A PNG for each file, of its name; a number makes it another than those before it."""
    taken, numbers, paths = set(), Counter(), []
    for file in files:
        stem = name = Path(file).stem
        # Some file systems take A and a for the same.
        while name.casefold() in taken:
            numbers[stem] += 1
            name = f"{stem}_{numbers[stem] + 1}"
        taken.add(name.casefold())
        paths.append(os.path.join(folder, f"{name}.png"))
    return paths


def check_overwrites_none(paths: Sequence[str], files: Sequence[str]) -> None:
    sources = {os.path.realpath(file) for file in files} if paths else set()
    for path in paths:
        if os.path.realpath(path) in sources:
            raise InputError(f"{path} is one of the images, and would be lost")


def add_threshold_options(parser: argparse.ArgumentParser) -> None:
    """--threshold and --thresholds, for `label_thresholds`, and --top-k."""
    parser.add_argument(
        "--threshold", type=probability, default=0.5, metavar="P", help="least probability (0.5)"
    )
    parser.add_argument(
        "--thresholds",
        metavar="FILE",
        help="of some labels, other ones: JSON, {label: threshold}, or CSV, label,threshold",
    )
    parser.add_argument(
        "--top-k", type=positive_int, metavar="K", help="of those, the K likeliest labels at most"
    )


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("inputs", metavar="INPUT", nargs="+", help="file, folder, pattern or -")
    parser.add_argument(
        "--weights", required=True, metavar="FILE", help="the checkpoint, or a .onnx file"
    )
    parser.add_argument(
        "--config-file", default="", metavar="FILE", help="instead of the checkpoint's own config"
    )
    parser.add_argument("--output", metavar="FILE", help="write there and not to standard output")
    parser.add_argument(
        "--format", choices=WRITERS, help="(csv for an --output that ends so, else jsonl)"
    )
    add_threshold_options(parser)
    parser.add_argument(
        "--known",
        type=known_label,
        action="append",
        default=[],
        metavar="LABEL=yes|no",
        help="this label is, or is not, in the images; may be given several times",
    )
    parser.add_argument("--regions", action="store_true", help="write boxes and weights (jsonl)")
    parser.add_argument("--draw", metavar="DIR", help="draw images with their labels there")
    parser.add_argument("--batch-size", type=positive_int, default=16, metavar="N", help="(16)")
    workers = default_workers()
    parser.add_argument(
        "--num-workers",
        type=non_negative_int,
        default=workers,
        metavar="N",
        help=f"threads that read images and predict ({workers})",
    )
    parser.add_argument("--device", help="cpu, cuda, ... (a GPU where there is one)")
    add_import_option(parser)
    # Intermixed, so that options may stand between the inputs.
    args = parser.parse_intermixed_args(argv)
    if not args.format:
        args.format = "csv" if (args.output or "").lower().endswith(".csv") else "jsonl"
    if len(dict(args.known)) < len(set(args.known)):
        parser.error("--known: a label can't be both in the images and not in them")
    if args.regions and args.format == "csv":
        parser.error("--regions: there is no room for boxes in CSV")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status; invalid user input is reported in one line."""
    args = parse_arguments(argv)

    def work() -> int:
        try:
            return predict(args)
        except BrokenPipeError:
            # The reader of the records has stopped; Python would write once more on exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1

    return run("predict", work)
