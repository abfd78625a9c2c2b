"""Images from files, with Pillow alone: neither torch nor detectron2 is needed."""

from __future__ import annotations

import os
import warnings
from functools import partial
from typing import BinaryIO, Callable, Union

import numpy as np
from PIL import Image, ImageOps

from ..errors import InputError

# A file; (H, W, 3) uint8 RGB; or one that Pillow has opened.
ImageSource = Union[str, "os.PathLike[str]", np.ndarray, Image.Image]

# The EXIF tag; 1 is upright.
ORIENTATION = 0x0112


class UnreadableImage(Exception):
    """A file that could not be decoded; `file_name` and why."""

    def __init__(self, file_name: str, reason: str):
        super().__init__(file_name, reason)
        self.file_name = file_name
        self.reason = reason

    def __str__(self):
        return f"{self.file_name}: {self.reason}"


def decode_image(
    file_name: str,
    convert: Callable[[Image.Image], np.ndarray],
    open_file: Callable[[str], BinaryIO] = partial(open, mode="rb"),
) -> np.ndarray:
    """What `convert` makes of the image in a file.

    Raises:
        UnreadableImage: the file is missing, truncated, too large, or no image at all.
    """
    try:
        with open_file(file_name) as file, warnings.catch_warnings():
            # Of what is large or oddly stored Pillow warns, without its name, and reads it.
            warnings.filterwarnings("ignore", module=r"PIL\.")
            return convert(Image.open(file))
    # Damaged and hostile files make decoders raise nearly anything: OSError, SyntaxError,
    # struct.error, DecompressionBombError, ...
    except Exception as error:
        raise UnreadableImage(file_name, f"{type(error).__name__}: {error}") from error


def upright_8_bit(image: Image.Image) -> Image.Image:
    """An image turned as its EXIF orientation says, and with 16-bit greys scaled to 8 bits.

    One that has neither to be done is returned itself.
    """
    if image.getexif().get(ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        # Pillow's own conversion cuts 16 bits off at 255 instead of scaling them.
        levels = np.asarray(image).clip(0, 65535) // 256
        image = Image.fromarray(levels.astype(np.uint8))
    return image


def image_pixels(
    image: ImageSource,
    convert: Callable[[Image.Image], np.ndarray],
    read: Callable[[str], np.ndarray],
) -> np.ndarray:
    """(H, W, 3) uint8 of a `ImageSource`, by `convert` of one in memory and by `read` of a file.

    Raises:
        InputError: it is none of the things that a `ImageSource` is.
    """
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.shape[2:] != (3,) or not image.size:
            raise InputError(
                f"an image is an (H, W, 3) array of uint8, not {image.shape} of {image.dtype}"
            )
        image = Image.fromarray(image)
    if isinstance(image, Image.Image):
        return convert(image)
    if isinstance(image, (str, os.PathLike)):
        return read(os.fspath(image))
    raise InputError(
        f"an image is a file name, an array or a Pillow image, not a {type(image).__name__}"
    )
