"""Label counts and pair counts of a data set, the raw material of every label graph."""

from __future__ import annotations

import hashlib
import logging
import os
from typing import Dict, List, NamedTuple, Sequence

import numpy as np
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from scipy import sparse

from ..io.files import write_atomically

logger = logging.getLogger(__name__)


class LabelStatistics(NamedTuple):
    """label_counts (C,) int64: images with label i. pair_counts (C, C) int64: with i and j."""

    label_counts: np.ndarray
    pair_counts: np.ndarray


def count_labels(dataset_dicts: Sequence[Dict], num_labels: int) -> LabelStatistics:
    """Count the labels of a data set's dicts, each image once. Ignored labels don't count.

    Args:
        dataset_dicts: with `labels`, lists of indices below num_labels = C.
    """
    presence = _presence_matrix(dataset_dicts, num_labels)
    pair_counts = (presence.T @ presence).toarray()
    return LabelStatistics(pair_counts.diagonal().copy(), pair_counts)


def cached_label_statistics(
    dataset_dicts: Sequence[Dict], label_names: List[str], path: str
) -> LabelStatistics:
    """`count_labels`, kept in the .npz file `path` for other tools and for the next start.

    The file holds a hash of the label names and of every image's labels; where that is another,
    they are counted and the file is written anew. The main process alone reads and writes it.
    """
    if not comm.is_main_process():
        return count_labels(dataset_dicts, len(label_names))
    fingerprint = _fingerprint(dataset_dicts, label_names)
    try:
        with PathManager.open(path, "rb") as file, np.load(file) as cache:
            if str(cache["fingerprint"]) == fingerprint:
                logger.debug(f"Label statistics taken from {path}")
                return LabelStatistics(cache["label_counts"], cache["pair_counts"])
    # Missing or damaged in whatever way: there is nothing in it that can't be counted again.
    except Exception:
        pass
    statistics = count_labels(dataset_dicts, len(label_names))
    PathManager.mkdirs(os.path.dirname(path) or ".")
    with write_atomically(path) as file:
        np.savez_compressed(
            file, fingerprint=fingerprint, label_names=label_names, **statistics._asdict()
        )
    logger.debug(f"Label statistics of {len(dataset_dicts)} images written to {path}")
    return statistics


def _presence_matrix(dataset_dicts: Sequence[Dict], num_labels: int) -> sparse.csr_matrix:
    """(n, C) int64, sparse: 1 where image k has label i."""
    labels = [sorted(set(d["labels"])) for d in dataset_dicts]
    row_ends = np.cumsum([0, *map(len, labels)])
    columns = np.concatenate([*labels, []]).astype(np.int64)
    shape = (len(labels), num_labels)
    return sparse.csr_matrix((np.ones_like(columns), columns, row_ends), shape=shape)


def _fingerprint(dataset_dicts: Sequence[Dict], label_names: List[str]) -> str:
    """A hash of the label names and of every image's labels, whatever the images' order."""
    digest = hashlib.sha256(repr(list(label_names)).encode())
    for line in sorted(repr(sorted(set(d["labels"]))) for d in dataset_dicts):
        digest.update(line.encode())
    return digest.hexdigest()
