"""Label embeddings computed from images: means of a trained model's outputs for each label."""

from __future__ import annotations

from typing import Dict, Iterable, List, Tuple

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from ..errors import InputError


def probabilities(model: nn.Module, images: List[Dict]) -> torch.Tensor:
    """(B, C)."""
    return torch.stack([output["scores"] for output in model(images)])


def features(model: nn.Module, images: List[Dict]) -> torch.Tensor:
    """(B, D): the label head's feature of each image."""
    if model.label_head is None:
        raise InputError(
            "MODEL.FUSION.GLOBAL_WEIGHT is 0, so there is no label head with a feature of the image"
        )
    found, _ = model.extract_features(images)
    return model.label_head.image_features(found.maps, found.masks)


KINDS = {"scores": probabilities, "features": features}


def embed_labels(
    model: nn.Module, batches: Iterable[List[Dict]], kind: str
) -> Tuple[np.ndarray, np.ndarray]:
    """A vector for each label: the mean of the model's outputs over the images that have it.

    Args:
        model: in evaluation mode.
        batches: lists of samples of `MultiLabelDatasetMapper`, with `file_name` and `labels`. At
            least one of the images has a label.
        kind: scores, the probabilities of all labels (d = C); or features, the label head's
            feature of the whole image (d = D).
    Returns:
        (C, d) float32, and how many images have each label, (C,). A label that no image has gets
        the mean of the other labels' vectors.
    Raises:
        InputError: an output is not finite.
    """
    sums, counts = sum_by_label(model, batches, kind)
    return label_means(sums, counts), counts


@torch.no_grad()
def sum_by_label(
    model: nn.Module, batches: Iterable[List[Dict]], kind: str
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
        outputs = KINDS[kind](model, images).cpu().double()
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
