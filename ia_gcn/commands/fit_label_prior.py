"""Teach a trained model what labels say of each other, from labels alone.

A prior of the labels, P(label | the other labels), is fitted to the labels of a training set: a
regression of each label on the others, and mixtures of 4 to 256 themes. What says most of held-out
labels is taken. The model's logits are its evidence, and how much they count beside the prior is
chosen on images that are in no fit. Where that gains nothing, they count nothing: the scores stay
what they are, and the prior is there for labels that are known of an image.

With --weights, what is written is a checkpoint with the prior, for evaluation, prediction, export
and the page, and its config beside it (.yaml). Such a model also takes labels that are known of an
image: tools/predict.py --known.

The images that the strength is chosen on should not be those that the model was trained on, of
which it is too sure, nor those that it is going to be measured on. --calibrate-on names such a data
set. Without it, a share of the training images is taken.

With --predictions, a predictions.npz of anybody's model takes the model's place. What is written is
the predictions.npz of --apply with the prior's scores. tools/label_headroom.py says beforehand
how much there is to gain.

Examples:
  a checkpoint, its training set being that of its config:
    tools/fit_label_prior.py --weights output/demo/model_best.pth --output with_prior.pth
  calibrated on another data set, as DATASETS.CUSTOM names it:
    tools/fit_label_prior.py --weights model.pth --output with_prior.pth \\
        --calibrate-on custom_test DATASETS.CUSTOM.TEST validation.csv
  evaluate it:
    tools/train_net.py --eval-only --config-file with_prior.yaml
  predictions of another program, with labels of a registered data set:
    tools/fit_label_prior.py --predictions val/predictions.npz --apply test/predictions.npz \\
        --labels-from coco_2014_train_multilabel --output test/with_prior.npz
"""

from __future__ import annotations

import argparse
import os
from typing import Sequence

import numpy as np
import torch
from tabulate import tabulate

from ..engine.label_prior import (
    FittedPrior,
    ScoredImages,
    check_other_images,
    fit_label_prior,
    fit_to_checkpoint,
    fit_to_predictions,
    read_labels,
    save_with_prior,
    with_prior,
)
from ..errors import InputError
from ..evaluation import multi_label_metrics, read_predictions
from ..evaluation.predictions import write_predictions
from ..extensions import import_extensions
from ..io.files import check_writable
from ..label_names import describe_mismatch
from ..modeling.label_prior_fit import FITS, posterior_logits
from .common import add_import_option, make_parser, probability, run

# Options of one kind of input alone, by their names among the arguments.
OF_WEIGHTS = {
    "calibrate_on": "--calibrate-on",
    "ema": "--ema",
    "device": "--device",
    "opts": "KEY VALUE",
}
OF_PREDICTIONS = {"labels_from": "--labels-from", "apply": "--apply"}
SHARE = 0.2
KINDS = {"pairwise": "PairwisePrior", "themes": "ThemePrior"}


def fit_checkpoint(args: argparse.Namespace) -> None:
    """--weights: write the checkpoint and its config."""
    predictor, fitted = fit_to_checkpoint(
        args.weights,
        calibrate_on=args.calibrate_on,
        share=args.share or SHARE,
        kinds=kinds_of(args),
        ema=args.ema,
        device=args.device,
        opts=args.opts,
    )
    print(describe(fitted))
    if not args.calibrate_on:
        print(
            "\nThese images are of the training set. Of images that it was trained on a model is "
            "too sure, and\nthe prior then counts too little: --calibrate-on names others."
        )
    config = save_with_prior(predictor, args.output)
    print(f"\n{args.output}\n{config}")


def fit_predictions(args: argparse.Namespace) -> None:
    """--predictions: write those of --apply with the prior."""
    predictions, applied = read_predictions(args.predictions), read_predictions(args.apply)
    if applied.label_names != predictions.label_names:
        mismatch = describe_mismatch(applied.label_names, predictions.label_names)
        raise InputError(f"--apply {args.apply} {mismatch} than {args.predictions}")
    check_other_images(
        predictions.image_ids, predictions.targets == 1, applied, args.predictions, args.apply
    )
    if args.labels_from:
        scored = ScoredImages.of_predictions(predictions)
        labels = read_labels(args.labels_from, applied, args.apply)
        fitted = fit_label_prior(labels, scored, kinds_of(args))
    else:
        fitted = fit_to_predictions(predictions, kinds_of(args), args.share or SHARE)
    print(describe(fitted))
    write_predictions(args.output, with_prior(fitted.prior, applied))
    print(f"\n{args.output}")


