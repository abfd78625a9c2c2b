"""One linear classifier per label."""

from __future__ import annotations

from typing import Dict

import torch
from detectron2.config import configurable
from torch import nn

from .base import LABEL_HEAD_REGISTRY, PooledHead


@LABEL_HEAD_REGISTRY.register()
class LinearHead(PooledHead):
    """A linear layer on x, with bias: the "ResNet-101" row of the papers' tables."""

    @configurable
    def __init__(self, *, feature_dim: int, num_labels: int, **kwargs):
        """
        Args:
            feature_dim, num_labels: D and C.
            kwargs: those of PooledHead.
        """
        super().__init__(**kwargs)
        self.classifier = nn.Linear(feature_dim, num_labels)

    def forward(self, features, masks) -> Dict[str, torch.Tensor]:
        return {"logits": self.classifier(self.image_features(features, masks))}
