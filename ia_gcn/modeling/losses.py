"""Multi-label losses: logits (B, C) and targets (B, C) to a scalar.

A target is 1 (present), 0 (absent) or -1 (ignored: no gradient).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.utils.registry import Registry
from torch import nn

MULTI_LABEL_LOSS_REGISTRY = Registry("MULTI_LABEL_LOSS")
MULTI_LABEL_LOSS_REGISTRY.__doc__ = """
Registry for multi-label losses. A registered class is called as `Loss(cfg)`.
"""


def build_multi_label_loss(cfg: CfgNode) -> nn.Module:
    """The loss that MODEL.LOSS.NAME asks for."""
    return MULTI_LABEL_LOSS_REGISTRY.get(cfg.MODEL.LOSS.NAME)(cfg)


def multi_label_bce(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy of each label, mean over labels and images (IA-GCN Eq. 13).

    An ignored entry contributes 0 and stays in the mean's C, so that an image weighs the same
    however many of its labels are ignored, and the gradient of a batch is the mean of its images'.

    Args:
        logits: (B, C) floats.
        targets: (B, C) in {1, 0, -1}.
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
