#!/usr/bin/env python3
"""Say which labels are in images, by a trained model's checkpoint or its ONNX export.

INPUT is a file; a folder, for all images in it and below; a pattern such as 'photos/*.jpg'; or -
for a list of files on standard input, one a line. What is named twice is predicted twice.

Writes a record for each image, in the order given, as JSON Lines
  {"file": "a.jpg", "labels": [{"label": "cat", "probability": 0.93}, ...]}
with the highest probability first, or as CSV: file,label,probability,error with a line for each
label, and one without label for an image that has none. A file that can't be read becomes a record
with the error, {"file": "b.jpg", "error": "..."}; the exit status is then 1.

With --regions, of a model with a region branch, a record has
  "regions": [{"box": [x0, y0, x1, y1], "weight": 1.2, "label": "cat", "probability": 0.8}, ...]
in the image's pixels, the best by objectness first, each with its likeliest label.

A model that tools/export_model.py wrote as .onnx takes onnxruntime, and for all but --draw neither
torch nor detectron2.

Examples:
  a file:
    tools/predict.py --weights output/demo/model_best.pth photo.jpg
  folders, into a table and drawn:
    tools/predict.py --weights model.pth photos more --output labels.csv --draw labelled
  all labels, whatever their probability, of the images that a command lists:
    find . -name '*.png' | tools/predict.py --weights model.pth - --threshold 0
"""

from __future__ import annotations

import argparse
import csv
import glob
import json
import os
import sys
import warnings
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Callable, Dict, Iterator, List, Sequence, TextIO, Tuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from ia_gcn.errors import InputError
from ia_gcn.inference import OnnxPredictor, Prediction
from ia_gcn.io.images import UnreadableImage

# An ONNX model does without, but for --draw.
HAS_DETECTRON2 = bool(find_spec("torch") and find_spec("detectron2"))
if HAS_DETECTRON2:
    import matplotlib
    from detectron2.data.build import trivial_batch_collator
    from torch.utils.data import DataLoader

    from ia_gcn import MultiLabelPredictor
    from ia_gcn.data.dataset_mapper import read_image
    from ia_gcn.visualization.regions import MAX_LABELS, PRESENT, thumbnail

# What counts as an image in a folder.
ENDINGS = {
    *(".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png"),
    *(".pnm", ".ppm", ".tif", ".tiff", ".webp"),
}
# Of drawn labels, in pixels; an image has at least that width, for the names to fit.
LINE_HEIGHT, FONT_SIZE, MIN_WIDTH = 22, 14, 240


class ImageFiles:
    """Maps an index to what `view` makes of a file, or to {"error": why} of an unreadable one.

    With thumbnails, a sample also has `thumbnail`, (h, w, 3) uint8 RGB.
    """

    def __init__(self, files: Sequence[str], view: Callable[[str], Dict], thumbnails: bool):
        self.files = files
        self.view = view
        self.thumbnails = thumbnails

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Dict:
        file = self.files[index]
        if os.path.isdir(file):
            return {"error": "there is no image in this folder"}
        try:
            sample = self.view(file)
            if self.thumbnails:
                sample["thumbnail"] = thumbnail(read_image(file))
        except UnreadableImage as error:
            return {"error": error.reason}
        return sample


def predict(args: argparse.Namespace) -> int:
    """Returns how many files could not be read."""
    files = find_images(args.inputs)
    drawings = drawing_paths(args.draw, files) if args.draw else []
    check_overwrites_none([args.output, *drawings] if args.output else drawings, files)
    predictor = load_predictor(args)
    threshold = np.full(len(predictor.label_names), args.threshold)
    if args.thresholds:
        for label, value in read_thresholds(args.thresholds, predictor.label_names).items():
            threshold[predictor.label_names.index(label)] = value
    if args.draw:
        os.makedirs(args.draw, exist_ok=True)

    failed = 0
    results = predict_files(predictor, files, args)
    # Without a terminal, no bar.
    bar = tqdm(results, total=len(files), unit=" images", leave=False, disable=None)
    with open_output(args.output) as stream, bar:
        write = WRITERS[args.format](stream)
        for i, (sample, prediction) in enumerate(bar):
            if prediction is None:
                failed += 1
                record = {"file": files[i], "error": sample["error"]}
            else:
                labels = prediction.above(threshold, args.top_k)
                record = describe(files[i], labels, prediction if args.regions else None)
                if drawings:
                    draw_labels(sample["thumbnail"], labels, drawings[i])
            # A bar and a record don't share a line of a terminal.
            with tqdm.external_write_mode(stream):
                write(record)
                stream.flush()
    print(f"predict: {len(files)} images, {failed} could not be read", file=sys.stderr)
    return failed


