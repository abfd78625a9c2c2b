"""Precision against recall over all thresholds, and the threshold of the best F1 of each label.

Pure functions of numpy arrays, as in metrics.py. n is the number of images, C the number of labels.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .label_blocks import label_blocks
from .metrics import check_predictions, check_shapes


class PrecisionRecallCurve(NamedTuple):
    """One label's precision and recall, with a point for each different score."""

    threshold: np.ndarray
    """(m,) float64, the scores there are, the highest first."""
    precision: np.ndarray
    """(m,) float64, percent, where the label is predicted from that score on."""
    recall: np.ndarray
    """The same of recall; NaN for a label without positives."""


class OperatingPoints(NamedTuple):
    """For each label the threshold of its best F1, and the measures there."""

    threshold: np.ndarray
    """(C,) float64 in [0, 1]; NaN, as are the next three, for a label without positives."""
    precision: np.ndarray
    """(C,) float64, percent."""
    recall: np.ndarray
    """(C,) float64, percent."""
    f1: np.ndarray
    """(C,) float64, percent."""
    positives: np.ndarray
    """(C,) int64, images that have the label."""


def precision_recall_curve(scores: np.ndarray, targets: np.ndarray) -> PrecisionRecallCurve:
    """Precision and recall of one label at every threshold that makes a difference.

    Args, Raises: as :func:`average_precision`; ignored entries count nowhere.
    """
    scores, positive = check_predictions(scores, targets, ndim=1)
    thresholds, correct, predicted = _counts(scores, positive, scores[scores >= 0])
    positives = correct[-1] if correct.size else 0
    recall = correct / positives if positives else np.full(correct.shape, np.nan)
    return PrecisionRecallCurve(thresholds, 100 * correct / predicted, 100 * recall)


def best_f1_points(scores: np.ndarray, targets: np.ndarray) -> OperatingPoints:
    """The threshold of the best F1 of each label, among the label's own scores.

    A label is predicted where its score is at least the threshold. Of equal F1, the highest
    threshold counts.

    Args, Raises: as :func:`multi_label_metrics`; ignored entries count nowhere.
    """
    _, num_labels = check_shapes(scores, targets, ndim=2)
    points = np.zeros((4, num_labels))
    positives = np.zeros(num_labels, np.int64)
    for labels, block in label_blocks(scores, targets):
        ranked, positive = check_predictions(*block, ndim=2)
        points[:, labels] = np.transpose([_best_f1_point(*pair) for pair in zip(ranked, positive)])
        positives[labels] = positive.sum(axis=1)
    return OperatingPoints(*points, positives)


def interpolated_precision(scores: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """The highest precision that each label has at a recall of at least 0, 1, ..., 100 percent.

    Every tenth of them is what 11-point average precision is the mean of.

    Args, Raises: as :func:`multi_label_metrics`; ignored entries count nowhere.
    Returns:
        (C, 101) float64, percent; NaN for a label without positives.
    """
    _, num_labels = check_shapes(scores, targets, ndim=2)
    curves = np.full((num_labels, 101), np.nan)
    for labels, block in label_blocks(scores, targets):
        for curve, label_scores, positive in zip(curves[labels], *check_predictions(*block, 2)):
            if positive.any():
                _, correct, predicted = _counts(label_scores, positive, label_scores[positive])
                highest = np.maximum.accumulate((correct / predicted)[::-1])[::-1]
                # In integers, as 3 / 10 < 0.1 * 3 in floating point.
                reached = np.searchsorted(100 * correct, np.arange(101) * correct[-1])
                curve[:] = 100 * highest[reached]
    return curves


def _best_f1_point(scores: np.ndarray, positive: np.ndarray) -> tuple[float, float, float, float]:
    """Threshold, precision, recall and F1 of one label, of what `check_predictions` returns.

    The best threshold is the score of a positive: below it, down to that of the next one, more
    images are predicted, and none of them rightly.
    """
    if not positive.any():
        return (np.nan,) * 4
    thresholds, correct, predicted = _counts(scores, positive, scores[positive])
    positives = correct[-1]
    f1 = 2 * correct / (predicted + positives)
    best = np.argmax(f1)
    precision, recall = correct[best] / predicted[best], correct[best] / positives
    return thresholds[best], 100 * precision, 100 * recall, 100 * f1[best]


def _counts(
    scores: np.ndarray, positive: np.ndarray, thresholds: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What is predicted of one label from each of some scores on.

    Args:
        scores, positive: (n,), as `check_predictions` returns them.
        thresholds: some of the scores.
    Returns:
        the different ones of `thresholds`, the highest first, (m,) float64; how many positives, and
        how many images, score as high or higher.
    """
    thresholds = np.unique(thresholds)[::-1]
    hits = np.sort(scores[positive])
    # What is ignored is at -inf.
    predicted = scores.size - np.searchsorted(np.sort(scores), thresholds)
    correct = hits.size - np.searchsorted(hits, thresholds)
    return thresholds.astype(np.float64), correct, predicted
