"""Measure the predictions of an evaluation again, without its model and data set.

PREDICTIONS is the predictions.npz that tools/train_net.py leaves in OUTPUT_DIR/inference/NAME.
Prints the table of the evaluation at each --threshold, and with a threshold per label, that of the
label's best F1. On the data that such thresholds were chosen on, the figures are too high;
--select-on chooses them on other data, for example a validation set. Prints the mAP of frequent,
middle and rare labels as well: by the training images of each label where the file says how many
there are, else by the images in the file.

Writes into --output
  operating_points.json   the threshold of each label's best F1, for tools/predict.py --thresholds;
                          a label without a positive is left out, and keeps the first --threshold
  operating_points.csv    with these thresholds: precision, recall and F1 in percent, and the
                          number of positives; empty cells where a label has none
  average_precision.csv   the AP of each label in percent
  precision_recall.png    the mean over the labels, and the labels of the highest and lowest AP: at
                          each recall the highest precision with at least that recall
  reliability.png         how often a label is present against its probability

The expected calibration error is measured over all (image, label) pairs in 15 bins of equal width:
in each bin, the distance between the mean probability and the share of pairs whose label is
present; then the mean over the bins, weighted by their numbers of pairs. Ignored entries do not
count.

Examples:
  other thresholds:
    tools/evaluate_predictions.py output/demo/inference/digit_scenes_val/predictions.npz \\
        --threshold 0.3 --threshold 0.7
  thresholds from a validation set, measured on a test set and then used:
    tools/evaluate_predictions.py test/predictions.npz --select-on val/predictions.npz --output out
    tools/predict.py --weights model.pth --thresholds out/operating_points.json photos
"""

from __future__ import annotations

import argparse
import os
from typing import List, Sequence, Tuple

import numpy as np

from ..data.build import describe_mismatch
from ..errors import InputError
from ..evaluation import (
    CONVENTIONS,
    Calibration,
    Conventions,
    OperatingPoints,
    Predictions,
    average_precision_table,
    best_f1_points,
    frequency_table,
    interpolated_precision,
    labels_without_negatives,
    labels_without_positives,
    measure_by_frequency,
    measure_calibration,
    read_predictions,
    summarize,
    summary_table,
    write_label_table,
    write_operating_points,
    write_thresholds,
)
from ..visualization import plot_precision_recall, plot_reliability
from .common import make_parser, non_negative_int, probability, run


def evaluate(args: argparse.Namespace) -> None:
    """Print the tables of --help and write its files."""
    predictions = read_predictions(args.predictions)
    _, scores, targets, label_names, label_counts = predictions
    if args.frequency_groups and label_counts is None:
        raise InputError(
            f"--frequency-groups: {args.predictions} has no label_counts, the training images of "
            "each label; without that option, the groups are thirds by the images in the file"
        )
    selection = read_selection(args.select_on, label_names, args.predictions)
    folder = args.output or os.path.dirname(args.predictions) or "."
    os.makedirs(folder, exist_ok=True)

    conventions = Conventions(args.ap, args.cf1, args.forced_top_k, args.ignored)

    def table(threshold) -> str:
        summary, _ = summarize(
            scores, targets, args.top_k, threshold=threshold, conventions=conventions
        )
        return summary_table(summary, args.top_k)

    print(f"{args.predictions}: {len(scores)} images, {len(label_names)} labels, in percent\n")
    thresholds = args.threshold or [0.5]
    for threshold in thresholds:
        print(f"at a threshold of {threshold:g}:\n{table(threshold)}\n")
    points = best_f1_points(*(selection or (scores, targets)))
    # As tools/predict.py does with a label that a file of thresholds doesn't name.
    own = np.where(np.isnan(points.threshold), thresholds[0], points.threshold)
    print(f"at the threshold of each label's best F1 on {args.select_on or args.predictions}:")
    print(table(own))
    if selection is None:
        print("These thresholds were chosen on the same data, so the figures are too high.")

    _, ap = summarize(scores, targets, None, conventions=conventions)
    per_label = dict(zip(label_names, ap.tolist()))
    frequency = measure_by_frequency(ap, targets, label_counts, args.frequency_groups)
    print(f"\nmAP by how frequent a label is:\n{frequency_table(frequency)}")
    print(f"\nAP of each label:\n{average_precision_table(per_label, 'average_precision.csv')}")
    if np.isnan(ap).any():
        print(labels_without_positives(per_label))
    if args.ignored != "everywhere" and (line := labels_without_negatives(targets, label_names)):
        print(line)
    calibration = measure_calibration(scores, targets)
    print(f"\nexpected calibration error: {calibration.error:.2f}\n")
    write_files(predictions, points, ap, calibration, folder)


