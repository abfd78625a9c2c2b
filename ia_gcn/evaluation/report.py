"""The measures of an evaluation, and the tables they are shown in."""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Dict, Sequence, Tuple

import numpy as np
from tabulate import tabulate

from .frequency import FrequencyGroup, FrequencyGroups
from .metrics import multi_label_metrics

# Whose AP is shown; all are in metrics.json.
MAX_LABELS = 100
# In a warning.
MAX_NAMED = 10

SUMMARY = ("CP", "CR", "CF1", "OP", "OR", "OF1")


def summarize(
    scores: np.ndarray, targets: np.ndarray, top_k: int | None, **settings
) -> Tuple[Dict[str, float], np.ndarray]:
    """The measures of an evaluation.

    Args:
        scores, targets: (n, C), see `multi_label_metrics`.
        top_k: k of the further six figures; None leaves them out.
        settings: threshold, conventions and known, see there.
    Returns:
        mAP and those of SUMMARY, the latter also with _top<k> appended; and the AP of each label,
        (C,). In percent.
    """
    metrics = multi_label_metrics(scores, targets, **settings)
    summary = OrderedDict((key, metrics[key]) for key in ("mAP", *SUMMARY))
    if top_k:
        top = multi_label_metrics(scores, targets, top_k=top_k, **settings)
        summary.update((f"{key}_top{top_k}", top[key]) for key in SUMMARY)
    return summary, metrics["AP"]


def summary_table(summary: Dict[str, float], top_k: int | None) -> str:
    """What `summarize` returned first, with a row for all labels and one for the top k."""
    rows = [["all", *(summary[key] for key in ("mAP", *SUMMARY))]]
    if top_k:
        rows.append([f"top {top_k}", "", *(summary[f"{key}_top{top_k}"] for key in SUMMARY)])
    return tabulate(rows, ["labels", "mAP", *SUMMARY], floatfmt=".2f", tablefmt="pipe")


def frequency_table(frequency: FrequencyGroups) -> str:
    """The mAP of frequent, middle and rare labels, and how frequent these are."""
    rows = [
        [name, group.labels, image_range(group), group.mAP if group.labels else ""]
        for name, group in frequency.groups.items()
    ]
    headers = ["", "labels", f"{frequency.counted} images of each", "mAP"]
    align = ["left", "right", "right", "right"]
    return tabulate(rows, headers, floatfmt=".2f", tablefmt="pipe", colalign=align)


def image_range(group: FrequencyGroup) -> str:
    """How many images the labels of a group have."""
    if not group.labels:
        return "–"
    if group.fewest == group.most:
        return f"{group.most:,}"
    return f"{group.fewest:,} to {group.most:,}"


def average_precision_table(per_label: Dict[str, float]) -> str:
    """The AP of each label by name, in up to four columns; without those that have none (NaN)."""
    named = [(name, ap) for name, ap in per_label.items() if not math.isnan(ap)]
    columns = min(4, max(1, len(named)))
    cells = [
        [cell for pair in named[i : i + columns] for cell in pair]
        for i in range(0, len(named), columns)
    ]
    return tabulate(cells, ["label", "AP"] * columns, floatfmt=".2f", tablefmt="pipe")


def summary_line(summary: Dict[str, float]) -> str:
    """The most important measures on one line."""
    return ", ".join(f"{key} {summary[key]:.2f}" for key in ("mAP", "CF1", "OF1"))


def labels_without_positives(per_label: Dict[str, float]) -> str:
    """A line that names the labels whose AP is NaN."""
    without = [name for name, ap in per_label.items() if math.isnan(ap)]
    return (
        f"{len(without)} label(s) without a positive are left out of mAP, CP and CR: "
        f"{', '.join(without)}"
    )


def labels_without_negatives(targets: np.ndarray, label_names: Sequence[str]) -> str:
    """A line that names the labels which some images have and none is known not to have; "" where
    there are none.

    Args:
        targets: (n, C) in {1, 0, -1 = ignored}.
        label_names: C.
    """
    without = np.flatnonzero((targets == 1).any(axis=0) & ~(targets == 0).any(axis=0))
    if not len(without):
        return ""
    shown = ", ".join(label_names[i] for i in without[:MAX_NAMED])
    more = f" and {len(without) - MAX_NAMED} more" if len(without) > MAX_NAMED else ""
    return (
        f"{len(without)} label(s) are known to be absent in no image, so that their AP is 100 "
        f"whatever the scores: {shown}{more}"
    )


def metrics_tables(metrics: Dict, top_k: int | None) -> str:
    """The content of a metrics.json as tables; of more than MAX_LABELS labels the summary alone."""
    per_label = {name: math.nan if ap is None else ap for name, ap in metrics["AP"].items()}
    found = metrics["frequency"]
    groups = {name: FrequencyGroup(**group) for name, group in found["groups"].items()}
    frequency = FrequencyGroups(found["counted"], groups)
    parts = [summary_table(metrics, top_k), "", frequency_table(frequency)]
    if len(per_label) <= MAX_LABELS:
        parts += ["", average_precision_table(per_label)]
    if any(map(math.isnan, per_label.values())):
        parts += ["", labels_without_positives(per_label)]
    return "\n".join(parts)
