"""How much there is to gain from what labels say of each other, for predictions that are there.

n is the number of images, C of labels.
"""

from __future__ import annotations

from typing import Dict, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from ..evaluation.bootstrap import Interval, draw_resamples, resampled_map
from ..evaluation.frequency import measure_by_frequency
from ..evaluation.metrics import multi_label_metrics
from ..modeling import LabelPrior
from ..modeling.label_prior_fit import posterior_logits

# Shares of an image's labels that are known.
SHARES = (0.25, 0.5, 0.75)
NUM_RESAMPLES = 200
# Less mAP than this, in points, is not worth a label graph.
LITTLE = 0.5


class Known(NamedTuple):
    """mAP of the labels that are not known, while a share of them is."""

    without_prior: Interval
    with_prior: Interval


class Headroom(NamedTuple):
    """mAP in percent, and differences of it in points, with their 95 % intervals over images."""

    map: Interval
    """Of the predictions as they are."""
    map_with_prior: Interval
    """With the label prior, nothing being known."""
    map_known: Dict[float, Known]
    """By the share of an image's labels that are known."""
    map_ceiling: Interval
    """Each label's own score, with the prior and all other labels known."""
    gain: Interval
    """map_with_prior - map, paired by image."""
    headroom: Interval
    """map_ceiling - map, paired by image."""
    by_frequency: Dict[str, Dict[str, float]]
    """For rare, middle and frequent labels: how many there are, their fewest and most images, and
    map, map_with_prior and map_ceiling."""

    def summary(self) -> Dict:
        """As plain numbers, for JSON."""
        known = self.map_known.items()
        return {
            "map": self.map._asdict(),
            "map_with_prior": self.map_with_prior._asdict(),
            "map_known": {str(share): k.with_prior._asdict() for share, k in known},
            "map_known_without_prior": {
                str(share): k.without_prior._asdict() for share, k in known
            },
            "map_ceiling": self.map_ceiling._asdict(),
            "gain": self.gain._asdict(),
            "headroom": self.headroom._asdict(),
            "by_frequency": self.by_frequency,
            "advice": self.advice(),
        }

    def advice(self) -> str:
        """One sentence: whether a label graph can help on this data."""
        if self.headroom.high < LITTLE:
            return (
                "A label graph can't help here: even the true other labels of an image would add "
                f"no more than {max(self.headroom.high, 0):.1f} points."
            )
        if self.gain.low > 0:
            return (
                f"A label graph can help here: what labels say of each other adds "
                f"{self.gain.value:.1f} points [{self.gain.low:.1f}, {self.gain.high:.1f}] by "
                "itself (tools/fit_label_prior.py), and the true other labels would add "
                f"{self.headroom.value:.1f}."
            )
        half = self.map_known[0.5]
        gain = half.with_prior.value - half.without_prior.value
        if gain < LITTLE:
            return (
                "A label graph is not likely to help here: the prior adds nothing that could be "
                f"told from 0, and {gain:.1f} points with half of the labels known."
            )
        return (
            "A label graph is not likely to help while nothing of an image's labels is known, as "
            "the predictions say already what the other labels would; where half of them are known "
            f"(tools/predict.py --known), the prior adds {gain:.1f} points."
        )


def measure_headroom(
    prior: LabelPrior,
    logits: torch.Tensor,
    targets: np.ndarray,
    label_counts: np.ndarray | None = None,
    seed: int = 0,
) -> Headroom:
    """Measure predictions with what a prior makes of them.

    Args:
        prior: calibrated, on other images than these.
        logits: (n, C).
        targets: (n, C) in {1, 0, -1 = ignored}; at least 2 labels.
        label_counts: (C,) training images with each label, see `measure_by_frequency`.
        seed: of the labels that are known, and of the resamples.
    """
    prior.eval()
    targets = targets.astype(np.int8)
    resamples = draw_resamples(len(targets), NUM_RESAMPLES, seed)
    num_labels = targets.shape[1]
    order = np.random.RandomState(seed).rand(*targets.shape).argsort(axis=1).argsort(axis=1)

    def measure(share: float, with_prior: bool) -> Measured:
        known = np.zeros(targets.shape, bool)
        if share < 1:
            # One at least is left to be measured.
            known = order < min(round(share * num_labels), num_labels - 1)
        others = np.where(known, -1, targets)
        states = targets if share == 1 else np.where(known, targets, -1)
        scores = _scores(prior, logits, states) if with_prior else logits.double().sigmoid().numpy()
        ap = multi_label_metrics(scores, others)["AP"]
        return Measured(ap, resampled_map(scores, others, resamples))

    # Without a terminal, no bar.
    cases = [(0, False), (0, True), (1, True), *((s, p) for s in SHARES for p in (False, True))]
    found = {case: measure(*case) for case in tqdm(cases, "bootstrap", leave=False, disable=None)}
    plain, with_prior, ceiling = found[0, False], found[0, True], found[1, True]
    return Headroom(
        map=plain.interval(),
        map_with_prior=with_prior.interval(),
        map_known={
            share: Known(found[share, False].interval(), found[share, True].interval())
            for share in SHARES
        },
        map_ceiling=ceiling.interval(),
        gain=with_prior.minus(plain),
        headroom=ceiling.minus(plain),
        by_frequency=_by_frequency(
            {"map": plain.ap, "map_with_prior": with_prior.ap, "map_ceiling": ceiling.ap},
            targets,
            label_counts,
        ),
    )


class Measured(NamedTuple):
    """One case: AP of each label, (C,), and the mAP of each resample, (R,)."""

    ap: np.ndarray
    resampled: np.ndarray

    def interval(self) -> Interval:
        return Interval.of(float(np.nanmean(self.ap)), self.resampled)

    def minus(self, other: Measured) -> Interval:
        difference = np.nanmean(self.ap) - np.nanmean(other.ap)
        return Interval.of(float(difference), self.resampled - other.resampled)


def _by_frequency(
    ap: Dict[str, np.ndarray], targets: np.ndarray, label_counts: np.ndarray | None
) -> Dict[str, Dict[str, float]]:
    groups = {
        name: measure_by_frequency(values, targets, label_counts).groups
        for name, values in ap.items()
    }
    return {
        group: {
            "labels": found.labels,
            "fewest": found.fewest,
            "most": found.most,
            **{name: groups[name][group].mAP for name in ap},
        }
        for group, found in groups["map"].items()
        if found.labels
    }


def _scores(prior: LabelPrior, logits: torch.Tensor, label_states: np.ndarray) -> np.ndarray:
    """(n, C) float64, of which few become 1."""
    states = torch.from_numpy(label_states)
    return posterior_logits(prior, logits, states).double().sigmoid().numpy()