def load_predictor(args: argparse.Namespace) -> MultiLabelPredictor | OnnxPredictor:
    """Of a checkpoint, or of a model that tools/export_model.py wrote as .onnx."""
    exported = args.weights.endswith(".onnx")
    if not HAS_DETECTRON2 and (args.draw or not exported):
        what = "--draw" if exported else f"--weights {args.weights}"
        raise InputError(f"{what} takes torch and detectron2; a .onnx file does without")
    if exported:
        if args.config_file:
            raise InputError(f"--config-file: what it would say is fixed in {args.weights}")
        predictor = OnnxPredictor(args.weights, device=args.device)
        model, has_regions = args.weights, predictor.has_regions
    else:
        predictor = MultiLabelPredictor(
            args.weights, config_file=args.config_file, device=args.device
        )
        model = predictor.cfg.MODEL.META_ARCHITECTURE
        has_regions = predictor.model.has_regions
    if args.regions and not has_regions:
        raise InputError(f"--regions: {model} has no region branch")
    return predictor


def find_images(inputs: Sequence[str]) -> List[str]:
    """The files that INPUT... stands for, in order.

    What is not there, or holds no image, stands for itself, to become a record with the error.
    """
    files = []
    for name in inputs:
        if name == "-":
            # The bytes, as names of files may be anything.
            files += [os.fsdecode(line) for line in sys.stdin.buffer.read().splitlines() if line]
        else:
            matches = [name] if os.path.exists(name) else sorted(glob.glob(name, recursive=True))
            for match in matches or [name]:
                files += (images_below(match) if os.path.isdir(match) else []) or [match]
    return files


def images_below(folder: str) -> List[str]:
    """The files with one of ENDINGS in a folder and its folders, sorted."""
    return sorted(
        os.path.join(parent, name)
        for parent, _, names in os.walk(folder)
        for name in names
        if os.path.splitext(name)[1].lower() in ENDINGS
    )


def predict_files(
    predictor: MultiLabelPredictor | OnnxPredictor,
    files: Sequence[str],
    args: argparse.Namespace,
) -> Iterator[Tuple[Dict, Prediction | None]]:
    """A sample of `ImageFiles` and its prediction for each file, in order.

    Files are loaded by other processes, or threads beside onnxruntime's, while the model is at
    work, unless one batch has them all.
    """
    images = ImageFiles(files, predictor.view, thumbnails=bool(args.draw))
    num_workers = args.num_workers if len(files) > args.batch_size else 0
    if isinstance(predictor, OnnxPredictor):
        batches = load_in_threads(images, args.batch_size, num_workers)
    else:
        batches = DataLoader(
            images,
            batch_size=args.batch_size,
            num_workers=num_workers,
            collate_fn=trivial_batch_collator,
        )
    for batch in batches:
        readable = [sample for sample in batch if "error" not in sample]
        predictions = iter(predictor.predict_views(readable))
        for sample in batch:
            yield sample, None if "error" in sample else next(predictions)


def load_in_threads(images: ImageFiles, batch_size: int, num_workers: int) -> Iterator[List[Dict]]:
    """Batches of samples, in order; with 0 threads, each is loaded when it is asked for."""
    starts = range(0, len(images), batch_size)

    def load(start: int) -> List[Dict]:
        return [images[i] for i in range(start, min(start + batch_size, len(images)))]

    if not num_workers:
        yield from map(load, starts)
        return
    # Filters are the process's: those that `decode_image` sets end with another thread's image.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    with ThreadPoolExecutor(num_workers) as threads:
        ahead = deque()
        for start in starts:
            ahead.append(threads.submit(load, start))
            # No more of them than the threads can work at, and as many that wait.
            if len(ahead) > 2 * num_workers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def describe(
    file: str, labels: Sequence[Tuple[str, float]], with_regions: Prediction | None
) -> Dict:
    """The record of an image; with the regions of a prediction, if one is given."""
    record = {"file": file, "labels": [label_record(*label) for label in labels]}
    if with_regions is not None:
        names, _, regions = with_regions
        record["regions"] = [
            {
                "box": [round(side, 2) for side in box],
                "weight": round(weight, 6),
                **label_record(names[scores.argmax()], float(scores.max())),
            }
            for box, weight, scores in zip(
                regions.boxes.tolist(), regions.weights.tolist(), regions.scores
            )
        ]
    return record


