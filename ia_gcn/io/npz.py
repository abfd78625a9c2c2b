"""Reading .npz files of others within limits, and writing large ones."""

from __future__ import annotations

import math
import os
import struct
import zipfile
from typing import BinaryIO, Dict, Iterable, Mapping, NamedTuple, Sequence, Tuple

import numpy as np

# How much larger than the file its arrays may be. Scores of a model compress to a half, the targets
# beside them to nearly nothing.
MAX_GROWTH = 100
MIN_SIZE = 2**26


class Columns(NamedTuple):
    """A matrix (n, C) that is not in memory."""

    dtype: np.dtype
    shape: Tuple[int, int]
    blocks: Iterable[np.ndarray]
    """Some of its columns each, one after the other: (b, n)."""


def write_npz(
    file: BinaryIO, matrices: Mapping[str, Columns], arrays: Mapping[str, np.ndarray] | None = None
) -> None:
    """Write an .npz file, not compressed, so that `read_npz` can map its matrices.

    Args:
        file: open for writing bytes, with `seek`.
        matrices, arrays: by name.
    """
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as content:
        for name, (dtype, shape, blocks) in matrices.items():
            descr = np.lib.format.dtype_to_descr(dtype)
            header = {"descr": descr, "fortran_order": True, "shape": shape}
            with content.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array_header_1_0(member, header)
                for block in blocks:
                    member.write(np.ascontiguousarray(block, dtype).tobytes())
        for name, array in (arrays or {}).items():
            with content.open(f"{name}.npy", "w") as member:
                np.lib.format.write_array(member, array, allow_pickle=False)


def read_npz(
    file: BinaryIO,
    names: Sequence[str] = (),
    optional: Sequence[str] = (),
    map_from: float = math.inf,
) -> Dict[str, np.ndarray]:
    """Arrays of numbers and text from an .npz file; pickled ones are refused.

    Args:
        file: open for reading bytes, with `seek`.
        names: of the arrays; (): all of them.
        optional: names of arrays that the file may have beside them.
        map_from: matrices of as many bytes are mapped from the file, if it is one of the system,
            and they are numbers, column after column, and not compressed. They can't be written to.
            All other arrays are read.
    Raises:
        Exception: of a damaged file numpy and zipfile raise nearly anything.
    """
    size = file.seek(0, os.SEEK_END)
    with zipfile.ZipFile(file) as content:
        unpacked = sum(entry.file_size for entry in content.infolist())
    if unpacked > MAX_GROWTH * size + MIN_SIZE:
        raise ValueError(f"its arrays are of {unpacked} bytes, and the file of {size}")
    file.seek(0)
    with np.load(file, allow_pickle=False) as content:
        # Entries of the file that are not arrays are read as bytes.
        names = names or content.files
        names = [*names, *(name for name in optional if name in content.files)]
        arrays = {
            name: mapped if mapped is not None else np.asarray(content[name])
            for name in names
            for mapped in [_map_array(file, content.zip, f"{name}.npy", map_from)]
        }
    for name, array in arrays.items():
        if array.dtype.kind == "U":
            _check_text(array, name)
    return arrays


def _map_array(
    file: BinaryIO, content: zipfile.ZipFile, name: str, map_from: float
) -> np.ndarray | None:
    """An array mapped from an .npz file; None where it is to be read instead."""
    if name not in content.namelist():
        return None
    entry = content.getinfo(name)
    if entry.compress_type != zipfile.ZIP_STORED or entry.file_size < map_from:
        return None
    try:
        file.fileno()
    # Such as one in memory, or what a handler of PathManager opens.
    except (AttributeError, OSError):
        return None
    with content.open(entry) as member:
        if np.lib.format.read_magic(member) != (1, 0):
            return None
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(member)
        header = member.tell()
        size = math.prod(shape) * dtype.itemsize
        # A few columns at a time of rows after rows take all pages of the file, again and again.
        if dtype.kind not in "fiub" or not shape or min(shape) < 1 or not fortran_order:
            return None
        if header + size != entry.file_size:
            return None
        # To the end, where its checksum is compared.
        while member.read(2**20):
            pass
    # Of the entry's own header: 26 bytes, the lengths of its name and of what else is in it.
    file.seek(entry.header_offset + 26)
    offset = entry.header_offset + 30 + sum(struct.unpack("<2H", file.read(4))) + header
    return np.asarray(np.memmap(file, dtype, "r", offset, shape, "F"))


def _check_text(array: np.ndarray, name: str) -> None:
    """numpy takes any four bytes for a character, of which Python can't make a string."""
    if not array.dtype.isnative:
        raise ValueError(f"{name} is text in another machine's order of bytes")
    codes = np.ascontiguousarray(array).reshape(-1).view(np.uint32)
    if codes.size and (codes.max() > 0x10FFFF or (codes >> 11 == 0xD800 >> 11).any()):
        raise ValueError(f"{name} is no text")
