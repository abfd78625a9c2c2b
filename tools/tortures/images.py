"""Damaged and hostile images of every format that Pillow writes, read in every way there is."""

from __future__ import annotations

import argparse
import io
import random
import shutil
import struct
import tempfile
import zlib
from functools import cache, partial
from pathlib import Path
from typing import Callable, Dict, Iterator, List, NamedTuple, Sequence, Tuple

import numpy as np
from PIL import Image, ImageCms

from ia_gcn.config import add_ia_gcn_config
from ia_gcn.data.dataset_mapper import read_image
from ia_gcn.inference import EvaluationView
from ia_gcn.inference.onnx_predictor import ImageView
from ia_gcn.io import images
from ia_gcn.io.images import UnreadableImage, turn_to_decode

from .harness import Task, Trial, run_in_children

# Files that a process reads, if none of them is a finding.
TOGETHER = 100
# Of the models that the views are for.
SIZE = 32
# Views of larger images are not compared, for the time that they take.
LARGE = 2**22


class Sample(NamedTuple):
    """A whole image file: its format by Pillow's name, and its bytes."""

    format: str
    content: bytes


def add_images(subcommands, common: argparse.ArgumentParser) -> None:
    parser = subcommands.add_parser("images", parents=[common], help=__doc__)
    parser.add_argument("--trials", type=int, default=1000, help="how many files (default 1000)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> Iterator[Trial]:
    """A trial for each damaged file; those that are findings stay in OUTPUT/images-found."""
    samples = whole_images(random.Random(args.seed))
    views = Views()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for start in range(0, args.trials, TOGETHER):
            tasks, paths = [], []
            for number in range(start, min(start + TOGETHER, args.trials)):
                rng = random.Random(f"{args.seed} {number}")
                kind, damage, content = damaged_image(rng, samples)
                # Another ending than the format's makes no difference.
                path = folder / f"{number}.{rng.choice(('jpg', 'png', 'tif'))}"
                path.write_bytes(content)
                work = partial(views.read, path)
                tasks.append(Task(kind, f"{number}, {damage}", work))
                paths.append(path)
            for trial, path in zip(run_in_children(tasks, folder), paths):
                if trial.is_finding:
                    found = args.output / "images-found"
                    found.mkdir(parents=True, exist_ok=True)
                    shutil.copy(path, found)
                yield trial
            for path in paths:
                path.unlink()


def damaged_image(rng: random.Random, samples: Sequence[Sample]) -> Tuple[str, str, bytes]:
    """A file's format, what was done to it, and its bytes."""
    formats = sorted({sample.format for sample in samples})
    # What is not read is soon refused.
    kind = rng.choice(images.FORMATS if rng.random() < 0.9 else formats)
    sample = rng.choice([sample for sample in samples if sample.format == kind])
    name, damage = rng.choice(damages_of(sample))
    return kind, name, damage(rng, sample, samples)


class Views:
    """All ways from a file to pixels, and from pixels to the input of a model."""

    def __init__(self):
        from detectron2.config import get_cfg

        cfg = get_cfg()
        add_ia_gcn_config(cfg)
        cfg.INPUT.IMAGE_SIZE, cfg.INPUT.FORMAT = (SIZE, SIZE), "RGB"
        self.evaluation = EvaluationView(cfg)
        preprocessing = {"size": (SIZE, SIZE), "interpolation": "bilinear", "format": "RGB"}
        self.exported = ImageView(preprocessing)

    def read(self, path: Path) -> str:
        """Read a file in all ways.

        Returns:
            "read", if all ways gave the same pixels.
        Raises:
            UnreadableImage: no way could read it.
            AssertionError: the ways differ.
        """
        file = str(path)
        ways: Dict[str, Callable[[], np.ndarray]] = {
            "training": lambda: read_image(file),
            "exported": lambda: self.exported.read(file),
            "open file": lambda: self.exported.read(io.BytesIO(path.read_bytes())),
            "in turn": lambda: read_in_turn(file),
            "Pillow": lambda: without_simplejpeg(file),
        }
        results, errors = {}, []
        for way, read in ways.items():
            try:
                results[way] = read()
            except UnreadableImage as error:
                errors.append(error)
        if not results:
            raise errors[0]
        assert not errors, f"read by {', '.join(results)} only: {errors[0]}"
        pixels = results.pop("training")
        assert pixels.dtype == np.uint8
        assert pixels.ndim == 3
        assert pixels.shape[2] == 3
        for way, others in results.items():
            assert np.array_equal(pixels, others), f"{way} has other pixels than training"
        if pixels.size < LARGE:
            views = [view(file) for view in (self.evaluation, self.exported)]
            sizes = {(view["height"], view["width"]) for view in views}
            assert sizes == {pixels.shape[:2]}
            assert np.array_equal(views[0]["image"].numpy(), views[1]["image"])
        return "read"


def read_in_turn(file: str) -> np.ndarray:
    with turn_to_decode(file):
        return read_image(file)


def without_simplejpeg(file: str) -> np.ndarray:
    """What an exported model reads where simplejpeg is not installed."""
    before, images.simplejpeg = images.simplejpeg, None
    try:
        return read_image(file)
    finally:
        images.simplejpeg = before


# ------------------------------------------------------------------------------- whole images


def whole_images(rng: random.Random) -> List[Sample]:
    """Images of each format and mode that Pillow writes, and of the options with which it does."""
    Image.init()
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    exif = Image.Exif()
    exif[images.ORIENTATION] = 6
    options: List[Dict] = [{}, {"exif": exif}, {"icc_profile": profile}, {"save_all": True}]
    by_format = {
        "JPEG": [{"progressive": True}, {"subsampling": 0, "quality": 95}, {"comment": b"x" * 99}],
        "PNG": [{"optimize": True}, {"transparency": 3}, {"bits": 2}],
        "TIFF": [{"compression": c} for c in ("tiff_lzw", "tiff_deflate", "jpeg", "packbits")],
        "WEBP": [{"lossless": True}],
        "GIF": [{"interlace": 1}, {"transparency": 3}],
        "JPEG2000": [{"irreversible": True}, {"no_jp2": True}],
        "TGA": [{"compression": "tga_rle"}],
    }
    samples = []
    # PDF is only written; HDF5, BUFR, GRIB and WMF need other programs to be written.
    for name in sorted(set(Image.SAVE) - {"PDF", "PALM"}):
        for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I", "I;16", "F"):
            image = pattern(rng, mode)
            for extra in (*options, *by_format.get(name, ())):
                if name == "ICNS" and (mode, extra) != ("RGB", {}):
                    continue  # each takes as long as a hundred others
                if extra.get("compression") == "jpeg" and mode not in ("L", "RGB"):
                    continue  # it corrupts the memory of the process that writes it
                if extra.get("save_all"):
                    extra = {**extra, "append_images": [pattern(rng, mode)] * 2}
                file = io.BytesIO()
                try:
                    image.save(file, name, **extra)
                # Not every format has every mode or option.
                except Exception:
                    continue
                samples.append(Sample(name, file.getvalue()))
    return samples


def pattern(rng: random.Random, mode: str) -> Image.Image:
    """A small image of smooth and random parts."""
    width, height = rng.choice(((1, 1), (16, 16), (33, 17), (64, 64)))
    noise = np.random.default_rng(rng.randrange(2**32))
    pixels = np.add.outer(np.arange(height) * 3, np.arange(width) * 2)[..., None] % 256
    pixels = (pixels + noise.integers(0, 40, (height, width, 3))).clip(0, 255).astype(np.uint8)
    if mode in ("I", "I;16", "F"):
        kind = {"I": np.int32, "I;16": np.uint16, "F": np.float32}[mode]
        return Image.fromarray(pixels[..., 0].astype(kind) * 257)
    return Image.fromarray(pixels).convert(mode)


# ------------------------------------------------------------------------------------ damages

Damage = Callable[[random.Random, Sample, Sequence[Sample]], bytes]
# What lies about sizes say.
LIES = (0, 1, 2, 7, 255, 256, 12_000, 65_535, 2**31 - 1, 2**31, 2**32 - 1)


def damages_of(sample: Sample) -> List[Tuple[str, Damage]]:
    """What can be done to a file, with names."""
    found = list(ANY_FILE.items())
    if sample.content.startswith(b"\x89PNG"):
        found += PNG.items()
    if sample.content.startswith(b"\xff\xd8"):
        found += JPEG.items()
    return found


def keep(rng, sample, samples) -> bytes:
    return sample.content


def flip_bits(rng, sample, samples) -> bytes:
    content = bytearray(sample.content)
    for _ in range(rng.choice((1, 1, 3, 20))):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return bytes(content)


def truncate(rng, sample, samples) -> bytes:
    return sample.content[: rng.randrange(len(sample.content))]


def overwrite(rng, sample, samples) -> bytes:
    """Bytes, or a number of two or four bytes in either order, most often near the beginning."""
    content = bytearray(sample.content)
    for _ in range(rng.choice((1, 2, 4))):
        place = rng.randrange(min(len(content), rng.choice((32, 256, len(content)))))
        lie = rng.choice(LIES)
        size = rng.choice((1, 2, 4))
        number = (lie % 256**size).to_bytes(size, rng.choice(("big", "little")))
        content[place : place + size] = number
    return bytes(content)


def splice(rng, sample, samples) -> bytes:
    """A part of it, then one of another file or of itself."""
    other = rng.choice((sample, rng.choice(samples))).content
    start, end = sorted(rng.randrange(len(other) + 1) for _ in range(2))
    place = rng.randrange(len(sample.content))
    return sample.content[:place] + other[start:end] + sample.content[place:]


def append(rng, sample, samples) -> bytes:
    return sample.content + rng.choice((rng.choice(samples).content, bytes(10_000), b"\xff" * 99))


def disguise(rng, sample, samples) -> bytes:
    """The beginning of another file before the rest of this one."""
    other = rng.choice(samples).content
    cut = rng.choice((2, 4, 8, 16, 32))
    return other[:cut] + sample.content[cut:]


ANY_FILE: Dict[str, Damage] = {
    "whole": keep,
    "bits flipped": flip_bits,
    "truncated": truncate,
    "numbers overwritten": overwrite,
    "spliced": splice,
    "appended": append,
    "disguised": disguise,
}


def png_chunks(content: bytes) -> List[Tuple[bytes, bytes]]:
    """The (kind, data) of a whole PNG's chunks."""
    chunks, place = [], 8
    while place < len(content):
        (size,) = struct.unpack(">I", content[place : place + 4])
        chunks.append((content[place + 4 : place + 8], content[place + 8 : place + 8 + size]))
        place += 12 + size
    return chunks


def png_file(chunks: Sequence[Tuple[bytes, bytes]], wrong: int = -1) -> bytes:
    """A PNG of chunks; that with the number `wrong` gets a wrong CRC."""
    content = b"\x89PNG\r\n\x1a\n"
    for i, (kind, data) in enumerate(chunks):
        check = zlib.crc32(kind + data) ^ (i == wrong)
        content += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)
    return content


