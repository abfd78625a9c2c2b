"""mAP of frequent, middle and rare labels.

Pure functions of numpy arrays, as in metrics.py. n is the number of images, C the number of labels.
"""

from __future__ import annotations

from typing import Dict, NamedTuple, Sequence

import numpy as np

from .label_blocks import count_given

# From the rarest on.
GROUPS = ("rare", "middle", "frequent")


class FrequencyGroup(NamedTuple):
    """Labels that are about as frequent as each other."""

    labels: int
    """How many of them are measured."""
    fewest: int
    """Images of the rarest of them; 0 where there is no label."""
    most: int
    """Images of the most frequent one."""
    mAP: float
    """Mean of their AP, percent; NaN where there is no label."""


class FrequencyGroups(NamedTuple):
    """The groups of an evaluation."""

    counted: str
    """Whose images count: training or test."""
    groups: Dict[str, FrequencyGroup]
    """frequent, middle and rare."""

    def summary(self) -> Dict[str, float]:
        """mAP_frequent, mAP_middle and mAP_rare in percent, of groups that have a label."""
        return {f"mAP_{name}": group.mAP for name, group in self.groups.items() if group.labels}


def measure_by_frequency(
    ap: np.ndarray,
    targets: np.ndarray,
    label_counts: Sequence[int] | None = None,
    bounds: Sequence[int] = (),
) -> FrequencyGroups:
    """The mAP of frequent, middle and rare labels, of those that have an AP.

    Args:
        ap: (C,) percent, NaN for a label without positives, see `multi_label_metrics`.
        targets: (n, C) in {1, 0, -1 = ignored}, of the images that are measured.
        label_counts: (C,) training images that have each label. None, where they are not known: the
            images that are measured count.
        bounds: a label with at most the lower number of training images is rare, with at most the
            higher one middle: (10, 100) are the groups of LVIS (Gupta et al., CVPR 2019), (19, 100)
            those of VOC-MLT and COCO-MLT (Wu et al., ECCV 2020). Without them, and where the images
            that are measured count: thirds of the labels, of which the rarer ones have a label more
            where there are not three times as many. Of equally frequent labels, the first are taken
            for rarer.
    """
    if label_counts is None:
        counts, bounds = count_given(targets)[0], ()
    else:
        counts = np.asarray(label_counts)
    measured = np.flatnonzero(~np.isnan(ap))
    order = measured[np.argsort(counts[measured], kind="stable")]
    if len(bounds):
        parts = np.split(order, np.searchsorted(counts[order], sorted(bounds), side="right"))
    else:
        parts = np.array_split(order, len(GROUPS))
    groups = {name: _measure(ap[part], counts[part]) for name, part in zip(GROUPS, parts)}
    counted = "test" if label_counts is None else "training"
    return FrequencyGroups(counted, dict(reversed(groups.items())))


def _measure(ap: np.ndarray, counts: np.ndarray) -> FrequencyGroup:
    if not ap.size:
        return FrequencyGroup(0, 0, 0, float("nan"))
    return FrequencyGroup(ap.size, int(counts.min()), int(counts.max()), float(ap.mean()))
