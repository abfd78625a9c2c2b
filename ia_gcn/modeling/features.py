"""The features of a batch of images, which the heads of a recogniser get."""

from __future__ import annotations

from typing import Dict, List, NamedTuple

import torch
from detectron2.structures import Instances


class ImageFeatures(NamedTuple):
    """The features of B images, made by a backbone and, where there are regions, pooled from it."""

    maps: Dict[str, torch.Tensor]
    """Feature maps by name, (B, D, H, W): those that the label head reads."""
    masks: Dict[str, torch.Tensor | None]
    """By the same names, (B, 1, H, W) bool: the cells that show an image rather than the padding
    around it; None where every cell does."""
    label_states: torch.Tensor | None = None
    """(B, C) in {1, 0, -1 = unknown}: labels that are known of the images; None where none is."""
    regions: torch.Tensor | None = None
    """X, (B, N, K): features of the regions, best first by objectness; 0 where there is none."""
    valid: torch.Tensor | None = None
    """(B, N) bool, true for a region that is there."""
    proposals: List[Instances] | None = None
    """The regions' boxes, for each image."""