@cache
def zeros(number: int) -> bytes:
    """Compressed as far as it goes."""
    return zlib.compress(bytes(number), 9)


def png_header_lies(rng, sample, samples) -> bytes:
    """Size, bit depth, colour type or interlacing are others, and the CRC is right."""
    chunks = png_chunks(sample.content)
    header = list(struct.unpack(">IIBBBBB", chunks[0][1]))
    for _ in range(rng.choice((1, 1, 2))):
        field = rng.randrange(7)
        header[field] = rng.choice(LIES) if field < 2 else rng.choice((0, 1, 2, 3, 4, 6, 16, 255))
    return png_file([(b"IHDR", struct.pack(">IIBBBBB", *header)), *chunks[1:]])


def png_wrong_crc(rng, sample, samples) -> bytes:
    chunks = png_chunks(sample.content)
    return png_file(chunks, rng.randrange(len(chunks)))


def png_shuffled(rng, sample, samples) -> bytes:
    """Chunks left out, twice or in another order."""
    chunks = png_chunks(sample.content)
    for _ in range(rng.choice((1, 2))):
        chunk = chunks[rng.randrange(len(chunks))]
        if rng.random() < 0.5:
            chunks.remove(chunk)
        chunks.insert(rng.randrange(len(chunks) + 1), chunk if rng.random() < 0.7 else chunks[0])
    return png_file(chunks)


