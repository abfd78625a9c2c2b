"""Losses for labels that are missing, with a focal loss with a margin for present labels.

Hill and SPLC of Zhang et al., Simple and Robust Loss Design for Multi-Label Learning with Missing
Labels, 2021 (arXiv:2112.07368). Sums over an image's labels, as published, and means over images.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from torch import nn

from .base import MULTI_LABEL_LOSS_REGISTRY, UNKNOWN, MultiLabelLoss, at_least_float32


def hill_loss(
    logits: torch.Tensor,
    targets: torch.Tensor,
    hill: float = 1.5,
    margin: float = 1.0,
    gamma: float = 2.0,
) -> torch.Tensor:
    """The Hill loss: the more likely an absent label, the less it is believed.

    With p = σ(logit) and p_m = σ(logit - m), a label that is present costs -(1 - p_m)^γ log p_m,
    and any other one (λ - p) p², whose slope in p falls again above λ / 3: there it may well be a
    label that is missing. Labels that are known to be absent are treated like unknown ones, as the
    paper makes no difference.

    Args:
        logits: (B, C) floats.
        targets: (B, C) in {1, 0, UNKNOWN}; lower ones are ignored.
        hill: λ, above 0.
        margin: m.
        gamma: γ, 0 or more.
    Returns:
        scalar; float32 where the logits have fewer bits, else of their dtype.
    """
    logits = at_least_float32(logits)
    p = logits.sigmoid()
    costs = torch.where(targets == 1, focal_loss(logits - margin, gamma), (hill - p) * p**2)
    return costs.masked_fill(targets < UNKNOWN, 0).sum(1).mean()


def splc_loss(
    logits: torch.Tensor,
    targets: torch.Tensor,
    threshold: float = 0.6,
    margin: float = 1.0,
    gamma: float = 2.0,
) -> torch.Tensor:
    """SPLC: unknown labels are absent, but present where the model says so itself.

    With p = σ(logit - m) for labels that are present and σ(logit) for others, a label that is
    present costs -(1 - p)^γ log p, and so does an unknown one with p > τ; any other one costs
    -p^γ log(1 - p). The factors have a gradient.

    As in the authors' code, from which the published figures are: a corrected label has no margin,
    for which the paper's formula has that of a present label. Labels that are known to be absent,
    of which the paper has none, are not corrected.

    Args:
        logits: (B, C) floats.
        targets: (B, C) in {1, 0, UNKNOWN}; lower ones are ignored.
        threshold: τ, in [0, 1]; 1: nothing is corrected.
        margin: m.
        gamma: γ, 0 or more.
    Returns:
        scalar; float32 where the logits have fewer bits, else of their dtype.
    """
    logits = at_least_float32(logits)
    present = targets == 1
    shifted = torch.where(present, logits - margin, logits)
    missing = (targets == UNKNOWN) & (logits.sigmoid() > threshold)
    costs = focal_loss(torch.where(present | missing, shifted, -shifted), gamma)
    return costs.masked_fill(targets < UNKNOWN, 0).sum(1).mean()


def focal_loss(logits: torch.Tensor, gamma: float) -> torch.Tensor:
    """-(1 - p)^γ log p with p = σ(logit), of each entry; the factor has a gradient."""
    # At 0 a power below 1 has no derivative.
    missed = (-logits).sigmoid().clamp(min=torch.finfo(logits.dtype).tiny)
    return -(missed**gamma) * F.logsigmoid(logits)


@MULTI_LABEL_LOSS_REGISTRY.register()
class HillLoss(nn.Module):
    """See `hill_loss`."""

    @configurable
    def __init__(self, *, hill: float = 1.5, margin: float = 1.0, gamma: float = 2.0):
        super().__init__()
        self.hill = hill
        self.margin = margin
        self.gamma = gamma

    @classmethod
    def from_config(cls, cfg):
        keys = cfg.MODEL.LOSS.HILL
        return {"hill": keys.LAMBDA, "margin": keys.MARGIN, "gamma": keys.GAMMA}

    def forward(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return hill_loss(logits, targets, self.hill, self.margin, self.gamma)


@MULTI_LABEL_LOSS_REGISTRY.register()
class SPLCLoss(MultiLabelLoss):
    """See `splc_loss`; nothing is corrected in the first epochs."""

    @configurable
    def __init__(
        self,
        *,
        threshold: float = 0.6,
        start_epoch: int = 1,
        margin: float = 1.0,
        gamma: float = 2.0,
    ):
        """
        Args:
            start_epoch: the first epoch, from 0, in which labels are corrected.
        """
        super().__init__()
        self.threshold = threshold
        self.start_epoch = start_epoch
        self.margin = margin
        self.gamma = gamma

    @classmethod
    def from_config(cls, cfg):
        keys = cfg.MODEL.LOSS.SPLC
        return {
            "threshold": keys.THRESHOLD,
            "start_epoch": keys.START_EPOCH,
            "margin": keys.MARGIN,
            "gamma": keys.GAMMA,
        }

    def forward(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        threshold = self.threshold if self.epoch >= self.start_epoch else 1.0
        return splc_loss(logits, targets, threshold, self.margin, self.gamma)
