"""Find labels of a data set that are probably wrong, to look at them again.

A network sees each image of DATASETS.TRAIN once. Linear classifiers are trained on its features, on
all folds of the images but one, and predict that one; cleanlab compares these probabilities with
the given labels. Entries that are unknown (ignored) are neither trained on nor doubted, and neither
are labels with few images.

Writes into --output
  label_errors.csv   rank, file, label, given (present or absent), probability of the label, score
                     (of the given label, 0 to 1), labels_alone (the probability according to the
                     image's other labels alone); the most doubtful entry comes first
  label_errors.html  the first 100 of them with their images, and the numbers of each label

The network may be a checkpoint or a pretrained backbone. If it was trained on these very labels, it
has learned some of the wrong ones and finds fewer of them. The fewer epochs it was trained, the
better; best is one that was trained on other images.

It needs pip install 'ia_gcn[clean]'.

Examples:
  your own data (COCO-format JSON, or CSV with file,label;label), with a trained network:
    tools/find_label_errors.py --config-file configs/Custom/small.yaml \\
        --weights output/custom_small/model_best.pth \\
        DATASETS.CUSTOM.TRAIN train.csv DATASETS.CUSTOM.IMAGE_ROOT photos
  the same before any training, with the config's pretrained backbone:
    tools/find_label_errors.py --config-file configs/Custom/small.yaml \\
        DATASETS.CUSTOM.TRAIN train.csv DATASETS.CUSTOM.IMAGE_ROOT photos
  with a checkpoint that has other labels:
    tools/find_label_errors.py ... --weights other.pth MODEL.TRANSFER True
"""

from __future__ import annotations

import argparse
import os
from typing import Sequence

from detectron2.config import CfgNode

from ..data import get_label_names
from ..data.build import MAX_LISTED
from ..engine import setup_cfg
from ..engine.label_prior import label_opinions
from ..engine.out_of_fold import assign_folds, out_of_fold_probabilities, training_vectors
from ..errors import InputError
from ..evaluation.label_errors import (
    check_cleanlab,
    find_label_errors,
    judged_labels,
    render_label_errors,
    write_label_errors,
)
from ..io.files import check_writable, write_text_atomically
from .common import add_import_option, make_parser, run


def search(cfg: CfgNode, num_folds: int, output: str) -> None:
    """Find the errors, write the files of --help and print what was found.

    Args:
        cfg: of the network, with DATASETS.TRAIN.
        num_folds: K, at least 2.
        output: folder to write into.
    Raises:
        InputError: the network, its data or the output can't be used.
    """
    if not cfg.DATASETS.TRAIN:
        raise InputError("DATASETS.TRAIN is empty")
    # Before the minutes of computing.
    check_cleanlab()
    check_writable(output)
    data_set, label_names = ", ".join(cfg.DATASETS.TRAIN), get_label_names(cfg.DATASETS.TRAIN)
    images = training_vectors(cfg)
    if len(images.file_names) < num_folds:
        raise InputError(f"--folds {num_folds}: {data_set} has {len(images.file_names)} images")
    folds = assign_folds(images.image_ids, images.targets, num_folds, max(cfg.SEED, 0))
    probabilities = out_of_fold_probabilities(images.vectors, images.targets, folds).numpy()
    targets = images.targets.numpy()
    doubts = find_label_errors(
        probabilities, targets, label_opinions(targets), min_images=num_folds
    )

    table = os.path.join(output, "label_errors.csv")
    write_label_errors(table, doubts, images.file_names, label_names)
    page = os.path.join(output, "label_errors.html")
    facts = {"Network": describe_network(cfg), "Folds": str(num_folds)}
    html = render_label_errors(doubts, targets, images.file_names, label_names, data_set, facts)
    # Of a name that is not UTF-8, the page shows what can be shown.
    with write_text_atomically(page, errors="replace") as file:
        file.write(html)
    judged = set(judged_labels(targets, num_folds))
    left_out = [name for i, name in enumerate(label_names) if i not in judged]
    if left_out:
        print(
            f"{len(left_out)} label(s) are not judged, which are present or absent in fewer than "
            f"{num_folds} images: {', '.join(left_out[:MAX_LISTED])}"
            f"{' ...' if len(left_out) > MAX_LISTED else ''}"
        )
    print(
        f"{data_set}: {len(doubts)} of {int((targets >= 0).sum())} entries are probably wrong, in "
        f"{len({doubt.image for doubt in doubts})} of {len(targets)} images"
    )
    print(f"{table}\n{page}")


def describe_network(cfg: CfgNode) -> str:
    return cfg.MODEL.WEIGHTS or cfg.MODEL.TIMM.WEIGHTS_FILE or cfg.MODEL.TIMM.NAME


def folds(text: str) -> int:
    """An argparse type: 2 or more."""
    if int(text) < 2:
        raise argparse.ArgumentTypeError(f"{text} is less than 2")
    return int(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = make_parser(__doc__)
    parser.add_argument("--config-file", required=True, metavar="FILE", help="of the network")
    parser.add_argument("--weights", metavar="FILE", help="its checkpoint (the config's weights)")
    parser.add_argument(
        "--folds", type=folds, default=5, metavar="K", help="parts of the images (5)"
    )
    parser.add_argument(
        "--output",
        metavar="DIR",
        default="output/label_errors",
        help="folder to write into (output/label_errors)",
    )
    add_import_option(parser)
    parser.add_argument("opts", metavar="KEY VALUE", nargs="*", help="config keys and values")
    # Intermixed, so that options may stand between and behind the keys.
    args = parser.parse_intermixed_args(argv)

    def work() -> None:
        # All images are searched, and no label is one that the model is told.
        opts = ["DATASETS.CUSTOM.HOLD_OUT", 0.0, *args.opts, "TEST.KNOWN_LABELS", 0.0]
        opts += ["MODEL.WEIGHTS", args.weights] if args.weights else []
        search(setup_cfg(args.config_file, opts, imports=args.imports), args.folds, args.output)

    return run("find_label_errors", work)
