"""Look at a data set before training on it: its labels, its files and its label graph.

Prints how many images have each label, how many labels the images have, which files are missing
or can't be read, and which labels have no edge in the label graph. Draws the graph as two heat
maps, how often labels occur together and the matrix that a GCN starts from, in OUTPUT/NAME.png.
Of more than 100 labels, the most frequent and the rarest are printed; all are in OUTPUT/NAME.csv.

Examples:
  the demo's training set:
    tools/inspect_dataset.py digit_scenes_train
  a large one, without opening each image:
    tools/inspect_dataset.py coco_2014_train_multilabel --no-decode
  other thresholds make a denser or sparser graph:
    tools/inspect_dataset.py voc_2007_trainval_multilabel MODEL.LABEL_GRAPH.THRESHOLD 0.2
  your own data (COCO-format JSON, or CSV with file,label;label) is custom_train and custom_test:
    tools/inspect_dataset.py custom_train DATASETS.CUSTOM.TRAIN train.csv \\
        DATASETS.CUSTOM.IMAGE_ROOT photos
  the share of it that a training without a test file holds out:
    tools/inspect_dataset.py custom_test DATASETS.CUSTOM.TRAIN train.csv \\
        DATASETS.CUSTOM.IMAGE_ROOT photos DATASETS.CUSTOM.HOLD_OUT 0.2
"""

from __future__ import annotations

import csv
import os
from collections import Counter
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Dict, List, Sequence

import numpy as np
from detectron2.config import CfgNode
from tabulate import tabulate
from tqdm import tqdm

from ..data import LabelGraphSummary, count_states, get_label_names, summarize_label_graph
from ..data.build import MAX_LISTED, load_multilabel_dicts, missing_images
from ..data.dataset_mapper import read_image
from ..engine import setup_cfg
from ..errors import InputError
from ..evaluation.report import MAX_LABELS
from ..io.files import write_text_atomically
from ..io.images import UnreadableImage, turn_to_decode
from ..visualization import plot_label_graph
from .common import make_parser, run

# The heat maps have the most frequent labels; more would be less than a pixel each.
MAX_DRAWN_LABELS = 500
# Of more than MAX_LABELS labels, so many of the most frequent and of the rarest are printed.
MAX_EXTREME = 20


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = make_parser(__doc__)
    parser.add_argument("name", metavar="NAME", help="a registered data set")
    parser.add_argument("--config-file", default="", help="a YAML file, for the label graph's keys")
    parser.add_argument(
        "--output",
        default="output/inspect",
        help="folder for the files (output/inspect)",
    )
    parser.add_argument(
        "--no-decode", action="store_true", help="don't open the images to see if they can be read"
    )
    parser.add_argument("opts", metavar="KEY VALUE", nargs="*", help="config keys and values")
    # Intermixed, so that options may stand between the name and the keys.
    args = parser.parse_intermixed_args(argv)

    def work() -> None:
        # Without a model, no device is needed, and files are read completely.
        opts = ["MODEL.DEVICE", "cpu", "DATASETS.CUSTOM.HOLD_OUT", 0.0, *args.opts]
        cfg = setup_cfg(args.config_file, opts)
        inspect(cfg, args.name, args.output, decode=not args.no_decode)

    return run("inspect_dataset", work)


def inspect(cfg: CfgNode, name: str, output_dir: str, decode: bool) -> None:
    """Print what the command says of a registered data set, and write its files.

    Args:
        cfg: for MODEL.LABEL_GRAPH and INPUT.FORMAT.
        name: of the data set.
        output_dir: folder for NAME.png and NAME.csv.
        decode: whether each image is opened.
    Raises:
        InputError: the data set or the label graph's keys can't be used.
    """
    label_names = get_label_names([name])
    dicts = load_multilabel_dicts(name)
    image = Path(output_dir) / f"{name}.png"
    image.parent.mkdir(parents=True, exist_ok=True)

    keys = cfg.MODEL.LABEL_GRAPH
    try:
        graph = summarize_label_graph(
            dicts, len(label_names), keys.THRESHOLD, keys.REWEIGHT, MAX_DRAWN_LABELS
        )
    except ValueError as error:
        raise InputError(f"MODEL.LABEL_GRAPH: {error}") from None
    print(f"{name}: {len(dicts)} images, {len(label_names)} labels\n")
    columns = label_columns(label_names, graph, dicts)
    table = image.with_suffix(".csv")
    with write_text_atomically(table) as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(columns)
        rows.writerows(zip(*columns.values()))
    print(label_table(columns, str(table)), end="\n\n")
    print(labels_per_image(dicts), end="\n\n")
    print(describe_graph(label_names, graph, keys.THRESHOLD), end="\n\n")
    missing = missing_images(dicts)
    print(describe_files("missing", missing), flush=True)
    if decode:
        there = sorted({d["file_name"] for d in dicts} - set(missing))
        unreadable = unreadable_files(there, cfg.INPUT.FORMAT)
        print(describe_files("unreadable", [f"{f}: {why}" for f, why in unreadable.items()]))
    drawn, number = [label_names[i] for i in graph.shown], len(label_names)
    note = f"the {len(drawn)} most frequent of {number} labels" if len(drawn) < number else ""
    plot_label_graph(graph.conditional, graph.lcm, drawn, str(image), note)
    print(f"\nheat maps: {image}{note and f' ({note})'}\nall labels: {table}")


