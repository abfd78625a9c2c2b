"""The measures of an evaluation, and the tables they are shown in."""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Dict, List, NamedTuple, Sequence, Tuple

import numpy as np
from tabulate import tabulate

from .frequency import FrequencyGroup, FrequencyGroups, measure_by_frequency
from .label_blocks import count_given
from .metrics import DEFAULT_CONVENTIONS, Conventions, all_and_top_metrics, multi_label_metrics
from .predictions import Predictions

# Of more labels, the AP of some with the highest and of some with the lowest is shown.
MAX_LABELS = 100
MAX_EXTREME = 12
# On a line.
MAX_NAMED = 10

SUMMARY = ("CP", "CR", "CF1", "OP", "OR", "OF1")


class Results(NamedTuple):
    """The measures of an evaluation, in percent, and what they were measured with."""

    summary: Dict[str, float]
    """Those of `summarize` and mAP_frequent, mAP_middle and mAP_rare."""
    ap: np.ndarray
    """(C,), NaN for a label without positives."""
    frequency: FrequencyGroups
    threshold: float
    top_k: int | None
    conventions: Conventions


def measure_predictions(
    predictions: Predictions,
    *,
    threshold: float = 0.5,
    top_k: int | None = 3,
    conventions: Conventions = DEFAULT_CONVENTIONS,
    known: np.ndarray | None = None,
    frequency_groups: Sequence[int] = (),
) -> Results:
    """The measures of an evaluation.

    Args:
        threshold, top_k, conventions, known: see `summarize`.
        frequency_groups: the `bounds` of `measure_by_frequency`.
    """
    _, scores, targets, _, label_counts = predictions
    settings = {"threshold": threshold, "conventions": conventions, "known": known}
    summary, ap = summarize(scores, targets, top_k, **settings)
    frequency = measure_by_frequency(ap, targets, label_counts, frequency_groups)
    summary.update(frequency.summary())
    return Results(summary, ap, frequency, threshold, top_k, conventions)


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
    if not top_k:
        metrics = multi_label_metrics(scores, targets, **settings)
    else:
        metrics, top = all_and_top_metrics(scores, targets, top_k, **settings)
    summary = OrderedDict((key, metrics[key]) for key in ("mAP", *SUMMARY))
    if top_k:
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


def average_precision_table(per_label: Dict[str, float], file: str) -> str:
    """The AP of each label by name, in up to four columns; without those that have none (NaN).

    Of more than MAX_LABELS labels, those of the highest and of the lowest AP.

    Args:
        file: where all are, for a line that says so.
    """
    named = [(name, ap) for name, ap in per_label.items() if not math.isnan(ap)]
    if len(named) <= MAX_LABELS:
        return _in_columns(named)
    ranked = sorted(named, key=lambda label: -label[1])
    return (
        f"{_in_columns(ranked[:MAX_EXTREME])}\n\n{_in_columns(ranked[-MAX_EXTREME:])}\n"
        f"These are the {MAX_EXTREME} highest and the {MAX_EXTREME} lowest AP of {len(named):,} "
        f"labels; all are in {file}."
    )


def _in_columns(named: Sequence[Tuple[str, float]]) -> str:
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
    """A line that names the labels whose AP is NaN, or some of them."""
    without = [name for name, ap in per_label.items() if math.isnan(ap)]
    return (
        f"{len(without)} label(s) without a positive are left out of mAP, CP and CR: "
        f"{_enumerate(without)}"
    )


def labels_without_negatives(targets: np.ndarray, label_names: Sequence[str]) -> str:
    """A line that names the labels which some images have and none is known not to have; "" where
    there are none.

    Args:
        targets: (n, C) in {1, 0, -1 = ignored}.
        label_names: C.
    """
    present, absent = count_given(targets)
    without = [label_names[i] for i in np.flatnonzero((present > 0) & (absent == 0))]
    if not without:
        return ""
    return (
        f"{len(without)} label(s) are known to be absent in no image, so that their AP is 100 "
        f"whatever the scores: {_enumerate(without)}"
    )


def _enumerate(names: List[str]) -> str:
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(names[:MAX_NAMED]) + more


def metrics_tables(metrics: Dict, top_k: int | None) -> str:
    """The content of a metrics.json as tables, of which `average_precision_table` is the last."""
    per_label = {name: math.nan if ap is None else ap for name, ap in metrics["AP"].items()}
    found = metrics["frequency"]
    groups = {name: FrequencyGroup(**group) for name, group in found["groups"].items()}
    frequency = FrequencyGroups(found["counted"], groups)
    parts = [summary_table(metrics, top_k), "", frequency_table(frequency)]
    parts += ["", average_precision_table(per_label, "metrics.json")]
    if any(map(math.isnan, per_label.values())):
        parts += ["", labels_without_positives(per_label)]
    return "\n".join(parts)
