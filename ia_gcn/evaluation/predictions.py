"""The predictions.npz that `MultiLabelEvaluator` writes."""

from __future__ import annotations

from typing import Dict, List, NamedTuple

import numpy as np

from ..errors import InputError
from ..io.files import write_atomically
from ..io.inputs import open_input
from ..io.npz import Columns, read_npz, write_npz
from .label_blocks import label_blocks
from .metrics import check_predictions, check_shapes


class Predictions(NamedTuple):
    """A model's scores of n images and C labels, and the targets."""

    image_ids: np.ndarray
    """(n,) integers or text, each of them once."""
    scores: np.ndarray
    """(n, C) float in [0, 1]."""
    targets: np.ndarray
    """(n, C) in {1, 0, -1 = ignored}."""
    label_names: List[str]
    """C different names."""
    label_counts: np.ndarray | None = None
    """(C,) integers: training images that have each label; None where that is not known."""


# Arrays of the file.
REQUIRED, OPTIONAL = Predictions._fields[:-1], Predictions._fields[-1:]
# Matrices of as many bytes stay in the file, where `store_predictions` wrote them.
MAPPED_FROM = 2**28


def read_predictions(path: str) -> Predictions:
    """Read and check such a file. Large matrices stay in it, see `read_npz`.

    Raises:
        InputError: there is no such file, it is damaged or contains pickled code, or an array is
            missing or is not as `Predictions` says; or there is no image or no label in it.
    """
    try:
        with open_input(path, "rb") as file:
            arrays = read_npz(file, REQUIRED, OPTIONAL, MAPPED_FROM)
    # Damaged and hostile files make numpy and zipfile raise nearly anything.
    except Exception as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        line = " ".join(str(reason).split()) or type(error).__name__
        raise InputError(f"{path}: not a predictions.npz of an evaluation: {line}") from None
    image_ids, scores, targets, names, label_counts = map(arrays.get, Predictions._fields)
    shapes = ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
    if image_ids.ndim != 1 or names.ndim != 1 or scores.shape != (len(image_ids), len(names)):
        raise InputError(f"{path}: the shapes do not agree: {shapes}")
    if not scores.size:
        raise InputError(f"{path} holds no prediction: {shapes}")
    if image_ids.dtype.kind not in "iuU" or names.dtype.kind != "U":
        raise InputError(
            f"{path}: image_ids must be integers or text, and label_names text, not "
            f"{image_ids.dtype} and {names.dtype}"
        )
    for name, array in (("image_ids", image_ids), ("label_names", names)):
        values, counts = np.unique(array, return_counts=True)
        if len(values) < len(array):
            raise InputError(f"{path}: {name} has {values[counts.argmax()]} twice")
    if scores.dtype.kind != "f":
        raise InputError(f"{path}: scores must be floating-point numbers, not {scores.dtype}")
    try:
        check_shapes(scores, targets, ndim=2)
        for _, block in label_blocks(scores, targets):
            check_predictions(*block, ndim=2)
    except ValueError as error:
        raise InputError(f"{path}: {error}") from None
    if label_counts is not None and not (
        label_counts.shape == names.shape
        and label_counts.dtype.kind in "iu"
        and label_counts.min() >= 0
    ):
        raise InputError(f"{path}: label_counts must be a number of images for each label")
    return Predictions(image_ids, scores, targets, names.tolist(), label_counts)


def write_predictions(path: str, predictions: Predictions) -> None:
    """Write such a file, in place of an older one once it is complete."""
    with write_atomically(path) as file:
        np.savez_compressed(file, **_arrays(predictions))


def store_predictions(path: str, predictions: Predictions) -> Predictions:
    """`write_predictions` of matrices that are not in memory, which are then mapped from the file.

    Args:
        predictions: scores and targets are `Columns`.
    """
    arrays = _arrays(predictions)
    matrices = {name: arrays.pop(name) for name in ("scores", "targets")}
    return predictions._replace(**_store(path, matrices, arrays))


def store_matrix(path: str, matrix: Columns) -> np.ndarray:
    """Write a matrix that is not in memory, which is then mapped from the file."""
    return _store(path, {"matrix": matrix})["matrix"]


def _store(path, matrices, arrays=None) -> Dict[str, np.ndarray]:
    """Write an .npz file, and map the matrices from it."""
    with write_atomically(path) as file:
        write_npz(file, matrices, arrays)
    with open(path, "rb") as file:
        return read_npz(file, tuple(matrices), map_from=0)


def _arrays(predictions: Predictions) -> Dict:
    """The arrays of the file by name."""
    arrays = {**predictions._asdict(), "label_names": np.array(predictions.label_names)}
    return {name: array for name, array in arrays.items() if array is not None}
