"""Functions that figures share: colours, shortened names, the choice of images, and SVG."""

from __future__ import annotations

import io
import os
import warnings
from typing import BinaryIO, List, Sequence, TypeVar

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from ..io.files import write_atomically

T = TypeVar("T")

FOUND, WRONG, MISSED = "#1a7f37", "#cf222e", "#bc6c00"


def shorten(text: str, length: int) -> str:
    """The text, cut off with an ellipsis where it has more characters than `length`."""
    return text if len(text) <= length else f"{text[: length - 1]}…"


def save_png(figure: Figure, path: str | os.PathLike[str] | BinaryIO, **options) -> None:
    """Save a figure as a PNG, all of it or nothing.

    Args:
        path: of the file; or a file that is open.
        options: of `Figure.savefig`.
    """
    if isinstance(path, (str, os.PathLike)):
        with write_atomically(path) as file:
            figure.savefig(file, format="png", **options)
    else:
        figure.savefig(path, format="png", **options)


def to_svg(figure: Figure) -> bytes:
    """The figure as SVG, always the same, with text as text and nothing behind it."""
    file = io.BytesIO()
    settings = {"svg.fonttype": "none", "svg.hashsalt": "ia_gcn"}
    with rc_context(settings), warnings.catch_warnings():
        # The program that shows the SVG has its own fonts.
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return file.getvalue()


def sample_items(items: Sequence[T], count: int) -> List[T]:
    """Up to `count` of the items in random order, always the same ones."""
    order = np.random.default_rng(0).permutation(len(items))
    return [items[i] for i in order[:count]]
