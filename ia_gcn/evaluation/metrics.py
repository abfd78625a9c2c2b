"""Measures of multi-label recognition: average precision, precision, recall and F1.

Pure functions of numpy arrays. n is the number of images, C the number of labels.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .label_blocks import label_blocks


class Conventions(NamedTuple):
    """What papers do differently; the defaults are Eq. 15-17 of IA-GCN and AP as printed there."""

    ap: str = "all_points"
    """all_points, envelope or eleven_points: see :func:`average_precision`."""
    cf1: str = "of_means"
    """of_means: CF1 = 2 CP CR / (CP + CR); mean_of_labels: the mean of the labels' F1."""
    forced_top_k: bool = False
    """Whether the `top_k` highest labels of an image are predicted below the threshold too."""
    ignored: str = "nowhere"
    """Where ignored entries count, as absent labels: nowhere, in_f1 (in all measures but AP and
    mAP), or everywhere."""
    known_in_f1: bool = False
    """Whether labels that the model was told count in all measures but AP and mAP, as in C-Tran's
    code."""


DEFAULT_CONVENTIONS = Conventions()

CONVENTIONS = {
    "ap": ("all_points", "envelope", "eleven_points"),
    "cf1": ("of_means", "mean_of_labels"),
    "ignored": ("nowhere", "in_f1", "everywhere"),
}
"""What the fields of `Conventions` that are names can be."""


class LabelMeasures(NamedTuple):
    """Measures of each label at a threshold, (C,) each.

    NaN for a label without positives, but for the counts. The precision of a label that is never
    predicted counts as 0.
    """

    precision: np.ndarray
    """float64, percent."""
    recall: np.ndarray
    """float64, percent."""
    f1: np.ndarray
    """float64, percent."""
    positives: np.ndarray
    """int64, images that have the label."""
    wrong: np.ndarray
    """int64, images that have not, and in which it is predicted."""
    missed: np.ndarray
    """int64, images that have the label, and in which it is not predicted."""


def multi_label_metrics(
    scores: np.ndarray,
    targets: np.ndarray,
    threshold: float | np.ndarray = 0.5,
    top_k: int | None = None,
    conventions: Conventions = DEFAULT_CONVENTIONS,
    known: np.ndarray | None = None,
) -> dict[str, float | np.ndarray]:
    """Mean average precision, and the per-class and overall measures of IA-GCN's Eq. 15-17.

    A label is predicted where its score is at least `threshold`. With N_cor the number of images
    a label is rightly predicted in, N_pre of those it is predicted in and N_gt of those it is
    present in:

        OP = sum N_cor / sum N_pre    CP = mean N_cor / N_pre     (Eq. 15)
        OR = sum N_cor / sum N_gt     CR = mean N_cor / N_gt      (Eq. 16)
        F1 = 2 P R / (P + R), of OP and OR and of CP and CR       (Eq. 17)

    The sums are over all labels; the means are over the labels that are present in some image;
    mAP is over those that have an AP. Where every label is present in some image, that is Eq. 15-16
    as printed. 0 / 0 counts as 0: the precision of a label that is never predicted, the F1 of 0 and
    0, and CP and CR where no label is present at all.

    Args:
        scores: (n, C) probabilities in [0, 1], of any float, integer or boolean type.
        targets: (n, C), 1 where a label is present, 0 where it is not, -1 where that is to be
            ignored (VOC's "difficult" objects): such an entry counts nowhere. Any numeric type.
        threshold: compared with the scores in float64, whatever their type; (C,) for one of each
            label.
        top_k: if given, only the `top_k` highest of an image's scores can be predicted (and must
            still reach `threshold`). Of equal scores, the lower label index comes first. Ignored
            entries take no place among them.
        conventions: other definitions than these.
        known: (n, C), 1 or 0 for a label that the model was told, which `targets` has as ignored,
            and -1 for all others; it has an effect with the convention known_in_f1 alone.

    Returns:
        "mAP", "CP", "CR", "CF1", "OP", "OR", "OF1" (float) and "AP" ((C,) float64 array), all in
        percent, 0 to 100. "AP" is NaN for a label without positives; "mAP" if there are no others.

    Raises:
        ValueError: the arrays are not two-dimensional or differ in shape, a score is not a number
            in [0, 1], a target is none of 1, 0 and -1, `top_k` is less than 1, or there is no such
            convention.
    """
    return _metrics(scores, targets, threshold, top_k, conventions, known)[-1]


