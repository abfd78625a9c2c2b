"""Compute label embeddings from images with a trained network.

A label's vector is the mean, over the training images that have it, of
  scores    the probabilities of all labels
  features  the label head's feature of the whole image
The images are those of DATASETS.TRAIN, in the test view. Writes an .npz file for
MODEL.LABEL_EMBEDDINGS.SOURCE, with embeddings (C, d) float32, label_names (C,) and kind, and prints
the config keys to set.

Examples:
  of a linear classifier's scores:
    tools/build_label_embeddings.py --config-file configs/VOC/resnet101.yaml \\
        --weights output/voc_resnet101/model_best.pth --kind scores
  then train on them:
    tools/train_net.py --config-file configs/VOC/ml_gcn_R_101.yaml \\
        MODEL.LABEL_EMBEDDINGS.SOURCE output/voc_resnet101/label_embeddings.npz \\
        MODEL.LABEL_EMBEDDINGS.DIM 20
  your own data (COCO-format JSON, or CSV with file,label;label), to a file of another name:
    tools/build_label_embeddings.py --config-file ... --weights output/model_best.pth \\
        --kind features --output features.npz \\
        DATASETS.CUSTOM.TRAIN train.csv DATASETS.CUSTOM.IMAGE_ROOT photos
"""

from __future__ import annotations

import os
import shlex
import sys
from typing import Dict, Iterable, List, Sequence

import numpy as np
from detectron2.config import CfgNode

from ..checkpoint import load_model
from ..data import (
    MultiLabelDatasetMapper,
    build_multilabel_test_loader,
    get_multilabel_dicts,
)
from ..engine import check_labels, setup_cfg
from ..errors import InputError
from ..inference import embed_labels
from ..inference.image_embeddings import KINDS
from ..io.files import check_writable, write_atomically
from .common import add_import_option, make_parser, run

SUFFIX = ".npz"


def build_label_embeddings(cfg: CfgNode, kind: str, output: str) -> None:
    """Compute the embeddings, write them and print the config keys.

    Args:
        cfg: of the model, with its MODEL.WEIGHTS.
        kind: one of KINDS.
        output: the .npz file.
    Raises:
        InputError: the model, its data or the output can't be used.
    """
    if not cfg.DATASETS.TRAIN:
        raise InputError("DATASETS.TRAIN is empty")
    check_output(output)
    label_names = check_labels(cfg)
    model = load_model(cfg, label_names, ema=cfg.TEST.EMA)
    embeddings, counts = embed_labels(model, labelled_images(cfg), kind)
    without = [name for name, count in zip(label_names, counts) if not count]
    if without:
        print(
            f"build_label_embeddings: no image has {len(without)} label(s), which get the mean "
            f"of the other labels' embeddings: {', '.join(without)}",
            file=sys.stderr,
        )
    with write_atomically(output) as file:
        np.savez(file, embeddings=embeddings, label_names=np.array(label_names), kind=kind)
    num_labels, dim = embeddings.shape
    print(f"{output}: {kind}, {num_labels} labels, {dim} numbers each")
    print(f"MODEL.LABEL_EMBEDDINGS.SOURCE {shlex.quote(output)} MODEL.LABEL_EMBEDDINGS.DIM {dim}")


def check_output(path: str) -> None:
    """Refuse, before the hours of computing, a file that can't be written or read again.

    Raises:
        InputError: the name is no .npz file's.
        OSError: the folder can't be written to.
    """
    if not path.endswith(SUFFIX):
        raise InputError(f"--output {path}: the name must end in {SUFFIX}")
    if os.path.isdir(path):
        raise InputError(f"--output {path}: is a folder")
    check_writable(os.path.dirname(path) or ".")


def labelled_images(cfg: CfgNode) -> Iterable[List[Dict]]:
    """Batches of the training images that have a label, in the test view."""
    dicts = get_multilabel_dicts(
        cfg.DATASETS.TRAIN,
        drop_unlabelled=True,
        proposal_files=cfg.DATASETS.PROPOSAL_FILES_TRAIN if cfg.MODEL.LOAD_PROPOSALS else None,
    )
    return build_multilabel_test_loader(
        dataset=dicts,
        mapper=MultiLabelDatasetMapper(cfg, is_train=False),
        batch_size=cfg.TEST.IMS_PER_BATCH,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        max_unreadable=cfg.DATASETS.MAX_UNREADABLE,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = make_parser(__doc__)
    parser.add_argument(
        "--config-file", required=True, metavar="FILE", help="of the trained network"
    )
    parser.add_argument("--weights", required=True, metavar="FILE", help="its checkpoint")
    parser.add_argument("--kind", required=True, choices=list(KINDS), help="what is averaged")
    parser.add_argument(
        "--output",
        metavar="FILE",
        help=f"write there (label_embeddings{SUFFIX} beside the weights)",
    )
    add_import_option(parser)
    parser.add_argument("opts", metavar="KEY VALUE", nargs="*", help="config keys and values")
    # Intermixed, so that options may stand between and behind the keys.
    args = parser.parse_intermixed_args(argv)

    def work() -> None:
        opts = [*args.opts, "MODEL.WEIGHTS", args.weights]
        cfg = setup_cfg(args.config_file, opts, imports=args.imports)
        beside = os.path.join(os.path.dirname(args.weights), f"label_embeddings{SUFFIX}")
        build_label_embeddings(cfg, args.kind, args.output or beside)

    return run("build_label_embeddings", work)
