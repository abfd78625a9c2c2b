"""Calibration: whether probabilities agree with how often labels are present.

Pure functions of numpy arrays, as in metrics.py.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .metrics import check_predictions


class Calibration(NamedTuple):
    """(image, label) pairs by their probability, in M bins of equal width."""

    count: np.ndarray
    """(M,) int64, pairs in each bin."""
    score: np.ndarray
    """(M,) float64, percent: their mean probability; NaN in an empty bin."""
    present: np.ndarray
    """(M,) float64, percent: the share of them where the label is there; NaN in an empty bin."""
    error: float
    """The expected calibration error in percent; NaN without a pair."""


def measure_calibration(scores: np.ndarray, targets: np.ndarray, bins: int = 15) -> Calibration:
    """The expected calibration error (ECE) of binary decisions, and the bins it is computed from.

    All (image, label) pairs that are not ignored count alike. Bin b of M holds those with a
    probability of at least b / M and less than (b + 1) / M; the last one also 1. Then

        ECE = sum over b of  n_b / n * |mean probability in b - share of b that is present|

    Args:
        scores, targets: as `multi_label_metrics` takes them.
        bins: M.

    Raises:
        ValueError: as `multi_label_metrics`.
    """
    scores, positive = check_predictions(scores, targets, ndim=2)
    known = scores >= 0
    scores, positive = scores[known].astype(np.float64), positive[known]
    # Against the edges themselves: multiplied by M, a score may round to another bin's.
    edges = np.arange(1, bins) / bins
    bin_of = np.searchsorted(edges, scores, side="right")
    count = np.bincount(bin_of, minlength=bins)
    divisor = np.where(count, count, np.nan)
    score = np.bincount(bin_of, scores, minlength=bins) / divisor
    present = np.bincount(bin_of, positive, minlength=bins) / divisor
    gaps = np.abs(score - present)[count > 0]
    error = float((gaps * count[count > 0]).sum() / scores.size) if scores.size else float("nan")
    return Calibration(count, 100 * score, 100 * present, 100 * error)
