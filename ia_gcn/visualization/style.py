"""What the figures share: colours, names that fit, and how they become SVG."""

from __future__ import annotations

import io
import warnings

from matplotlib import rc_context
from matplotlib.figure import Figure

FOUND, WRONG, MISSED = "#1a7f37", "#cf222e", "#bc6c00"


def shorten(text: str, length: int) -> str:
    """The text, cut off with an ellipsis where it has more characters than `length`."""
    return text if len(text) <= length else f"{text[: length - 1]}…"


def to_svg(figure: Figure) -> bytes:
    """The figure as SVG, always the same, with text as text and nothing behind it."""
    file = io.BytesIO()
    settings = {"svg.fonttype": "none", "svg.hashsalt": "ia_gcn"}
    with rc_context(settings), warnings.catch_warnings():
        # Whoever shows the SVG has fonts of his own.
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return file.getvalue()
