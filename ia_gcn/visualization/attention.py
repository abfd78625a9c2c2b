"""Figures of what a model looked at for each label; running it for them; and the same as JSON.

C is the number of labels, H and W of an attention map's rows and columns.
"""

from __future__ import annotations

import math
from typing import Dict, NamedTuple, Sequence, Tuple

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

from ..errors import InputError
from .regions import DIMMED, thumbnail
from .style import FOUND, MISSED, WRONG, save_png, shorten

# Maps beside an image.
MAX_LABELS = 5
TITLES = {"found": FOUND, "wrong": WRONG, "missed": MISSED}


class AttendedImage(NamedTuple):
    """What a model looked at in an image for each label."""

    name: str
    """What to call the image."""
    image: np.ndarray
    """(h, w, 3) uint8 RGB; may be smaller than the image itself, see `thumbnail`."""
    width: int
    height: int
    """Of the image itself, in pixels."""
    targets: np.ndarray
    """(C,) in {1, 0, -1 = unknown}."""
    scores: np.ndarray
    """(C,) in [0, 1]."""
    attention: np.ndarray
    """(C, H, W), 0 or more."""
    window: Tuple[float, float, float, float]
    """x0, y0, x1, y1 of the part of the image that the model saw, in the image's pixels."""
    cell: Tuple[float, float]
    """Width and height of a cell of the maps in the image's pixels. The first one is in the upper
    left corner of the window; the last ones may reach beyond it."""


@torch.no_grad()
def attend(
    model: nn.Module,
    sample: Dict,
    pixels: np.ndarray,
    *,
    name: str = "",
    targets: torch.Tensor | None = None,
) -> AttendedImage:
    """Run a model whose `has_attention` is true on an image.

    Args:
        model: in evaluation mode.
        sample, pixels, name, targets: as `recognize` takes them.
    Raises:
        InputError: the model's output is not finite.
    """
    (result,) = model([sample])
    scores, attention = (result[key].float().cpu().numpy() for key in ("scores", "attention"))
    if not (np.isfinite(scores).all() and np.isfinite(attention).all()):
        raise InputError(f"MODEL.WEIGHTS: the model's output for {name} is not finite")
    height, width = sample["image"].shape[-2:]
    # The maps are as large as one of the feature maps that the head reads.
    shapes = model.backbone.output_shape()
    strides = [shapes[feature].stride for feature in model.label_head.in_features]
    stride = min(strides, key=lambda stride: abs(math.ceil(width / stride) - attention.shape[2]))
    x0, y0, x1, y1 = map(float, sample["window"])
    return AttendedImage(
        name=name,
        image=thumbnail(pixels),
        width=sample["width"],
        height=sample["height"],
        targets=np.full(len(scores), -1) if targets is None else targets.cpu().numpy(),
        scores=scores,
        attention=attention,
        window=(x0, y0, x1, y1),
        cell=(stride * (x1 - x0) / width, stride * (y1 - y0) / height),
    )


def likely_labels(attended: AttendedImage, threshold: float, count: int = MAX_LABELS) -> np.ndarray:
    """Indices of up to `count` labels: those from the threshold on, or else the likeliest one."""
    order = np.argsort(-attended.scores, kind="stable")[:count]
    return order[: max(1, int((attended.scores[order] >= threshold).sum()))]


def attention_light(attended: AttendedImage, label: int) -> np.ndarray:
    """How bright an image is where a label's attention is: (h, w), DIMMED to 1 at its highest."""
    weights = attended.attention[label]
    rows, columns = weights.shape
    height, width = attended.image.shape[:2]
    scale = width / attended.width, height / attended.height
    x0, y0, x1, y1 = np.rint(np.multiply(attended.window, scale * 2)).astype(int)
    # Of the whole map, of which the window is the upper left part.
    size = [
        max(1, round(cells * side * factor))
        for cells, side, factor in zip((columns, rows), attended.cell, scale)
    ]
    light = Image.fromarray(weights / (weights.max() or 1))
    light = np.asarray(light.resize(size, Image.Resampling.BILINEAR))[: y1 - y0, : x1 - x0]
    # By rounding, the map may end a pixel before the window.
    light = np.pad(light, [(0, y1 - y0 - len(light)), (0, x1 - x0 - light.shape[1])], "edge")
    # What the model did not see is dark.
    light = np.pad(light, [(y0, height - y1), (x0, width - x1)])
    return DIMMED + (1 - DIMMED) * light


def draw_attention_sheet(
    images: Sequence[AttendedImage], label_names: Sequence[str], threshold: float, path: str
) -> None:
    """A row per image: itself, and what was looked at for each of its likely labels, as a PNG.

    Args:
        images: at least one.
        label_names: C names.
        threshold: a label is predicted from this score on.
        path: of the PNG.
    """
    shown = [likely_labels(attended, threshold) for attended in images]
    columns = 1 + max(map(len, shown))
    figure = Figure((2.3 * columns, 2.4 * len(images) + 0.5), 100, layout="constrained")
    if any((attended.targets != -1).any() for attended in images):
        title = f"labels from {threshold:.0%} on: found (green) and wrong (red)"
    else:
        title = f"labels from {threshold:.0%} on"
    figure.suptitle(f"{title}; bright: what was looked at", size=10)
    rows = figure.subplots(len(images), columns, squeeze=False)
    for axes in rows.flat:
        axes.axis("off")
    for row, attended, labels in zip(rows, images, shown):
        row[0].imshow(attended.image)
        row[0].set_title(shorten(attended.name, 28), size=8, parse_math=False)
        for axes, label in zip(row[1:], labels):
            light = attention_light(attended, label)[..., None]
            axes.imshow((attended.image * light).astype(np.uint8))
            said, target = attended.scores[label] >= threshold, int(attended.targets[label])
            colour = {1: FOUND, 0: WRONG}.get(target, "black") if said else "0.4"
            text = f"{shorten(label_names[label], 22)}  {attended.scores[label]:.0%}"
            axes.set_title(text, size=8, color=colour, parse_math=False)
    save_png(figure, path)


def describe_attention(
    attended: AttendedImage, file_name: str, label_names: Sequence[str], threshold: float
) -> Dict:
    """What `draw_attention_sheet` draws of an image as JSON takes it, with numbers of 4 decimals.

    Args:
        attended: of the image.
        file_name: of the image.
        label_names, threshold: see there.
    """
    return {
        "file_name": file_name,
        "width": attended.width,
        "height": attended.height,
        "window": [round(side, 2) for side in attended.window],
        "cell": [round(side, 2) for side in attended.cell],
        "labels": [
            {
                "name": label_names[label],
                "score": round(float(attended.scores[label]), 4),
                "present": {1: True, 0: False}.get(int(attended.targets[label])),
                "attention": attended.attention[label].astype(np.float64).round(4).tolist(),
            }
            for label in likely_labels(attended, threshold)
        ],
    }
