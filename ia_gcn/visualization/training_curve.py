"""Loss and mAP of a training."""

from __future__ import annotations

import json
from typing import Dict, List, Sequence

from matplotlib.figure import Figure

from ..errors import InputError
from ..io.inputs import open_input
from .style import save_png


def read_training_log(path: str) -> List[Dict]:
    """The records of the metrics.json that detectron2 writes while it trains, one per line.

    Raises:
        InputError: there is no such file, or a line is not JSON.
    """
    try:
        with open_input(path) as file:
            return [json.loads(line) for line in file if line.strip()]
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None
    except ValueError as error:
        raise InputError(f"{path}: not a training log: {error}") from None


def plot_training_curve(records: Sequence[Dict], path: str) -> None:
    """Loss and, where the run was evaluated, mAP (and that of an EMA) by iteration, as a PNG.

    Args:
        records: as `read_training_log` returns them.
        path: of the PNG.
    """
    figure = Figure(figsize=(7, 5), layout="constrained")
    loss_axes, map_axes = figure.subplots(2, sharex=True)
    loss_axes.set_ylabel("training loss")
    map_axes.set_ylabel("mAP (%)")
    curves = [
        (loss_axes, "total_loss", {}),
        (map_axes, "multi_label/mAP", {"marker": "o", "label": "weights"}),
        (map_axes, "ema/multi_label/mAP", {"marker": "o", "label": "EMA of the weights"}),
    ]
    for axes, key, style in curves:
        points = [(record["iteration"], record[key]) for record in records if key in record]
        if points:
            axes.plot(*zip(*points), markersize=4, **style)
    if len(map_axes.lines) > 1:
        map_axes.legend()
    for axes in figure.axes:
        axes.grid(alpha=0.3)
    map_axes.set_xlabel("iteration")
    save_png(figure, path, dpi=120)
