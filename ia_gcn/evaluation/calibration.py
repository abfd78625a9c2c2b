"""Calibration: whether probabilities agree with how often labels are present.

Pure functions of numpy arrays, as in metrics.py.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .label_blocks import label_blocks
from .metrics import check_predictions, check_shapes


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
    label_errors: np.ndarray
    """(C,) float64, percent: that of the pairs of each label."""


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
    _, num_labels = check_shapes(scores, targets, ndim=2)
    # Against the edges themselves: multiplied by M, a score may round to another bin's.
    edges = np.arange(1, bins) / bins
    # Of each label, in each bin: pairs, and the sums of their probabilities and of what is present.
    sums = np.zeros((num_labels, 3, bins))
    for labels, block in label_blocks(scores, targets):
        for of_label, ranked, positive in zip(sums[labels], *check_predictions(*block, ndim=2)):
            known = ranked >= 0
            probability, present = ranked[known].astype(np.float64), positive[known]
            bin_of = np.searchsorted(edges, probability, side="right")
            for total, weights in zip(of_label, (None, probability, present)):
                total[:] = np.bincount(bin_of, weights, minlength=bins)
    count, score, present = total = sums.sum(axis=0)
    divisor = np.where(count, count, np.nan)
    score, present = 100 * (score / divisor), 100 * (present / divisor)
    return Calibration(count.astype(np.int64), score, present, float(_error(total)), _error(sums))


def _error(sums: np.ndarray) -> np.ndarray:
    """The expected calibration error in percent, of sums as above, (..., 3, M)."""
    count, score, present = np.moveaxis(sums, -2, 0)
    pairs = count.sum(axis=-1)
    # n_b times the distance of two means is that of their sums.
    return 100 * np.abs(score - present).sum(axis=-1) / np.where(pairs, pairs, np.nan)
