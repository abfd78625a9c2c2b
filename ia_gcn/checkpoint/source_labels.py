"""The labels of another project's checkpoint: their names, their order and their embeddings."""

from __future__ import annotations

import zipfile
from typing import Any, List, Sequence, Tuple

import numpy as np
import torch
from detectron2.config import CfgNode

from ..data import label_embeddings
from ..data.datasets import COCO_LABELS, VOC_LABELS
from ..data.datasets.common import read_label_file
from ..errors import InputError
from ..io.inputs import open_input
from ..io.npz import read_npz
from .source import read_pickle


def source_labels(
    given: str, count: int, coco: Sequence[str], own: Sequence[str] | None, shown: str
) -> List[str]:
    """The names of a source's labels, in its order: those given, its own, or by their number.

    Args:
        given: coco, voc or a file with a name a line; "": none of them.
        count: C, how many there are.
        coco: COCO's labels in the order that the source's project has them.
        own: those that the source itself names, if it does.
        shown: the source, for messages.
    Raises:
        InputError: the names are unknown, or they are not C different ones.
    """
    if given:
        where, labels = f"--labels {given}", read_labels(given, coco)
    elif own is not None:
        where, labels = f"{shown}: idx_to_class", own
    else:
        where = shown
        labels = next((names for names in (coco, VOC_LABELS) if len(names) == count), None)
        if labels is None:
            raise InputError(f"{where} has {count} labels: --labels must name them, in its order")
    if len(labels) != count or len(set(labels)) != count:
        raise InputError(f"{where} names {len(set(labels))} labels, and the source has {count}")
    return list(labels)


def read_labels(given: str, coco: Sequence[str]) -> List[str]:
    """The names that --labels stands for: coco, voc, or a file with a name a line.

    Raises:
        InputError: the file can't be read.
    """
    known = {"coco": coco, "voc": VOC_LABELS}
    return list(known[given]) if given in known else read_label_file(given)


def model_order(labels: Sequence[str]) -> Tuple[List[str], List[int]]:
    """The labels in the order of the data set that has them, else as they are.

    Returns:
        the names, and where each one was.
    """
    names = next((n for n in (COCO_LABELS, VOC_LABELS) if sorted(n) == sorted(labels)), labels)
    return list(names), [labels.index(name) for name in names]


def describe_order(label_names: Sequence[str], labels: Sequence[str]) -> str:
    """Which labels come first in the model, and whether they did in the source."""
    order = "as in the source" if list(labels) == list(label_names) else "reordered"
    return f"labels: {', '.join(label_names[:3])} ...; {order}"


def read_matrix(option: str, path: str, count: int, columns: int | None = None) -> torch.Tensor:
    """(C, .) float32, of a .pkl, .npy or .npz file with one matrix.

    Args:
        option: by which the file was given, for messages.
        count: C.
        columns: how many it must have; None: any number.
    Raises:
        InputError: it can't be read, or is no matrix of finite numbers of that size.
    """
    where = f"{option} {path}"
    matrix = (read_pickle if path.endswith(".pkl") else _read_numpy)(path, where)
    if not isinstance(matrix, np.ndarray) or matrix.ndim != 2 or matrix.dtype.kind not in "fiu":
        raise InputError(f"{where} is no matrix of numbers")
    if len(matrix) != count:
        raise InputError(f"{where} is of {len(matrix)} labels, and the source has {count}")
    if columns not in (None, matrix.shape[1]):
        raise InputError(f"{where} has {matrix.shape[1]} columns, not {columns}")
    matrix = torch.tensor(matrix.astype(np.float32))
    if not matrix.isfinite().all():
        raise InputError(f"{where}: a number is not finite")
    return matrix


def embeddings_by_name(cfg: CfgNode, label_names: Sequence[str]) -> torch.Tensor:
    """(C, d) float32 of MODEL.LABEL_EMBEDDINGS.

    Raises:
        InputError: they are those of the names, or can't be read.
    """
    source = cfg.MODEL.LABEL_EMBEDDINGS
    if source.SOURCE == "names":
        raise InputError(
            "MODEL.LABEL_EMBEDDINGS.SOURCE names: no weights were trained with these; give those "
            "of the source as --embeddings"
        )
    try:
        matrix = label_embeddings(
            label_names, source.SOURCE, source.DIM, source.ALIASES, source.NORM
        )
    except InputError as error:
        raise InputError(f"{error}; or give those of the source as --embeddings") from None
    return torch.tensor(matrix)


def _read_numpy(path: str, where: str) -> Any:
    """The array of a .npy file, or the only one of an .npz."""
    try:
        with open_input(path, "rb") as file:
            if not zipfile.is_zipfile(file):
                file.seek(0)
                return np.load(file, allow_pickle=False)
            arrays = list(read_npz(file).values())
    except OSError as error:
        raise InputError(f"{where}: {error.strerror or error}") from None
    except Exception:  # of a damaged file numpy and zipfile raise nearly anything
        raise InputError(f"{where} is damaged, or no .pkl, .npy or .npz file") from None
    if len(arrays) != 1:
        raise InputError(
            f"{where} has {len(arrays)} arrays; a file of tools/build_label_embeddings.py is "
            "given as MODEL.LABEL_EMBEDDINGS.SOURCE"
        )
    return arrays[0]