def label_columns(
    label_names: Sequence[str], graph: LabelGraphSummary, dicts: Sequence[Dict]
) -> Dict[str, List]:
    """By its name, a value of each label, the most frequent one first; where labels are unknown,
    also in how many images it is known to be absent, and unknown."""
    columns = {
        "label": label_names,
        "images": graph.label_counts,
        "share": [f"{count / len(dicts):.1%}" for count in graph.label_counts],
        "edges out": graph.edges_out,
        "edges in": graph.edges_in,
    }
    if any("absent_labels" in d for d in dicts):
        states = count_states(dicts, len(label_names))
        columns.update(absent=states.absent, unknown=states.unknown)
    order = np.argsort(-graph.label_counts, kind="stable")
    return {name: [column[i] for i in order] for name, column in columns.items()}


def label_table(columns: Dict[str, List], file: str) -> str:
    """A line per label, and how many are in no image.

    Of more than MAX_LABELS labels, the first and the last ones.

    Args:
        columns: of `label_columns`.
        file: where all are, for a line that says so.
    """
    rows, note = list(zip(*columns.values())), ""
    number, unused = len(rows), columns["images"].count(0)
    if number > MAX_LABELS:
        rows = [*rows[:MAX_EXTREME], ["..."] * len(columns), *rows[-MAX_EXTREME:]]
        note = (
            f"\nThese are the {MAX_EXTREME} most frequent and the {MAX_EXTREME} rarest of "
            f"{number:,} labels; all are in {file}."
        )
    align = ("left", *["right"] * (len(columns) - 1))
    # Names that look like numbers stay as they are.
    table = tabulate(rows, list(columns), disable_numparse=True, colalign=align)
    return f"{table}{note}\n\nlabels without an image: {unused}"


def labels_per_image(dicts: Sequence[Dict]) -> str:
    """How many images have how many labels, and how many have none, ignored or unknown ones."""
    numbers = [len(set(d["labels"])) for d in dicts]
    with_holes = [d for d in dicts if "absent_labels" in d]
    ignored = [len(d.get("ignored_labels", [])) for d in dicts]
    rows = [
        (number, count, f"{count / len(dicts):.1%}")
        for number, count in sorted(Counter(numbers).items())
    ]
    headers = ["labels in an image", "images", "share"]
    table = tabulate(rows, headers, disable_numparse=True, colalign=("right",) * 3)
    holes = ""
    if with_holes:
        known = [len({*d["labels"], *d["absent_labels"]}) for d in with_holes]
        holes = (
            f"\nimages with unknown labels: {len(with_holes)}, in which {np.mean(known):.2f} "
            "labels are known on average"
        )
    return (
        f"{table}\n\n"
        f"labels per image: {np.mean(numbers):.2f} on average\n"
        f"images without a label: {numbers.count(0)}\n"
        f"ignored entries: {sum(ignored)}, in {np.count_nonzero(ignored)} images{holes}"
    )


def describe_graph(label_names: Sequence[str], graph: LabelGraphSummary, threshold: float) -> str:
    """How many edges there are, and which labels have none."""
    lonely = np.flatnonzero((graph.edges_out == 0) & (graph.edges_in == 0))
    listed = [label_names[i] for i in lonely[:MAX_LISTED]]
    if len(lonely) > MAX_LISTED:
        listed.append(f"and {len(lonely) - MAX_LISTED} more")
    return (
        f"label graph: {graph.edges_out.sum()} edges i → j with P(j|i) ≥ {threshold} "
        "(MODEL.LABEL_GRAPH.THRESHOLD)\n"
        f"labels without an edge: {len(lonely)}" + (f" ({', '.join(listed)})" if listed else "")
    )


def describe_files(kind: str, lines: Sequence[str]) -> str:
    """A count and the first few of `lines`."""
    more = [f"and {len(lines) - MAX_LISTED} more"] if len(lines) > MAX_LISTED else []
    return "\n  ".join([f"{kind} files: {len(lines)}", *lines[:MAX_LISTED], *more])


def unreadable_files(file_names: Sequence[str], image_format: str) -> Dict[str, str]:
    """Why, by file name, for each file that training and evaluation would skip."""

    def why_unreadable(file_name: str) -> str:
        try:
            with turn_to_decode(file_name):
                read_image(file_name, image_format)
        except UnreadableImage as error:
            return error.reason
        return ""

    with ThreadPool(os.cpu_count()) as pool:
        reasons = pool.imap(why_unreadable, file_names, chunksize=8)
        # Without a terminal, no bar.
        progress = tqdm(reasons, "decoding", len(file_names), leave=False, disable=None)
        return {name: reason for name, reason in zip(file_names, progress) if reason}
