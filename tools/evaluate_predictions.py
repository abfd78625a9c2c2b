#!/usr/bin/env python3
"""Measure the predictions of an evaluation again, without its model and data set.

PREDICTIONS is the predictions.npz that tools/train_net.py leaves in OUTPUT_DIR/inference/NAME.
Prints the table of the evaluation at each --threshold, and what it comes to with a threshold of its
own for each label, that of the label's best F1. Such thresholds, and the figures with them, flatter
a model on the very data that they were chosen on; --select-on chooses them on other data, for
example a validation set.

Writes into --output
  operating_points.json   the threshold of each label's best F1, for tools/predict.py --thresholds;
                          a label without a positive is left out, and keeps the first --threshold
  operating_points.csv    with these thresholds: precision, recall and F1 in percent, and the
                          number of positives; empty cells where a label has none
  precision_recall.png    the mean over the labels, and the labels of the highest and lowest AP: at
                          each recall the highest precision with at least that recall
  reliability.png         how often a label is there against its probability

The expected calibration error is that of all (image, label) pairs in 15 bins of equal width: the
distance between the mean probability in a bin and the share of it where the label is there, as a
mean over the bins, each of which counts as much as it has pairs. Ignored entries count nowhere.

Examples:
  other thresholds:
    tools/evaluate_predictions.py output/demo/inference/digit_scenes_val/predictions.npz \\
        --threshold 0.3 --threshold 0.7
  thresholds from a validation set, measured on a test set and then used:
    tools/evaluate_predictions.py test/predictions.npz --select-on val/predictions.npz --output out
    tools/predict.py --weights model.pth --thresholds out/operating_points.json photos
"""

import argparse
import csv
import json
import math
import os
import sys

import numpy as np

from ia_gcn.errors import InputError
from ia_gcn.evaluation import (
    OperatingPoints,
    average_precision_table,
    best_f1_points,
    interpolated_precision,
    labels_without_positives,
    measure_calibration,
    read_predictions,
    summarize,
    summary_table,
)
from ia_gcn.label_names import describe_mismatch
from ia_gcn.visualization import plot_precision_recall, plot_reliability


def evaluate(args: argparse.Namespace) -> None:
    path = args.predictions
    image_ids, scores, targets, label_names = read_predictions(path)
    selection_path, selection = path, (scores, targets)
    if args.select_on:
        selection_path, other = args.select_on, read_predictions(args.select_on)
        if other.label_names != label_names:
            mismatch = describe_mismatch(other.label_names, label_names)
            raise InputError(f"--select-on {args.select_on} {mismatch} than {path}")
        selection = (other.scores, other.targets)
    folder = args.output or os.path.dirname(path) or "."
    os.makedirs(folder, exist_ok=True)

    print(f"{path}: {len(image_ids)} images, {len(label_names)} labels, in percent\n")
    thresholds = args.threshold or [0.5]
    for threshold in thresholds:
        summary, ap = summarize(
            scores, targets, args.top_k, threshold=threshold, eleven_point=args.eleven_point
        )
        print(f"at a threshold of {threshold:g}:\n{summary_table(summary, args.top_k)}\n")

    points = best_f1_points(*selection)
    # As tools/predict.py does with a label that a file of thresholds doesn't name.
    own = np.where(np.isnan(points.threshold), thresholds[0], points.threshold)
    summary, _ = summarize(
        scores, targets, args.top_k, threshold=own, eleven_point=args.eleven_point
    )
    print(f"at the threshold of each label's best F1 on {selection_path}:")
    print(summary_table(summary, args.top_k))
    if not args.select_on:
        print("These thresholds were chosen on this very data, and so the figures flatter it.")

    per_label = dict(zip(label_names, ap.tolist()))
    print(f"\nAP of each label:\n{average_precision_table(per_label)}")
    if np.isnan(ap).any():
        print(labels_without_positives(per_label))
    calibration = measure_calibration(scores, targets)
    print(f"\nexpected calibration error: {calibration.error:.2f}\n")

    names = ("operating_points.json", "operating_points.csv")
    names += ("precision_recall.png", "reliability.png")
    thresholds_path, table_path, curves_path, reliability_path = (
        os.path.join(folder, name) for name in names
    )
    write_thresholds(points, label_names, thresholds_path)
    write_table(points, label_names, table_path)
    plot_precision_recall(interpolated_precision(scores, targets), ap, label_names, curves_path)
    plot_reliability(calibration, reliability_path)
    print("\n".join((thresholds_path, table_path, curves_path, reliability_path)))


def write_thresholds(points: OperatingPoints, label_names, path: str) -> None:
    thresholds = {
        name: threshold
        for name, threshold in zip(label_names, points.threshold.tolist())
        if not math.isnan(threshold)
    }
    with open(path, "w", encoding="utf-8") as file:
        json.dump(thresholds, file, indent=1, ensure_ascii=False)


def write_table(points: OperatingPoints, label_names, path: str) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("label", *OperatingPoints._fields))
        for name, *row in zip(label_names, *(values.tolist() for values in points)):
            writer.writerow((name, *("" if math.isnan(value) else value for value in row)))


def probability(text: str) -> float:
    if not 0 <= float(text) <= 1:
        raise ValueError
    return float(text)


def not_negative(text: str) -> int:
    if int(text) < 0:
        raise ValueError
    return int(text)


def main() -> int:
    """Returns the exit status; what the user can put right is said in one line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
        type=not_negative,
        default=3,
        metavar="K",
        help="measure the K highest labels of an image too (3); 0: don't",
    )
    parser.add_argument("--eleven-point", action="store_true", help="VOC 2007's AP")
    parser.add_argument(
        "--select-on", metavar="OTHER", help="choose each label's threshold on this predictions.npz"
    )
    parser.add_argument("--output", metavar="FOLDER", help="(the folder of PREDICTIONS)")
    args = parser.parse_args()
    try:
        evaluate(args)
    except (InputError, OSError) as error:
        print(f"evaluate_predictions: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
