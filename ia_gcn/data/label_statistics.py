"""Label counts and pair counts of a data set, from which label graphs are computed."""

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


# Pairs of labels that `summarize_label_graph` looks at together: some tens of megabytes.
PAIRS_AT_ONCE = 2_000_000


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
    # Missing or damaged: the labels are counted again.
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


class LabelGraphSummary(NamedTuple):
    """Facts about a label graph of any size; C labels, of which K are shown."""

    label_counts: np.ndarray
    """(C,) int64: images with label i."""
    edges_out: np.ndarray
    """(C,) int64: edges from label i to another."""
    edges_in: np.ndarray
    """(C,) int64: edges from another label to i."""
    shown: np.ndarray
    """(K,) int64: indices of the most frequent labels, in their order."""
    conditional: np.ndarray
    """(K, K) float64: P(j|i) of the labels shown."""
    lcm: np.ndarray
    """(K, K) float64: their part of the statistical LCM of all C labels."""


def summarize_label_graph(
    dataset_dicts: Sequence[Dict],
    num_labels: int,
    threshold: float,
    reweight: float,
    max_shown: int,
) -> LabelGraphSummary:
    """Count the edges of a data set's label graph, in memory that does not grow with C².

    The graph is that of `ia_gcn.modeling.label_graph.statistical_lcm`: an edge i → j where
    P(j|i) ≥ τ, or above 0 where τ is 0.

    Args:
        dataset_dicts: see `count_labels`.
        num_labels: C.
        threshold, reweight: τ and p, MODEL.LABEL_GRAPH.THRESHOLD and REWEIGHT.
        max_shown: the largest K.
    Raises:
        ValueError: τ outside [0, 1].
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold must be in [0, 1], got {threshold}")
    presence = _presence_matrix(dataset_dicts, num_labels).tocsc()
    counts = np.asarray(presence.sum(axis=0)).ravel()
    shown = np.sort(np.argsort(-counts, kind="stable")[:max_shown])
    edges_out, edges_in = np.zeros((2, num_labels), np.int64)
    weight_in = np.zeros(num_labels)
    conditional, edges = np.zeros((2, len(shown), len(shown)))
    step = max(1, PAIRS_AT_ONCE // max(num_labels, 1))
    for start in range(0, num_labels, step):
        stop = min(start + step, num_labels)
        pairs = (presence[:, start:stop].T @ presence).tocoo()
        rows, columns = pairs.row + start, pairs.col
        probability = pairs.data / counts[rows]
        weight = np.where(probability >= threshold, 1.0, 0.0) if threshold else probability.copy()
        weight[rows == columns] = 0
        edges_out += np.bincount(rows[weight > 0], minlength=num_labels)
        edges_in += np.bincount(columns[weight > 0], minlength=num_labels)
        weight_in += np.bincount(columns, weight, minlength=num_labels)
        inside = slice(*np.searchsorted(shown, (start, stop)))
        for matrix, values in ((conditional, probability), (edges, weight)):
            block = sparse.csr_matrix((values, (pairs.row, columns)), pairs.shape)
            matrix[inside] = block[shown[inside] - start][:, shown].toarray()
    lcm = reweight * edges / (weight_in[shown] + 1e-6)
    np.fill_diagonal(lcm, 1)
    return LabelGraphSummary(counts, edges_out, edges_in, shown, conditional, lcm)


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
