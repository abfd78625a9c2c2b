"""Image files of every kind, and files that are none."""

import io
import os
import struct
import threading
import time
import zlib

import numpy as np
from PIL import Image


def ramp(dtype, top):
    """(20, 30), from black on the left to `top` on the right."""
    return np.tile(np.linspace(0, top, 30).astype(dtype), (20, 1))


GREY = Image.fromarray(ramp(np.uint8, 255))
IMAGES = {
    "grey.png": GREY,
    "grey.jpg": GREY,
    "grey with alpha.png": GREY.convert("LA"),
    "black and white.png": GREY.convert("1"),
    "palette.png": GREY.convert("P"),
    "palette.gif": GREY.convert("P"),
    "alpha.png": GREY.convert("RGBA"),
    "cmyk.jpg": GREY.convert("RGB").convert("CMYK"),
    "16 bit.png": Image.fromarray(ramp(np.uint16, 65535)),
    "16 bit.tif": Image.fromarray(ramp(np.uint16, 65535)),
    "float.tif": Image.fromarray(ramp(np.float32, 255)),
    "photo.webp": GREY.convert("RGB"),
    "photo.bmp": GREY.convert("RGB"),
}


def write_bomb(path):
    """A PNG of a few bytes that says it has 60000×60000 pixels."""

    def chunk(kind, data):
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    chunks = (
        chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    )
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)


def write_truncated(path):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    path.write_bytes(path.read_bytes()[:-1500])


UNREADABLE = {
    "truncated.jpg": write_truncated,
    "truncated.png": write_truncated,
    "text.jpg": lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"),
    "empty.jpg": lambda path: path.touch(),
    "header only.jpg": lambda path: path.write_bytes(b"\xff\xd8\xff\xe0"),
    "bomb.png": write_bomb,
    "folder.png": lambda path: path.mkdir(),
    "missing.png": lambda path: None,
    "pipe.png": os.mkfifo,
    "postscript.jpg": lambda path: GREY.save(path, "EPS"),
}


JPEGS = {
    "baseline": {"quality": 80},
    "every pixel's colour": {"quality": 95, "subsampling": 0},
    "progressive": {"quality": 60, "progressive": True},
    "stored as RGB": {"keep_rgb": True},
    "with restarts": {"quality": 80, "restart_marker_rows": 1},
    "with remarks": {"comment": b"x" * 60_000},
}


def jpeg_bytes(size=(45, 37), **options):
    """A JPEG of random waves of colour."""
    x, y = np.meshgrid(*map(np.arange, size))
    waves = [np.sin(0.2 * x + k) * np.cos(0.1 * k * y) for k in (1, 2, 3)]
    file = io.BytesIO()
    pixels = (127 + 120 * np.stack(waves, axis=-1)).astype(np.uint8)
    Image.fromarray(pixels).save(file, "JPEG", **options)
    return file.getvalue()


class Meter:
    """The most that was taken at once, of `PixelBudget.take`."""

    def __init__(self):
        self.lock = threading.Lock()
        self.now = self.most = self.users = self.most_users = 0

    def use(self, pixels):
        with self.lock:
            self.now, self.users = self.now + pixels, self.users + 1
            self.most = max(self.most, self.now)
            self.most_users = max(self.most_users, self.users)
        time.sleep(0.01)
        with self.lock:
            self.now, self.users = self.now - pixels, self.users - 1
