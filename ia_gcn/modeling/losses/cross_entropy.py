"""Binary cross-entropy: of known labels alone, of unknown ones taken as absent, and with a prior on
the number of labels."""

from __future__ import annotations

from typing import FrozenSet

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from torch import nn

from ...errors import InputError
from .base import MULTI_LABEL_LOSS_REGISTRY, UNKNOWN, MultiLabelLoss, at_least_float32


def multi_label_bce(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy of each label, mean over labels and images (IA-GCN Eq. 13).

    An ignored entry contributes 0 and stays in the mean's C, so that an image weighs the same
    however many of its labels are ignored, and the gradient of a batch is the mean of its images'.

    Args:
        logits: (B, C) floats.
        targets: (B, C) in {1, 0}; entries below 0 are ignored.
    Returns:
        scalar of the logits' dtype.
    """
    known = (targets >= 0).to(logits.dtype)
    targets = targets.clamp(min=0).to(logits.dtype)
    return F.binary_cross_entropy_with_logits(logits, targets, weight=known)


@MULTI_LABEL_LOSS_REGISTRY.register()
class MultiLabelBCE(nn.Module):
    """See `multi_label_bce`."""

    @configurable
    def __init__(self):
        super().__init__()

    @classmethod
    def from_config(cls, cfg):
        return {}

    def forward(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return multi_label_bce(logits, targets)


def assume_negative_loss(
    logits: torch.Tensor,
    targets: torch.Tensor,
    unknown_weight: float = 1.0,
    smoothing: float = 0.0,
) -> torch.Tensor:
    """BCE with unknown labels taken as absent ones; the mean over labels and images.

    AN, WAN and AN-LS of Cole et al., Multi-Label Learning from Single Positive Labels, CVPR 2021.
    Labels that are known to be absent, of which that paper has none, weigh 1.

    Args:
        logits: (B, C) floats.
        targets: (B, C) in {1, 0, UNKNOWN}; lower ones are ignored, and stay in the mean.
        unknown_weight: γ, of unknown labels. 1 is AN, 1 / (C - 1) WAN.
        smoothing: how likely a target is wrong: the loss is that of targets 1 - smoothing and
            smoothing. AN-LS; the paper writes ε/2 for it, and the authors' code has 0.1.
    Returns:
        scalar; float32 where the logits have fewer bits, else of their dtype.
    """
    logits = at_least_float32(logits)
    present = (targets == 1).to(logits.dtype)
    weights = torch.ones_like(logits).masked_fill(targets == UNKNOWN, unknown_weight)
    weights = weights.masked_fill(targets < UNKNOWN, 0)
    smoothed = present + smoothing * (1 - 2 * present)
    return F.binary_cross_entropy_with_logits(logits, smoothed, weight=weights)


@MULTI_LABEL_LOSS_REGISTRY.register()
class AssumeNegativeLoss(nn.Module):
    """See `assume_negative_loss`."""

    @configurable
    def __init__(self, *, unknown_weight: float = 1.0, smoothing: float = 0.0):
        """
        Args:
            unknown_weight: γ; 0: 1 / (C - 1).
            smoothing: see `assume_negative_loss`.
        """
        super().__init__()
        self.unknown_weight = unknown_weight
        self.smoothing = smoothing

    @classmethod
    def from_config(cls, cfg):
        keys = cfg.MODEL.LOSS.ASSUME_NEGATIVE
        return {"unknown_weight": keys.UNKNOWN_WEIGHT, "smoothing": keys.SMOOTHING}

    def forward(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        weight = self.unknown_weight or 1 / max(logits.shape[1] - 1, 1)
        return assume_negative_loss(logits, targets, weight, self.smoothing)


def expected_positive_loss(
    logits: torch.Tensor, targets: torch.Tensor, expected: float
) -> torch.Tensor:
    """EPR: BCE of the known labels, and a penalty on how many labels an image is said to have.

    Cole et al. (see `assume_negative_loss`), expected positive regularisation: with k̂ the sum of an
    image's probabilities, mean over images, the penalty is ((k̂ - k) / C)². The paper knows labels
    that are present; those that are known to be absent have their BCE as well. Labels that the head
    was told are not among those that it finds: k̂ is without them, and k is their share less.

    k̂ is of the images that are passed together: those of one process, and of one part of its batch
    with SOLVER.ACCUMULATE_STEPS. The fewer these are, the more the penalty asks for k labels in
    each image, not just on average.

    Args:
        logits: (B, C) floats.
        targets: (B, C) in {1, 0, UNKNOWN}; unknown ones have no BCE, and lower ones do not count.
        expected: k, labels per image, 0 or more.
    Returns:
        scalar; float32 where the logits have fewer bits, else of their dtype.
    """
    logits = at_least_float32(logits)
    excess = logits.sigmoid() - expected / logits.shape[1]
    excess = excess.masked_fill(targets < UNKNOWN, 0).mean()
    return multi_label_bce(logits, targets) + excess**2


@MULTI_LABEL_LOSS_REGISTRY.register()
class ExpectedPositiveLoss(MultiLabelLoss):
    """See `expected_positive_loss`.

    Attributes:
        expected: k; 0: not known yet.
    """

    @configurable
    def __init__(self, *, expected: float):
        """
        Args:
            expected: k; 0: taken from the label counts.
        """
        super().__init__()
        self.expected = expected

    @classmethod
    def from_config(cls, cfg):
        return {"expected": cfg.MODEL.LOSS.EXPECTED_POSITIVE.NUM_LABELS}

    @property
    def needs(self) -> FrozenSet[str]:
        return frozenset() if self.expected else frozenset({"label_counts"})

    def fill(self, num_images: int, present: torch.Tensor, absent: torch.Tensor) -> None:
        """Add up how often each label is there, where it is known.

        Raises:
            InputError: where no label is known to be absent, that is no estimate.
        """
        super().fill(num_images, present, absent)
        if not absent.any():
            raise InputError(
                "MODEL.LOSS.EXPECTED_POSITIVE.NUM_LABELS must be set: the training set has no "
                "label that is known to be absent, from which to estimate it"
            )
        self.expected = float((present / (present + absent).clamp(min=1)).sum())

    def forward(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return expected_positive_loss(logits, targets, self.expected)
