"""Matrices of images and labels, a few labels at a time.

Everything that is measured goes through `label_blocks`, so that what is computed on the way to a
figure takes the same memory whatever the number of labels, and the matrices themselves may be in
files. n is the number of images, C the number of labels.
"""

from __future__ import annotations

import mmap
from typing import Iterator, List, Sequence, Tuple

import numpy as np

# Of a matrix. What is computed from so many scores takes some tens of megabytes.
SCORES_AT_ONCE = 2**22


def label_slices(num_images: int, num_labels: int) -> Iterator[slice]:
    """Slices of the labels, of at most SCORES_AT_ONCE scores each, if that is one label or more."""
    step = max(1, SCORES_AT_ONCE // max(1, num_images))
    return (slice(i, min(i + step, num_labels)) for i in range(0, num_labels, step))


def label_blocks(
    *matrices: np.ndarray, labels: Sequence[int] | None = None
) -> Iterator[Tuple[slice, List[np.ndarray]]]:
    """Go through matrices of the same shape (n, C), a few labels at a time.

    Args:
        matrices: in memory, or mapped from files; of any order in memory.
        labels: the indices of those to go through; None: all.
    Yields:
        a slice of the labels, or of `labels`; and of each matrix these, label after label: (b, n).
        They are to be used before the next ones are asked for, and not to be changed.
    """
    matrices = [np.asarray(matrix) for matrix in matrices]
    num_images, num_labels = matrices[0].shape
    for part in label_slices(num_images, num_labels if labels is None else len(labels)):
        chosen = part if labels is None else np.asarray(labels[part])
        # In a file, numbers need not begin at a multiple of their size, without which all is slow.
        yield part, [np.require(matrix[:, chosen].T, requirements="CA") for matrix in matrices]
        for matrix in matrices:
            _release(matrix)


def count_given(targets: np.ndarray) -> Tuple[np.ndarray, np.ndarray]:
    """In how many images each label is present and absent, (C,) int64 each.

    Args:
        targets: (n, C), 1 where a label is present, 0 where it is absent.
    """
    present, absent = np.zeros((2, targets.shape[1]), np.int64)
    for labels, (block,) in label_blocks(targets):
        present[labels], absent[labels] = (block == 1).sum(axis=1), (block == 0).sum(axis=1)
    return present, absent


def _release(matrix: np.ndarray) -> None:
    """Let a matrix that is mapped from a file hold no memory; it is read again where it is used."""
    source = matrix
    while isinstance(source, np.ndarray):
        source = source.base
    # Of a matrix that may be written to, changes could be lost. Windows has no such advice.
    read_only = isinstance(source, mmap.mmap) and not matrix.flags.writeable
    if read_only and hasattr(source, "madvise"):
        source.madvise(mmap.MADV_DONTNEED)
