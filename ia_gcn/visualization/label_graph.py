"""Heat maps of label graphs."""

from __future__ import annotations

from typing import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from .style import save_png, shorten

# More labels than this have no room for their names beside a heat map.
MAX_NAMED_LABELS = 100
# At most so many have room for a number in each cell.
MAX_NUMBERED_LABELS = 20


def plot_label_graph(
    conditional: np.ndarray, lcm: np.ndarray, label_names: Sequence[str], path: str, note: str = ""
) -> None:
    """Two heat maps side by side, P(j|i) and the statistical LCM, as a PNG.

    Diagonals are grey: they are 1 whatever the data.

    Args:
        conditional: (C, C); [i, j] is the share of the images with label i that have label j.
        lcm: (C, C), as `statistical_lcm` returns it.
        label_names: C names.
        path: of the PNG.
        note: a line above both.
    """
    named = len(label_names) <= MAX_NAMED_LABELS
    side = max(0.15 * len(label_names), 4.0) if named else 8.0
    figure = Figure(figsize=(2 * side + 3, side + 1.2), layout="constrained")
    maps = [
        (conditional, "how often label $j$ is present where $i$ is: $P(j|i)$"),
        (lcm, "statistical LCM $A_S$: edges $i \\rightarrow j$"),
    ]
    for axes, (values, title) in zip(figure.subplots(1, 2), maps):
        axes.set_title(title, size=max(11, 1.2 * side), pad=10)
        axes.set_ylabel("label $i$")
        axes.set_xlabel("label $j$")
        draw_heat_map(axes, without_diagonal(values))
        set_label_ticks(axes, label_names if named else [])
    if note:
        figure.suptitle(note)
    save_png(figure, path, dpi=110)


def without_diagonal(values: np.ndarray) -> np.ndarray:
    return np.where(np.eye(len(values), dtype=bool), np.nan, values)


def set_label_ticks(axes, names: Sequence[str]) -> None:
    # A label's name may have dollar signs.
    labels = {"labels": [shorten(name, 24) for name in names], "parse_math": False}
    ticks = {"ticks": range(len(names)), "size": 7.5, **labels}
    axes.set_yticks(**ticks)
    axes.set_xticks(**ticks)
    axes.tick_params(axis="x", labelrotation=90)
    axes.tick_params(length=0)


def draw_heat_map(axes, values: np.ndarray, top: float | None = None) -> None:
    """White at 0 to dark blue at `top`, the highest value unless given; grey where NaN."""
    if top is None:
        top = np.nanmax(values, initial=0.0) or 1.0
    # Not the background's, which an SVG leaves out.
    colours = colormaps["Blues"].with_extremes(bad="0.85")
    image = axes.imshow(values, cmap=colours, vmin=0, vmax=top)
    bar = axes.figure.colorbar(image, ax=axes, fraction=0.046, pad=0.03, aspect=24)
    bar.ax.tick_params(labelsize=8)
    if len(values) <= MAX_NUMBERED_LABELS:
        size = min(7, 110 / len(values))
        for (i, j), value in np.ndenumerate(values):
            # Not where it would read .00.
            if value >= 0.005:
                colour = "white" if value > 0.6 * top else "black"
                text = f"{value:.2f}".removeprefix("0")
                style = {"ha": "center", "va": "center", "in_layout": False}
                axes.text(j, i, text, color=colour, size=size, **style)
