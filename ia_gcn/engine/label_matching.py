"""The labels that a checkpoint knows, against those of the data it is evaluated on."""

from __future__ import annotations

from typing import Any, Dict, List, Sequence

from detectron2.config import CfgNode
from detectron2.utils.file_io import PathManager

from ..checkpoint import find_resumable, read_checkpoint
from ..errors import InputError
from ..label_names import describe_mismatch


def weights_path(cfg: CfgNode, resume: bool) -> str:
    """MODEL.WEIGHTS; to resume, the last checkpoint in OUTPUT_DIR where there is one.

    Raises:
        InputError: see `find_resumable`.
    """
    return (resume and find_resumable(cfg.OUTPUT_DIR)) or cfg.MODEL.WEIGHTS


def checkpoint_labels(path: str) -> List[str]:
    """The label names in a checkpoint; none of a file that has none, such as a bare state dict.

    Raises:
        InputError: there is no path, the file can't be read, or its label names are not a list of
            names.
    """
    if not path:
        raise InputError("MODEL.WEIGHTS is empty: set it to a checkpoint")
    return _label_names(checkpoint_content(path), path)


def _label_names(content: Dict[str, Any], path: str) -> List[str]:
    names = content.get("label_names", [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(f"MODEL.WEIGHTS: {path} has label_names that are not a list of names")
    return names


def training_counts(path: str, labels: Sequence[str]) -> List[int] | None:
    """How many training images of a checkpoint have each of some labels; None if it doesn't say.

    A label that the training did not have has none.

    Raises:
        InputError: the file can't be read, or its label_counts are not a number for each of its
            label_names.
    """
    content = checkpoint_content(path)
    names, counts = _label_names(content, path), content.get("label_counts", [])
    if not counts:
        return None
    if (
        not isinstance(counts, list)
        or len(counts) != len(names)
        or not all(type(count) is int and count >= 0 for count in counts)
    ):
        raise InputError(
            f"MODEL.WEIGHTS: {path} has label_counts that are not a number of images for each of "
            "its labels"
        )
    count_of = dict(zip(names, counts))
    return [count_of.get(label, 0) for label in labels]


def checkpoint_content(path: str) -> Dict[str, Any]:
    """`read_checkpoint` of any path that PathManager knows.

    Raises:
        InputError: the file can't be downloaded or read.
    """
    try:
        local = PathManager.get_local_path(path)
    except (OSError, ValueError) as error:
        raise InputError(f"MODEL.WEIGHTS: {path}: {error}") from None
    return read_checkpoint(local, path)


def match_labels(
    labels: Sequence[str], trained: Sequence[str], by_name: bool, path: str
) -> List[int]:
    """The index of each label of a data set among those of a checkpoint.

    Args:
        labels: names of the data set's.
        trained: names of the checkpoint's; none: they are taken for the data set's.
        by_name: DATASETS.MATCH_LABELS_BY_NAME; False: they must be the same, in the same order.
        path: of the checkpoint, for messages.
    Raises:
        InputError: they differ in a way that is not allowed, or the checkpoint has no label names.
    """
    if not trained:
        if by_name:
            raise InputError(
                f"DATASETS.MATCH_LABELS_BY_NAME: MODEL.WEIGHTS {path} holds no label names"
            )
        return list(range(len(labels)))
    unknown = [label for label in labels if label not in trained]
    if not by_name and list(labels) != list(trained):
        hint = "" if unknown else "; DATASETS.MATCH_LABELS_BY_NAME True selects outputs by name"
        mismatch = describe_mismatch(labels, trained)
        raise InputError(f"the data set {mismatch} than MODEL.WEIGHTS {path}{hint}")
    if unknown:
        raise InputError(
            f"DATASETS.MATCH_LABELS_BY_NAME: MODEL.WEIGHTS {path} lacks {len(unknown)} of the data "
            f"set's labels: {', '.join(unknown[:20])}{' ...' if len(unknown) > 20 else ''}"
        )
    return [list(trained).index(label) for label in labels]
