"""An image with its labels below it, and a bar for each probability."""

from __future__ import annotations

import os
from typing import Sequence, Tuple

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..io.files import write_atomically
from .regions import MAX_LABELS, PRESENT

# Of a label, in pixels; a drawing has at least that width, for the names to fit.
LINE_HEIGHT, FONT_SIZE, MIN_WIDTH = 22, 14, 240


def draw_label_bars(pixels: np.ndarray, labels: Sequence[Tuple[str, float]], path: str) -> None:
    """Draw an image and its labels as a PNG.

    Args:
        pixels: (h, w, 3) uint8 RGB.
        labels: names and probabilities; the first MAX_LABELS are drawn.
        path: of the PNG.
    """
    labels = labels[:MAX_LABELS]
    image = Image.fromarray(pixels)
    width = max(image.width, MIN_WIDTH)
    canvas = Image.new("RGB", (width, image.height + LINE_HEIGHT * max(1, len(labels))), "white")
    canvas.paste(image, ((width - image.width) // 2, 0))
    draw = ImageDraw.Draw(canvas)
    fonts = os.path.join(matplotlib.get_data_path(), "fonts", "ttf")
    font = ImageFont.truetype(os.path.join(fonts, "DejaVuSans.ttf"), FONT_SIZE)
    lines = [(f"{share:.0%}  {' '.join(name.split())}", share) for name, share in labels]
    for i, (text, share) in enumerate(lines or [("no label", 0.0)]):
        top = image.height + LINE_HEIGHT * i
        if share:
            draw.rectangle((0, top, share * width, top + LINE_HEIGHT - 3), fill=PRESENT)
        draw.text((6, top + 2), text, fill="black", font=font)
    with write_atomically(path) as file:
        canvas.save(file, "PNG")
