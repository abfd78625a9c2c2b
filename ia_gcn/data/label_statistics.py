"""The labels of a data set as sparse matrices, and the counts from which label graphs are computed.

n is the number of images, C of labels.
"""

from __future__ import annotations

import hashlib
import logging
import os
from array import array
from typing import Dict, Iterable, Iterator, List, NamedTuple, Sequence, Tuple

import numpy as np
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from scipy import sparse

from ..io.files import write_atomically
from .dataset_mapper import label_sets

logger = logging.getLogger(__name__)


# Pairs of labels that `summarize_label_graph` looks at together: some tens of megabytes.
PAIRS_AT_ONCE = 2_000_000


class LabelStatistics(NamedTuple):
    """Counts from which P(j|i) = pair_counts[i, j] / label_counts[i] follows; C labels."""

    label_counts: np.ndarray
    """(C,) int64: n_i, images with label i."""
    pair_counts: np.ndarray
    """(C, C) int32: n_ij, images with labels i and j. Where labels are unknown, n_i · n_ij / k_ij,
    rounded, with k_ij the images with label i in which j is known, present or absent: as many as
    there would be if the images in which j is unknown were as the others."""


class StateCounts(NamedTuple):
    """In how many images a label is present, absent and unknown; (C,) int64 each."""

    present: np.ndarray
    absent: np.ndarray
    unknown: np.ndarray


class _States(NamedTuple):
    """Which labels images have, and of which more is known; (n, C) int32 of ones, sparse."""

    present: sparse.csr_matrix
    absent: sparse.csr_matrix
    """Known to be absent, of images with holes alone."""
    ignored: sparse.csr_matrix
    """Of complete images, those that are not absent beside the present ones."""
    complete: np.ndarray
    """(n,) bool: the images without `absent_labels`, the others of which have holes."""

    @classmethod
    def of(cls, dataset_dicts: Iterable[Dict], num_labels: int) -> _States:
        """Of a data set's dicts, each of which is looked at once and not kept."""
        rows = present, absent, ignored = tuple(_Rows() for _ in range(3))
        complete = array("b")
        for record in dataset_dicts:
            labels = label_sets(record)
            complete.append(labels.absent is None)
            present.append(labels.present)
            absent.append(labels.absent or ())
            ignored.append(labels.ignored if labels.absent is None else ())
        return cls(*(part.matrix(num_labels) for part in rows), np.array(complete, bool))


class _Rows:
    """The rows of a sparse matrix of ones, which are appended one by one."""

    def __init__(self):
        self.columns, self.ends = array("i"), array("q", [0])

    def append(self, columns: Iterable[int]) -> None:
        self.columns.extend(sorted(columns))
        self.ends.append(len(self.columns))

    def matrix(self, num_columns: int) -> sparse.csr_matrix:
        columns, ends = np.array(self.columns, np.int32), np.array(self.ends)
        shape = len(ends) - 1, num_columns
        return sparse.csr_matrix((np.ones_like(columns), columns, ends), shape=shape)


def label_matrices(
    dataset_dicts: Iterable[Dict], num_labels: int
) -> Tuple[sparse.csr_matrix, sparse.csr_matrix | None]:
    """Which labels images have, and of which it is known, as `target_vector` has them.

    Args:
        dataset_dicts: see `MultiLabelDatasetMapper`.
        num_labels: C.
    Returns:
        present and known, (n, C) float32 of ones; None for known where all labels of all images
        are.
    """
    present, absent, ignored, complete = _States.of(dataset_dicts, num_labels)
    if complete.all() and not ignored.nnz:
        return present.astype(np.float32), None
    # All ones in the rows of complete images, and no others.
    rows = sparse.csr_matrix(complete[:, None], dtype=np.int32)
    rows = rows @ sparse.csr_matrix(np.ones((1, num_labels), np.int32))
    known = (rows + present + absent - ignored) > 0
    return present.astype(np.float32), known.astype(np.float32)


def count_labels(dataset_dicts: Iterable[Dict], num_labels: int) -> LabelStatistics:
    """Count the labels of a data set's dicts, each image once. Unknown labels don't count.

    In images without `absent_labels`, where ignored labels are few, these count as absent ones.

    Args:
        dataset_dicts: with `labels` and, where others are unknown, `absent_labels`: lists of
            indices below num_labels = C.
    """
    # Not int64: it is the largest thing that there is of a label graph.
    pair_counts = np.zeros((num_labels, num_labels), np.int32)
    for start, pairs in _pair_counts(_States.of(dataset_dicts, num_labels)):
        pair_counts[start : start + pairs.shape[0]] = pairs.toarray()
    return LabelStatistics(pair_counts.diagonal().astype(np.int64), pair_counts)


def count_states(dataset_dicts: Iterable[Dict], num_labels: int) -> StateCounts:
    """In how many images each label is present, absent and unknown, ignored ones among these.

    Args:
        dataset_dicts: see `MultiLabelDatasetMapper`.
        num_labels: C.
    """
    states = _States.of(dataset_dicts, num_labels)
    present, num_complete = _sum(states.present), states.complete.sum()
    not_absent = _sum(states.present[states.complete]) + _sum(states.ignored)
    absent = _sum(states.absent) + num_complete - not_absent
    return StateCounts(present, absent, len(states.complete) - present - absent)


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
    dataset_dicts: Iterable[Dict],
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
    states = _States.of(dataset_dicts, num_labels)
    counts = _sum(states.present)
    shown = np.sort(np.argsort(-counts, kind="stable")[:max_shown])
    edges_out, edges_in = np.zeros((2, num_labels), np.int64)
    weight_in = np.zeros(num_labels)
    conditional, edges = np.zeros((2, len(shown), len(shown)))
    for start, pairs in _pair_counts(states):
        stop = start + pairs.shape[0]
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


def _pair_counts(states: _States) -> Iterator[Tuple[int, sparse.coo_matrix]]:
    """The rows of `LabelStatistics.pair_counts`, some at a time, behind the first one's index."""
    presence, holes = states.present, ~states.complete
    counts, num_labels = _sum(presence), presence.shape[1]
    holed = presence[holes]
    known = holed + states.absent[holes]
    in_complete = counts - _sum(holed)
    of_labels, of_labels_holed = presence.tocsc(), holed.tocsc()
    step = max(1, PAIRS_AT_ONCE // max(num_labels, 1))
    for start in range(0, num_labels, step):
        rows = slice(start, start + step)
        pairs = (of_labels[:, rows].T @ presence).tocoo()
        if holes.any():
            both_known = (of_labels_holed[:, rows].T @ known).toarray() + in_complete[rows, None]
            weights = counts[rows][pairs.row] / both_known[pairs.row, pairs.col]
            pairs.data = np.rint(pairs.data * weights).astype(np.int64)
        yield start, pairs


def _sum(matrix: sparse.csr_matrix) -> np.ndarray:
    """(C,) int64: in how many images a label is."""
    return np.bincount(matrix.indices, minlength=matrix.shape[1])


def _fingerprint(dataset_dicts: Sequence[Dict], label_names: List[str]) -> str:
    """A hash of the label names and of what is counted of every image, whatever their order."""
    digest = hashlib.sha256(repr(list(label_names)).encode())
    for line in sorted(map(_counted, dataset_dicts)):
        digest.update(line.encode())
    return digest.hexdigest()


def _counted(record: Dict) -> str:
    labels = label_sets(record)
    present = repr(sorted(labels.present))
    return present if labels.absent is None else f"{present} !{sorted(labels.absent)}"
