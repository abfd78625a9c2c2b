"""Figures of an evaluation: calibration, precision against recall, and confused labels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Sequence

import numpy as np
from matplotlib.figure import Figure

from .label_graph import draw_heat_map, set_label_ticks
from .style import save_png, shorten

if TYPE_CHECKING:
    from ..evaluation.calibration import Calibration

MEAN, GAP = "#424a53", "#cf222e"
# How many of the best and how many of the worst labels have a curve of their own.
MAX_BEST = MAX_WORST = 4
# Of a label's name in a legend, in characters.
MAX_NAME = 28


def plot_reliability(calibration: Calibration, path: str) -> None:
    """`draw_reliability`, as a PNG at `path`."""
    save_png(draw_reliability(calibration), path, dpi=150)


def draw_reliability(calibration: Calibration) -> Figure:
    """How often labels are present against their probability, and how many pairs that is.

    Args:
        calibration: of `measure_calibration`; empty bins have no bar.
    """
    bins = len(calibration.count)
    edges = 100 * np.arange(bins) / bins
    bars = {"x": edges, "width": 100 / bins, "align": "edge", "edgecolor": "white"}
    figure = Figure(figsize=(5, 5.2), layout="constrained")
    shares, counts = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    shares.bar(height=np.nan_to_num(calibration.present), color="#54aeff", **bars)
    shares.plot([0, 100], [0, 100], color="0.4", linestyle=":", label="calibrated")
    shares.vlines(calibration.score, calibration.present, calibration.score, color=GAP, label="gap")
    shares.plot(calibration.score, calibration.present, "o", color=MEAN, markersize=4, label="bin")
    shares.set(xlim=(0, 100), ylim=(0, 100), ylabel="labels that are present (%)")
    error = f"expected calibration error: {calibration.error:.2f} %"
    shares.set_title(error, size=11)
    shares.legend(loc="upper left", frameon=False)
    counts.bar(height=calibration.count, color="0.6", **bars)
    counts.set(yscale="symlog", ylabel="pairs", xlabel="probability (%)")
    return figure


def plot_precision_recall(
    curves: np.ndarray, ap: np.ndarray, label_names: Sequence[str], path: str
) -> None:
    """`draw_precision_recall`, as a PNG at `path`."""
    save_png(draw_precision_recall(curves, ap, label_names), path, dpi=150)


def draw_precision_recall(curves: np.ndarray, ap: np.ndarray, label_names: Sequence[str]) -> Figure:
    """The mean over the labels and the labels of the highest and the lowest AP.

    Args:
        curves: (C, 101) percent, as `interpolated_precision` returns them.
        ap: (C,) percent; NaN for a label without positives, which counts nowhere.
        label_names: C names.
    """
    # The highest first; NaN is put last.
    ranked = np.argsort(-ap, kind="stable")[: np.count_nonzero(~np.isnan(ap))]
    best, worst = ranked[:MAX_BEST], ranked[MAX_BEST:][-MAX_WORST:]
    figure = Figure(figsize=(5, 5.2), layout="constrained")
    axes = figure.subplots()
    recall = np.arange(101)
    for shown, style in ((best, "-"), (worst, "--")):
        for i in shown:
            title = f"{shorten(label_names[i], MAX_NAME)}  {ap[i]:.1f}"
            axes.plot(recall, curves[i], style, linewidth=1, label=title)
    if len(ranked):
        mean = curves[ranked].mean(axis=0)
        title = f"mean of {len(ranked)} labels  {ap[ranked].mean():.1f}"
        axes.plot(recall, mean, color=MEAN, linewidth=3, label=title)
        below = {"loc": "outside lower center", "ncols": 2, "frameon": False}
        legend = figure.legend(title="AP (%)", **below)
        for text in legend.get_texts():
            # A label's name may have dollar signs.
            text.set_parse_math(False)
    axes.set(xlim=(0, 100), ylim=(0, 102), xlabel="recall (%)", ylabel="precision (%)")
    axes.grid(alpha=0.3)
    return figure


def draw_confusions(rates: np.ndarray, label_names: Sequence[str]) -> Figure:
    """A heat map of how often a label is wrongly predicted where another one is present.

    Args:
        rates: (C, C) in [0, 1]; [i, j] is for label j where label i is present, NaN (grey) where
            that is not known, as on the diagonal.
        label_names: C names.
    """
    side = max(4.0, 0.3 * len(label_names))
    figure = Figure(figsize=(side + 2, side + 1.2), layout="constrained")
    axes = figure.subplots()
    axes.set_ylabel("present label")
    axes.set_xlabel("label predicted wrongly")
    draw_heat_map(axes, rates)
    set_label_ticks(axes, label_names)
    return figure
