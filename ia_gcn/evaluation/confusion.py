"""Labels that a model confuses with each other.

Pure functions of numpy arrays, as in metrics.py. n is the number of images, C the number of labels.
"""

from __future__ import annotations

from typing import List, NamedTuple, Sequence

import numpy as np

from .label_blocks import label_blocks
from .metrics import check_predictions, check_shapes, label_measures

# Pairs of at most so many labels are counted, so that the time grows with n and C only.
MAX_LABELS = 200
# Of so many labels, that takes some tens of megabytes.
IMAGES_AT_ONCE = 2**15


class Confusions(NamedTuple):
    """How often one label, of K, is predicted wrongly where another one, of R, is present."""

    images: np.ndarray
    """(R, K) int64, images that have the row's label and have not the column's."""
    wrong: np.ndarray
    """(R, K) int64, those of `images` in which the column's label is predicted."""
    missed: np.ndarray
    """(R, K) int64, those of `wrong` in which the row's label is not predicted."""
    rate: np.ndarray
    """(K,) float64 in [0, 1], the share of all images without the column's label in which it is
    predicted; 0 if there is no such image."""


class ConfusedPair(NamedTuple):
    """A label that is present, another one that is predicted wrongly, and how often."""

    present: int
    """Index of the label that is present."""
    predicted: int
    """Index of the label that is predicted wrongly."""
    images: int
    """Images that have the first label and have not the second."""
    wrong: int
    """Those of `images` in which the second label is predicted."""
    missed: int
    """Those of `wrong` in which the first label is not predicted: one was taken for the other."""
    expected: float
    """What `wrong` would be if the second label were as often wrong here as in all images."""


def count_confusions(
    scores: np.ndarray,
    targets: np.ndarray,
    threshold: float,
    rows: Sequence[int],
    columns: Sequence[int],
) -> Confusions:
    """Count the wrong predictions of some labels where others are present.

    A label is predicted from `threshold` on. It is wrong where the target is 0; ignored entries
    count nowhere.

    Args:
        scores, targets: as `multi_label_metrics` takes them.
        rows: indices of the R labels that are present.
        columns: indices of the K labels that are predicted wrongly.
    Raises:
        ValueError: as `multi_label_metrics`.
    """
    num_images, _ = check_shapes(scores, targets, ndim=2)
    scores, targets = np.asarray(scores), np.asarray(targets)
    counts = np.zeros((3, len(rows), len(columns)), np.int64)
    num_absent, num_wrong = np.zeros((2, len(columns)), np.int64)
    for start in range(0, num_images, IMAGES_AT_ONCE):
        part = slice(start, start + IMAGES_AT_ONCE)
        images = scores[part], targets[part], threshold
        present, _, row_predicted = _decisions(*images, rows)
        _, absent, column_predicted = _decisions(*images, columns)
        wrong = absent & column_predicted
        counts[0] += _count_both(present, absent)
        counts[1] += _count_both(present, wrong)
        counts[2] += _count_both(present & ~row_predicted, wrong)
        num_absent += absent.sum(axis=1)
        num_wrong += wrong.sum(axis=1)
    return Confusions(*counts, num_wrong / np.maximum(num_absent, 1))


def confused_pairs(
    scores: np.ndarray, targets: np.ndarray, threshold: float, count: int
) -> List[ConfusedPair]:
    """The pairs of labels with the most wrong predictions beyond what is expected of the second.

    With more than MAX_LABELS labels, the first label of a pair is one of the most frequent and the
    second one of those that are most often predicted wrongly: both limit how many wrong
    predictions a pair can have.

    Args:
        scores, targets, threshold: as for :func:`count_confusions`.
        count: of pairs at most.
    Returns:
        pairs whose `wrong` is at least half an image more than `expected`, the greatest difference
        first.
    """
    measures = label_measures(scores, targets, threshold)
    rows = np.argsort(-measures.positives, kind="stable")[:MAX_LABELS]
    columns = np.argsort(-measures.wrong, kind="stable")[:MAX_LABELS]
    confusions = count_confusions(scores, targets, threshold, rows, columns)
    expected = confusions.images * confusions.rate
    excess = confusions.wrong - expected
    strongest = np.argsort(-excess, axis=None, kind="stable")[:count]
    return [
        ConfusedPair(
            int(rows[i]),
            int(columns[j]),
            *(int(counts[i, j]) for counts in confusions[:3]),
            float(expected[i, j]),
        )
        for i, j in zip(*np.unravel_index(strongest, excess.shape))
        if excess[i, j] >= 0.5
    ]


def _decisions(scores, targets, threshold, labels) -> np.ndarray:
    """Where some labels are present, absent and predicted: (3, len(labels), n) bool."""
    present, absent, predicted = decisions = np.zeros((3, len(labels), len(scores)), bool)
    for part, block in label_blocks(scores, targets, labels=labels):
        known, present[part] = check_predictions(*block, ndim=2)
        absent[part] = ~present[part] & (known >= 0)
        predicted[part] = known >= np.array([threshold], np.float64)
    return decisions


def _count_both(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """In how many images each of R labels and each of K are chosen, (R, K) int64.

    Args:
        first, second: (R, n) and (K, n) bool.
    """
    # float32, as numpy multiplies integers slowly; exact up to 2^24 images.
    return (first.astype(np.float32) @ second.astype(np.float32).T).astype(np.int64)