def png_added(rng, sample, samples) -> bytes:
    """A chunk with garbage, a lie or a bomb: EXIF, ICC, text, palette, transparency, frames."""
    garbage = rng.randbytes(rng.choice((0, 1, 13, 300)))
    bomb = zeros(rng.choice((10_000, 50_000_000)))
    extra = rng.choice(
        (
            (b"eXIf", garbage),
            (b"eXIf", b"II*\0\x08\0\0\0" + garbage),
            (b"iCCP", b"icc\0\0" + rng.choice((garbage, bomb, zlib.compress(garbage)))),
            (b"zTXt", b"text\0\0" + bomb),
            (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + bomb),
            (b"PLTE", garbage),
            (b"tRNS", garbage),
            (b"acTL", struct.pack(">II", rng.choice(LIES), rng.choice(LIES))),
            (b"fcTL", garbage),
            (b"fdAT", garbage),
            (b"CgBI", garbage),
        )
    )
    chunks = png_chunks(sample.content)
    chunks.insert(rng.randrange(1, len(chunks) + 1), extra)
    return png_file(chunks)


def png_bomb(rng, sample, samples) -> bytes:
    """Many pixels in few bytes, most often fewer than it says."""
    width, height = rng.choice(((20_000, 20_000), (13_000, 13_000), (3_000, 3_000), (2**31 - 1, 1)))
    rows = min(height, rng.choice((0, 1, 100, 3_000)))
    pixels = zeros((1 + 3 * min(width, 20_000)) * rows)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, rng.choice((0, 1)))
    return png_file([(b"IHDR", header), (b"IDAT", pixels), (b"IEND", b"")])


