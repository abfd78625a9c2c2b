"""Images from files: neither torch nor detectron2 is needed.

Every image that a model sees is read here, so that training, evaluation, predictors and exported
models get the same pixels of the same file.
"""

from __future__ import annotations

import os
import threading
import warnings
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import BinaryIO, Callable, Dict, Iterator, Tuple, Union

import numpy as np
from PIL import Image, UnidentifiedImageError

from ..errors import InputError
from .inputs import check_regular

try:
    import simplejpeg
except ImportError:
    # An exported model runs without. Pillow then decodes JPEGs too: the same pixels, but slower.
    simplejpeg = None

# The name of a file; a binary file that is open; (H, W, 3) uint8 RGB; or one that Pillow has
# opened.
ImageSource = Union[str, "os.PathLike[str]", BinaryIO, np.ndarray, Image.Image]

# What is read, by Pillow's names. Pillow knows many more, little used and little tested; for one of
# them, EPS, it runs another program. A module of your own may append the format of a Pillow plugin.
FORMATS = ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF"]

# The EXIF tag, and what makes an image upright; 1 is upright.
ORIENTATION = 0x0112
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# In memory at once, see `turn_to_decode`. Decoded and resized, a pixel takes 7 to 11 bytes.
PIXELS_AT_ONCE = 100_000_000
# Pixels of a strip that is converted at once.
STRIP = 2**20


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
        if not hasattr(file, "read"):
            check_regular(file)
        with warnings.catch_warnings():
            # Pillow warns of large and oddly stored images, without their names, and reads them.
            warnings.filterwarnings("ignore", module=r"PIL\.")
            with nullcontext(file) if hasattr(file, "read") else open_file(file) as stream:
                return convert(Image.open(stream, formats=FORMATS))
    except UnreadableImage:
        raise
    # Damaged and hostile files make decoders raise nearly anything: OSError, SyntaxError,
    # struct.error, DecompressionBombError, ...
    except Exception as error:
        # Pillow's text for what it does not know describes Python's object of the open file.
        unknown = isinstance(error, UnidentifiedImageError)
        reason = f"none of {', '.join(FORMATS)}" if unknown else error
        name = source_name(file)
        raise UnreadableImage(name, f"{type(error).__name__}: {reason}") from error


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
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    # Of a large image, Pillow's copies in between would be as large.
    for box in strips(image.size):
        pixels[box[1] : box[3]] = image.crop(box).convert("RGB")
    return pixels[:, :, ::-1] if image_format == "BGR" else pixels


def strips(size: Tuple[int, int]) -> Iterator[Tuple[int, int, int, int]]:
    """The boxes (left, upper, right, lower) of an image's strips from top to bottom."""
    width, height = size
    rows = max(1, STRIP // max(1, width))
    for top in range(0, height, rows):
        yield 0, top, width, min(top + rows, height)


def decode_upright_jpeg(image: Image.Image, image_format: str) -> np.ndarray | None:
    """What `convert_image` returns, of a JPEG in colour; None if Pillow must decode it.

    The decoder and the pixels are the same as Pillow's, but Pillow adds a fourth channel first.
    """
    if simplejpeg is None or orientation(image) != 1:
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
    # A PNG may have its EXIF behind the pixels, and Pillow turns a TIFF as it loads it.
    image.load()
    transposition = UPRIGHT.get(orientation(image))
    if transposition is not None:
        image = image.transpose(transposition)
    if image.mode.startswith("I"):
        # Pillow's own conversion cuts 16 bits off at 255 instead of scaling them.
        grey = Image.new("L", image.size)
        for box in strips(image.size):
            levels = np.asarray(image.crop(box)).clip(0, 65535) // 256
            grey.paste(Image.fromarray(levels.astype(np.uint8)), box)
        image = grey
    return image


def orientation(image: Image.Image) -> int:
    """What an image's EXIF says; 1, which is upright, where it says nothing or is damaged."""
    try:
        value = image.getexif().get(ORIENTATION, 1)
    # Of damaged EXIF: SyntaxError, struct.error, ...
    except Exception:
        return 1
    return value if value in UPRIGHT else 1


class PixelBudget:
    """Bounds the pixels that threads have in memory at once; a larger image has its turn alone."""

    def __init__(self, pixels: int):
        self.pixels = pixels
        self._taken = 0
        self._changed = threading.Condition()

    @contextmanager
    def take(self, pixels: int) -> Iterator[None]:
        """Wait until so many pixels fit in; they are given back at the end."""
        with self._changed:
            self._changed.wait_for(lambda: not self._taken or self._taken + pixels <= self.pixels)
            self._taken += pixels
        try:
            yield
        finally:
            with self._changed:
                self._taken -= pixels
                self._changed.notify_all()


_budget = PixelBudget(PIXELS_AT_ONCE)


@contextmanager
def turn_to_decode(file: str | os.PathLike[str] | BinaryIO) -> Iterator[None]:
    """Wait until PIXELS_AT_ONCE allow that another thread of this process decodes an image.

    What is decoded and made of it in the meantime counts. It is for threads; a process of its own
    for each image needs no turns.

    Raises:
        UnreadableImage: see `decode_image`; only the header is read here.
    """
    # A name that isn't a file's may be one of PathManager's.
    is_local = hasattr(file, "read") or os.path.isfile(file)
    with _budget.take(decode_image(file, _count_pixels) if is_local else 0):
        yield


def _count_pixels(image: Image.Image) -> int:
    return image.width * image.height


def boxes_on_image(boxes: np.ndarray, sample: Dict) -> np.ndarray:
    """Boxes from pixels of a model's input to the image's.

    Args:
        boxes: (n, 4) of x0, y0, x1, y1.
        sample: `image`, the input (3, H, W), and `window`, x0, y0, x1, y1 of what it shows of the
            image, in the image's pixels.
    Returns:
        (n, 4), of the same dtype.
    """
    height, width = sample["image"].shape[-2:]
    x0, y0, x1, y1 = sample["window"]
    scale = [(x1 - x0) / width, (y1 - y0) / height] * 2
    return boxes * np.array(scale, boxes.dtype) + np.array([x0, y0] * 2, boxes.dtype)


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
