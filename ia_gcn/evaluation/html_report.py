"""The report of an evaluation as one HTML file.

n is the number of images, C the number of labels.
"""

from __future__ import annotations

import base64
import math
import os
import re
from functools import lru_cache, partial
from typing import Callable, Dict, List, Mapping

import numpy as np
from matplotlib.figure import Figure

from ..io.files import write_atomically
from ..visualization import draw_confusions, draw_precision_recall, draw_reliability, to_svg
from .calibration import measure_calibration
from .confusion import confused_pairs, count_confusions
from .html_page import read_thumbnail, render_page
from .metrics import Conventions, label_measures
from .operating_points import best_f1_points, interpolated_precision
from .predictions import Predictions
from .report import SUMMARY, Results, image_range
from .thresholds import write_label_table

# Limits of what is shown, so that the page stays small whatever the number of labels.
MAX_LABELS_IN_TABLE = 1000
MAX_LABELS_WITH_IMAGES = 20
IMAGES_IN_A_GROUP = 3
MAX_PAIRS = 20
MAX_LABELS_IN_HEAT_MAP = 20
AVERAGE_PRECISIONS = {
    "all_points": "all points",
    "envelope": "VOC 2012, envelope",
    "eleven_points": "VOC 2007, 11 points",
}
# The longer side of an image in pixels.
THUMBNAIL_SIZE = 128


def write_report(
    folder: str,
    predictions: Predictions,
    results: Results,
    data_set: str,
    facts: Mapping[str, str],
    find_file: Callable[[object], str | None] = lambda image_id: None,
) -> None:
    """Write the report of an evaluation as an HTML page, report.html, and per_label.csv beside it.

    The page has all measures, those of each label, figures of precision against recall and of
    calibration, the pairs of labels that are confused most, and, for the labels with the most wrong
    decisions, images. Of more than MAX_LABELS_IN_TABLE labels, it has the measures of those of the
    highest and the lowest AP, and a link to per_label.csv, which has those of all. It loads nothing
    from elsewhere. Names of labels and files are escaped.

    Args:
        predictions: as `read_predictions` returns them.
        results: of `measure_predictions`.
        data_set: its name, for the title.
        facts: further facts about the evaluation, such as {"Checkpoint": path}.
        find_file: the file of an image by its id, local or of a kind that PathManager knows; None
            where it is not known. What can't be read is left out.
    """
    image_ids, scores, targets, names, _ = predictions
    summary, ap, frequency, threshold, top_k, conventions = results
    measures = label_measures(scores, targets, threshold)
    points = best_f1_points(scores, targets)
    calibration = measure_calibration(scores, targets)
    columns = {
        "images": measures.positives,
        "AP": ap,
        "precision": measures.precision,
        "recall": measures.recall,
        "F1": measures.f1,
        "best threshold": points.threshold,
        "F1 there": points.f1,
        "ECE": calibration.label_errors,
    }
    write_label_table(columns, names, os.path.join(folder, "per_label.csv"))
    # The figures are XML, which has no control characters; UTF-8 has no lone surrogates.
    names = [re.sub(r"[\x00-\x1f\x7f\ud800-\udfff\ufffe\uffff]", "\ufffd", name) for name in names]
    predictions = predictions._replace(label_names=names)
    mistakes = measures.wrong + measures.missed
    per_image = measures.positives.sum() / max(1, len(image_ids))
    shown = _labels_in_table(ap)
    rows = zip(*(column[shown].tolist() for column in columns.values()))
    page = {
        "data_set": data_set,
        "facts": {
            **facts,
            "Images": len(image_ids),
            "Labels": len(names),
            "Labels per image": f"{per_image:.2f}",
            "Threshold": f"{threshold:g} (a label is predicted from this probability on)",
            "Average precision": AVERAGE_PRECISIONS[conventions.ap],
            **_describe(conventions),
        },
        "highlights": [
            ("mAP", summary["mAP"]),
            ("CF1", summary["CF1"]),
            ("OF1", summary["OF1"]),
            ("ECE", calibration.error),
        ],
        "columns": ["mAP", *SUMMARY],
        "rows": _summary_rows(summary, top_k),
        "top_k": top_k,
        "counted": frequency.counted,
        "frequency": [
            (name, group.labels, image_range(group), group.mAP)
            for name, group in frequency.groups.items()
        ],
        "decisions": int(calibration.count.sum()),
        "mistakes": int(mistakes.sum()),
        "without_positives": [name for name, value in zip(names, ap) if math.isnan(value)],
        "precision_recall": _data_uri(
            draw_precision_recall(interpolated_precision(scores, targets), ap, names)
        ),
        "reliability": _data_uri(draw_reliability(calibration)),
        "labels": [(names[i], *row) for i, row in zip(shown, rows)],
        "examples": _examples(predictions, ap, mistakes, threshold, find_file),
        "names": names,
        "pairs": confused_pairs(scores, targets, threshold, MAX_PAIRS),
    }
    if page["pairs"]:
        frequent = np.argsort(-measures.positives, kind="stable")[:MAX_LABELS_IN_HEAT_MAP]
        page["frequent"] = len(frequent)
        page["confusions"] = _data_uri(_confusion_map(predictions, threshold, np.sort(frequent)))
    with write_atomically(os.path.join(folder, "report.html")) as file:
        file.write(render_page("report.html", page).encode("utf-8", "replace"))


