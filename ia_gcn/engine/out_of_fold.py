"""Probabilities of images' labels by classifiers that were trained on other images.

The network stays as it is: each image passes it once, and linear classifiers are trained on the
features of all folds but one, to predict that one (cross-validation). n, C, D and K are the numbers
of images, labels, feature channels and folds.
"""

from __future__ import annotations

import os
from typing import Dict, Iterable, List, NamedTuple, Sequence

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from torch import nn
from tqdm import tqdm

from ..checkpoint import MultiLabelCheckpointer, build_model
from ..data import (
    MultiLabelDatasetMapper,
    build_multilabel_test_loader,
    get_multilabel_dicts,
)
from ..data.stratified_split import stratified_folds
from ..errors import InputError
from ..inference.image_embeddings import features
from .trainer import check_labels

# λ, from strong to weak.
STRENGTHS = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001)
# Of L-BFGS; strong ones converge sooner, and more steps change no probability by much.
MAX_STEPS = 100


class ImageVectors(NamedTuple):
    """The pooled features of n images, and their labels."""

    vectors: torch.Tensor
    """(n, D) float32."""
    targets: torch.Tensor
    """(n, C) float32 in {1, 0, -1 = unknown}."""
    file_names: List[str]
    image_ids: List[str]
    """Names that do not depend on where the images are."""


def training_vectors(cfg: CfgNode) -> ImageVectors:
    """The vectors of all images of DATASETS.TRAIN that can be read, whatever their files' order.

    Args:
        cfg: of the network, see `load_network`; its MODEL.LABEL_HEAD.NUM_LABELS is the data's.
    Raises:
        InputError: the network or the data can't be used.
    """
    model = load_network(cfg, check_labels(cfg))
    dicts = get_multilabel_dicts(
        cfg.DATASETS.TRAIN,
        proposal_files=cfg.DATASETS.PROPOSAL_FILES_TRAIN if cfg.MODEL.LOAD_PROPOSALS else None,
    )
    batches = build_multilabel_test_loader(
        dataset=sorted(dicts, key=_image_id),
        mapper=MultiLabelDatasetMapper(cfg, is_train=False),
        batch_size=cfg.TEST.IMS_PER_BATCH,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        max_unreadable=cfg.DATASETS.MAX_UNREADABLE,
    )
    return extract_vectors(model, batches)


def _image_id(record: Dict) -> str:
    return f"{os.path.basename(record['file_name'])} {record['image_id']}"


def load_network(cfg: CfgNode, label_names: Sequence[str]) -> nn.Module:
    """The model of a config with the weights of its network; its heads may be random.

    MODEL.WEIGHTS is a checkpoint or a pretrained backbone; without it, a timm network has its own
    weights.

    Raises:
        InputError: the network would be random, or the weights can't be used.
    """
    model = build_model(cfg)
    checkpointer = MultiLabelCheckpointer(
        model, label_names=label_names, load_ema=cfg.TEST.EMA, transfer=cfg.MODEL.TRANSFER
    )
    checkpointer.load(cfg.MODEL.WEIGHTS)
    timm = cfg.MODEL.TIMM
    if cfg.MODEL.WEIGHTS or not (timm.NAME and (timm.PRETRAINED or timm.WEIGHTS_FILE)):
        checkpointer.check_loaded("backbone.")
    return model.eval()


@torch.no_grad()
def extract_vectors(model: nn.Module, batches: Iterable[List[Dict]]) -> ImageVectors:
    """The label head's feature of every image of a test loader, in its order.

    Unlike `extract_features`, it keeps no feature maps, which may be too large for the memory.

    Raises:
        InputError: a feature is not finite, or there is no label head.
    """
    found = ImageVectors([], [], [], [])
    # Without a terminal, no bar.
    for images in tqdm(batches, "features", leave=False, disable=None):
        vectors = features(model, images).float().cpu()
        names = [image["file_name"] for image in images]
        finite = vectors.isfinite().all(dim=1).tolist()
        if not all(finite):
            file_name = names[finite.index(False)]
            raise InputError(f"MODEL.WEIGHTS: the features of {file_name} are not finite")
        found.vectors.append(vectors)
        found.targets.extend(image["labels"] for image in images)
        found.file_names.extend(names)
        found.image_ids.extend(map(_image_id, images))
    return found._replace(vectors=torch.cat(found.vectors), targets=torch.stack(found.targets))


