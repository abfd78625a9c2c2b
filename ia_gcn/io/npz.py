"""Reading .npz files of others within limits."""

from __future__ import annotations

import os
import zipfile
from typing import BinaryIO, Dict, Sequence

import numpy as np

# How much larger than the file its arrays may be. Scores of a model compress to a half, the targets
# beside them to nearly nothing.
MAX_GROWTH = 100
MIN_SIZE = 2**26


def read_npz(
    file: BinaryIO, names: Sequence[str] = (), optional: Sequence[str] = ()
) -> Dict[str, np.ndarray]:
    """Arrays of numbers and text from an .npz file; pickled ones are refused.

    Args:
        file: open for reading bytes, with `seek`.
        names: of the arrays; (): all of them.
        optional: names of arrays that the file may have beside them.
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
        arrays = {name: np.asarray(content[name]) for name in names}
    for name, array in arrays.items():
        if array.dtype.kind == "U":
            _check_text(array, name)
    return arrays


def _check_text(array: np.ndarray, name: str) -> None:
    """numpy takes any four bytes for a character, of which Python can't make a string."""
    if not array.dtype.isnative:
        raise ValueError(f"{name} is text in another machine's order of bytes")
    codes = np.ascontiguousarray(array).reshape(-1).view(np.uint32)
    if codes.size and (codes.max() > 0x10FFFF or (codes >> 11 == 0xD800 >> 11).any()):
        raise ValueError(f"{name} is no text")
