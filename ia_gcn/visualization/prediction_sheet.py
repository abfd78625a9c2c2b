"""Images with the labels that a model finds in them."""

from __future__ import annotations

from typing import Dict, Sequence

import numpy as np
from matplotlib.figure import Figure

from ..data.dataset_mapper import read_image
from .style import FOUND, MISSED, WRONG, save_png, shorten


def draw_prediction_sheet(
    images: Sequence[Dict], label_names: Sequence[str], threshold: float, path: str
) -> None:
    """Images with the labels that were found, wrongly found and missed, as a PNG.

    Args:
        images: at least one dict with file_name, scores (C,) in [0, 1] and targets (C,) in
            {1, 0, -1 = ignored, shown nowhere}.
        label_names: C names.
        threshold: a label is predicted from this score on.
        path: of the PNG.
    """
    columns = min(6, len(images))
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(2.3 * columns, 2.9 * rows))
    title = f"found (green), wrong (red) and missed (orange) at {threshold:.0%}"
    figure.suptitle(title, size=10, y=0.98, va="bottom")
    figure.subplots_adjust(0, 0, 1, 0.97, wspace=0.08, hspace=0.3)
    for axes in figure.subplots(rows, columns, squeeze=False).flat:
        axes.axis("off")
    for axes, image in zip(figure.axes, images):
        axes.imshow(read_image(image["file_name"]))
        predicted = image["scores"] >= threshold
        present, absent = image["targets"] == 1, image["targets"] == 0
        verdicts = [
            (predicted & present, FOUND),
            (predicted & absent, WRONG),
            (~predicted & present, MISSED),
        ]
        for line, (chosen, colour) in enumerate(verdicts):
            labels = [f"{label_names[i]} {image['scores'][i]:.0%}" for i in np.flatnonzero(chosen)]
            axes.text(
                0.5,
                -0.06 - 0.11 * line,
                shorten(", ".join(labels), 38),
                color=colour,
                size=7,
                ha="center",
                va="top",
                transform=axes.transAxes,
            )
    save_png(figure, path, dpi=100, bbox_inches="tight", pad_inches=0.15)
