"""Hiding labels of a data set, so that a training with unknown labels can be compared with others.

n is the number of images, C of labels. An entry is a label of an image.
"""

from __future__ import annotations

import hashlib
from typing import Callable, Dict, List, Sequence

import numpy as np
from tqdm import tqdm

from .dataset_mapper import target_vector

Keep = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""From targets (n, C) int8 and random numbers (n, C) to a boolean array: what stays known."""


def keep_entries(share: float) -> Keep:
    """Each entry stays known with the probability `share`."""
    return lambda targets, draws: (draws < share) & (targets >= 0)


def keep_of_each_image(share: float) -> Keep:
    """Of each image's known entries this share, rounded, which is the protocol of Durand, Mehrasa,
    Mori: Learning a Deep ConvNet for Multi-label Classification with Partial Labels, 2019."""
    return lambda targets, draws: _lowest(draws, targets >= 0, share)


def keep_of_each_label(share: float) -> Keep:
    """Of each label's present entries this share, rounded, and at least one; the same of its absent
    ones."""

    def keep(targets: np.ndarray, draws: np.ndarray) -> np.ndarray:
        parts = (_lowest(draws.T, state == targets.T, share, least=1).T for state in (1, 0))
        return np.logical_or(*parts)

    return keep


def keep_one_positive(targets: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Of each image one label that is present, and nothing else: Cole, Mac Aodha, Lorieul, Perona,
    Morris, Jojic: Multi-Label Learning from Single Positive Labels, 2021."""
    return _lowest(draws, targets == 1, share=0, least=1)


def hide_labels(
    dataset_dicts: Sequence[Dict], num_labels: int, keep: Keep, seed: int
) -> List[Dict]:
    """The dicts with `absent_labels`, without what is hidden; boxes of hidden labels go, too.

    The random numbers of an image are a function of C, the seed and its id, so that neither the
    order of the images nor, but for `keep_of_each_label`, other images make a difference.

    Args:
        dataset_dicts: see `MultiLabelDatasetMapper`. Unknown labels stay unknown.
        num_labels: C.
        keep: one of the functions above.
        seed: any integer.
    """
    targets = np.empty((len(dataset_dicts), num_labels), np.int8)
    draws = np.empty(targets.shape)
    # Without a terminal, no bar.
    progress = tqdm(dataset_dicts, "hiding", unit=" images", leave=False, disable=None)
    for i, record in enumerate(progress):
        targets[i] = target_vector(record, num_labels).numpy()
        digest = hashlib.sha256(f"{seed} {record['image_id']}".encode()).digest()
        draws[i] = np.random.default_rng(np.frombuffer(digest, np.uint32)).random(num_labels)
    targets[~keep(targets, draws)] = -1
    return [_with_targets(record, row) for record, row in zip(dataset_dicts, targets)]


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