def _labels_in_table(ap: np.ndarray) -> np.ndarray:
    """Indices of all labels; if they are too many, of those of the highest and the lowest AP."""
    if len(ap) <= MAX_LABELS_IN_TABLE:
        return np.arange(len(ap))
    # NaN is put last.
    ranked = np.argsort(-ap, kind="stable")[: np.count_nonzero(~np.isnan(ap))]
    half = MAX_LABELS_IN_TABLE // 2
    return np.concatenate([ranked[:half], ranked[half:][-half:]])


def _describe(conventions: Conventions) -> Dict[str, str]:
    """Facts on what is measured otherwise than by default."""
    facts = {}
    if conventions.cf1 == "mean_of_labels":
        facts["CF1"] = "mean of the labels' F1"
    if conventions.forced_top_k:
        facts["Top labels"] = "predicted below the threshold too"
    if conventions.ignored != "nowhere":
        where = {"in_f1": "in all measures but AP", "everywhere": "in all measures"}
        facts["Ignored labels"] = f"absent {where[conventions.ignored]}"
    if conventions.known_in_f1:
        facts["Known labels"] = "measured in all measures of the table but mAP"
    return facts


def _summary_rows(summary: Dict[str, float], top_k: int | None) -> List:
    rows = [("all labels", [summary[key] for key in ("mAP", *SUMMARY)])]
    if top_k:
        # mAP has no threshold, and so no top k.
        top = [summary[f"{key}_top{top_k}"] for key in SUMMARY]
        rows.append((f"top {top_k}", [math.nan, *top]))
    return rows


def _confusion_map(predictions: Predictions, threshold: float, labels: np.ndarray) -> Figure:
    confusions = count_confusions(
        predictions.scores, predictions.targets, threshold, labels, labels
    )
    rates = np.full(confusions.images.shape, np.nan)
    np.divide(confusions.wrong, confusions.images, out=rates, where=confusions.images > 0)
    return draw_confusions(rates, [predictions.label_names[i] for i in labels])


def _examples(predictions, ap, mistakes, threshold, find_file) -> List[Dict]:
    """The labels with the most mistakes, each with groups of images that could be read."""
    image_ids, scores, targets, names, _ = predictions
    read = lru_cache(maxsize=None)(partial(read_thumbnail, size=THUMBNAIL_SIZE))
    examples = []
    for label in np.argsort(-mistakes, kind="stable")[:MAX_LABELS_WITH_IMAGES]:
        groups = []
        for title, chosen in _choose_images(scores[:, label], targets[:, label]):
            images = []
            for i in chosen:
                image_id = image_ids[i].item()
                file_name = find_file(image_id)
                thumbnail = read(file_name) if file_name else None
                if thumbnail:
                    predicted = float(scores[i, label]) >= threshold
                    images.append(
                        {
                            "source": thumbnail,
                            "score": float(scores[i, label]),
                            "verdict": _verdict(predicted, targets[i, label] == 1),
                            "name": f"{os.path.basename(file_name)} (image {image_id})",
                        }
                    )
            if images:
                groups.append((title, images))
        if groups:
            examples.append({"name": names[label], "ap": float(ap[label]), "groups": groups})
    return examples


def _choose_images(scores: np.ndarray, targets: np.ndarray) -> List:
    """Of one label: the images of three groups, as titles and indices; the most telling first."""
    falling = np.argsort(-scores, kind="stable")
    present, absent = falling[targets[falling] == 1], falling[targets[falling] == 0]
    best = present[:IMAGES_IN_A_GROUP]
    worst = present[len(best) :][::-1][:IMAGES_IN_A_GROUP]
    return [
        ("Present, highest probability", best),
        ("Present, lowest probability", worst),
        ("Absent, highest probability", absent[:IMAGES_IN_A_GROUP]),
    ]


def _verdict(predicted: bool, present: bool) -> str:
    if predicted:
        return "found" if present else "wrong"
    return "missed" if present else "rejected"


def _data_uri(figure: Figure) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(to_svg(figure)).decode()}"