def read_selection(
    path: str | None, label_names: List[str], evaluated: str
) -> Tuple[np.ndarray, np.ndarray] | None:
    """Scores and targets of --select-on, which must have the labels of the file `evaluated`."""
    if path is None:
        return None
    selection = read_predictions(path)
    if selection.label_names != label_names:
        mismatch = describe_mismatch(selection.label_names, label_names)
        raise InputError(f"--select-on {path} {mismatch} than {evaluated}")
    return selection.scores, selection.targets


def write_files(
    predictions: Predictions,
    points: OperatingPoints,
    ap: np.ndarray,
    calibration: Calibration,
    folder: str,
) -> None:
    """Write the files of --help into a folder and print their paths."""
    _, scores, targets, label_names, _ = predictions
    writers = {
        "operating_points.json": lambda path: write_thresholds(points, label_names, path),
        "operating_points.csv": lambda path: write_operating_points(points, label_names, path),
        "average_precision.csv": lambda path: write_label_table({"AP": ap}, label_names, path),
        "precision_recall.png": lambda path: plot_precision_recall(
            interpolated_precision(scores, targets), ap, label_names, path
        ),
        "reliability.png": lambda path: plot_reliability(calibration, path),
    }
    for name, write in writers.items():
        path = os.path.join(folder, name)
        write(path)
        print(path)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = make_parser(__doc__)
    parser.add_argument("predictions", metavar="PREDICTIONS", help="predictions.npz")
    parser.add_argument(
        "--threshold",
        type=probability,
        action="append",
        metavar="P",
        help="a label is predicted from this probability on (0.5); may be given several times",
    )
    parser.add_argument(
        "--top-k",
        type=non_negative_int,
        default=3,
        metavar="K",
        help="measure the K highest labels of an image too (3); 0: don't",
    )
    parser.add_argument(
        "--ap",
        choices=CONVENTIONS["ap"],
        default="all_points",
        help="envelope: VOC 2012's, eleven_points: VOC 2007's AP (all_points)",
    )
    parser.add_argument(
        "--cf1",
        choices=CONVENTIONS["cf1"],
        default="of_means",
        help="of CP and CR, or the mean of the labels' F1 (of_means)",
    )
    parser.add_argument(
        "--forced-top-k",
        action="store_true",
        help="the K highest labels are predicted below the threshold too",
    )
    parser.add_argument(
        "--ignored",
        choices=CONVENTIONS["ignored"],
        default="nowhere",
        help="where ignored entries count, as absent labels; in_f1: in all but AP (nowhere)",
    )
    parser.add_argument(
        "--frequency-groups",
        type=non_negative_int,
        nargs=2,
        default=(),
        metavar=("RARE", "MIDDLE"),
        help="a label is rare, or of middle frequency, if it has at most so many training images, "
        "for example 10 100 (thirds of the labels)",
    )
    parser.add_argument(
        "--select-on", metavar="OTHER", help="choose each label's threshold on this predictions.npz"
    )
    parser.add_argument("--output", metavar="FOLDER", help="(the folder of PREDICTIONS)")
    args = parser.parse_args(argv)
    return run("evaluate_predictions", lambda: evaluate(args))
