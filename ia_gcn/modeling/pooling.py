"""Pooling of feature maps (B, D, H, W): to x (B, D), the feature of the whole image; of regions."""

from __future__ import annotations

from typing import List

import torch
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes
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
            return masked_max(features, valid)
        if self.name == "mean":
            return masked_mean(features, valid)
        features = features.clamp(min=1e-6)
        # Relative to the largest, whose power is 1: none overflows, and not all can vanish.
        peak = masked_max(features.detach(), valid)
        powers = (features / peak[:, :, None, None]) ** self.power
        return peak * masked_mean(powers, valid) ** (1 / self.power)

    def extra_repr(self) -> str:
        return self.name


def masked_max(features: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    """Maximum over the valid cells: (B, D, H, W) and (B, 1, H, W) bool or None to (B, D)."""
    if valid is not None:
        features = features.masked_fill(~valid, -torch.inf)
    return features.amax(dim=(2, 3))


def masked_mean(features: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    """Mean over the valid cells: (B, D, H, W) and (B, 1, H, W) bool or None to (B, D)."""
    if valid is None:
        return features.mean(dim=(2, 3))
    return features.masked_fill(~valid, 0).sum(dim=(2, 3)) / valid.sum(dim=(2, 3))


def masked_softmax(scores: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    """Softmax over the valid cells of each channel, (B, C, H, W); 0 where `valid` is false.

    Args:
        scores: (B, C, H, W).
        valid: (B, 1, H, W) bool, with a true cell in each image; or None for all.
    """
    if valid is not None:
        scores = scores.masked_fill(~valid, -torch.inf)
    return scores.flatten(2).softmax(dim=2).view_as(scores)


def masked_top_mean(scores: torch.Tensor, share: float, valid: torch.Tensor | None) -> torch.Tensor:
    """Mean of the highest of each channel's valid cells, (B, C).

    Args:
        scores: (B, C, H, W).
        share: how many of an image's valid cells that is, rounded to a whole number, at least one.
        valid: (B, 1, H, W) bool, with a true cell in each image; or None for all.
    """
    most = max(1, round(share * scores.shape[2] * scores.shape[3]))
    if valid is None:
        return scores.flatten(2).topk(most).values.mean(dim=2)
    number = (share * valid.sum(dim=(2, 3))).round().clamp(min=1)[:, :, None]
    highest = scores.masked_fill(~valid, -torch.inf).flatten(2).topk(most).values
    counted = torch.arange(most, device=scores.device) < number
    return highest.masked_fill(~counted, 0).sum(dim=2) / number[:, :, 0]


class MeanROIPooler(ROIPooler):
    """detectron2's ROIPooler where only the mean over a region's cells is asked for.

    ROIAlign's samples stand on a grid, and each lies between cells of the feature map: their mean
    is the map's sum with weights w_y w_xᵀ. For all regions of an image that is a matrix product,
    and so is its gradient, instead of a loop over every sample in every channel.

    It takes one feature map, ROIAlignV2, and a sampling_ratio that is not 0.
    """

    def forward(self, x: List[torch.Tensor], box_lists: List[Boxes]) -> torch.Tensor:
        """
        Args:
            x: of one feature map, (B, D, H, W).
            box_lists: the M boxes of B images, in pixels.
        Returns:
            (M, D, 1, 1), of the feature map's dtype; without a gradient for the boxes.
        """
        (features,), (align,) = x, self.level_poolers
        dtype = torch.promote_types(features.dtype, torch.float32)
        counts = torch.tensor([len(boxes) for boxes in box_lists], device=features.device)
        valid = torch.arange(max(map(len, box_lists)), device=features.device) < counts[:, None]
        with torch.no_grad():
            # From pixels to cells, whose centres are whole numbers.
            boxes = torch.cat([boxes.tensor for boxes in box_lists]).to(dtype)
            x0, y0, x1, y1 = (boxes * align.spatial_scale - 0.5).unbind(dim=1)
            samples = [align.sampling_ratio * size for size in self.output_size]
            rows = _mean_weights(y0, y1, samples[0], features.shape[2])
            columns = _mean_weights(x0, x1, samples[1], features.shape[3])
            cells = (rows[:, :, None] * columns[:, None, :]).flatten(1)
            weights = cells.new_zeros(*valid.shape, cells.shape[1]).index_put((valid,), cells)
        # As ROIAlign, in full precision.
        with torch.autocast(features.device.type, enabled=False):
            means = weights @ features.to(dtype).flatten(2).mT
        return means[valid].to(features.dtype)[:, :, None, None]


def _mean_weights(start: torch.Tensor, end: torch.Tensor, samples: int, size: int) -> torch.Tensor:
    """What each of a row of cells counts in the mean of samples between `start` and `end`.

    Args:
        start, end: (M,), in cells.
        samples: how many there are, at equal distances.
        size: number of cells. A sample up to half a cell beyond the outer ones' borders is taken at
            the outer cell's centre, one farther out is 0.
    Returns:
        (M, size).
    """
    steps = (torch.arange(samples, dtype=start.dtype, device=start.device) + 0.5) / samples
    places = start[:, None] + steps * (end - start)[:, None]
    inside = (places >= -1) & (places <= size)
    distances = places.clamp(0, size - 1)[:, :, None] - torch.arange(size, device=start.device)
    return ((1 - distances.abs()).clamp(min=0) * inside[:, :, None]).mean(dim=1)