def all_and_top_metrics(
    scores: np.ndarray, targets: np.ndarray, top_k: int, **settings
) -> tuple[dict[str, float | np.ndarray], dict[str, float | np.ndarray]]:
    """`multi_label_metrics` without and with `top_k`, which share most of the time they take.

    Args:
        settings: threshold, conventions and known, see there.
    """
    every, top = _metrics(scores, targets, top_k=top_k, **settings)
    return every, top


def _metrics(
    scores, targets, threshold=0.5, top_k=None, conventions=DEFAULT_CONVENTIONS, known=None
) -> list[dict[str, float | np.ndarray]]:
    """What `multi_label_metrics` returns without `top_k`; and with it, where it is given."""
    for field, values in CONVENTIONS.items():
        if getattr(conventions, field) not in values:
            raise ValueError(f"{field} must be one of {values}, got {getattr(conventions, field)}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    num_images, num_labels = check_shapes(scores, targets, ndim=2)
    matrices = [scores, targets]
    if conventions.known_in_f1 and known is not None:
        matrices.append(known)
    # float64, as numpy would round a number to the type of the scores.
    threshold = np.broadcast_to(np.asarray(threshold, np.float64), num_labels)
    ap = np.full(num_labels, np.nan)
    present, predicted, correct = np.zeros((3, num_labels), np.int64)
    highest = _Highest(num_images, min(top_k or 0, num_labels))
    for labels, (block, target, *told) in label_blocks(*matrices):
        ranked, positive = check_predictions(block, target, 2, conventions.ignored == "everywhere")
        ap[labels] = [_average_precision(*pair, conventions.ap) for pair in zip(ranked, positive)]
        if told or conventions.ignored == "in_f1":
            counted = np.where(told[0] >= 0, told[0], target) if told else target
            as_absent = conventions.ignored != "nowhere"
            ranked, positive = check_predictions(block, counted, 2, as_absent)
        reached = ranked >= threshold[labels, None]
        present[labels] = positive.sum(axis=1)
        predicted[labels] = reached.sum(axis=1)
        correct[labels] = (reached & positive).sum(axis=1)
        highest.add(labels.start, ranked, positive)
    counts = [(predicted, correct)]
    if top_k is not None:
        # Ignored entries are at -inf.
        least = 0 if conventions.forced_top_k else threshold[highest.labels]
        reached = highest.scores >= least
        chosen = reached, reached & highest.positive
        counts.append([np.bincount(highest.labels[x], minlength=num_labels) for x in chosen])
    return [_of_counts(ap, present, *pair, conventions) for pair in counts]


def _of_counts(
    ap: np.ndarray,
    present: np.ndarray,
    predicted: np.ndarray,
    correct: np.ndarray,
    conventions: Conventions,
) -> dict[str, float | np.ndarray]:
    """What `multi_label_metrics` returns, of AP from 0 to 1 and the counts of the labels, (C,)."""
    found = present > 0
    f1 = _ratio(2 * correct, predicted + present)[found]
    cp = _mean(_ratio(correct, predicted)[found], empty=0.0)
    cr = _mean(_ratio(correct, present)[found], empty=0.0)
    op = float(_ratio(correct.sum(), predicted.sum()))
    or_ = float(_ratio(correct.sum(), present.sum()))
    return {
        # A label whose positives were all told counts in the others, and has no AP.
        "mAP": 100 * _mean(ap[~np.isnan(ap)], empty=float("nan")),
        "CP": 100 * cp,
        "CR": 100 * cr,
        "CF1": 100 * (_f1(cp, cr) if conventions.cf1 == "of_means" else _mean(f1, empty=0.0)),
        "OP": 100 * op,
        "OR": 100 * or_,
        "OF1": 100 * _f1(op, or_),
        "AP": 100 * ap,
    }


class _Highest:
    """The k highest scores of each image among the labels that were added; of equal ones, the
    first.

    Attributes:
        scores: (n, k) float64, -inf where there are fewer.
        labels: (n, k) int64, their indices.
        positive: (n, k) bool.
    """

    def __init__(self, num_images: int, k: int):
        self.scores = np.full((num_images, k), -np.inf)
        self.labels = np.zeros((num_images, k), np.int64)
        self.positive = np.zeros((num_images, k), bool)

    def add(self, first: int, scores: np.ndarray, positive: np.ndarray) -> None:
        """
        Args:
            first: index of the first of b labels, which follow those that were added before.
            scores, positive: (b, n), as `check_predictions` returns them.
        """
        num_added, k = len(scores), self.scores.shape[1]
        if not k:
            return
        # Where no score is higher, those of before, whose labels come first, stay.
        images = np.flatnonzero(scores.max(axis=0) > self.scores.min(axis=1))
        added = np.broadcast_to(np.arange(first, first + num_added), (len(images), num_added))
        for_image = np.concatenate([self.scores[images], scores[:, images].T], axis=1)
        # k in each row.
        places = _highest(for_image, k).nonzero()[1].reshape(-1, k)

        def take(before, new):
            return np.take_along_axis(np.concatenate([before[images], new], axis=1), places, axis=1)

        self.positive[images] = take(self.positive, positive[:, images].T)
        self.labels[images] = take(self.labels, added)
        self.scores[images] = np.take_along_axis(for_image, places, axis=1)


def label_measures(scores: np.ndarray, targets: np.ndarray, threshold: float) -> LabelMeasures:
    """Precision, recall and F1 of each label where it is predicted from `threshold` on.

    Args, Raises: as :func:`multi_label_metrics`; ignored entries count nowhere.
    """
    _, num_labels = check_shapes(scores, targets, ndim=2)
    n_correct, n_predicted, n_present = np.zeros((3, num_labels), np.int64)
    for labels, block in label_blocks(scores, targets):
        known, positive = check_predictions(*block, ndim=2)
        predicted = known >= np.array([threshold], np.float64)
        n_correct[labels] = (predicted & positive).sum(axis=1)
        n_predicted[labels], n_present[labels] = predicted.sum(axis=1), positive.sum(axis=1)
    ratios = (
        _ratio(n_correct, n_predicted),
        _ratio(n_correct, n_present),
        _ratio(2 * n_correct, n_predicted + n_present),
    )
    precision, recall, f1 = (np.where(n_present, 100 * ratio, np.nan) for ratio in ratios)
    wrong, missed = n_predicted - n_correct, n_present - n_correct
    return LabelMeasures(precision, recall, f1, n_present, wrong, missed)


def average_precision(
    scores: np.ndarray, targets: np.ndarray, formula: str = "all_points"
) -> float:
    """Average precision of one label.

    The mean over the label's positives of the precision at that positive's score, that is among
    the images that score as high or higher. Images of equal score come together, so their order
    does not matter.

    Args:
        scores: (n,) probabilities in [0, 1], of any float, integer or boolean type.
        targets: (n,), 1 (present), 0 (not present) or -1 (ignored, counts nowhere).
        formula: all_points, which is this; envelope (VOC 2012): for a positive's precision, take
            the highest that is reached at its recall or more; eleven_points (VOC 2007): the mean
            over t = 0, 0.1, ..., 1 of the highest precision at a recall of at least t.

    Returns:
        percent, 0 to 100; NaN if there is no positive.

    Raises:
        ValueError: the arrays are not one-dimensional or differ in shape, a score is not a number
            in [0, 1], or a target is none of 1, 0 and -1.
    """
    return 100 * _average_precision(*check_predictions(scores, targets, ndim=1), formula)


def check_shapes(scores: np.ndarray, targets: np.ndarray, ndim: int) -> tuple[int, ...]:
    """The shape of both.

    Raises:
        ValueError: they are not `ndim`-dimensional or differ in shape.
    """
    shapes = np.shape(scores), np.shape(targets)
    if len(shapes[0]) != ndim or shapes[0] != shapes[1]:
        raise ValueError(
            f"scores and targets must be {ndim}-D and of the same shape, "
            f"got {shapes[0]} and {shapes[1]}"
        )
    return shapes[0]


def check_predictions(
    scores: np.ndarray, targets: np.ndarray, ndim: int, ignored_is_absent: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Check the arguments of the public functions, and convert them for the computation.

    Returns:
        the scores, of at least float32 and -inf where they are ignored, which puts them behind
        every other score and below the threshold; and a boolean array, true at the positives.
    """
    scores, targets = np.asarray(scores), np.asarray(targets)
    check_shapes(scores, targets, ndim)
    if scores.dtype.kind not in "fiub" or targets.dtype.kind not in "fiub":
        raise ValueError(
            f"scores and targets must be real numbers, got {scores.dtype} and {targets.dtype}"
        )
    # The least and the greatest are NaN if any score is, and then compare false.
    if scores.size and not (scores.min() >= 0 and scores.max() <= 1):
        wrong = scores[~((scores >= 0) & (scores <= 1))][0]
        raise ValueError(f"scores must be finite and in [0, 1], got {wrong}")
    positive, ignored = targets == 1, targets == -1
    known = positive | ignored | (targets == 0)
    if not known.all():
        raise ValueError(f"targets must be 1, 0 or -1, got {targets[~known][0]}")
    scores = scores.astype(np.promote_types(scores.dtype, np.float32), copy=False)
    if ignored_is_absent:
        return scores, positive
    return np.where(ignored, -np.inf, scores), positive


def _average_precision(scores: np.ndarray, positive: np.ndarray, formula: str) -> float:
    """As :func:`average_precision`, of what `check_predictions` returns, from 0 to 1."""
    # Sorting values is several times faster than finding the order that sorts them.
    hits = np.sort(scores[positive])
    if not hits.size:
        return float("nan")
    n_retrieved = scores.size - np.searchsorted(np.sort(scores), hits)
    n_correct = hits.size - np.searchsorted(hits, hits)
    precision = n_correct / n_retrieved
    if formula == "all_points":
        return float(precision.mean())
    if formula == "envelope":
        # The hits are in order of falling recall.
        return float(np.maximum.accumulate(precision).mean())
    # Recall >= i / 10 in integers, as 3 / 10 < 0.1 * 3 in floating point.
    reached = [10 * n_correct >= i * hits.size for i in range(11)]
    return float(np.mean([precision[at].max() for at in reached]))


def _highest(scores: np.ndarray, k: int) -> np.ndarray:
    """Mark the k highest scores of each row; of equal ones, the first.

    Args:
        scores: (n, C), of more than k labels.

    Returns:
        (n, C) bool.
    """
    n_labels = scores.shape[1]
    kth = np.partition(scores, n_labels - k, axis=1)[:, [n_labels - k]]
    higher = scores > kth
    tied = scores == kth
    places_left = k - higher.sum(axis=1, keepdims=True)
    return higher | (tied & (tied.cumsum(axis=1) <= places_left))


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    # The numerator is 0 wherever the denominator is.
    return part / np.maximum(whole, 1)


def _mean(values: np.ndarray, empty: float) -> float:
    return float(values.mean()) if values.size else empty


def _f1(precision: float, recall: float) -> float:
    total = precision + recall
    return 2 * precision * recall / total if total > 0 else 0.0
