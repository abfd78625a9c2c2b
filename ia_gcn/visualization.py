"""Pictures of a run: training curve, predictions, label graph, regions."""

from __future__ import annotations

import json
from typing import Dict, List, NamedTuple, Sequence, Tuple

import numpy as np
from detectron2.utils.file_io import PathManager
from matplotlib import patheffects
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

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
        (map_axes, "ema/multi_label/mAP", {"marker": "o", "label": "their running mean"}),
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
        _draw_heat_map(axes, _without_diagonal(values))
        _set_label_ticks(axes, label_names if named else [])
    figure.savefig(path, dpi=110)


def _without_diagonal(values: np.ndarray) -> np.ndarray:
    return np.where(np.eye(len(values), dtype=bool), np.nan, values)


def _set_label_ticks(axes, names: Sequence[str]) -> None:
    # A label's name may have dollar signs.
    labels = {"labels": [_shorten(name, 24) for name in names], "parse_math": False}
    ticks = {"ticks": range(len(names)), "size": 7.5, **labels}
    axes.set_yticks(**ticks)
    axes.set_xticks(**ticks)
    axes.tick_params(axis="x", labelrotation=90)
    axes.tick_params(length=0)


def _draw_heat_map(axes, values: np.ndarray, top: float | None = None) -> None:
    """White at 0 to dark blue at `top`, the highest value unless given; grey where NaN."""
    if top is None:
        top = np.nanmax(values, initial=0.0) or 1.0
    axes.set_facecolor("0.85")
    image = axes.imshow(values, cmap="Blues", vmin=0, vmax=top)
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


# Of the fused scores, of the two branches', and of the regions' boxes.
FUSED, GLOBAL, REGION = "#424a53", "#54aeff", "#8250df"
# Behind the scores of a label that is present.
PRESENT = "#dafbe1"
# How bright a weighted picture is where no region is.
DIMMED = 0.15
# Room for labels beside one picture, and in a row of the sheet of many.
MAX_LABELS, MAX_ROW_LABELS = 20, 10
# In pixels; enough for what a picture's place on a sheet can show.
MAX_PICTURE_SIDE = 800


class Recognition(NamedTuple):
    """What IA-GCN says of a picture, and by which regions and label graph.

    C is the number of labels, n of regions.
    """

    name: str
    """What to call the picture."""
    picture: np.ndarray
    """(h, w, 3) uint8 RGB; may be smaller than the picture itself, see `thumbnail`."""
    width: int
    height: int
    """Of the picture itself, in pixels."""
    targets: np.ndarray
    """(C,) in {1, 0, -1 = unknown}."""
    scores: Dict[str, np.ndarray]
    """(C,) in [0, 1] each: "fused", and "global" and "region" of the branches there are."""
    presence: np.ndarray
    """a, (C,) in [0, 1]."""
    label_graph: Dict[str, np.ndarray]
    """(C, C) in [0, 1] each: "individual", and "statistical" and "fused" where there are such."""
    boxes: np.ndarray
    """(n, 4) of x0, y0, x1, y1 in the picture's pixels; the best region by objectness first."""
    objectness: np.ndarray
    """(n,) in [0, 1]."""
    weights: np.ndarray
    """z, (n,) of any sign."""
    region_scores: np.ndarray
    """A_I^w, (n, C) in [0, 1]."""


def thumbnail(picture: np.ndarray) -> np.ndarray:
    """A picture (H, W, 3) uint8, made smaller where a side is over MAX_PICTURE_SIDE pixels."""
    image = Image.fromarray(picture)
    image.thumbnail((MAX_PICTURE_SIDE, MAX_PICTURE_SIDE))
    return np.asarray(image)


def labels_to_show(recognition: Recognition, count: int = MAX_LABELS) -> np.ndarray:
    """Indices of up to `count` labels, by falling score: those present before all others."""
    scores = recognition.scores["fused"]
    chosen = np.lexsort((-scores, recognition.targets != 1))[:count]
    return chosen[np.argsort(-scores[chosen], kind="stable")]


