"""A figure of what labels say of each other for given predictions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure

from .style import save_png

if TYPE_CHECKING:
    from ..analysis.label_headroom import Headroom

MODEL, PRIOR, CEILING = "#8c959f", "#0969da", "#bf8700"


def plot_headroom(headroom: Headroom, path: str) -> None:
    """`draw_headroom`, as a PNG at `path`."""
    save_png(draw_headroom(headroom), path, dpi=150)


def draw_headroom(headroom: Headroom) -> Figure:
    """mAP by the share of an image's labels that are known, and by the labels' frequency."""
    figure = Figure(figsize=(9.5, 3.8), layout="constrained")
    known, groups = figure.subplots(1, 2, width_ratios=(3, 2))
    shares = [0, *(100 * share for share in headroom.map_known)]
    lines = (
        (
            "the predictions as they are",
            MODEL,
            [headroom.map, *(k.without_prior for k in headroom.map_known.values())],
        ),
        (
            "with the label prior",
            PRIOR,
            [headroom.map_with_prior, *(k.with_prior for k in headroom.map_known.values())],
        ),
    )
    for label, colour, intervals in lines:
        known.plot(shares, [i.value for i in intervals], "o-", color=colour, label=label)
        low, high = [i.low for i in intervals], [i.high for i in intervals]
        known.fill_between(shares, low, high, color=colour, alpha=0.15, linewidth=0)
    known.axhline(
        headroom.map_ceiling.value,
        color=CEILING,
        linestyle="--",
        label="all labels but the one known",
    )
    known.set(xlabel="labels that are known (%)", ylabel="mAP of the others (%)", xticks=shares)
    figure.legend(loc="outside upper left", ncols=3, frameon=False)

    places = np.arange(len(headroom.by_frequency))
    bars = (("map", MODEL), ("map_with_prior", PRIOR), ("map_ceiling", CEILING))
    for i, (name, colour) in enumerate(bars):
        heights = [group[name] for group in headroom.by_frequency.values()]
        groups.bar(places + 0.27 * (i - 1), heights, 0.25, color=colour)
    names = [
        f"{name}\n{group['fewest']}–{group['most']}"
        for name, group in headroom.by_frequency.items()
    ]
    groups.set(xticks=places, xticklabels=names, xlabel="labels, by their images; none known")
    return figure
