"""Pictures of a run: training curve, predictions, label graph."""

from __future__ import annotations

import json
from typing import Dict, List, Sequence

import numpy as np
from detectron2.utils.file_io import PathManager
from matplotlib.figure import Figure

from .data.dataset_mapper import read_picture
from .errors import InputError

FOUND, WRONG, MISSED = "#1a7f37", "#cf222e", "#bc6c00"


def read_training_log(path: str) -> List[Dict]:
    """The records of the metrics.json that detectron2 writes while it trains, one per line.

    Raises:
        InputError: there is no such file, or a line is not JSON.
    """
    try:
        with PathManager.open(path, "r") as file:
            return [json.loads(line) for line in file if line.strip()]
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None
    except ValueError as error:
        raise InputError(f"{path}: not a training log: {error}") from None


def plot_training_curve(records: Sequence[Dict], path: str) -> None:
    """Loss and, where the run was evaluated, mAP over the iterations, as a PNG.

    Args:
        records: as `read_training_log` returns them.
        path: of the PNG.
    """
    figure = Figure(figsize=(7, 5), layout="constrained")
    loss_axes, map_axes = figure.subplots(2, sharex=True)
    curves = [
        (loss_axes, "total_loss", "training loss", ""),
        (map_axes, "multi_label/mAP", "mAP (%)", "o"),
    ]
    for axes, key, label, marker in curves:
        points = [(record["iteration"], record[key]) for record in records if key in record]
        if points:
            axes.plot(*zip(*points), marker=marker, markersize=4)
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    map_axes.set_xlabel("iteration")
    figure.savefig(path, dpi=120)


def draw_prediction_sheet(
    pictures: Sequence[Dict], label_names: Sequence[str], threshold: float, path: str
) -> None:
    """Pictures with the labels that were found, wrongly found and missed, as a PNG.

    Args:
        pictures: at least one dict with file_name, scores (C,) in [0, 1] and targets (C,) in
            {1, 0, -1 = ignored, shown nowhere}.
        label_names: C names.
        threshold: a label is predicted from this score on.
        path: of the PNG.
    """
    columns = min(6, len(pictures))
    rows = -(-len(pictures) // columns)
    figure = Figure(figsize=(2.3 * columns, 2.9 * rows))
    title = f"found (green), wrong (red) and missed (orange) at {threshold:.0%}"
    figure.suptitle(title, size=10, y=0.98, va="bottom")
    figure.subplots_adjust(0, 0, 1, 0.97, wspace=0.08, hspace=0.3)
    for axes in figure.subplots(rows, columns, squeeze=False).flat:
        axes.axis("off")
    for axes, picture in zip(figure.axes, pictures):
        axes.imshow(read_picture(picture["file_name"]))
        predicted = picture["scores"] >= threshold
        present, absent = picture["targets"] == 1, picture["targets"] == 0
        verdicts = [
            (predicted & present, FOUND),
            (predicted & absent, WRONG),
            (~predicted & present, MISSED),
        ]
        for line, (chosen, colour) in enumerate(verdicts):
            labels = [
                f"{label_names[i]} {picture['scores'][i]:.0%}" for i in np.flatnonzero(chosen)
            ]
            axes.text(
                0.5,
                -0.06 - 0.11 * line,
                _shorten(", ".join(labels), 38),
                color=colour,
                size=7,
                ha="center",
                va="top",
                transform=axes.transAxes,
            )
    figure.savefig(path, dpi=100, bbox_inches="tight", pad_inches=0.15)


# More labels than this have no room for their names beside a heat map.
MAX_NAMED_LABELS = 100
# At most so many have room for a number in each cell.
MAX_NUMBERED_LABELS = 20


def plot_label_graph(
    conditional: np.ndarray, lcm: np.ndarray, label_names: Sequence[str], path: str
) -> None:
    """Two heat maps side by side, P(j|i) and the statistical LCM, as a PNG.

    Diagonals are grey: they are 1 whatever the data.

    Args:
        conditional: (C, C); [i, j] is the share of the images with label i that have label j.
        lcm: (C, C), as `statistical_lcm` returns it.
        label_names: C names.
        path: of the PNG.
    """
    named = len(label_names) <= MAX_NAMED_LABELS
    side = max(0.15 * len(label_names), 4.0) if named else 8.0
    figure = Figure(figsize=(2 * side + 3, side + 1.2), layout="constrained")
    maps = [
        (conditional, "how often label $j$ is there where $i$ is: $P(j|i)$"),
        (lcm, "statistical LCM $A_S$: edges $i \\rightarrow j$"),
    ]
    for axes, (values, title) in zip(figure.subplots(1, 2), maps):
        axes.set_title(title, size=max(11, 1.2 * side), pad=10)
        axes.set_ylabel("label $i$")
        axes.set_xlabel("label $j$")
        _draw_heat_map(axes, np.array(values, dtype=float))
        # A label's name may have dollar signs.
        names = {"labels": [_shorten(name, 24) for name in label_names], "parse_math": False}
        ticks = {"ticks": range(len(label_names)), "size": 7.5, **names} if named else {"ticks": []}
        axes.set_yticks(**ticks)
        axes.set_xticks(**ticks)
        axes.tick_params(axis="x", labelrotation=90)
        axes.tick_params(length=0)
    figure.savefig(path, dpi=110)


def _draw_heat_map(axes, values: np.ndarray) -> None:
    np.fill_diagonal(values, np.nan)
    top = np.nanmax(values, initial=0.0) or 1.0
    axes.set_facecolor("0.85")
    image = axes.imshow(values, cmap="Blues", vmin=0, vmax=top)
    axes.figure.colorbar(image, ax=axes, fraction=0.046, pad=0.03, aspect=24)
    if len(values) <= MAX_NUMBERED_LABELS:
        for (i, j), value in np.ndenumerate(values):
            if value > 0:
                colour = "white" if value > 0.6 * top else "black"
                text = f"{value:.2f}".removeprefix("0")
                axes.text(j, i, text, color=colour, size=7, ha="center", va="center")


def _shorten(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"
