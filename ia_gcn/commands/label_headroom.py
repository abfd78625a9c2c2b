"""How much there is to gain from what labels say of each other: is a label graph worth a try?

PREDICTIONS is the predictions.npz of an evaluation, of any model. Prints and draws its mAP as it
is; with a label prior, a model of the labels alone; with 25, 50 and 75 % of an image's labels
known, of the others; and with all others known, which is the ceiling for whatever a label graph
does. Rare, middle and frequent labels, and 95 % intervals over images (bootstrap), are there, too.

--labels-from is what the prior is fitted to: a registered data set, or a predictions.npz of
training-side images that the model was not trained on, which is better: how far its scores can be
trusted is then chosen on the latter. With a data set, a share of PREDICTIONS is set aside for that
and is not measured. Nothing is ever chosen on the images that are measured.

Examples:
  with the labels of the training set:
    tools/label_headroom.py output/demo/inference/digit_scenes_val/predictions.npz \\
        --labels-from digit_scenes_train
  with predictions of a validation set, and the figures as JSON:
    tools/label_headroom.py test/predictions.npz --labels-from val/predictions.npz \\
        --json headroom.json
"""

from __future__ import annotations

import argparse
import json
import os
from typing import Sequence, Tuple

from tabulate import tabulate

from ..analysis.label_headroom import Headroom, measure_headroom
from ..engine.label_prior import (
    FittedPrior,
    ScoredImages,
    check_other_images,
    fit_label_prior,
    fit_to_predictions,
    label_order,
    read_labels,
)
from ..evaluation import Predictions, read_predictions
from ..extensions import import_extensions
from ..io.files import check_writable, write_text_atomically
from ..visualization import plot_headroom
from .common import add_import_option, make_parser, probability, run


def measure(args: argparse.Namespace) -> None:
    import_extensions(args.imports)
    path = args.plot or os.path.join(os.path.dirname(args.predictions), "label_headroom.png")
    # Before the minutes of computing.
    for written in filter(None, (path, args.json)):
        check_writable(os.path.dirname(written) or ".")
    predictions = read_predictions(args.predictions)
    fitted, measured = fit(args, predictions)
    headroom = measure_headroom(
        fitted.prior, measured.logits, measured.targets, predictions.label_counts
    )
    print(
        f"{args.predictions}: {len(measured.targets)} images, {len(predictions.label_names)} labels"
    )
    print(f"\n{table(headroom)}\n\n{frequency_table(headroom)}\n\n{headroom.advice()}\n")
    if args.json:
        with write_text_atomically(args.json) as file:
            json.dump(headroom.summary(), file, indent=2)
        print(args.json)
    plot_headroom(headroom, path)
    print(path)


def fit(args: argparse.Namespace, predictions: Predictions) -> Tuple[FittedPrior, ScoredImages]:
    """The prior, and the images that are measured."""
    if args.labels_from.endswith(".npz"):
        others = read_predictions(args.labels_from)
        order = label_order(others.label_names, predictions, args.labels_from)
        others = others._replace(
            scores=others.scores[:, order],
            targets=others.targets[:, order],
            label_names=predictions.label_names,
        )
        check_other_images(
            others.image_ids, others.targets == 1, predictions, args.labels_from, args.predictions
        )
        return fit_to_predictions(others), ScoredImages.of_predictions(predictions)
    labels = read_labels(args.labels_from, predictions, args.predictions)
    aside, measured = ScoredImages.of_predictions(predictions).split(
        predictions.image_ids, args.share
    )
    return fit_label_prior(labels, aside), measured


def table(headroom: Headroom) -> str:
    """mAP as it is and with the prior, by what is known."""
    rows = [["none", headroom.map, headroom.map_with_prior, headroom.gain]]
    for share, known in headroom.map_known.items():
        gain = known.with_prior.value - known.without_prior.value
        rows.append([f"{share:.0%}", known.without_prior, known.with_prior, f"{gain:.2f}"])
    rows.append(["all but one", headroom.map, headroom.map_ceiling, headroom.headroom])
    headers = ["labels known", "mAP of the others", "with the prior", "difference"]
    rows = [[str(cell) for cell in row] for row in rows]
    return tabulate(rows, headers, disable_numparse=True)


def frequency_table(headroom: Headroom) -> str:
    """mAP of rare, middle and frequent labels."""
    rows = [
        [name, g["labels"], f"{g['fewest']} to {g['most']}"]
        + [g[key] for key in ("map", "map_with_prior", "map_ceiling")]
        for name, g in headroom.by_frequency.items()
    ]
    headers = ["", "labels", "images of each", "mAP", "with the prior", "all but one known"]
    return tabulate(rows, headers, floatfmt=".2f")


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status; invalid user input is reported in one line."""
    parser = make_parser(__doc__)
    parser.add_argument("predictions", metavar="PREDICTIONS", help="predictions.npz")
    parser.add_argument(
        "--labels-from", required=True, metavar="FROM", help="a data set, or a predictions.npz"
    )
    parser.add_argument(
        "--share",
        type=probability,
        default=0.2,
        metavar="P",
        help="of PREDICTIONS, to be set aside where --labels-from is a data set (0.2)",
    )
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    parser.add_argument(
        "--plot", metavar="FILE", help="(label_headroom.png in the folder of PREDICTIONS)"
    )
    add_import_option(parser)
    args = parser.parse_args(argv)
    return run("label_headroom", lambda: measure(args))
