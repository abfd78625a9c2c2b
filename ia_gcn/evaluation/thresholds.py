"""Files with the threshold of each label's best F1, and with other figures of each label."""

from __future__ import annotations

import csv
import json
import math
import os
from typing import Mapping, Sequence

import numpy as np

from ..io.files import write_text_atomically
from .operating_points import OperatingPoints


def write_thresholds(
    points: OperatingPoints, label_names: Sequence[str], path: str | os.PathLike[str]
) -> None:
    """Write {"label": threshold} as JSON; a label without positives is left out."""
    thresholds = {
        name: threshold
        for name, threshold in zip(label_names, points.threshold.tolist())
        if not math.isnan(threshold)
    }
    with write_text_atomically(path) as file:
        json.dump(thresholds, file, indent=1, ensure_ascii=False)


def write_operating_points(
    points: OperatingPoints, label_names: Sequence[str], path: str | os.PathLike[str]
) -> None:
    """`write_label_table` of the fields of `OperatingPoints`."""
    write_label_table(points._asdict(), label_names, path)


def write_label_table(
    columns: Mapping[str, np.ndarray], label_names: Sequence[str], path: str | os.PathLike[str]
) -> None:
    """Write a CSV with a row for each label: its name and its figures, empty where they are NaN.

    Args:
        columns: (C,) figures by what is to stand above them.
        label_names: C. What UTF-8 can't have of them is replaced.
    """
    with write_text_atomically(path, errors="replace") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("label", *columns))
        for name, *row in zip(label_names, *(values.tolist() for values in columns.values())):
            writer.writerow((name, *("" if math.isnan(value) else value for value in row)))
