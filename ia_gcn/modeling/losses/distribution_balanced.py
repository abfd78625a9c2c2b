"""Distribution-balanced loss, for labels of which some are frequent and many are rare.

Wu et al., Distribution-Balanced Loss for Multi-Label Classification in Long-Tailed Datasets, ECCV
2020. B and C are the numbers of images and labels.
"""

from __future__ import annotations

from typing import Tuple

import torch
import torch.nn.functional as F
from detectron2.config import configurable

from .base import MULTI_LABEL_LOSS_REGISTRY, MultiLabelLoss, at_least_float32

# The authors' code has this factor where there is focusing.
FOCAL_FACTOR = 2.0


def rebalanced_weights(
    targets: torch.Tensor, present: torch.Tensor, smoothing: Tuple[float, float, float]
) -> torch.Tensor:
    """r̂ = α + σ(β (r - µ)), by how much sampling each label alone would be changed by the others.

    r = P_c / P_i: were images drawn so that each label comes as often as any other, an image would
    be drawn with P_c = 1 / n_c for one of its labels, and with P_i, the sum of these over its
    labels, for all of them. (The paper's factor 1 / C cancels.)

    Args:
        targets: (B, C); 1 for present labels.
        present: (C,) n_c, images of the training set with label c. 0 counts as 1.
        smoothing: α, β and µ.
    Returns:
        (B, C) floats; α + 1, the limit of large r, in the row of an image without a label.
    """
    alpha, beta, mu = smoothing
    rarity = 1 / present.clamp(min=1)
    drawn = ((targets == 1) * rarity).sum(1, keepdim=True)
    return alpha + (beta * (rarity / drawn - mu)).sigmoid()


def distribution_balanced_loss(
    logits: torch.Tensor,
    targets: torch.Tensor,
    present: torch.Tensor,
    absent: torch.Tensor,
    smoothing: Tuple[float, float, float] = (0.1, 10.0, 0.2),
    tolerance: Tuple[float, float] = (0.05, 2.0),
    gamma: float = 2.0,
) -> torch.Tensor:
    """Re-balanced weights, and a BCE that tolerates negatives; mean over labels and images.

    With z = logit + κ b̂ / λ and b̂ = log(n_c / n̄_c) the log-odds of the label in the training set, a
    label that is present costs -r̂ log σ(z), and one that is absent -r̂ / λ · log σ(-λ z): large
    negative logits, which most labels of most images ask for, are left alone. r̂ is that of
    `rebalanced_weights`. With γ > 0 these are multiplied by 2 (1 - q)^γ, where q is σ(z) or σ(-λ z)
    and has a gradient.

    As in the authors' code, from which the published figures are: b̂ is divided by λ, and focusing
    comes with a factor of 2.

    Args:
        logits: (B, C) floats.
        targets: (B, C) in {1, 0}; entries below 0 are ignored, and stay in the mean.
        present, absent: (C,) n_c and n̄_c, images of the training set where the label is known to be
            there, or not. 0 counts as 1.
        smoothing: α, β and µ.
        tolerance: κ and λ, λ above 0.
        gamma: γ, 0 or more.
    Returns:
        scalar; float32 where the logits have fewer bits, else of their dtype.
    """
    logits = at_least_float32(logits)
    kappa, scale = tolerance
    log_odds = (present.clamp(min=1) / absent.clamp(min=1)).log()
    z = logits + kappa / scale * log_odds
    is_present = targets == 1
    costs = -F.logsigmoid(torch.where(is_present, z, -scale * z))
    if gamma:
        # At 0 a power below 1 has no derivative.
        missed = (-torch.expm1(-costs)).clamp(min=torch.finfo(logits.dtype).tiny)
        costs = FOCAL_FACTOR * missed**gamma * costs
    weights = rebalanced_weights(targets, present, smoothing)
    weights = torch.where(is_present, weights, weights / scale)
    return (weights * costs).masked_fill(targets < 0, 0).mean()


@MULTI_LABEL_LOSS_REGISTRY.register()
class DistributionBalancedLoss(MultiLabelLoss):
    """See `distribution_balanced_loss`."""

    needs = frozenset({"label_counts"})

    @configurable
    def __init__(
        self,
        *,
        num_labels: int,
        smoothing: Tuple[float, float, float] = (0.1, 10.0, 0.2),
        tolerance: Tuple[float, float] = (0.05, 2.0),
        gamma: float = 2.0,
    ):
        """
        Args:
            num_labels: C.
            smoothing, tolerance, gamma: see `distribution_balanced_loss`.
        """
        super().__init__()
        self.smoothing = smoothing
        self.tolerance = tolerance
        self.gamma = gamma
        self.register_buffer("present", torch.zeros(num_labels), persistent=False)
        self.register_buffer("absent", torch.zeros(num_labels), persistent=False)

    @classmethod
    def from_config(cls, cfg):
        keys = cfg.MODEL.LOSS.DISTRIBUTION_BALANCED
        return {
            "num_labels": cfg.MODEL.LABEL_HEAD.NUM_LABELS,
            "smoothing": (keys.ALPHA, keys.BETA, keys.MU),
            "tolerance": (keys.KAPPA, keys.LAMBDA),
            "gamma": keys.GAMMA,
        }

    def fill(self, num_images: int, present: torch.Tensor, absent: torch.Tensor) -> None:
        super().fill(num_images, present, absent)
        self.present.copy_(present)
        self.absent.copy_(absent)

    def forward(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        counts = self.present, self.absent
        return distribution_balanced_loss(
            logits, targets, *counts, self.smoothing, self.tolerance, self.gamma
        )
