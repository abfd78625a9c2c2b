"""The training view of the papers, as a detectron2 Augmentation."""

from __future__ import annotations

from typing import Sequence, Tuple

import numpy as np
from detectron2.data import transforms as T
from PIL import Image


class MultiScaleCrop(T.Augmentation):
    """A crop of random place, scale and aspect, warped to a fixed size.

    Height and width are the image's shorter side times one of `scales` each, drawn evenly from
    the pairs at most `max_distort` places apart in that list; the place is uniform. Draws from
    numpy's global generator, as detectron2's augmentations do.
    """

    def __init__(self, size: Tuple[int, int], scales: Sequence[float], max_distort: int):
        """
        Args:
            size: height and width of the result in pixels.
            scales: in (0, 1].
            max_distort: 0 crops squares only.
        """
        super().__init__()
        if not scales or not all(0 < scale <= 1 for scale in scales):
            raise ValueError(f"INPUT.MULTI_SCALE_CROP.SCALES must be in (0, 1], got {scales}")
        self.size = size
        self.scale_pairs = [
            (scale_h, scale_w)
            for i, scale_h in enumerate(scales)
            for j, scale_w in enumerate(scales)
            if abs(i - j) <= max_distort
        ]

    def get_transform(self, image: np.ndarray) -> T.Transform:
        height, width = image.shape[:2]
        scale_h, scale_w = self.scale_pairs[np.random.randint(len(self.scale_pairs))]
        crop_h = max(1, round(min(height, width) * scale_h))
        crop_w = max(1, round(min(height, width) * scale_w))
        top = np.random.randint(height - crop_h + 1)
        left = np.random.randint(width - crop_w + 1)
        return T.TransformList(
            [
                T.CropTransform(left, top, crop_w, crop_h, width, height),
                T.ResizeTransform(crop_h, crop_w, *self.size, Image.BILINEAR),
            ]
        )