def kinds_of(args: argparse.Namespace) -> Sequence[str]:
    return [KINDS[args.kind]] if args.kind else list(FITS)


def describe(fitted: FittedPrior) -> str:
    """What was tried, what was taken, and what it does to the images it was calibrated on."""
    rows = [[name_of(c.kind), f"{c.setting:g}" * bool(c.kind), c.loss] for c in fitted.candidates]
    headers = ["", "L2 weight or themes", "nats"]
    table = tabulate(rows, headers, floatfmt=".4f", disable_numparse=[0, 1])
    prior, scored = fitted.prior, fitted.scored
    drawn = np.random.RandomState(0).rand(*scored.targets.shape) < 0.5
    known = torch.from_numpy(np.where(drawn, scored.targets, -1))
    others = np.where(drawn, -1, scored.targets)
    measured = [
        ("no label known", mean_ap(scored.logits, scored.targets), scored.targets, None),
        ("half of them known, the others measured", mean_ap(scored.logits, others), others, known),
    ]
    maps = [
        [what, before, mean_ap(posterior_logits(prior, scored.logits, states), targets)]
        for what, before, targets, states in measured
    ]
    return (
        "What the other labels of an image leave open of a label, on held-out labels:\n"
        f"{table}\n\n"
        f"{name_of(type(prior).__name__)}: temperature {prior.temperature:.2f}, offset "
        f"{prior.offset:.2f}, strength {prior.strength:.2f}"
        f"{'' if prior.strength else ' (it has an effect where labels are known)'}\n\n"
        f"mAP of the {len(scored.targets)} images that these were chosen on:\n"
        + tabulate(maps, ["", "without", "with the prior"], floatfmt=".2f")
    )


def mean_ap(logits: torch.Tensor, targets: np.ndarray) -> float:
    return multi_label_metrics(logits.sigmoid().numpy(), targets)["mAP"]


def name_of(kind: str) -> str:
    return {value: key for key, value in KINDS.items()}.get(kind, "frequencies alone")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--weights", metavar="FILE", help="a checkpoint")
    what.add_argument(
        "--predictions",
        metavar="FILE",
        help="a predictions.npz, of images that its model was not trained on",
    )
    parser.add_argument(
        "--output", required=True, metavar="FILE", help=".pth, or .npz with --apply"
    )
    parser.add_argument(
        "--kind", choices=KINDS, help="try these alone (both, and take what says more)"
    )
    parser.add_argument(
        "--calibrate-on",
        default="",
        metavar="NAME",
        help="a data set to choose the strength on, with --weights (a share of the training set)",
    )
    parser.add_argument(
        "--share",
        type=probability,
        metavar="P",
        help=f"of the images, to choose the strength on ({SHARE})",
    )
    parser.add_argument(
        "--labels-from",
        metavar="FROM",
        help="with --predictions: fit the prior to the labels of this data set or predictions.npz",
    )
    parser.add_argument("--apply", metavar="FILE", help="with --predictions, what gets the prior")
    parser.add_argument("--ema", action="store_true", help="take the EMA of the weights")
    parser.add_argument("--device", help="cpu, cuda, ... (a GPU where there is one)")
    add_import_option(parser)
    parser.add_argument("opts", metavar="KEY VALUE", nargs="*", help="config keys and values")
    args = parser.parse_intermixed_args(argv)
    if args.predictions and not args.apply:
        parser.error("--predictions: --apply names the predictions that get the prior")
    for name, option in (OF_PREDICTIONS if args.weights else OF_WEIGHTS).items():
        if getattr(args, name):
            what = "--weights" if args.weights else "--predictions"
            parser.error(f"{option} has no effect with {what}")
    if args.share is not None and (args.calibrate_on or args.labels_from):
        parser.error("--share has no effect with --calibrate-on or --labels-from")
    ending = ".pth" if args.weights else ".npz"
    if not args.output.endswith(ending):
        parser.error(f"--output: must end in {ending}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status; invalid user input is reported in one line."""
    args = parse_arguments(argv)

    def work() -> None:
        # Before the minutes of computing.
        check_writable(os.path.dirname(args.output) or ".")
        import_extensions(args.imports)
        (fit_checkpoint if args.weights else fit_predictions)(args)

    return run("fit_label_prior", work)
