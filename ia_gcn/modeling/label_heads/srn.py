"""Spatial regularisation: convolutions over attention maps of all labels."""

from __future__ import annotations

from typing import Dict

import torch
from detectron2.config import configurable
from torch import nn

from ...errors import InputError
from ..pooling import masked_mean, masked_softmax
from .base import LABEL_HEAD_REGISTRY, LabelHead, head_in_features

# Filters of the last convolution on each of its input channels.
FILTERS_PER_CHANNEL = 4


@LABEL_HEAD_REGISTRY.register()
class SRNHead(LabelHead):
    """Spatial regularization network (Zhu, Li, Ouyang, Yu and Wang, CVPR 2017).

    On a finer map X, each label has attention A, of sum 1, and confidence S in each cell. Where the
    labels are, and where they are next to each other, is in U = σ(S) ⊙ A: convolutions over it, the
    last one as large as the map, score the labels anew. With the scores of the pooled deepest map:

        ŷ = ½ ŷ_global + ½ ŷ_regularization

    The published training has four stages, in which these two and ŷ_attention = Σ A ⊙ S are trained
    one after the other; here they are auxiliary logits, trained together with ŷ.

    What the paper leaves open, as its networks are not at hand: there is a ReLU after each of the
    convolutions over U, and no norm.
    """

    has_attention = True

    @configurable
    def __init__(
        self,
        *,
        attention_feature: str,
        global_feature: str,
        attention_dim: int,
        feature_dim: int,
        num_labels: int,
        hidden_dim: int,
        grid_size: int,
    ):
        """
        Args:
            attention_feature, global_feature: names of X and of the deepest feature map.
            attention_dim, feature_dim: their channels.
            num_labels: C.
            hidden_dim: channels of the convolutions but the last, which has four times as many.
            grid_size: G, height and width of U as the last convolution sees it.
        """
        super().__init__()
        self.in_features = (attention_feature, global_feature)
        self.grid_size = grid_size
        self.classifier = nn.Linear(feature_dim, num_labels)
        self.reduction = nn.Conv2d(attention_dim, hidden_dim, 1)
        self.attention = nn.Sequential(
            nn.Conv2d(hidden_dim, hidden_dim, 3, padding=1),
            nn.ReLU(),
            # Without a bias, which the softmax would cancel.
            nn.Conv2d(hidden_dim, num_labels, 1, bias=False),
        )
        self.confidence = nn.Conv2d(attention_dim, num_labels, 1)
        filters = FILTERS_PER_CHANNEL * hidden_dim
        self.regularization = nn.Sequential(
            nn.Conv2d(num_labels, hidden_dim, 1),
            nn.ReLU(),
            nn.Conv2d(hidden_dim, hidden_dim, 1),
            nn.ReLU(),
            nn.Conv2d(hidden_dim, filters, grid_size, groups=hidden_dim),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(filters, num_labels),
        )

    @classmethod
    def from_config(cls, cfg, input_shape):
        names = head_in_features(cfg, input_shape)
        if len(names) != 2:
            raise InputError(
                "MODEL.LABEL_HEAD.IN_FEATURES: SRNHead reads two feature maps, the finer one first "
                f"(res4 and res5 in the paper), not {', '.join(names)}"
            )
        attention_feature, global_feature = names
        return {
            "attention_feature": attention_feature,
            "global_feature": global_feature,
            "attention_dim": input_shape[attention_feature].channels,
            "feature_dim": input_shape[global_feature].channels,
            "num_labels": cfg.MODEL.LABEL_HEAD.NUM_LABELS,
            "hidden_dim": cfg.MODEL.SRN.HIDDEN_DIM,
            "grid_size": cfg.MODEL.SRN.GRID_SIZE,
        }

    def forward(self, features, masks) -> Dict[str, torch.Tensor]:
        finer, deepest = self.in_features
        of_image = self.classifier(masked_mean(features[deepest], masks[deepest]))

        x, mask = features[finer], masks[finer]
        hidden = self.reduction(x).relu()
        if mask is not None:
            # The 3×3 cells around a cell may reach into the padding.
            hidden = hidden.masked_fill(~mask, 0)
        attention = masked_softmax(self.attention(hidden), mask)
        confidence = self.confidence(x)
        of_attention = (attention * confidence).sum(dim=(2, 3))
        grid = to_grid(confidence.sigmoid() * attention, mask, self.grid_size)
        regularized = self.regularization(grid)
        return {
            "logits": (of_image + regularized) / 2,
            "aux_logits": {
                "global": of_image,
                "attention": of_attention,
                "regularization": regularized,
            },
            "attention": attention,
        }


def to_grid(mass: torch.Tensor, mask: torch.Tensor | None, size: int) -> torch.Tensor:
    """A map of any size as one of G×G cells, each of which gets the mass that lies in it.

    The cells of the image are spread evenly over the grid, and a cell that lies in several of the
    grid's is divided among them. So the sum stays what it is, and an image of G×G cells as well.

    Args:
        mass: (B, C, H, W).
        mask: (B, 1, H, W) bool, a rectangle in each image; None for all.
        size: G.
    Returns:
        (B, C, G, G).
    """
    if mask is None:
        mask = mass.new_ones((1, 1, *mass.shape[2:]), dtype=torch.bool)
    rows = overlaps(mask.any(dim=3)[:, 0], size, mass.dtype)
    columns = overlaps(mask.any(dim=2)[:, 0], size, mass.dtype)
    return rows[:, None] @ mass @ columns.mT[:, None]


def overlaps(shown: torch.Tensor, size: int, dtype: torch.dtype) -> torch.Tensor:
    """Which share of each row lies in each of G rows that together are as high as the image.

    Args:
        shown: (B, H) bool, the image's rows, which are the first ones.
    Returns:
        (B, G, H) of the dtype, 0 for rows that are not shown.
    """
    # In at least float32: a bfloat16 counts to 256.
    precise = torch.promote_types(dtype, torch.float32)
    count = shown.sum(dim=1).to(precise)[:, None, None]
    starts = torch.arange(size, dtype=precise, device=shown.device)[:, None] * count / size
    rows = torch.arange(shown.shape[1], dtype=precise, device=shown.device)
    ends = torch.minimum(starts + count / size, rows + 1)
    shares = (ends - torch.maximum(starts, rows)).clamp(min=0)
    return (shares * shown[:, None]).to(dtype)
