"""Figures of IA-GCN on an image: its regions, their weights, the scores and the label graph."""

from __future__ import annotations

from typing import Dict, NamedTuple, Sequence, Tuple

import numpy as np
from matplotlib import patheffects
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from .label_graph import draw_heat_map, set_label_ticks, without_diagonal
from .style import FOUND, MISSED, WRONG, save_png, shorten

# Of the fused scores, of the two branches', and of the regions' boxes.
FUSED, GLOBAL, REGION = "#424a53", "#54aeff", "#8250df"
# Behind the scores of a label that is present.
PRESENT = "#dafbe1"
# How bright a weighted image is where no region is.
DIMMED = 0.15
# Room for labels beside one image, and in a row of the sheet of many.
MAX_LABELS, MAX_ROW_LABELS = 20, 10
# In pixels; enough for what an image's place on a sheet can show.
MAX_IMAGE_SIDE = 800


class Recognition(NamedTuple):
    """IA-GCN's outputs for an image, with its regions and label graph.

    C is the number of labels, n of regions.
    """

    name: str
    """What to call the image."""
    image: np.ndarray
    """(h, w, 3) uint8 RGB; may be smaller than the image itself, see `thumbnail`."""
    width: int
    height: int
    """Of the image itself, in pixels."""
    targets: np.ndarray
    """(C,) in {1, 0, -1 = unknown}."""
    scores: Dict[str, np.ndarray]
    """(C,) in [0, 1] each: "fused", and "global" and "region" of the branches there are."""
    presence: np.ndarray
    """a, (C,) in [0, 1]."""
    label_graph: Dict[str, np.ndarray]
    """(C, C) in [0, 1] each: "individual", and "statistical" and "fused" where there are such."""
    boxes: np.ndarray
    """(n, 4) of x0, y0, x1, y1 in the image's pixels; the best region by objectness first."""
    objectness: np.ndarray
    """(n,) in [0, 1]."""
    weights: np.ndarray
    """z, (n,) of any sign."""
    region_scores: np.ndarray
    """A_I^w, (n, C) in [0, 1]."""


def thumbnail(pixels: np.ndarray) -> np.ndarray:
    """An image (H, W, 3) uint8, made smaller where a side is over MAX_IMAGE_SIDE pixels."""
    image = Image.fromarray(pixels)
    image.thumbnail((MAX_IMAGE_SIDE, MAX_IMAGE_SIDE))
    return np.asarray(image)


def labels_to_show(recognition: Recognition, count: int = MAX_LABELS) -> np.ndarray:
    """Indices of up to `count` labels, by falling score: those present before all others."""
    scores = recognition.scores["fused"]
    chosen = np.lexsort((-scores, recognition.targets != 1))[:count]
    return chosen[np.argsort(-scores[chosen], kind="stable")]


def region_light(size: Tuple[int, int], boxes: np.ndarray, strength: np.ndarray) -> np.ndarray:
    """How bright an image is where its regions are: the strongest one over a pixel counts.

    Args:
        size: h and w.
        boxes: (n, 4) of x0, y0, x1, y1 in pixels.
        strength: (n,) in [0, 1].
    Returns:
        (h, w), DIMMED where no region is or its strength is 0, to 1.
    """
    light = np.full(size, DIMMED)
    for (x0, y0, x1, y1), value in zip(boxes.round().astype(int), strength):
        inside = light[y0:y1, x0:x1]
        np.maximum(inside, DIMMED + (1 - DIMMED) * value, out=inside)
    return light


def draw_recognition(
    recognition: Recognition,
    label_names: Sequence[str],
    threshold: float,
    max_regions: int,
    path: str,
) -> None:
    """An image, its regions, the same by weight, its scores and its label graph, as a PNG.

    The label graph is a heat map for each matrix there is. A_S and A_F have one scale, so that an
    edge is paler in A_F the less its labels are there; their diagonals are grey.

    Args:
        recognition: of the image.
        label_names: C names; the `labels_to_show` are shown.
        threshold: a label is predicted from this score on.
        max_regions: draw no more of them, the best by objectness.
        path: of the PNG.
    """
    shown = labels_to_show(recognition)
    figure = _keyed_figure((15, 9), [recognition], threshold)
    upper, lower = figure.subfigures(2, 1, height_ratios=(4, 5), hspace=0.04)
    row = upper.subplots(1, 4, width_ratios=COLUMN_WIDTHS)
    _draw_row(row, recognition, shown, label_names, threshold, max_regions)
    _head_columns(row)
    if len(shown) < len(label_names):
        some = f"{len(shown)} of {len(label_names)} labels"
        lower.suptitle(f"{some}: those known to be present, then the highest scores", size=10)
    _draw_label_graphs(lower, recognition, shown, label_names)
    _write_weights(figure, [row[2]], [recognition], max_regions)
    save_png(figure, path)


