"""The contract of multi-label losses.

B and C are the numbers of images and labels.
"""

from __future__ import annotations

from typing import FrozenSet

import torch
from detectron2.config import CfgNode
from detectron2.utils.registry import Registry
from torch import nn

MULTI_LABEL_LOSS_REGISTRY = Registry("MULTI_LABEL_LOSS")
MULTI_LABEL_LOSS_REGISTRY.__doc__ = """
Registry for multi-label losses, see `MultiLabelLoss`. A registered class is called as `Loss(cfg)`.
"""

# Targets beside 1 (present) and 0 (absent): nobody has said whether the label is there, and it does
# not count, as the label head was told of it.
UNKNOWN, NOT_COUNTED = -1, -2


def build_multi_label_loss(cfg: CfgNode) -> nn.Module:
    """The loss that MODEL.LOSS.NAME asks for."""
    return MULTI_LABEL_LOSS_REGISTRY.get(cfg.MODEL.LOSS.NAME)(cfg)


class MultiLabelLoss(nn.Module):
    """A loss that asks the training for something. Called as

        loss(logits, targets, **context)

    with
        logits: (B, C) floats;
        targets: (B, C) in {1, 0, UNKNOWN, NOT_COUNTED};
        context: by keyword, of what it `needs`:
            images: (B,) int64 on the CPU, each image's place in the training set;
    it returns a scalar. A loss that asks for nothing may be any nn.Module.

    Attributes:
        needs: "images", "label_counts" or both. With the latter, `fill` is called before training.
        epoch: that of the training, from 0; set before each iteration.
        is_filled: whether `fill` was called.
    """

    needs: FrozenSet[str] = frozenset()
    epoch = 0
    is_filled = False

    def fill(self, num_images: int, present: torch.Tensor, absent: torch.Tensor) -> None:
        """Take what is known of the training set.

        It is computed anew in each training, so that it is not in checkpoints.

        Args:
            num_images: n.
            present, absent: (C,) floats, images where label i is known to be there, or not; with
                MODEL.LOSS.LABEL_COUNTS, the numbers that a model expects.
        """
        self.is_filled = True


def at_least_float32(logits: torch.Tensor) -> torch.Tensor:
    """Logits of fewer bits as float32, others as they are."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
