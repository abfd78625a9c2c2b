"""Residual attention over the feature map, for each label."""

from __future__ import annotations

from typing import Dict, Sequence

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from torch import nn

from ...errors import InputError
from ..pooling import masked_mean, masked_softmax
from .base import LABEL_HEAD_REGISTRY, LabelHead, one_in_feature

# The published temperature that stands for a maximum.
MAX_TEMPERATURE = 99


@LABEL_HEAD_REGISTRY.register()
class CSRAHead(LabelHead):
    """Class-specific residual attention (Zhu and Wu, ICCV 2021).

    A head scores every cell f of the feature map for every label c with a classifier of length 1,
    s = w_c f / ‖w_c‖. The label's logit is the mean of s over the image, plus λ times its mean
    weighted by softmax(T s): the higher the temperature T, the more the best cell counts, up to the
    maximum. The logits of H heads, each with its own T, are added up.
    """

    has_attention = True

    @configurable
    def __init__(
        self,
        *,
        in_feature: str,
        feature_dim: int,
        num_labels: int,
        temperatures: Sequence[float],
        attention_weight: float,
    ):
        """
        Args:
            in_feature: name of the feature map.
            feature_dim, num_labels: D and C.
            temperatures: T of each head, above 0; MAX_TEMPERATURE and above stand for the maximum.
            attention_weight: λ.
        Raises:
            InputError: there is no temperature, or one is not above 0.
        """
        super().__init__()
        if not temperatures or not all(temperature > 0 for temperature in temperatures):
            raise InputError(
                f"MODEL.CSRA.TEMPERATURES must be numbers above 0, not {list(temperatures)}"
            )
        self.in_features = (in_feature,)
        self.temperatures = list(temperatures)
        self.attention_weight = attention_weight
        self.classifiers = nn.ModuleList(
            nn.Conv2d(feature_dim, num_labels, 1, bias=False) for _ in temperatures
        )

    @classmethod
    def from_config(cls, cfg, input_shape):
        in_feature = one_in_feature(cfg, input_shape)
        return {
            "in_feature": in_feature,
            "feature_dim": input_shape[in_feature].channels,
            "num_labels": cfg.MODEL.LABEL_HEAD.NUM_LABELS,
            "temperatures": cfg.MODEL.CSRA.TEMPERATURES,
            "attention_weight": cfg.MODEL.CSRA.ATTENTION_WEIGHT,
        }

    def forward(self, features, masks) -> Dict[str, torch.Tensor]:
        (name,) = self.in_features
        logits, attention = 0, 0
        for classifier, temperature in zip(self.classifiers, self.temperatures):
            scores = F.conv2d(features[name], F.normalize(classifier.weight, dim=1))
            looked_at = attend(scores, temperature, masks[name])
            attended = (looked_at * scores).sum(dim=(2, 3))
            logits = logits + masked_mean(scores, masks[name]) + self.attention_weight * attended
            attention = attention + looked_at / len(self.temperatures)
        return {"logits": logits, "attention": attention}


def attend(scores: torch.Tensor, temperature: float, mask: torch.Tensor | None) -> torch.Tensor:
    """Weights of the cells, which sum to 1: softmax(T s), or all of it on the highest s.

    Args:
        scores: s, (B, C, H, W).
        temperature: T.
        mask: (B, 1, H, W) bool, or None.
    Returns:
        (B, C, H, W), 0 where the mask is false.
    """
    if temperature < MAX_TEMPERATURE:
        return masked_softmax(temperature * scores, mask)
    best = scores if mask is None else scores.masked_fill(~mask, -torch.inf)
    best = best.flatten(2).argmax(dim=2, keepdim=True)
    return torch.zeros_like(scores).flatten(2).scatter(2, best, 1).view_as(scores)
