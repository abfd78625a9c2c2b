"""Global pooling: from a feature map (B, D, H, W) to x (B, D), the feature of the whole image."""

from __future__ import annotations

import torch
from torch import nn

from ..errors import InputError


def valid_cells(features: torch.Tensor, image_sizes, stride: int) -> torch.Tensor | None:
    """Which cells of a feature map show an image rather than the padding around it.

    Args:
        features: (B, D, H, W).
        image_sizes: B pairs (height, width) in pixels, before padding.
        stride: pixels per cell.
    Returns:
        (B, 1, H, W) bool, true for a cell at least part of which lies on the image; None where
        every cell does.
    """
    height, width = features.shape[-2:]
    # A cell that starts before the image's end shows some of it.
    last_row, last_column = (height - 1) * stride, (width - 1) * stride
    if all(last_row < h and last_column < w for h, w in image_sizes):
        return None
    sizes = torch.tensor([tuple(size) for size in image_sizes], device=features.device)
    rows = torch.arange(height, device=features.device) * stride < sizes[:, :1]
    columns = torch.arange(width, device=features.device) * stride < sizes[:, 1:]
    return (rows[:, :, None] & columns[:, None, :])[:, None]


class GlobalPooling(nn.Module):
    """Max, mean or generalised mean over the valid cells of a feature map.

    The generalised mean is (mean of v^p)^(1/p) of the values v, cut off at 1e-6 from below, with
    p a parameter of the network.
    """

    def __init__(self, name: str, gem_power: float = 3.0):
        """
        Args:
            name: max, mean or gem.
            gem_power: where p starts, for gem.
        """
        super().__init__()
        if name not in ("max", "mean", "gem"):
            raise InputError(f"MODEL.GLOBAL_POOLING.NAME must be max, mean or gem, not {name!r}")
        self.name = name
        if name == "gem":
            self.power = nn.Parameter(torch.tensor(float(gem_power)))

    def forward(self, features: torch.Tensor, valid: torch.Tensor | None = None) -> torch.Tensor:
        """
        Args:
            features: (B, D, H, W).
            valid: (B, 1, H, W) bool as `valid_cells` gives it, or None for all.
        Returns:
            (B, D).
        """
        if self.name == "max":
            return _masked_max(features, valid)
        if self.name == "mean":
            return _masked_mean(features, valid)
        features = features.clamp(min=1e-6)
        # Relative to the largest, whose power is 1: none overflows, and not all can vanish.
        peak = _masked_max(features.detach(), valid)
        powers = (features / peak[:, :, None, None]) ** self.power
        return peak * _masked_mean(powers, valid) ** (1 / self.power)

    def extra_repr(self) -> str:
        return self.name


def _masked_max(features: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    if valid is not None:
        features = features.masked_fill(~valid, -torch.inf)
    return features.amax(dim=(2, 3))


def _masked_mean(features: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    if valid is None:
        return features.mean(dim=(2, 3))
    return features.masked_fill(~valid, 0).sum(dim=(2, 3)) / valid.sum(dim=(2, 3))