def label_record(name: str, probability: float) -> Dict:
    return {"label": name, "probability": round(probability, 6)}


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
    """The file, or standard output without one, in UTF-8.

    A file name that is not text itself is written with escapes, which JSON reads again.
    """
    options = {"encoding": "utf-8", "errors": "backslashreplace", "newline": "\n"}
    if path:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(path, "w", **options) as stream:
            yield stream
    else:
        sys.stdout.reconfigure(**options)
        yield sys.stdout


def read_thresholds(path: str, label_names: Sequence[str]) -> Dict[str, float]:
    """Of some labels, from JSON, {"label": threshold}, or from CSV, label,threshold.

    Raises:
        InputError: there is no such file, or it has anything else in it.
    """
    try:
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
    except (AttributeError, TypeError, ValueError, csv.Error) as error:
        raise InputError(
            f"--thresholds {path}: neither JSON, {{label: threshold}}, nor CSV, label,threshold, "
            f"with thresholds of 0 to 1: {error}"
        ) from None
    unknown = sorted(set(thresholds) - set(label_names))
    if unknown:
        raise InputError(f"--thresholds {path}: the model has no label {unknown[0]!r}")
    return thresholds


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


def draw_labels(pixels: np.ndarray, labels: Sequence[Tuple[str, float]], path: str) -> None:
    """An image and below it its labels, with bars as long as they are probable, as a PNG.

    Args:
        pixels: (h, w, 3) uint8 RGB.
        labels: names and probabilities; the first MAX_LABELS are drawn.
        path: of the PNG.
    """
    labels = labels[:MAX_LABELS]
    image = Image.fromarray(pixels)
    width = max(image.width, MIN_WIDTH)
    canvas = Image.new("RGB", (width, image.height + LINE_HEIGHT * max(1, len(labels))), "white")
    canvas.paste(image, ((width - image.width) // 2, 0))
    draw = ImageDraw.Draw(canvas)
    fonts = os.path.join(matplotlib.get_data_path(), "fonts", "ttf")
    font = ImageFont.truetype(os.path.join(fonts, "DejaVuSans.ttf"), FONT_SIZE)
    lines = [(f"{share:.0%}  {' '.join(name.split())}", share) for name, share in labels]
    for i, (text, share) in enumerate(lines or [("no label", 0.0)]):
        top = image.height + LINE_HEIGHT * i
        if share:
            draw.rectangle((0, top, share * width, top + LINE_HEIGHT - 3), fill=PRESENT)
        draw.text((6, top + 2), text, fill="black", font=font)
    canvas.save(path)


def probability(value) -> float:
    if not 0 <= float(value) <= 1:
        raise ValueError(f"{value} is not from 0 to 1")
    return float(value)


def positive(text: str) -> int:
    if int(text) < 1:
        raise ValueError
    return int(text)


def not_negative(text: str) -> int:
    if int(text) < 0:
        raise ValueError
    return int(text)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
    parser.add_argument(
        "--threshold", type=probability, default=0.5, metavar="P", help="least probability (0.5)"
    )
    parser.add_argument(
        "--thresholds",
        metavar="FILE",
        help="of some labels, other ones: JSON, {label: threshold}, or CSV, label,threshold",
    )
    parser.add_argument(
        "--top-k", type=positive, metavar="K", help="of those, the K likeliest labels at most"
    )
    parser.add_argument("--regions", action="store_true", help="write boxes and weights (jsonl)")
    parser.add_argument("--draw", metavar="DIR", help="draw images with their labels there")
    parser.add_argument("--batch-size", type=positive, default=16, metavar="N", help="(16)")
    workers = min(4, os.cpu_count() or 1)
    parser.add_argument(
        "--num-workers",
        type=not_negative,
        default=workers,
        metavar="N",
        help=f"processes that load images ({workers})",
    )
    parser.add_argument("--device", help="cpu, cuda, ... (a GPU where there is one)")
    # Intermixed, so that options may stand between the inputs.
    args = parser.parse_intermixed_args()
    if not args.format:
        args.format = "csv" if (args.output or "").lower().endswith(".csv") else "jsonl"
    if args.regions and args.format == "csv":
        parser.error("--regions: there is no room for boxes in CSV")
    return args


def main() -> int:
    """Returns the exit status; what the user can put right is said in one line."""
    args = parse_arguments()
    try:
        return 1 if predict(args) else 0
    except BrokenPipeError:
        # Whoever read the records has enough of them; Python would try once more on its way out.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (InputError, OSError) as error:
        print(f"predict: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
