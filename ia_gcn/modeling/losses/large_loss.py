"""Unknown labels that, taken as absent, have a large loss are rejected or corrected.

Kim et al., Large Loss Matters in Weakly Supervised Multi-Label Classification, CVPR 2022. B, C and
n are the numbers of images in a batch, of labels, and of images in the training set.
"""

from __future__ import annotations

import math
from typing import FrozenSet, List

import numpy as np
import torch
from detectron2.config import configurable

from .base import MULTI_LABEL_LOSS_REGISTRY, NOT_COUNTED, UNKNOWN, MultiLabelLoss
from .cross_entropy import assume_negative_loss


def large_losses(logits: torch.Tensor, targets: torch.Tensor, share: float) -> torch.Tensor:
    """The unknown labels that cost most if they are taken as absent.

    As in the authors' code, their number is a share of all B·C entries, rounded up; there can't be
    more than unknown labels.

    Args:
        logits: (B, C) floats.
        targets: (B, C), see `MultiLabelLoss`.
        share: in [0, 1].
    Returns:
        (B, C) bool. With equal costs there may be more.
    """
    unknown = targets == UNKNOWN
    # Not one more because of how 0.1 or 0.002 is rounded.
    number = min(math.ceil(share * logits.numel() - 1e-6), int(unknown.sum()))
    if not number:
        return torch.zeros_like(unknown)
    # The loss of an absent label grows with its logit.
    least = logits[unknown].topk(number).values[-1]
    return unknown & (logits >= least)


class LabelCorrections:
    """Which labels of which images of the training set were corrected for good, a bit for each.

    Attributes:
        bits: (n, ⌈C / 8⌉) uint8, as of numpy's packbits.
        new: pairs (k, 2) of image and label, of this process, that are not in `bits` yet.
    """

    def __init__(self, num_images: int, num_labels: int):
        self.num_labels = num_labels
        self.bits = np.zeros((num_images, math.ceil(num_labels / 8)), np.uint8)
        self.new: List[np.ndarray] = []

    def of(self, images: torch.Tensor) -> torch.Tensor:
        """(B, C) bool of images (B,)."""
        rows = np.unpackbits(self.bits[images.numpy()], axis=1, count=self.num_labels)
        return torch.from_numpy(rows.astype(bool))

    def propose(self, images: torch.Tensor, corrected: torch.Tensor) -> None:
        """Note those of a batch, images (B,) and corrected (B, C) bool."""
        rows, labels = corrected.cpu().nonzero(as_tuple=True)
        self.new.append(torch.stack([images[rows], labels], dim=1).numpy())

    def take_new(self) -> np.ndarray:
        """The pairs (k, 2) that were noted, which are then no longer new."""
        taken = np.concatenate([np.empty((0, 2), np.int64), *self.new])
        self.new = []
        return taken

    def add(self, pairs: np.ndarray) -> None:
        """Correct the labels of pairs (k, 2) of image and label."""
        images, labels = pairs.T
        np.bitwise_or.at(self.bits, (images, labels // 8), (128 >> labels % 8).astype(np.uint8))


@MULTI_LABEL_LOSS_REGISTRY.register()
class LargeLoss(MultiLabelLoss):
    """BCE with unknown labels taken as absent, but for those with the largest losses.

    Mean over labels and images. In epoch t, from 1, the unknown labels with the largest losses, in
    number (t - 1) Δ_rel B·C, are
        LL-R: rejected: they have no loss;
        LL-Ct: corrected for this once: they have the loss of present labels;
    and with LL-Cp, Δ_rel B·C in every epoch but the first are corrected for good: from the next
    iteration on, they are present ones.

    They are the largest of the images that are passed together: those of one process, and of one
    part of its batch with SOLVER.ACCUMULATE_STEPS. A label that is known is never changed. Of a
    model with auxiliary logits, each of its outputs corrects labels.

    The code of the authors keeps, with LL-Cp, only losses larger than the least of those that it
    corrects; here, all that have the loss of present labels are kept.

    Attributes:
        corrections: `LabelCorrections` of LL-Cp; None without, and before `fill`.
    """

    @configurable
    def __init__(self, *, scheme: str, rate: float):
        """
        Args:
            scheme: LL-R, LL-Ct or LL-Cp.
            rate: Δ_rel, a share of all entries, in [0, 1].
        """
        super().__init__()
        self.scheme = scheme
        self.rate = rate
        self.corrections = None

    @classmethod
    def from_config(cls, cfg):
        keys = cfg.MODEL.LOSS.LARGE_LOSS
        return {"scheme": keys.SCHEME, "rate": keys.RATE}

    @property
    def needs(self) -> FrozenSet[str]:
        return frozenset({"images", "label_counts"} if self.scheme == "LL-Cp" else ())

    def fill(self, num_images: int, present: torch.Tensor, absent: torch.Tensor) -> None:
        super().fill(num_images, present, absent)
        self.corrections = LabelCorrections(num_images, len(present))

    def forward(
        self, logits: torch.Tensor, targets: torch.Tensor, images: torch.Tensor | None = None
    ) -> torch.Tensor:
        for_good = self.scheme == "LL-Cp"
        if for_good:
            corrected = self.corrections.of(images).to(targets.device)
            targets = targets.masked_fill(corrected & (targets == UNKNOWN), 1)
        steps = min(self.epoch, 1) if for_good else self.epoch
        large = large_losses(logits.detach(), targets, min(steps * self.rate, 1))
        if for_good:
            self.corrections.propose(images, large)
        settled = NOT_COUNTED if self.scheme == "LL-R" else 1
        return assume_negative_loss(logits, targets.masked_fill(large, settled))
