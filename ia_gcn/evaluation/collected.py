"""What an evaluation collects: in memory, and above a limit in temporary files.

n is the number of images, m that of a part of them, C the number of labels.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from typing import Dict, Iterator, List, NamedTuple, Sequence, Tuple

import numpy as np

from ..errors import InputError
from ..io.files import append_bytes
from ..io.npz import Columns
from . import label_blocks
from .label_blocks import label_slices

DTYPES = {"scores": np.float32, "targets": np.int8, "known": np.int8}


class StoredMatrix(NamedTuple):
    """A matrix (C, m) in a file, of which some rows are read at a time."""

    path: str
    offset: int
    """Where it begins, in bytes."""
    dtype: np.dtype
    shape: Tuple[int, int]

    def __getitem__(self, rows: slice) -> np.ndarray:
        count, width = rows.stop - rows.start, self.shape[1]
        offset = self.offset + rows.start * width * self.dtype.itemsize
        return np.fromfile(self.path, self.dtype, count * width, offset=offset).reshape(-1, width)


class Part(NamedTuple):
    """Some of the images of an evaluation."""

    image_ids: List
    """m."""
    file_names: List[str | None]
    """m."""
    matrices: Dict[str, np.ndarray | StoredMatrix]
    """(C, m) each, by the names of DTYPES: label after label, as they are read in the end."""


class Collected:
    """Images of one process, as they come: in memory up to a limit, above it in a temporary folder.

    The folder is removed when this object or the process ends, unless `leave_files` was called.
    """

    def __init__(self, limit: int, folder: str | None = None):
        """
        Args:
            limit: of the matrices in memory, in bytes.
            folder: where the temporary folder is made, once it is needed; None: the system's.
        """
        self._limit, self._parent = limit, folder
        self._parts: List[Part] = []
        self._bytes = 0
        self._folder: str | None = None
        self._remove = None
        self._forget_rows()

    def add(self, image_id, file_name: str | None, **rows: np.ndarray) -> None:
        """
        Args:
            rows: (C,) each, by the names of DTYPES: scores, and the same others for all images.
        """
        self._image_ids.append(image_id)
        self._file_names.append(file_name)
        for name, row in rows.items():
            self._rows.setdefault(name, []).append(row)
        if len(self._image_ids) * len(rows["scores"]) >= label_blocks.SCORES_AT_ONCE:
            self._pack()

    def parts(self) -> List[Part]:
        """What was added."""
        if self._image_ids:
            self._pack()
        return self._parts

    def leave_files(self) -> None:
        """From now on, who has the parts removes the files, see `Gathered.remove_files`."""
        if self._remove is not None:
            self._remove.detach()

    def _forget_rows(self) -> None:
        self._image_ids: List = []
        self._file_names: List[str | None] = []
        self._rows: Dict[str, List[np.ndarray]] = {}

    def _pack(self) -> None:
        matrices = {
            name: np.ascontiguousarray(np.stack(rows).astype(DTYPES[name], copy=False).T)
            for name, rows in self._rows.items()
        }
        self._parts.append(Part(self._image_ids, self._file_names, matrices))
        self._forget_rows()
        self._bytes += sum(matrix.nbytes for matrix in matrices.values())
        if self._bytes > self._limit:
            self._parts = [
                part._replace(matrices={k: self._store(v) for k, v in part.matrices.items()})
                for part in self._parts
            ]

    def _store(self, matrix: np.ndarray | StoredMatrix) -> StoredMatrix:
        if isinstance(matrix, StoredMatrix):
            return matrix
        if self._folder is None:
            if self._parent:
                os.makedirs(self._parent, exist_ok=True)
            # A name that `remove_unfinished` knows, should the process be killed.
            self._folder = tempfile.mkdtemp(".tmp", ".scores.", self._parent)
            self._remove = weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        path = os.path.join(self._folder, "matrices")
        offset = append_bytes(path, memoryview(matrix).cast("B"))
        return StoredMatrix(path, offset, matrix.dtype, matrix.shape)


class Gathered:
    """The parts of all processes as matrices: each image once, in the order of their ids."""

    def __init__(self, parts: Sequence[Part], num_labels: int):
        """
        Raises:
            InputError: a part is in a file that is not to be found.
            ValueError: the scores, or another matrix, are of another number of labels.
        """
        self._parts, self._num_labels = parts, num_labels
        self._files = {
            matrix.path
            for part in parts
            for matrix in part.matrices.values()
            if isinstance(matrix, StoredMatrix)
        }
        missing = sorted(path for path in self._files if not os.path.exists(path))
        if missing:
            self.remove_files()
            raise InputError(
                f"TEST.MEMORY_LIMIT: {missing[0]}, with scores of another process, is not to be "
                "found: OUTPUT_DIR must be on a file system that all machines share"
            )
        for part in parts:
            for name, matrix in part.matrices.items():
                if matrix.shape != (num_labels, len(part.image_ids)):
                    self.remove_files()
                    found = " × ".join(map(str, matrix.shape[:-1]))
                    raise ValueError(f"{name} of {found} labels, of a data set of {num_labels}")
        image_ids = np.array([image_id for part in parts for image_id in part.image_ids])
        file_names = [name for part in parts for name in part.file_names]
        # Sorted, so that neither the processes nor the order of the files make a difference.
        self.image_ids, self._order = np.unique(image_ids, return_index=True)
        self.file_names = [file_names[i] for i in self._order]

    @property
    def folder(self) -> str | None:
        """A temporary folder, where some of the parts are in files; else None."""
        return min(map(os.path.dirname, self._files), default=None)

    def columns(self, name: str) -> Columns:
        """A matrix (n, C) to be gone through once, a few labels at a time."""
        shape = len(self._order), self._num_labels
        return Columns(np.dtype(DTYPES[name]), shape, self._blocks(name))

    def matrix(self, name: str) -> np.ndarray:
        """The same in memory, (n, C)."""
        dtype, (num_images, num_labels), blocks = self.columns(name)
        matrix, filled = np.empty((num_labels, num_images), dtype), 0
        for block in blocks:
            matrix[filled : filled + len(block)] = block
            filled += len(block)
        return matrix.T

    def remove_files(self) -> None:
        """Remove the temporary folders."""
        for path in self._files:
            shutil.rmtree(os.path.dirname(path), ignore_errors=True)

    def _blocks(self, name: str) -> Iterator[np.ndarray]:
        total = sum(len(part.image_ids) for part in self._parts)
        for labels in label_slices(total, self._num_labels):
            none = np.empty((labels.stop - labels.start, 0), DTYPES[name])
            blocks = [part.matrices[name][labels] for part in self._parts]
            yield np.concatenate([none, *blocks], axis=1)[:, self._order]
