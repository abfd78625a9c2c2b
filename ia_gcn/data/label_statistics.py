"""Label counts and pair counts of a data set, from which label graphs are computed."""

from __future__ import annotations

import hashlib
import logging
import os
from itertools import chain
from typing import Dict, Iterable, Iterator, List, NamedTuple, Sequence, Set, Tuple

import numpy as np
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from scipy import sparse

from ..io.files import write_atomically

logger = logging.getLogger(__name__)


# Pairs of labels that `summarize_label_graph` looks at together: some tens of megabytes.
PAIRS_AT_ONCE = 2_000_000


class LabelStatistics(NamedTuple):
    """Counts from which P(j|i) = pair_counts[i, j] / label_counts[i] follows; C labels."""

    label_counts: np.ndarray
    """(C,) int64: n_i, images with label i."""
    pair_counts: np.ndarray
    """(C, C) int64: n_ij, images with labels i and j. Where labels are unknown, n_i · n_ij / k_ij,
    rounded, with k_ij the images with label i in which j is known, present or absent: as many as
    there would be if the images in which j is unknown were as the others."""


class StateCounts(NamedTuple):
    """In how many images a label is present, absent and unknown; (C,) int64 each."""

    present: np.ndarray
    absent: np.ndarray
    unknown: np.ndarray


def count_labels(dataset_dicts: Sequence[Dict], num_labels: int) -> LabelStatistics:
    """Count the labels of a data set's dicts, each image once. Unknown labels don't count.

    In images without `absent_labels`, where ignored labels are few, these count as absent ones.

    Args:
        dataset_dicts: with `labels` and, where others are unknown, `absent_labels`: lists of
            indices below num_labels = C.
    """
    pair_counts = np.zeros((num_labels, num_labels), np.int64)
    for start, pairs in _pair_counts(dataset_dicts, num_labels):
        pair_counts[start : start + pairs.shape[0]] = pairs.toarray()
    return LabelStatistics(pair_counts.diagonal().copy(), pair_counts)


def count_states(dataset_dicts: Sequence[Dict], num_labels: int) -> StateCounts:
    """In how many images each label is present, absent and unknown, ignored ones among these.

    Args:
        dataset_dicts: see `MultiLabelDatasetMapper`.
        num_labels: C.
    """
    complete = [d for d in dataset_dicts if "absent_labels" not in d]
    with_holes = [d for d in dataset_dicts if "absent_labels" in d]
    present = _count(map(_present, dataset_dicts), num_labels)
    absent = _count(map(_known_absent, with_holes), num_labels)
    absent += len(complete) - _count((_present(d) | _ignored(d) for d in complete), num_labels)
    return StateCounts(present, absent, len(dataset_dicts) - present - absent)


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
    counts = _count(map(_present, dataset_dicts), num_labels)
    shown = np.sort(np.argsort(-counts, kind="stable")[:max_shown])
    edges_out, edges_in = np.zeros((2, num_labels), np.int64)
    weight_in = np.zeros(num_labels)
    conditional, edges = np.zeros((2, len(shown), len(shown)))
    for start, pairs in _pair_counts(dataset_dicts, num_labels):
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


def _pair_counts(
    dataset_dicts: Sequence[Dict], num_labels: int
) -> Iterator[Tuple[int, sparse.coo_matrix]]:
    """The rows of `LabelStatistics.pair_counts`, some at a time, behind the first one's index."""
    presence = _indicator(map(_present, dataset_dicts), num_labels)
    counts = np.asarray(presence.sum(axis=0)).ravel()
    with_holes = [d for d in dataset_dicts if "absent_labels" in d]
    holed = _indicator(map(_present, with_holes), num_labels)
    known = holed + _indicator(map(_known_absent, with_holes), num_labels)
    in_complete = counts - np.asarray(holed.sum(axis=0)).ravel()
    of_labels, of_labels_holed = presence.tocsc(), holed.tocsc()
    step = max(1, PAIRS_AT_ONCE // max(num_labels, 1))
    for start in range(0, num_labels, step):
        rows = slice(start, start + step)
        pairs = (of_labels[:, rows].T @ presence).tocoo()
        if with_holes:
            both_known = (of_labels_holed[:, rows].T @ known).toarray() + in_complete[rows, None]
            weights = counts[rows][pairs.row] / both_known[pairs.row, pairs.col]
            pairs.data = np.rint(pairs.data * weights).astype(np.int64)
        yield start, pairs


def _present(record: Dict) -> Set[int]:
    return set(record["labels"])


def _ignored(record: Dict) -> Set[int]:
    return set(record.get("ignored_labels", ())).difference(record["labels"])


def _known_absent(record: Dict) -> Set[int]:
    """Of an image with `absent_labels`; the precedence is that of `target_vector`."""
    return set(record["absent_labels"]) - _ignored(record) - _present(record)


def _count(label_sets: Iterable[Set[int]], num_labels: int) -> np.ndarray:
    """(C,) int64: in how many sets a label is."""
    return np.bincount(
        np.fromiter(chain.from_iterable(label_sets), np.int64), minlength=num_labels
    ).astype(np.int64)


def _indicator(label_sets: Iterable[Set[int]], num_labels: int) -> sparse.csr_matrix:
    """(n, C) int64, sparse: 1 where label i is in set k."""
    labels = [sorted(found) for found in label_sets]
    row_ends = np.cumsum([0, *map(len, labels)])
    columns = np.fromiter(chain.from_iterable(labels), np.int64)
    shape = (len(labels), num_labels)
    return sparse.csr_matrix((np.ones_like(columns), columns, row_ends), shape=shape)


def _fingerprint(dataset_dicts: Sequence[Dict], label_names: List[str]) -> str:
    """A hash of the label names and of what is counted of every image, whatever their order."""
    digest = hashlib.sha256(repr(list(label_names)).encode())
    for line in sorted(map(_counted, dataset_dicts)):
        digest.update(line.encode())
    return digest.hexdigest()


def _counted(record: Dict) -> str:
    labels = repr(sorted(_present(record)))
    if "absent_labels" not in record:
        return labels
    return f"{labels} !{sorted(_known_absent(record))}"
