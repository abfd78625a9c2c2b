"""What the figures share: colours, and names that fit."""

from __future__ import annotations

FOUND, WRONG, MISSED = "#1a7f37", "#cf222e", "#bc6c00"


def shorten(text: str, length: int) -> str:
    """The text, cut off with an ellipsis where it has more characters than `length`."""
    return text if len(text) <= length else f"{text[: length - 1]}…"
