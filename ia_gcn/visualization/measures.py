"""Images of an evaluation: calibration, and precision against recall."""

from __future__ import annotations

from typing import Sequence

import numpy as np
from matplotlib.figure import Figure

from ..evaluation.calibration import Calibration

MEAN, GAP = "#424a53", "#cf222e"
# How many of the best and how many of the worst labels have a curve of their own.
MAX_BEST = MAX_WORST = 4
# Of a label's name in a legend, in characters.
MAX_NAME = 28


def plot_reliability(calibration: Calibration, path: str) -> None:
    """How often labels are there against their probability, and how many pairs that is, as a PNG.

    Args:
        calibration: of `measure_calibration`; empty bins have no bar.
        path: of the PNG.
    """
    bins = len(calibration.count)
    edges = 100 * np.arange(bins) / bins
    bars = {"x": edges, "width": 100 / bins, "align": "edge", "edgecolor": "white"}
    figure = Figure(figsize=(5.5, 7), layout="constrained")
    shares, counts = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    shares.bar(height=np.nan_to_num(calibration.present), color="#54aeff", **bars)
    shares.plot([0, 100], [0, 100], color="0.4", linestyle=":", label="calibrated")
    shares.vlines(calibration.score, calibration.present, calibration.score, color=GAP, label="gap")
    shares.plot(calibration.score, calibration.present, "o", color=MEAN, markersize=4, label="bin")
    shares.set(xlim=(0, 100), ylim=(0, 100), ylabel="labels that are there (%)")
    error = f"expected calibration error: {calibration.error:.2f} %"
    shares.set_title(error, size=11)
    shares.legend(loc="upper left", frameon=False)
    counts.bar(height=calibration.count, color="0.6", **bars)
    counts.set(yscale="symlog", ylabel="pairs", xlabel="probability (%)")
    figure.savefig(path, dpi=120)


def plot_precision_recall(
    curves: np.ndarray, ap: np.ndarray, label_names: Sequence[str], path: str
) -> None:
    """The mean over the labels and the labels of the highest and the lowest AP, as a PNG.

    Args:
        curves: (C, 101) percent, as `interpolated_precision` returns them.
        ap: (C,) percent; NaN for a label without positives, which counts nowhere.
        label_names: C names.
        path: of the PNG.
    """
    # The highest first; NaN is put last.
    ranked = np.argsort(-ap, kind="stable")[: np.count_nonzero(~np.isnan(ap))]
    best, worst = ranked[:MAX_BEST], ranked[MAX_BEST:][-MAX_WORST:]
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    recall = np.arange(101)
    for shown, style in ((best, "-"), (worst, "--")):
        for i in shown:
            name = label_names[i]
            name = name if len(name) <= MAX_NAME else f"{name[: MAX_NAME - 1]}…"
            axes.plot(recall, curves[i], style, linewidth=1, label=f"{name}  {ap[i]:.1f}")
    if len(ranked):
        mean = curves[ranked].mean(axis=0)
        title = f"mean of {len(ranked)} labels  {ap[ranked].mean():.1f}"
        axes.plot(recall, mean, color=MEAN, linewidth=3, label=title)
        legend = figure.legend(loc="outside right upper", frameon=False, title="AP (%)")
        for text in legend.get_texts():
            # A label's name may have dollar signs.
            text.set_parse_math(False)
    axes.set(xlim=(0, 100), ylim=(0, 102), xlabel="recall (%)", ylabel="precision (%)")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