def assign_folds(
    image_ids: Sequence[str], targets: torch.Tensor, number: int, seed: int
) -> torch.Tensor:
    """The fold of each image, (n,) in 0 to K - 1; see `stratified_folds`.

    Args:
        image_ids: n names. Images of the same name are in the same fold.
        targets: (n, C) in {1, 0, -1 = unknown}.
        number: K.
        seed: another one makes other folds.
    """
    labels = {
        image_id: target.eq(1).nonzero()[:, 0].tolist()
        for image_id, target in zip(image_ids, targets)
    }
    folds = stratified_folds(labels, number, seed)
    return torch.tensor([folds[image_id] for image_id in image_ids])


def out_of_fold_probabilities(
    vectors: torch.Tensor, targets: torch.Tensor, folds: torch.Tensor
) -> torch.Tensor:
    """The probability of each label by classifiers that have not seen the image.

    They are logistic regressions, see `fit_linear`. Their λ, one for all, is that of STRENGTHS with
    the least loss on the held-out images; weaker ones are not tried once the loss rises.

    Args:
        vectors: (n, D).
        targets: (n, C) in {1, 0, -1 = unknown}. Unknown ones are neither trained on nor measured.
        folds: (n,) integers, K different ones.
    Returns:
        (n, C) float32.
    """
    vectors = standardize(vectors)
    known = targets >= 0
    held_out = [folds == fold for fold in folds.unique()]
    models = [torch.zeros(targets.shape[1], vectors.shape[1] + 1) for _ in held_out]
    best, lowest = torch.empty_like(targets), float("inf")
    # Without a terminal, no bar.
    total = len(STRENGTHS) * len(held_out)
    with tqdm(total=total, desc="folds", leave=False, disable=None) as progress:
        for strength in STRENGTHS:
            logits = torch.empty_like(targets)
            for fold, images in enumerate(held_out):
                seen = targets.masked_fill(images[:, None], -1)
                # It starts from that of the strength before.
                models[fold] = fit_linear(vectors, seen, strength, models[fold])
                logits[images] = predict_linear(vectors[images], models[fold])
                progress.update()
            loss = F.binary_cross_entropy_with_logits(logits[known], targets[known]).item()
            if loss >= lowest:
                break
            best, lowest = logits, loss
    return best.sigmoid()


def standardize(vectors: torch.Tensor) -> torch.Tensor:
    """Each channel to mean 0 and deviation 1 over the images; one that is constant to 0."""
    deviation, mean = torch.std_mean(vectors.double(), dim=0, correction=0)
    deviation[deviation <= 1e-6 * mean.abs()] = torch.inf
    return ((vectors - mean) / deviation).float()


def fit_linear(
    vectors: torch.Tensor, targets: torch.Tensor, strength: float, start: torch.Tensor
) -> torch.Tensor:
    """A logistic regression for each label.

    Minimises for each label the mean binary cross-entropy over the images in which it is known,
    plus λ/2 ‖w‖², by L-BFGS of all labels at once.

    Args:
        vectors: (n, D).
        targets: (n, C) in {1, 0, -1 = unknown}.
        strength: λ.
        start: (C, D + 1), where the search begins.
    Returns:
        (C, D + 1): w and the bias of each label.
    """
    known = (targets >= 0).float()
    weights = known / known.sum(dim=0).clamp(min=1)
    targets = targets.clamp(min=0)
    classifiers = start.clone().requires_grad_()
    # Each step in the history has two copies of all classifiers; by default it has 100 steps.
    optimizer = torch.optim.LBFGS(
        [classifiers],
        max_iter=MAX_STEPS,
        tolerance_grad=1e-4,
        history_size=10,
        line_search_fn="strong_wolfe",
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        losses = F.binary_cross_entropy_with_logits(
            predict_linear(vectors, classifiers), targets, weights, reduction="sum"
        )
        loss = losses + strength / 2 * classifiers[:, :-1].square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return classifiers.detach()


def predict_linear(vectors: torch.Tensor, classifiers: torch.Tensor) -> torch.Tensor:
    """Logits (n, C) of vectors (n, D) by `fit_linear`'s classifiers (C, D + 1)."""
    return F.linear(vectors, classifiers[:, :-1], classifiers[:, -1])
