#!/usr/bin/env python3
"""Make label embeddings of images: what a trained network makes of each label's, on average.

A label's vector is the mean, over the training images that have it, of
  scores    the probabilities of all labels
  features  the feature of the whole image, which the label head gets
The images are those of DATASETS.TRAIN, whole, as in an evaluation. Writes an .npz file for
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

import argparse
import os
import shlex
import sys
from typing import Dict, Iterable, List, Tuple

import numpy as np
import torch
from detectron2.config import CfgNode
from tqdm import tqdm

from ia_gcn.checkpoint import load_model
from ia_gcn.data import (
    MultiLabelDatasetMapper,
    build_multilabel_test_loader,
    get_multilabel_dicts,
)
from ia_gcn.engine import check_labels, setup_cfg
from ia_gcn.errors import InputError
from ia_gcn.io.files import check_writable, write_atomically
from ia_gcn.modeling import MultiLabelRecognizer

SUFFIX = ".npz"


def build(cfg: CfgNode, kind: str, output: str) -> None:
    """Compute the embeddings, write them and say so.

    Args:
        cfg: of the model, with its MODEL.WEIGHTS.
        kind: of OUTPUTS.
        output: the .npz file.
    """
    if not cfg.DATASETS.TRAIN:
        raise InputError("DATASETS.TRAIN is empty")
    check_output(output)
    label_names = check_labels(cfg)
    model = load_model(cfg, label_names, ema=cfg.TEST.EMA)
    sums, counts = sum_by_label(model, labelled_images(cfg), kind)
    embeddings = label_means(sums, counts)
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
    """Say before the hours of computing that a file can't be written, or not be read again."""
    if not path.endswith(SUFFIX):
        raise InputError(f"--output {path}: its name must end in {SUFFIX}")
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


def probabilities(model: MultiLabelRecognizer, images: List[Dict]) -> torch.Tensor:
    """(B, C)."""
    return torch.stack([output["scores"] for output in model(images)])


def features(model: MultiLabelRecognizer, images: List[Dict]) -> torch.Tensor:
    """x (B, D)."""
    if model.label_head is None:
        raise InputError(
            "--kind features: with MODEL.FUSION.GLOBAL_WEIGHT 0 there is no label head"
        )
    found, _ = model.extract_features(images)
    return model.label_head.image_features(found.maps, found.masks)


OUTPUTS = {"scores": probabilities, "features": features}


@torch.no_grad()
def sum_by_label(
    model: MultiLabelRecognizer, batches: Iterable[List[Dict]], kind: str
) -> Tuple[np.ndarray, np.ndarray]:
    """Sums of the outputs over the images that have a label, and how many those are.

    Returns:
        (C, d) float64 and (C,) float64.
    Raises:
        InputError: an output is not finite.
    """
    sums = counts = 0
    # Without a terminal, no bar.
    for images in tqdm(batches, kind, leave=False, disable=None):
        # Not every device knows float64.
        outputs = OUTPUTS[kind](model, images).cpu().double()
        finite = outputs.isfinite().all(dim=1)
        if not finite.all():
            file_name = images[finite.tolist().index(False)]["file_name"]
            raise InputError(f"MODEL.WEIGHTS: the {kind} of {file_name} are not finite")
        present = (torch.stack([image["labels"] for image in images]) == 1).double()
        sums = sums + present.T @ outputs
        counts = counts + present.sum(dim=0)
    return sums.numpy(), counts.numpy()


def label_means(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(C, d) float32: sums (C, d) by counts (C,); for a count of 0, the mean of the other rows."""
    found = counts > 0
    means = sums / np.where(found, counts, 1)[:, None]
    means[~found] = means[found].mean(axis=0)
    return means.astype(np.float32)


def main() -> int:
    """Returns the exit status; what the user can put right is said in one line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config-file", required=True, metavar="FILE", help="of the trained network"
    )
    parser.add_argument("--weights", required=True, metavar="FILE", help="its checkpoint")
    parser.add_argument("--kind", required=True, choices=list(OUTPUTS), help="what is averaged")
    parser.add_argument(
        "--output",
        metavar="FILE",
        help=f"write there (label_embeddings{SUFFIX} beside the weights)",
    )
    parser.add_argument("opts", metavar="KEY VALUE", nargs="*", help="config keys and values")
    # Intermixed, so that options may stand between and behind the keys.
    args = parser.parse_intermixed_args()
    try:
        cfg = setup_cfg(args.config_file, [*args.opts, "MODEL.WEIGHTS", args.weights])
        beside = os.path.join(os.path.dirname(args.weights), f"label_embeddings{SUFFIX}")
        build(cfg, args.kind, args.output or beside)
    except (InputError, OSError) as error:
        print(f"build_label_embeddings: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