def draw_region_sheet(
    recognitions: Sequence[Recognition],
    label_names: Sequence[str],
    threshold: float,
    max_regions: int,
    path: str,
) -> None:
    """A row per image: itself, its regions, the same by weight, and its scores, as a PNG.

    Args: as `draw_recognition` takes them, of at least one image.
    """
    figure = _keyed_figure((13, 2.7 * len(recognitions) + 0.8), recognitions, threshold)
    rows = figure.subplots(len(recognitions), 4, squeeze=False, width_ratios=COLUMN_WIDTHS)
    for row, recognition in zip(rows, recognitions):
        shown = labels_to_show(recognition, MAX_ROW_LABELS)
        _draw_row(row, recognition, shown, label_names, threshold, max_regions)
    _head_columns(rows[0])
    _write_weights(figure, rows[:, 2], recognitions, max_regions)
    save_png(figure, path)


COLUMN_WIDTHS = (1, 1, 1, 1.2)


def _keyed_figure(size, recognitions: Sequence[Recognition], threshold: float) -> Figure:
    """With a key to the colours of the labels, where it is known which are there."""
    figure = Figure(figsize=size, dpi=100, layout="constrained")
    figure.get_layout_engine().set(h_pad=0.06)
    # It measures text faster than a figure of its own can.
    FigureCanvasAgg(figure)
    if any((recognition.targets != -1).any() for recognition in recognitions):
        figure.suptitle(
            f"labels found (green), wrong (red) and missed (orange) at {threshold:.0%}; "
            "green band: labels that are present",
            size=10,
        )
    return figure


def _head_columns(row) -> None:
    titles = ("image", "detected regions", "regions by weight $|z|$")
    for axes, title in zip(row, titles):
        axes.set_title(title, size=11)
    row[-1].legend(
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
        ncols=3,
        frameon=False,
        fontsize=9,
        handlelength=1,
        columnspacing=1.2,
    )


def _draw_row(row, recognition, shown, label_names, threshold, max_regions) -> None:
    """The image, its regions, the same by weight and the scores, on four axes."""
    boxes, weights = recognition.boxes[:max_regions], np.abs(recognition.weights[:max_regions])
    highest = weights.max(initial=0)
    strength = weights / (highest or 1)
    height, width = recognition.image.shape[:2]
    scale = np.array([width / recognition.width, height / recognition.height] * 2)
    light = region_light((height, width), boxes * scale, strength)[..., None]
    images = [recognition.image] * 2 + [(recognition.image * light).astype(np.uint8)]
    for axes, image in zip(row, images):
        # Without half a pixel's shift, and in the image's own pixels, as the boxes are.
        axes.imshow(image, extent=(0, recognition.width, recognition.height, 0))
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    _draw_boxes(row[1], boxes, np.ones(len(boxes)))
    _draw_boxes(row[2], boxes, strength)
    row[0].set_xlabel(shorten(recognition.name, 40), size=8, parse_math=False)
    _draw_scores(row[3], recognition, shown, label_names, threshold)
    total = len(recognition.boxes)
    if not total:
        row[1].set_xlabel("no regions", size=8)
        return
    best = f"the best {len(boxes)} of {total} by objectness"
    row[1].set_xlabel(best if len(boxes) < total else f"all {total}", size=8)
    row[2].set_xlabel(f"brightest: $|z|$ = {highest:.3g}", size=8)


def _draw_boxes(axes, boxes: np.ndarray, strength: np.ndarray) -> None:
    """The box of the highest strength, and among equals the first, on top."""
    for i in np.argsort(-strength, kind="stable")[::-1]:
        x0, y0, x1, y1 = boxes[i]
        axes.add_patch(
            Rectangle(
                (x0, y0),
                x1 - x0,
                y1 - y0,
                fill=False,
                edgecolor=REGION,
                linewidth=1.5,
                alpha=max(strength[i], DIMMED),
                clip_on=False,
                # On what is as dark as itself.
                path_effects=[patheffects.withStroke(linewidth=2.5, foreground="white")],
            )
        )


