"""Feature maps of several sizes that strengthen what they have in common.

B and K are the numbers of images and channels. A mask (B, 1, H, W) bool says which cells show the
image, a rectangle from the upper left; None: all of them.
"""

from __future__ import annotations

from typing import List, Sequence, Tuple

import torch
import torch.nn.functional as F


def cross_scale_attention(
    maps: Sequence[torch.Tensor], masks: Sequence[torch.Tensor | None]
) -> List[torch.Tensor]:
    """x ← x + Π x of all maps, at the size of the first map (TDRG).

    Maps are resized to the first one's size and back again, bilinear with corners on corners.

    Args:
        maps: (B, K, H, W) each, the largest first.
        masks: of each of them.
    Returns:
        maps of the same sizes; 0 where a mask is false.
    """
    large = [resize(x, mask, maps[0], masks[0]) for x, mask in zip(maps, masks)]
    common = torch.stack(large).prod(dim=0)
    return [resize(x + common, masks[0], own, mask) for x, own, mask in zip(large, maps, masks)]


def resize(
    features: torch.Tensor,
    mask: torch.Tensor | None,
    like: torch.Tensor,
    like_mask: torch.Tensor | None,
) -> torch.Tensor:
    """Bilinear interpolation of each image to its size in another map, corners on corners.

    Args:
        features: (B, K, H, W).
        mask: of the features.
        like, like_mask: the other map, of size (H', W'), and its mask.
    Returns:
        (B, K, H', W').
    """
    if mask is None and like_mask is None:
        return F.interpolate(features, like.shape[2:], mode="bilinear", align_corners=True)
    rows, columns = (
        _interpolation(*_lengths(features, mask, dim), *_lengths(like, like_mask, dim))
        for dim in (2, 3)
    )
    if mask is not None:
        features = features.masked_fill(~mask, 0)
    rows, columns = rows.to(features.dtype), columns.to(features.dtype)
    return torch.einsum("byh,bkhw,bxw->bkyx", rows, features, columns)


def _lengths(
    features: torch.Tensor, mask: torch.Tensor | None, dim: int
) -> Tuple[torch.Tensor, int]:
    """How many cells the images have in a dimension of a map, (B,), and how many the map has."""
    if mask is None:
        mask = features.new_ones((len(features), 1, *features.shape[2:]), dtype=torch.bool)
    return mask.any(dim=5 - dim).sum(dim=(1, 2)), features.shape[dim]


def _interpolation(
    lengths: torch.Tensor, size: int, new_lengths: torch.Tensor, new_size: int
) -> torch.Tensor:
    """(B, new_size, size): what each cell counts in each new one; 0 beyond the images' lengths."""
    device = lengths.device
    cells, new_cells = torch.arange(size, device=device), torch.arange(new_size, device=device)
    steps = (lengths.double() - 1) / (new_lengths - 1).clamp(min=1)
    places = new_cells * steps[:, None]
    weights = (1 - (places[:, :, None] - cells).abs()).clamp(min=0)
    return weights * (new_cells < new_lengths[:, None])[:, :, None]
