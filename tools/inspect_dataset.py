#!/usr/bin/env python3
"""Look at a data set before training on it: its labels, its files and its label graph.

Prints how many images have each label, how many labels the images have, which files are missing
or can't be read, and which labels have no edge in the label graph. Draws the graph as two heat
maps, how often labels occur together and the matrix that a GCN starts from, in OUTPUT/NAME.png.

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
"""

import argparse
import os
import sys
from collections import Counter
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Dict, Sequence

import numpy as np
from detectron2.config import CfgNode
from tabulate import tabulate
from tqdm import tqdm

from ia_gcn.data import (
    LabelStatistics,
    MultiLabelDatasetMapper,
    UnreadableImage,
    count_labels,
    get_label_names,
)
from ia_gcn.data.build import MAX_LISTED, load_multilabel_dicts, missing_images
from ia_gcn.engine import setup_cfg
from ia_gcn.errors import InputError
from ia_gcn.modeling.label_graph import statistical_lcm
from ia_gcn.visualization import plot_label_graph


def inspect(cfg: CfgNode, name: str, output_dir: str, decode: bool) -> None:
    label_names = get_label_names([name])
    dicts = load_multilabel_dicts(name)
    image = Path(output_dir) / f"{name}.png"
    image.parent.mkdir(parents=True, exist_ok=True)

    statistics = count_labels(dicts, len(label_names))
    lcm = label_graph(cfg, statistics)
    print(f"{name}: {len(dicts)} images, {len(label_names)} labels\n")
    print(label_table(label_names, statistics, lcm, len(dicts)), end="\n\n")
    print(labels_per_image(dicts), end="\n\n")
    print(describe_graph(cfg, label_names, lcm), end="\n\n")
    missing = missing_images(dicts)
    print(describe_files("missing", missing), flush=True)
    if decode:
        there = sorted({d["file_name"] for d in dicts} - set(missing))
        unreadable = unreadable_files(cfg, there)
        print(describe_files("unreadable", [f"{f}: {why}" for f, why in unreadable.items()]))
    plot_label_graph(conditional(statistics), lcm, label_names, str(image))
    print(f"\nheat maps: {image}")


def conditional(statistics: LabelStatistics) -> np.ndarray:
    """(C, C): P(j|i), the share of the images with label i that have label j."""
    return statistics.pair_counts / statistics.label_counts.clip(min=1)[:, None]


def label_graph(cfg: CfgNode, statistics: LabelStatistics) -> np.ndarray:
    """(C, C): the statistical LCM of MODEL.LABEL_GRAPH."""
    graph = cfg.MODEL.LABEL_GRAPH
    counts = statistics.pair_counts, statistics.label_counts
    try:
        return statistical_lcm(*counts, graph.THRESHOLD, graph.REWEIGHT)
    except ValueError as error:
        raise InputError(f"MODEL.LABEL_GRAPH: {error}") from None


def edges_of(lcm: np.ndarray) -> np.ndarray:
    """(C, C) bool: whether there is an edge from i to j ≠ i."""
    return (lcm > 0) & ~np.eye(len(lcm), dtype=bool)


def label_table(label_names, statistics: LabelStatistics, lcm, num_images: int) -> str:
    """A line per label, the most frequent one first."""
    edges = edges_of(lcm)
    rows = [
        (
            label_names[i],
            statistics.label_counts[i],
            f"{statistics.label_counts[i] / num_images:.1%}",
            edges[i].sum(),
            edges[:, i].sum(),
        )
        for i in np.argsort(-statistics.label_counts, kind="stable")
    ]
    headers = ["label", "images", "share", "edges out", "edges in"]
    align = ("left", "right", "right", "right", "right")
    # Names that look like numbers stay as they are.
    return tabulate(rows, headers, disable_numparse=True, colalign=align)


def labels_per_image(dicts: Sequence[Dict]) -> str:
    """How many images have how many labels, and how many have none or ignored ones."""
    numbers = [len(set(d["labels"])) for d in dicts]
    ignored = [len(d.get("ignored_labels", [])) for d in dicts]
    rows = [
        (number, count, f"{count / len(dicts):.1%}")
        for number, count in sorted(Counter(numbers).items())
    ]
    headers = ["labels in an image", "images", "share"]
    table = tabulate(rows, headers, disable_numparse=True, colalign=("right",) * 3)
    return (
        f"{table}\n\n"
        f"labels per image: {np.mean(numbers):.2f} on average\n"
        f"images without a label: {numbers.count(0)}\n"
        f"ignored entries: {sum(ignored)}, in {np.count_nonzero(ignored)} images"
    )


def describe_graph(cfg: CfgNode, label_names: Sequence[str], lcm: np.ndarray) -> str:
    edges = edges_of(lcm)
    lonely = np.flatnonzero(~edges.any(axis=0) & ~edges.any(axis=1))
    return (
        f"label graph: {edges.sum()} edges i → j with P(j|i) ≥ {cfg.MODEL.LABEL_GRAPH.THRESHOLD} "
        "(MODEL.LABEL_GRAPH.THRESHOLD)\n"
        f"labels without an edge: {len(lonely)}"
        + (f" ({', '.join(label_names[i] for i in lonely)})" if len(lonely) else "")
    )


def describe_files(kind: str, lines: Sequence[str]) -> str:
    """A count and the first few of `lines`."""
    more = [f"and {len(lines) - MAX_LISTED} more"] if len(lines) > MAX_LISTED else []
    return "\n  ".join([f"{kind} files: {len(lines)}", *lines[:MAX_LISTED], *more])


def unreadable_files(cfg: CfgNode, file_names: Sequence[str]) -> Dict[str, str]:
    """Why, by file name, for each file that training and evaluation would skip."""
    mapper = MultiLabelDatasetMapper(
        is_train=False,
        augmentations=[],
        image_format=cfg.INPUT.FORMAT,
        num_labels=0,
        with_boxes=False,
    )

    def why_unreadable(file_name: str) -> str:
        try:
            mapper({"file_name": file_name, "labels": []})
        except UnreadableImage as error:
            return error.reason
        return ""

    with ThreadPool(os.cpu_count()) as pool:
        reasons = pool.imap(why_unreadable, file_names, chunksize=8)
        # Without a terminal, no bar.
        progress = tqdm(reasons, "decoding", len(file_names), leave=False, disable=None)
        return {name: reason for name, reason in zip(file_names, progress) if reason}


def main() -> int:
    """Returns the exit status; what the user can put right is said in one line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", metavar="NAME", help="a registered data set")
    parser.add_argument("--config-file", default="", help="a YAML file, for the label graph's keys")
    parser.add_argument(
        "--output", default="output/inspect", help="folder of the heat maps (output/inspect)"
    )
    parser.add_argument(
        "--no-decode", action="store_true", help="don't open the images to see if they can be read"
    )
    parser.add_argument("opts", metavar="KEY VALUE", nargs="*", help="config keys and values")
    # Intermixed, so that options may stand between the name and the keys.
    args = parser.parse_intermixed_args()
    try:
        # There is no model here, so there is no need for a device.
        cfg = setup_cfg(args.config_file, ["MODEL.DEVICE", "cpu", *args.opts])
        inspect(cfg, args.name, args.output, decode=not args.no_decode)
    except (InputError, OSError) as error:
        print(f"inspect_dataset: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