def region_light(size: Tuple[int, int], boxes: np.ndarray, strength: np.ndarray) -> np.ndarray:
    """How bright a picture is where its regions are: the strongest one over a pixel counts.

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
    """A picture, its regions, the same by weight, its scores and its label graph, as a PNG.

    The label graph is a heat map for each matrix there is. A_S and A_F have one scale, so that an
    edge is paler in A_F the less its labels are there; their diagonals are grey.

    Args:
        recognition: of the picture.
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
        lower.suptitle(f"{some}: those known to be there, then the highest scores", size=10)
    _draw_label_graphs(lower, recognition, shown, label_names)
    _write_weights(figure, [row[2]], [recognition], max_regions)
    figure.savefig(path)


def draw_region_sheet(
    recognitions: Sequence[Recognition],
    label_names: Sequence[str],
    threshold: float,
    max_regions: int,
    path: str,
) -> None:
    """A row per picture: itself, its regions, the same by weight, and its scores, as a PNG.

    Args: as `draw_recognition` takes them, of at least one picture.
    """
    figure = _keyed_figure((13, 2.7 * len(recognitions) + 0.8), recognitions, threshold)
    rows = figure.subplots(len(recognitions), 4, squeeze=False, width_ratios=COLUMN_WIDTHS)
    for row, recognition in zip(rows, recognitions):
        shown = labels_to_show(recognition, MAX_ROW_LABELS)
        _draw_row(row, recognition, shown, label_names, threshold, max_regions)
    _head_columns(rows[0])
    _write_weights(figure, rows[:, 2], recognitions, max_regions)
    figure.savefig(path)


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
            "green band: what is there",
            size=10,
        )
    return figure


def _head_columns(row) -> None:
    titles = ("picture", "detected regions", "regions by weight $|z|$")
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
    """The picture, its regions, the same by weight and the scores, on four axes."""
    boxes, weights = recognition.boxes[:max_regions], np.abs(recognition.weights[:max_regions])
    highest = weights.max(initial=0)
    strength = weights / (highest or 1)
    height, width = recognition.picture.shape[:2]
    scale = np.array([width / recognition.width, height / recognition.height] * 2)
    light = region_light((height, width), boxes * scale, strength)[..., None]
    pictures = [recognition.picture] * 2 + [(recognition.picture * light).astype(np.uint8)]
    for axes, picture in zip(row, pictures):
        # Without half a pixel's shift, and in the picture's own pixels, as the boxes are.
        axes.imshow(picture, extent=(0, recognition.width, recognition.height, 0))
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    _draw_boxes(row[1], boxes, np.ones(len(boxes)))
    _draw_boxes(row[2], boxes, strength)
    row[0].set_xlabel(_shorten(recognition.name, 40), size=8, parse_math=False)
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
    names = [f"{_shorten(label_names[i], 24)}  {score:.0%}" for i, score in zip(shown, scores)]
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
    """A heat map for each of the picture's LCMs, of the labels of `shown`."""
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
    names = [_shorten(label_names[i], 18) for i in shown]
    for axes, (kind, title) in zip(figure.subplots(1, 3), titles.items()):
        if kind not in graph:
            axes.axis("off")
            continue
        axes.set_title(title, size=11)
        if kind == "individual":
            _draw_heat_map(axes, graph[kind], top=1.0)
        else:
            edges = _without_diagonal(graph["statistical"])
            top = np.nanmax(edges, initial=0.0) or 1.0
            _draw_heat_map(axes, _without_diagonal(graph[kind]), top)
        _set_label_ticks(axes, names)
        if kind == "individual":
            presence = [f"{name}  {recognition.presence[i]:.2f}" for name, i in zip(names, shown)]
            axes.set_yticks(range(len(shown)), presence, parse_math=False)


def _shorten(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"
