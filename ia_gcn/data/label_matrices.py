"""The labels of a data set as sparse matrices.

n is the number of images, C of labels.
"""

from __future__ import annotations

from itertools import chain
from typing import Dict, Iterable, Sequence, Tuple

import numpy as np
from scipy import sparse


def label_matrices(
    dataset_dicts: Sequence[Dict], num_labels: int
) -> Tuple[sparse.csr_matrix, sparse.csr_matrix | None]:
    """Which labels images have, and of which it is known, as `target_vector` has them.

    Args:
        dataset_dicts: with `labels`, and `ignored_labels` and `absent_labels` where there are some.
        num_labels: C.
    Returns:
        present and known, (n, C) float32 of ones; None for known where all labels of all images
        are.
    """
    present = [set(d["labels"]) for d in dataset_dicts]
    if not any(d.get("ignored_labels") or "absent_labels" in d for d in dataset_dicts):
        return _ones(present, num_labels), None
    everything = set(range(num_labels))
    known = []
    for record, labels in zip(dataset_dicts, present):
        absent = set(record.get("absent_labels", everything))
        known.append(absent.difference(record.get("ignored_labels", ())) | labels)
    return _ones(present, num_labels), _ones(known, num_labels)


def _ones(rows: Sequence[Iterable[int]], num_labels: int) -> sparse.csr_matrix:
    rows = [sorted(row) for row in rows]
    row_ends = np.cumsum([0, *map(len, rows)])
    columns = np.fromiter(chain.from_iterable(rows), np.int64)
    shape = (len(rows), num_labels)
    return sparse.csr_matrix((np.ones(len(columns), np.float32), columns, row_ends), shape=shape)
