"""How many wrong labels tools/find_label_errors.py finds, of labels that are flipped on purpose."""

from __future__ import annotations

import argparse
import csv
import inspect
import os
import time
from typing import Dict, Iterator, List, Sequence

import numpy as np
import torch

from ia_gcn.data import get_label_names
from ia_gcn.engine import setup_cfg
from ia_gcn.engine.out_of_fold import assign_folds, out_of_fold_probabilities, training_vectors
from ia_gcn.evaluation.label_errors import check_cleanlab, find_label_errors
from ia_gcn.io.files import write_text_atomically

from .arguments import positive
from .measuring import Table


def choose_flips(targets: np.ndarray, share: float, seed: int) -> np.ndarray:
    """(n, C) bool: a share of the known entries, drawn without replacement.

    Args:
        targets: (n, C) in {1, 0, -1 = unknown}.
        share: in [0, 1].
        seed: another one draws others.
    """
    known = np.flatnonzero(targets >= 0)
    chosen = np.random.default_rng(seed).choice(known, round(share * len(known)), replace=False)
    flips = np.zeros(targets.size, bool)
    flips[chosen] = True
    return flips.reshape(targets.shape)


def rows_of_first(right: Sequence[bool], flipped: int, entries: int) -> List[Dict]:
    """Precision and recall of the first n/2, n and 2n doubts, and of as many entries at random.

    Args:
        right: of each doubt, the first one first, whether its entry was flipped.
        flipped: n, the number of flipped entries.
        entries: of which they are.
    """
    rows = []
    for name, count in (("n/2", flipped // 2), ("n", flipped), ("2n", 2 * flipped)):
        # There may be fewer doubts.
        first = right[:count]
        row = {"name": f"first {name} ({len(first)})"}
        row["precision"], row["recall"] = np.mean(first), np.sum(first) / flipped
        row["random_precision"], row["random_recall"] = flipped / entries, len(first) / entries
        rows.append(row)
    return rows


def write_csv(
    path: str, file_names: Sequence[str], targets: np.ndarray, label_names: Sequence[str]
) -> None:
    """Labels for DATASETS.CUSTOM.TRAIN, of files in one folder."""
    with write_text_atomically(path) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("file", "labels"))
        for file_name, target in zip(file_names, targets):
            labels = [label_names[i] for i in np.flatnonzero(target == 1)]
            writer.writerow((os.path.basename(file_name), ";".join(labels)))


def run_label_errors(args) -> Iterator[Table]:
    """Flip a share of the labels of DATASETS.TRAIN, and look for them.

    It looks for them as tools/find_label_errors.py does. The share that is flipped is one of all
    known entries of the label matrix, present or absent. Precision and recall are those of the
    first n/2, n and 2n doubts, where n entries were flipped.
    """
    check_cleanlab()
    cfg = setup_cfg(args.config_file, [*args.opts, "MODEL.WEIGHTS", args.weights])
    images = training_vectors(cfg)
    true = images.targets.numpy()
    flips = choose_flips(true, args.share, args.seed)
    given = np.where(flips, 1 - true, true)
    if args.csv:
        write_csv(args.csv, images.file_names, given, get_label_names(cfg.DATASETS.TRAIN))
    start = time.perf_counter()
    targets = torch.from_numpy(given)
    folds = assign_folds(images.image_ids, targets, args.folds, args.seed)
    probabilities = out_of_fold_probabilities(images.vectors, targets, folds).numpy()
    doubts = find_label_errors(probabilities, given, min_images=args.folds)
    seconds = time.perf_counter() - start
    right = [bool(flips[doubt.image, doubt.label]) for doubt in doubts]
    flipped, entries = int(flips.sum()), int((true >= 0).sum())
    yield Table(
        f"{flipped} of {entries} entries flipped, {len(doubts)} doubted",
        rows_of_first(right, flipped, entries),
        f"{seconds:.0f} s for {args.folds} folds, without the features.",
    )


LABEL_ERRORS_EXAMPLES = """
Examples:
  by a network that was trained on other scenes:
    tools/benchmark.py label-errors --config-file configs/DigitScenes/ml_gcn.yaml \\
        --weights output/digit_scenes_ml_gcn/model_final.pth \\
        DATASETS.TRAIN "('digit_scenes_train_b',)"
"""


def add_label_errors(subcommands, common: argparse.ArgumentParser) -> None:
    parser = subcommands.add_parser(
        "label-errors",
        help="labels flipped on purpose, and how many are found",
        description=inspect.getdoc(run_label_errors),
        epilog=LABEL_ERRORS_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[common],
    )
    parser.set_defaults(run=run_label_errors)
    parser.add_argument("--config-file", required=True, help="of the network")
    parser.add_argument("--weights", required=True, help="its checkpoint")
    parser.add_argument(
        "--share", type=float, default=0.05, help="of the entries that is flipped (default 0.05)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of flips and folds (default 0)")
    parser.add_argument("--folds", type=positive, default=5, help="K (default 5)")
    parser.add_argument(
        "--csv", metavar="FILE", help="write the flipped labels, to train a network on them"
    )
    parser.add_argument("opts", metavar="KEY VALUE", nargs="*", help="config keys and values")
