"""Labels that a model was not trained on, which a head with a shared readout scores: zero-shot."""

from __future__ import annotations

from typing import List, Sequence

from detectron2.config import CfgNode
from torch import nn

from ..data import label_embeddings
from ..data.datasets.common import read_label_file
from ..errors import InputError


def scored_labels(cfg: CfgNode, trained: Sequence[str]) -> List[str]:
    """The labels of TEST.LABELS; if it is empty, those that the checkpoint was trained on.

    Raises:
        InputError: the file of TEST.LABELS can't be used.
    """
    if not cfg.TEST.LABELS:
        return list(trained)
    try:
        return read_label_file(cfg.TEST.LABELS)
    except InputError as error:
        raise InputError(f"TEST.LABELS: {error}") from None


def give_label_embeddings(cfg: CfgNode, model: nn.Module, label_names: Sequence[str]) -> None:
    """Fill a recogniser's label embeddings by name, for labels of TEST.LABELS.

    Raises:
        InputError: its head scores only what it was trained on, or MODEL.LABEL_EMBEDDINGS has no
            embedding of a label.
    """
    if model.label_head is None or not model.label_head.any_labels:
        raise InputError(
            "TEST.LABELS: this model scores the labels that it was trained on alone; those with "
            "MODEL.LABEL_HEAD.NAME MLDecoderHead and MODEL.ML_DECODER.READOUT shared score others"
        )
    source = cfg.MODEL.LABEL_EMBEDDINGS
    embeddings = label_embeddings(
        label_names, source.SOURCE, source.DIM, source.ALIASES, source.NORM
    )
    model.label_graph.fill(None, None, embeddings)
