"""The augmentations of the papers' training views, as detectron2 Augmentations.

They draw from numpy's global generator, as detectron2's do, and only in `get_transform`: the
transform that it returns is deterministic.
"""

from __future__ import annotations

from typing import List, Sequence, Tuple

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from detectron2.config import CfgNode
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T
from PIL import Image

from ..errors import InputError

# torch's kernel for 8-bit images needs AVX2. Without it, torch takes twice Pillow's time, and is
# wrong about what gets one pixel wide.
HAS_FAST_KERNEL = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


# What INPUT.INTERPOLATION can be, as Pillow calls it.
INTERPOLATIONS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}


def interpolation_of(cfg: CfgNode) -> Image.Resampling:
    """INPUT.INTERPOLATION.

    Raises:
        InputError: it is neither bilinear nor bicubic.
    """
    name = cfg.INPUT.INTERPOLATION
    if name not in INTERPOLATIONS:
        raise InputError(f"INPUT.INTERPOLATION must be bilinear or bicubic, not {name!r}")
    return INTERPOLATIONS[name]


def centre_view(
    size: Tuple[int, int], share: float, interpolation: Image.Resampling
) -> List[T.Augmentation | T.Transform]:
    """The test view: a resized image, or the centre of one.

    It is resized by Pillow (detectron2's Resize), whose pixels an exported model gets without
    torch, bit for bit.

    Args:
        size: height and width of the view in pixels.
        share: of the image's height and width that the view keeps, INPUT.CENTER_CROP.
        interpolation: Pillow's, bilinear or bicubic.
    """
    (height, width), (top, left) = resized_size(size, share), centre(size, share)
    augmentations = [T.Resize((height, width), interpolation)]
    if (height, width) != tuple(size):
        augmentations.append(T.CropTransform(left, top, size[1], size[0], width, height))
    return augmentations


def resized_size(size: Sequence[int], share: float) -> Tuple[int, int]:
    """Height and width of the image whose centre is a view of a size, see `centre_view`."""
    height, width = (round(side / share) for side in size)
    return height, width


def centre(size: Sequence[int], share: float) -> Tuple[int, int]:
    """Row and column where that centre begins, as torchvision's CenterCrop rounds them."""
    top, left = (round((whole - side) / 2) for whole, side in zip(resized_size(size, share), size))
    return top, left


def window_of(transforms: T.TransformList, size: Tuple[int, int]) -> np.ndarray:
    """What a view shows of its image: (4,), x0, y0, x1, y1 in the image's pixels.

    Args:
        transforms: that made the view, with inverses.
        size: height and width of the view.
    """
    return transforms.inverse().apply_box(np.array([0.0, 0, size[1], size[0]]))[0]


class Warp(T.Resize):
    """detectron2's Resize for training views, to a fixed height and width, by `WarpTransform`."""

    def get_transform(self, image: np.ndarray) -> T.Transform:
        return WarpTransform(*image.shape[:2], *self.shape, self.interp)


class WarpTransform(T.ResizeTransform):
    """detectron2's ResizeTransform for training views, faster on (H, W, C) uint8 images.

    The result is Pillow's within rounding: of a photo, one value in a hundred differs, by one of
    256 levels. That can change a score by some hundredths, so evaluation and prediction take
    detectron2's ResizeTransform, that is Pillow, whose pixels can be had without torch as well.
    In memory the result is (C, H, W).
    """

    def apply_image(self, img: np.ndarray, interp: int | None = None) -> np.ndarray:
        fast = HAS_FAST_KERNEL and self.interp in INTERPOLATIONS.values()
        if interp is not None or img.dtype != np.uint8 or not fast:
            return super().apply_image(img, interp)
        # torch takes neither what can't be written nor what runs backwards.
        pixels = torch.from_numpy(img.copy()).permute(2, 0, 1)[None]
        size = (self.new_h, self.new_w)
        mode = Image.Resampling(self.interp).name.lower()
        warped = F.interpolate(pixels, size, mode=mode, antialias=True)
        return warped[0].permute(1, 2, 0).numpy()


class MultiScaleCrop(T.Augmentation):
    """A crop of random place, scale and aspect, warped to a fixed size.

    Height and width are those of a square of the image's shorter side, or those of the image, times
    one of `scales` each, drawn evenly from the pairs at most `max_distort` places apart in that
    list; the place is uniform.
    """

    def __init__(
        self,
        size: Tuple[int, int],
        scales: Sequence[float],
        max_distort: int,
        interpolation: Image.Resampling = Image.Resampling.BILINEAR,
        base: str = "square",
    ):
        """
        Args:
            size: height and width of the result in pixels.
            scales: in (0, 1].
            max_distort: 0 crops squares only, or the image's proportions only.
            interpolation: Pillow's, bilinear or bicubic.
            base: square or image.
        Raises:
            InputError: a scale is out of range, or there is none.
        """
        super().__init__()
        if not scales or not all(0 < scale <= 1 for scale in scales):
            raise InputError(f"INPUT.MULTI_SCALE_CROP.SCALES must be in (0, 1], got {scales}")
        self.size = size
        self.interpolation = interpolation
        self.base = base
        self.scale_pairs = [
            (scale_h, scale_w)
            for i, scale_h in enumerate(scales)
            for j, scale_w in enumerate(scales)
            if abs(i - j) <= max_distort
        ]

    def get_transform(self, image: np.ndarray) -> T.Transform:
        height, width = image.shape[:2]
        scale_h, scale_w = self.scale_pairs[np.random.randint(len(self.scale_pairs))]
        side = min(height, width)
        base_h, base_w = (height, width) if self.base == "image" else (side, side)
        crop_h = max(1, round(base_h * scale_h))
        crop_w = max(1, round(base_w * scale_w))
        top = np.random.randint(height - crop_h + 1)
        left = np.random.randint(width - crop_w + 1)
        return T.TransformList(
            [
                T.CropTransform(left, top, crop_w, crop_h, width, height),
                WarpTransform(crop_h, crop_w, *self.size, self.interpolation),
            ]
        )


