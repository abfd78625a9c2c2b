"""Hiding labels of a data set, so that a training with unknown labels can be compared with others.

n is the number of images, C of labels. An entry is a label of an image.
"""

from __future__ import annotations

import hashlib
from typing import Callable, Dict, List, NamedTuple, Sequence

import numpy as np
from tqdm import tqdm

from .dataset_mapper import target_vector

# Entries of images that are looked at together; some hundred megabytes.
ENTRIES_AT_ONCE = 2**22


class Keep(NamedTuple):
    """What stays known."""

    choose: Callable[[np.ndarray, np.ndarray], np.ndarray]
    """From targets (n, C) int8 and random numbers (n, C) to a boolean array."""
    by_image: bool = True
    """Whether other images make no difference to an image, so that n may be a part of all."""


def keep_entries(share: float) -> Keep:
    """Each entry stays known with the probability `share`."""
    return Keep(lambda targets, draws: (draws < share) & (targets >= 0))


def keep_of_each_image(share: float) -> Keep:
    """Of each image's known entries this share, rounded, which is the protocol of Durand, Mehrasa,
    Mori: Learning a Deep ConvNet for Multi-label Classification with Partial Labels, 2019."""
    return Keep(lambda targets, draws: _lowest(draws, targets >= 0, share))


def keep_of_each_label(share: float) -> Keep:
    """Of each label's present entries this share, rounded, and at least one; the same of its absent
    ones."""

    def choose(targets: np.ndarray, draws: np.ndarray) -> np.ndarray:
        parts = (_lowest(draws.T, state == targets.T, share, least=1).T for state in (1, 0))
        return np.logical_or(*parts)

    return Keep(choose, by_image=False)


def keep_one_positive() -> Keep:
    """Of each image one label that is present, and nothing else: Cole, Mac Aodha, Lorieul, Perona,
    Morris, Jojic: Multi-Label Learning from Single Positive Labels, 2021."""
    return Keep(lambda targets, draws: _lowest(draws, targets == 1, share=0, least=1))


def hide_labels(
    dataset_dicts: Sequence[Dict], num_labels: int, keep: Keep, seed: int
) -> List[Dict]:
    """The dicts with `absent_labels`, without what is hidden; boxes of hidden labels go, too.

    The random numbers of an image are a function of C, the seed and its id, so that neither the
    order of the images nor, but for `keep_of_each_label`, other images make a difference.

    Args:
        dataset_dicts: see `MultiLabelDatasetMapper`. Unknown labels stay unknown.
        num_labels: C.
        keep: of one of the functions above.
        seed: any integer.
    """
    at_once = max(1, ENTRIES_AT_ONCE // num_labels if keep.by_image else len(dataset_dicts))
    hidden = []
    # Without a terminal, no bar.
    with tqdm(total=len(dataset_dicts), desc="hiding", leave=False, disable=None) as progress:
        for start in range(0, len(dataset_dicts), at_once):
            part = dataset_dicts[start : start + at_once]
            targets = np.empty((len(part), num_labels), np.int8)
            draws = np.empty(targets.shape)
            for i, record in enumerate(part):
                targets[i] = target_vector(record, num_labels).numpy()
                digest = hashlib.sha256(f"{seed} {record['image_id']}".encode()).digest()
                random = np.random.default_rng(np.frombuffer(digest, np.uint32))
                draws[i] = random.random(num_labels)
                progress.update()
            targets[~keep.choose(targets, draws)] = -1
            hidden += map(_with_targets, part, targets)
    return hidden


def _lowest(draws: np.ndarray, among: np.ndarray, share: float, least: int = 0) -> np.ndarray:
    """The entries with a row's lowest draws, a share of those `among`, rounded, but at least
    `least`; all arrays (n, C)."""
    order = np.where(among, draws, np.inf).argsort(axis=1, kind="stable")
    ranks = order.argsort(axis=1, kind="stable")
    number = np.maximum(np.floor(share * among.sum(axis=1) + 0.5), least)
    return among & (ranks < number[:, None])


def _with_targets(record: Dict, targets: np.ndarray) -> Dict:
    known = {key: value for key, value in record.items() if key != "ignored_labels"}
    known["labels"] = np.flatnonzero(targets == 1).tolist()
    known["absent_labels"] = np.flatnonzero(targets == 0).tolist()
    if "annotations" in record:
        boxes = record["annotations"]
        known["annotations"] = [box for box in boxes if targets[box["category_id"]] == 1]
    return known
