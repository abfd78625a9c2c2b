"""One linear classifier per label."""

from __future__ import annotations

from typing import Dict

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from torch import nn

from .base import LABEL_HEAD_REGISTRY, PooledHead


@LABEL_HEAD_REGISTRY.register()
class LinearHead(PooledHead):
    """A linear layer on x, with bias: the "ResNet-101" row of the papers' tables.

    With a cosine scale s, it is s · cos θ of the angle θ between x and each label's classifier,
    without bias, as an angular loss takes it.
    """

    @configurable
    def __init__(self, *, feature_dim: int, num_labels: int, cosine_scale: float = 0.0, **kwargs):
        """
        Args:
            feature_dim, num_labels: D and C.
            cosine_scale: s; 0: a linear layer.
            kwargs: those of PooledHead.
        """
        super().__init__(**kwargs)
        self.cosine_scale = cosine_scale
        self.classifier = nn.Linear(feature_dim, num_labels, bias=not cosine_scale)

    @classmethod
    def from_config(cls, cfg, input_shape):
        return {
            **super().from_config(cfg, input_shape),
            "cosine_scale": cfg.MODEL.LINEAR_HEAD.COSINE_SCALE,
        }

    def forward(self, features, masks) -> Dict[str, torch.Tensor]:
        x = self.image_features(features, masks)
        if not self.cosine_scale:
            return {"logits": self.classifier(x)}
        cosines = F.linear(F.normalize(x), F.normalize(self.classifier.weight))
        return {"logits": self.cosine_scale * cosines}
