"""Images from files: neither torch nor detectron2 is needed.

Every image that a model sees is read here, so that training, evaluation, predictors and exported
models get the same pixels of the same file.
"""

from __future__ import annotations

import os
import warnings
from contextlib import nullcontext
from functools import partial
from typing import BinaryIO, Callable, Union

import numpy as np
from PIL import Image, ImageOps

from ..errors import InputError

try:
    import simplejpeg
except ImportError:
    # An exported model runs without. Pillow then decodes JPEGs too: the same pixels, but slower.
    simplejpeg = None

# The name of a file; a binary file that is open; (H, W, 3) uint8 RGB; or one that Pillow has
# opened.
ImageSource = Union[str, "os.PathLike[str]", BinaryIO, np.ndarray, Image.Image]

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
    file: str | BinaryIO,
    convert: Callable[[Image.Image], np.ndarray],
    open_file: Callable[[str], BinaryIO] = partial(open, mode="rb"),
) -> np.ndarray:
    """Apply `convert` to the image in a file.

    Args:
        file: its name, or a binary file that is open and stays so.
        convert: gets the image before any of its pixels are read.
        open_file: opens the file of a name.
    Raises:
        UnreadableImage: the file is missing, truncated, too large, or no image at all.
    """
    try:
        with warnings.catch_warnings():
            # Pillow warns of large and oddly stored images, without their names, and reads them.
            warnings.filterwarnings("ignore", module=r"PIL\.")
            with nullcontext(file) if hasattr(file, "read") else open_file(file) as stream:
                return convert(Image.open(stream))
    # Damaged and hostile files make decoders raise nearly anything: OSError, SyntaxError,
    # struct.error, DecompressionBombError, ...
    except Exception as error:
        name = source_name(file)
        raise UnreadableImage(name, f"{type(error).__name__}: {error}") from error


def source_name(file: str | os.PathLike[str] | BinaryIO) -> str:
    """What to call a file in messages: an open one may have a `name`."""
    return str(getattr(file, "name", "image")) if hasattr(file, "read") else os.fspath(file)


def convert_file(image: Image.Image, image_format: str) -> np.ndarray:
    """What `convert_image` returns, of a file that Pillow has opened and not read yet."""
    if (image.format, image.mode) == ("JPEG", "RGB"):
        pixels = decode_upright_jpeg(image, image_format)
        if pixels is not None:
            return pixels
    return convert_image(image, image_format)


def convert_image(image: Image.Image, image_format: str) -> np.ndarray:
    """The pixels of an image that Pillow has opened.

    Args:
        image_format: RGB or BGR, the order of the channels.
    Returns:
        (H, W, 3) uint8, turned as its EXIF orientation says.
    """
    image = upright_8_bit(image)
    # Converting RGB to RGB would be one more copy.
    pixels = np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
    return pixels[:, :, ::-1] if image_format == "BGR" else pixels


def decode_upright_jpeg(image: Image.Image, image_format: str) -> np.ndarray | None:
    """What `convert_image` returns, of a JPEG in colour; None if Pillow must decode it.

    The decoder and the pixels are the same as Pillow's, but Pillow adds a fourth channel first.
    """
    if simplejpeg is None or image.getexif().get(ORIENTATION, 1) != 1:
        return None
    image.fp.seek(0)
    # A valid JPEG is not larger than its pixels, except for attached data.
    most = 3 * image.width * image.height + 2**20
    content = image.fp.read(most + 1)
    if len(content) > most:
        return None
    try:
        pixels = simplejpeg.decode_jpeg(content, image_format)
    except ValueError:
        # The file is damaged. Pillow decides whether it can still be read.
        return None
    return pixels if pixels.shape[:2] == image.size[::-1] else None


def upright_8_bit(image: Image.Image) -> Image.Image:
    """An image turned as its EXIF orientation says, and with 16-bit greys scaled to 8 bits.

    An image that needs neither is returned itself.
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
    read: Callable[[str | BinaryIO], np.ndarray],
) -> np.ndarray:
    """(H, W, 3) uint8 of an `ImageSource`, by `convert` of one in memory and by `read` of a file.

    Raises:
        InputError: it is none of the things that an `ImageSource` is.
    """
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.shape[2:] != (3,) or not image.size:
            raise InputError(
                f"an image is an (H, W, 3) array of uint8, not {image.shape} of {image.dtype}"
            )
        image = Image.fromarray(image)
    if isinstance(image, Image.Image):
        return convert(image)
    if hasattr(image, "read"):
        return read(image)
    if isinstance(image, (str, os.PathLike)):
        return read(os.fspath(image))
    raise InputError(
        "an image is a file name, an open file, an array or a Pillow image, not a "
        f"{type(image).__name__}"
    )
