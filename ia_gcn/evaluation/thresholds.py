"""Files with the threshold of each label's best F1."""

from __future__ import annotations

import csv
import json
import math
import os
from typing import Sequence

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
    """Write a CSV with a row for each label: its name and the fields of `OperatingPoints`.

    Cells are empty where a label has no positives.
    """
    with write_text_atomically(path) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("label", *OperatingPoints._fields))
        for name, *row in zip(label_names, *(values.tolist() for values in points)):
            writer.writerow((name, *("" if math.isnan(value) else value for value in row)))