class RandomResizedCrop(T.Augmentation):
    """torchvision's, of a random area and aspect ratio from 3:4 to 4:3, warped to a fixed size."""

    def __init__(
        self,
        size: Tuple[int, int],
        least_area: float,
        interpolation: Image.Resampling = Image.Resampling.BILINEAR,
    ):
        """
        Args:
            size: height and width of the result in pixels.
            least_area: of the crop, as a share of the image's, in (0, 1].
            interpolation: Pillow's, bilinear or bicubic.
        Raises:
            InputError: least_area is out of range.
        """
        super().__init__()
        if not 0 < least_area <= 1:
            raise InputError(f"INPUT.RANDOM_RESIZED_CROP must be in [0, 1], got {least_area}")
        self.size = size
        self.least_area = least_area
        self.interpolation = interpolation

    def get_transform(self, image: np.ndarray) -> T.Transform:
        height, width = image.shape[:2]
        # It looks at the size alone.
        shape = torch.empty(height, width, device="meta")
        top, left, crop_h, crop_w = torchvision.transforms.RandomResizedCrop.get_params(
            shape, scale=[self.least_area, 1.0], ratio=[3 / 4, 4 / 3]
        )
        return T.TransformList(
            [
                T.CropTransform(left, top, crop_w, crop_h, width, height),
                WarpTransform(crop_h, crop_w, *self.size, self.interpolation),
            ]
        )


class Cutout(T.Augmentation):
    """A rectangle of one random colour, of the image's proportions, that hides what is there.

    Its centre is uniform over the image; what reaches over the border is cut off. Boxes stay.
    """

    def __init__(self, share: float):
        """
        Args:
            share: the rectangle's sides by the image's, in [0, 1).
        Raises:
            InputError: share is out of range.
        """
        super().__init__()
        if not 0 <= share < 1:
            raise InputError(f"INPUT.CUTOUT must be in [0, 1), got {share}")
        self.share = share

    def get_transform(self, image: np.ndarray) -> T.Transform:
        height, width, channels = image.shape
        cut_h, cut_w = round(self.share * height), round(self.share * width)
        top = np.random.randint(height) - cut_h // 2
        left = np.random.randint(width) - cut_w // 2
        colour = np.random.randint(256, size=channels)
        rows = slice(max(0, top), top + cut_h)
        columns = slice(max(0, left), left + cut_w)
        return CutoutTransform(rows, columns, colour)


class CutoutTransform(T.Transform):
    """Paints `rows` × `columns`, two slices, in `colour`, a value per channel."""

    def __init__(self, rows: slice, columns: slice, colour: np.ndarray):
        super().__init__()
        self._set_attributes(locals())

    def apply_image(self, image: np.ndarray) -> np.ndarray:
        image = image.copy()
        image[self.rows, self.columns] = self.colour
        return image

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        return coords

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        return segmentation


class RandAugment(T.Augmentation):
    """torchvision's RandAugment: random operations on colours and geometry, one after the other.

    The image keeps its size; areas without image content are black. Boxes are not transformed.
    """

    def __init__(self, num_ops: int, magnitude: int, image_format: str = "RGB"):
        """
        Args:
            num_ops: operations per image.
            magnitude: how strong they are, 0 to 30.
            image_format: the images', as detectron2's `read_image` takes it. Some operations
                need to know which channel is red; in BGR, an image gets what it gets in RGB.
        Raises:
            InputError: a number is out of range.
        """
        super().__init__()
        if num_ops < 0:
            raise InputError(f"INPUT.RAND_AUGMENT_OPS must be 0 or more, got {num_ops}")
        if not 0 <= magnitude <= 30:
            raise InputError(f"INPUT.RAND_AUGMENT_MAGNITUDE must be 0 to 30, got {magnitude}")
        self.num_ops = num_ops
        self.magnitude = magnitude
        self.image_format = image_format
        self.policy = torchvision.transforms.RandAugment(num_ops, magnitude)

    def get_transform(self, image: np.ndarray) -> T.Transform:
        return RandAugmentTransform(self.policy, np.random.randint(2**31), self.image_format)


class RandAugmentTransform(T.Transform):
    """Apply a torchvision policy to an image, with torch's generator seeded by `seed`."""

    def __init__(self, policy: torch.nn.Module, seed: int, image_format: str):
        super().__init__()
        self._set_attributes(locals())

    def apply_image(self, image: np.ndarray) -> np.ndarray:
        augmented = Image.fromarray(utils.convert_image_to_rgb(image, self.image_format))
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed, which would seed the GPUs as well.
            torch.default_generator.manual_seed(self.seed)
            augmented = self.policy(augmented)
        return utils.convert_PIL_to_numpy(augmented, self.image_format)

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        raise NotImplementedError("RandAugment does not return its geometric transform")

    apply_segmentation = apply_coords