PNG: Dict[str, Damage] = {
    "header lies": png_header_lies,
    "wrong CRC": png_wrong_crc,
    "chunks shuffled": png_shuffled,
    "chunk added": png_added,
    "bomb": png_bomb,
}


def jpeg_header_lies(rng, sample, samples) -> bytes:
    """Another height, width, precision or number of channels in the frame header."""
    content = bytearray(sample.content)
    frame = max(content.find(b"\xff\xc0"), content.find(b"\xff\xc2"))
    place, size = rng.choice(((4, 1), (5, 2), (7, 2), (9, 1), (10, 1), (11, 1)))
    lie = rng.choice(LIES) % 256**size
    content[frame + place : frame + place + size] = lie.to_bytes(size, "big")
    return bytes(content)


def jpeg_segment(rng, sample, samples) -> bytes:
    """A segment with garbage after the beginning: EXIF, ICC, Adobe's, frames, tables, restarts."""
    garbage = rng.randbytes(rng.choice((0, 2, 30, 2000)))
    marker, data = rng.choice(
        (
            (0xE1, b"Exif\0\0" + garbage),
            (0xE1, b"Exif\0\0II*\0\x08\0\0\0" + garbage),
            (0xE1, b"http://ns.adobe.com/xap/1.0/\0" + b'tiff:Orientation="6"' + garbage),
            (0xE2, b"ICC_PROFILE\0\1\1" + garbage),
            (0xE2, b"MPF\0II*\0\x08\0\0\0" + garbage),
            (0xED, b"Photoshop 3.0\x008BIM" + garbage),
            (0xEE, b"Adobe\0d\0\0\0\0" + bytes([rng.choice((0, 1, 2, 9))])),
            (0xDB, garbage),
            (0xC4, garbage),
            (0xDD, b"\0" + garbage[:1]),
            (0xFE, garbage),
        )
    )
    segment = bytes((0xFF, marker)) + struct.pack(">H", len(data) + 2) + data
    return sample.content[:2] + segment + sample.content[2:]


JPEG: Dict[str, Damage] = {"header lies": jpeg_header_lies, "segment added": jpeg_segment}
