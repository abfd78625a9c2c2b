"""How much there is to gain from what labels say of each other, for predictions that are there.

n is the number of images, C of labels.
"""

from __future__ import annotations

from typing import Dict, List, NamedTuple, Tuple

import numpy as np
import torch
from tqdm import tqdm

from ..evaluation.bootstrap import Interval, draw_resamples, resampled_map
from ..evaluation.frequency import measure_by_frequency
from ..evaluation.metrics import multi_label_metrics
from ..modeling import LabelPrior
from ..modeling.label_prior_fit import batches

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
    prior: LabelPrior, logits: torch.Tensor, targets: np.ndarray, seed: int = 0
) -> Headroom:
    """Measure predictions with what a prior makes of them.

    Args:
        prior: calibrated, on other images than these.
        logits: (n, C).
        targets: (n, C) in {1, 0, -1 = ignored}.
        seed: of the labels that are known, and of the resamples.
    """
    prior.eval()
    targets = targets.astype(np.int8)
    resamples = draw_resamples(len(targets), NUM_RESAMPLES, seed)
    cases: Dict[str, Tuple[np.ndarray, np.ndarray]] = {
        "map": (_scores(logits), targets),
        "map_with_prior": (_with_prior(prior, logits, None), targets),
        "map_ceiling": (_with_prior(prior, logits, targets), targets),
    }
    order = np.random.RandomState(seed).rand(*targets.shape).argsort(axis=1).argsort(axis=1)
    for share in SHARES:
        known = order < round(share * targets.shape[1])
        states, others = np.where(known, targets, -1), np.where(known, -1, targets)
        cases[f"{share} without"] = cases["map"][0], others
        cases[f"{share} with"] = _with_prior(prior, logits, states), others
    # Without a terminal, no bar.
    bar = tqdm(cases.items(), "bootstrap", leave=False, disable=None)
    resampled = {name: resampled_map(*case, resamples) for name, case in bar}
    ap = {name: multi_label_metrics(*case)["AP"] for name, case in cases.items()}
    maps = {name: Interval.of(np.nanmean(ap[name]), resampled[name]) for name in cases}

    def difference(name: str) -> Interval:
        value = maps[name].value - maps["map"].value
        return Interval.of(value, resampled[name] - resampled["map"])

    return Headroom(
        map=maps["map"],
        map_with_prior=maps["map_with_prior"],
        map_known={
            share: Known(maps[f"{share} without"], maps[f"{share} with"]) for share in SHARES
        },
        map_ceiling=maps["map_ceiling"],
        gain=difference("map_with_prior"),
        headroom=difference("map_ceiling"),
        by_frequency=_by_frequency(
            {name: ap[name] for name in ("map", "map_with_prior", "map_ceiling")}, targets
        ),
    )


def _by_frequency(ap: Dict[str, np.ndarray], targets: np.ndarray) -> Dict[str, Dict[str, float]]:
    groups = {name: measure_by_frequency(values, targets).groups for name, values in ap.items()}
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


def _scores(logits: torch.Tensor) -> np.ndarray:
    # In float64, where few become 1.
    return logits.double().sigmoid().numpy()


@torch.no_grad()
def _with_prior(
    prior: LabelPrior, logits: torch.Tensor, label_states: np.ndarray | None
) -> np.ndarray:
    parts: List[torch.Tensor] = []
    for part in batches(prior, len(logits)):
        states = None if label_states is None else torch.from_numpy(label_states[part])
        parts.append(prior(logits[part], states))
    return _scores(torch.cat(parts))
