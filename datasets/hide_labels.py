#!/usr/bin/env python3
"""Hide labels of a data set, to train with unknown labels as published comparisons do.

IN is the name of a registered data set, a JSON in COCO's format or a CSV; what it does not say of
an image is absent. OUT is a .json or .csv that DATASETS.CUSTOM reads, in which the labels that are
left are present or known to be absent, and all others are unknown.

  --known S --by image   of each image's labels a share S is known (Durand et al., 2019)
  --known S --by entry   each label of each image is known with the probability S
  --known S --by label   each label is known in a share S of the images that have it, and of those
                         that don't, one of each at least
  --single-positive      of each image, one label that is present is known (Cole et al., 2021)

Which labels these are follows from the seed and the image's id; the order of the images makes no
difference. Only training labels are hidden: evaluate on the whole ones.

Examples:
  a tenth of the labels of each image of the demo's training set:
    datasets/hide_labels.py digit_scenes_hard_train known_10.json --known 0.1
  your own data, and the training on it:
    datasets/hide_labels.py train.csv one_label.json --single-positive
    tools/train_net.py --config-file configs/Custom/small.yaml \\
        DATASETS.CUSTOM.TRAIN one_label.json DATASETS.CUSTOM.TEST test.csv \\
        DATASETS.CUSTOM.IMAGE_ROOT photos
  A JSON says of each image what is unknown. OUT as a CSV needs DATASETS.CUSTOM.UNLABELED unknown,
  which holds for the test file, too: that one must then name what is absent, as !label.
  With --known 1, a registered test set becomes a file for DATASETS.CUSTOM.TEST.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from typing import Dict, List, Tuple

from detectron2.data import DatasetCatalog

from ia_gcn.commands.common import make_parser, non_negative_int, probability, run
from ia_gcn.data import get_label_names, hidden_labels
from ia_gcn.data.build import load_multilabel_dicts
from ia_gcn.data.datasets.custom import file_label_names, load_multilabel_file
from ia_gcn.data.datasets.shards import is_shard_index
from ia_gcn.data.datasets.writing import WRITERS, write_multilabel_file
from ia_gcn.errors import InputError
from ia_gcn.io.files import check_writable

BY = {
    "image": hidden_labels.keep_of_each_image,
    "entry": hidden_labels.keep_entries,
    "label": hidden_labels.keep_of_each_label,
}


def load(source: str) -> Tuple[List[Dict], List[str], str]:
    """The dicts and label names of IN, and the folder that its file names begin with.

    Raises:
        InputError: it is neither registered nor a file that can be read.
    """
    if source not in DatasetCatalog.list():
        if not os.path.exists(source):
            raise InputError(f"{source}: neither a registered data set nor a file")
        labels = file_label_names(source)
        dicts = load_multilabel_file(source, "", labels)
        if not is_shard_index(source):
            return dicts, labels, ""
    else:
        dicts, labels = load_multilabel_dicts(source), get_label_names([source])
    folders = [record["file_name"].split("/")[:-1] for record in dicts]
    root = "/".join(os.path.commonprefix(folders))  # noqa: RUF071 (of lists, it compares parts)
    return dicts, labels, root


def hide(args: argparse.Namespace) -> None:
    """Read IN, hide labels, write OUT, and say how much is left."""
    if os.path.splitext(args.out)[1].lower() not in WRITERS:
        raise InputError(f"{args.out}: the name must end in {' or '.join(WRITERS)}")
    if os.path.realpath(args.out) == os.path.realpath(args.source):
        raise InputError(f"{args.out}: is IN itself, whose labels would be lost")
    if args.single_positive:
        keep = hidden_labels.keep_one_positive()
    else:
        keep = BY[args.by or "image"](args.known)
    check_writable(os.path.dirname(args.out) or ".")
    dicts, labels, root = load(args.source)
    hidden = hidden_labels.hide_labels(dicts, len(labels), keep, args.seed)
    write_multilabel_file(args.out, hidden, labels, root)

    present, absent = (sum(len(d[key]) for d in hidden) for key in ("labels", "absent_labels"))
    known = (present + absent) / (len(dicts) * len(labels))
    print(
        f"{args.out}: {len(hidden)} images, {len(labels)} labels; {known:.1%} of the entries are "
        f"known: {present} present of {sum(len(d['labels']) for d in dicts)}, {absent} absent"
    )
    opts = ["DATASETS.CUSTOM.TRAIN", args.out, "DATASETS.CUSTOM.TEST", "TEST"]
    opts += ["DATASETS.CUSTOM.IMAGE_ROOT", root or "IMAGES"]
    if args.out.lower().endswith(".csv"):
        opts += ["DATASETS.CUSTOM.UNLABELED", "unknown"]
    print(
        "to train on it, with your test file for TEST and the folder of the images for IMAGES:\n"
        f"  tools/train_net.py --config-file configs/Custom/small.yaml {shlex.join(opts)}"
    )


def main() -> int:
    """Returns the exit status."""
    parser = make_parser(__doc__)
    parser.add_argument("source", metavar="IN", help="a registered data set, or .json or .csv")
    parser.add_argument("out", metavar="OUT", help="a .json or .csv")
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--known", type=probability, metavar="S", help="the share that stays known")
    how.add_argument(
        "--single-positive", action="store_true", help="one present label of each image stays known"
    )
    parser.add_argument("--by", choices=BY, help="what --known is a share of (image)")
    parser.add_argument("--seed", type=non_negative_int, default=0, metavar="N", help="(0)")
    args = parser.parse_args()
    if args.single_positive and args.by:
        parser.error("--by goes with --known")
    return run("hide_labels", lambda: hide(args))


if __name__ == "__main__":
    sys.exit(main())