def _write_weights(figure, columns, recognitions, max_regions) -> None:
    """z in a corner of each box of weighted regions, the highest |z| first, where there is room."""
    # A text's extent is known once the layout is, which needs no second time.
    figure.get_layout_engine().execute(figure)
    figure.set_layout_engine("none")
    for axes, recognition in zip(columns, recognitions):
        axes.apply_aspect()
        boxes, weights = recognition.boxes[:max_regions], recognition.weights[:max_regions]
        # Two digits of the highest, be it tiny.
        highest = np.abs(weights).max(initial=0) or 1
        decimals = max(2, 1 - int(np.floor(np.log10(highest))))
        taken = []
        for i in np.argsort(-np.abs(weights), kind="stable"):
            x0, y0, x1, y1 = boxes[i]
            corners = [("left", "top"), ("right", "top"), ("left", "bottom"), ("right", "bottom")]
            for ha, va in corners:
                text = axes.text(
                    x0 if ha == "left" else x1,
                    y0 if va == "top" else y1,
                    # Without a minus before a zero.
                    f"{weights[i].round(decimals) + 0.0:.{decimals}f}".replace("-", "−"),
                    ha=ha,
                    va=va,
                    size=7,
                    color="white",
                    bbox={"facecolor": REGION, "edgecolor": "none", "pad": 1},
                )
                extent = text.get_window_extent().padded(2)
                if not any(extent.overlaps(other) for other in taken):
                    taken.append(extent)
                    break
                text.remove()


def _draw_scores(axes, recognition, shown, label_names, threshold) -> None:
    """Bars for each label of `shown`, from the top down; names have the colour of the verdict."""
    scores, targets = recognition.scores["fused"][shown], recognition.targets[shown]
    predicted = scores >= threshold
    places = np.arange(len(shown))
    for i in np.flatnonzero(targets == 1):
        axes.axhspan(i - 0.5, i + 0.5, color=PRESENT, linewidth=0)
    kinds = [
        ("fused", FUSED, "fused $\\hat y_f$", -0.19, 0.38),
        ("global", GLOBAL, "global $\\hat y_w$", 0.11, 0.22),
        ("region", REGION, "regions $\\hat y_r$", 0.33, 0.22),
    ]
    for kind, colour, title, shift, thickness in kinds:
        if kind in recognition.scores:
            values = recognition.scores[kind][shown]
            axes.barh(places + shift, values, thickness, color=colour, label=title)
    axes.axvline(threshold, color="0.4", linewidth=0.8, linestyle=":")
    names = [f"{shorten(label_names[i], 24)}  {score:.0%}" for i, score in zip(shown, scores)]
    axes.set_yticks(places, names, size=8, parse_math=False)
    axes.set_xticks([0, 0.5, 1], ["0", "½", "1"], size=8)
    for text, said, target in zip(axes.get_yticklabels(), predicted, targets):
        if said or target == 1:
            text.set_color({1: FOUND if said else MISSED, 0: WRONG}.get(int(target), "black"))
        else:
            text.set_color("0.4")
    axes.set(xlim=(0, 1), ylim=(len(shown) - 0.5, -0.5))
    if len(shown) < len(label_names):
        axes.set_xlabel(f"{len(shown)} of {len(label_names)} labels", size=8)
    axes.tick_params(length=0)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_label_graphs(figure, recognition, shown, label_names) -> None:
    """A heat map for each of the image's LCMs, of the labels of `shown`."""
    titles = {
        "statistical": "statistical LCM $A_S$",
        "individual": "individual LCM $A_I = a\\,a^{\\top}$, $a$ beside the label",
        "fused": "fused LCM $A_F = A_S \\odot A_I$",
    }
    graph = {
        kind: recognition.label_graph[kind][np.ix_(shown, shown)]
        for kind in titles
        if kind in recognition.label_graph
    }
    names = [shorten(label_names[i], 18) for i in shown]
    for axes, (kind, title) in zip(figure.subplots(1, 3), titles.items()):
        if kind not in graph:
            axes.axis("off")
            continue
        axes.set_title(title, size=11)
        if kind == "individual":
            draw_heat_map(axes, graph[kind], top=1.0)
        else:
            edges = without_diagonal(graph["statistical"])
            top = np.nanmax(edges, initial=0.0) or 1.0
            draw_heat_map(axes, without_diagonal(graph[kind]), top)
        set_label_ticks(axes, names)
        if kind == "individual":
            presence = [f"{name}  {recognition.presence[i]:.2f}" for name, i in zip(names, shown)]
            axes.set_yticks(range(len(shown)), presence, parse_math=False)
