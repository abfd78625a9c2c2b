"""How much a measure would be another on other images: the bootstrap over images.

n is the number of images, C of labels, R of resamples.
"""

from __future__ import annotations

from typing import NamedTuple, Sequence

import numpy as np

# Of the resamples' precisions at once: some tens of megabytes.
NUMBERS_AT_ONCE = 8_000_000


class Interval(NamedTuple):
    """A measure, and the range of 95 % of its resamples."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, value: float, resampled: np.ndarray) -> Interval:
        """From the measure and those of resamples, (R,)."""
        return cls(value, *map(float, np.nanpercentile(resampled, (2.5, 97.5))))

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


def draw_resamples(num_images: int, count: int, seed: int = 0) -> np.ndarray:
    """How often each image is in each of R = `count` resamples of n images, (R, n) int32."""
    random = np.random.RandomState(seed)
    drawn = [random.randint(num_images, size=num_images) for _ in range(count)]
    return np.stack([np.bincount(d, minlength=num_images) for d in drawn]).astype(np.int32)


def resampled_ap(scores: np.ndarray, positive: np.ndarray, resamples: np.ndarray) -> np.ndarray:
    """AP of one label in each resample, (R,) in percent; NaN where it has no positive.

    As `average_precision` has it, of every image as often as it is drawn.

    Args:
        scores: (n,), -inf where the label is ignored.
        positive: (n,) bool.
        resamples: of `draw_resamples`.
    """
    order = np.argsort(-scores, kind="stable")
    # Images of equal score come together: a positive's precision is that at the last of them.
    ordered = scores[order]
    last = np.searchsorted(-ordered, -ordered, side="right") - 1
    hits = np.flatnonzero(positive[order])
    result = np.full(len(resamples), np.nan)
    step = max(1, NUMBERS_AT_ONCE // max(1, len(scores)))
    for start in range(0, len(resamples), step):
        counts = resamples[start : start + step, order]
        retrieved = np.cumsum(counts, axis=1)[:, last[hits]]
        correct = np.cumsum(counts * positive[order], axis=1)[:, last[hits]]
        weights = counts[:, hits]
        total = weights.sum(axis=1)
        precision = (weights * correct / np.maximum(retrieved, 1)).sum(axis=1)
        found = total > 0
        result[start : start + step][found] = 100 * precision[found] / total[found]
    return result


def resampled_map(
    scores: np.ndarray, targets: np.ndarray, resamples: np.ndarray, labels: Sequence[int] = ()
) -> np.ndarray:
    """mAP in each resample, (R,) in percent, over the labels that have a positive there.

    Args:
        scores: (n, C) in [0, 1].
        targets: (n, C) in {1, 0, -1 = ignored}.
        resamples: of `draw_resamples`.
        labels: indices of those that count; (): all.
    """
    total, count = np.zeros((2, len(resamples)))
    for label in labels if len(labels) else range(scores.shape[1]):
        target = targets[:, label]
        ap = resampled_ap(np.where(target < 0, -np.inf, scores[:, label]), target == 1, resamples)
        total += np.nan_to_num(ap)
        count += ~np.isnan(ap)
    with np.errstate(invalid="ignore"):
        return total / count
