"""From a config and a checkpoint to a model that is ready for use."""

from __future__ import annotations

from typing import Sequence

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model as build_d2_model
from torch import nn

from ..errors import InputError
from .allowance import Allowance
from .checkpointer import MultiLabelCheckpointer
from .other_labels import give_label_embeddings


def build_model(cfg: CfgNode) -> nn.Module:
    """The model of a config, with random weights, on MODEL.DEVICE, as MODEL.CHANNELS_LAST says.

    Raises:
        InputError: a registry has no such name, keys contradict each other, or
            MODEL.META_ARCHITECTURE is no multi-label recogniser.
    """
    try:
        model = build_d2_model(cfg)
    except (AssertionError, KeyError) as error:
        raise InputError(f"MODEL: {' '.join(map(str, error.args))}") from error
    if not hasattr(model, "label_head"):
        raise InputError(
            f"MODEL.META_ARCHITECTURE: {cfg.MODEL.META_ARCHITECTURE} is no multi-label recogniser"
        )
    if cfg.MODEL.CHANNELS_LAST:
        # A convolution hands on the layout of its weight.
        model.to(memory_format=torch.channels_last)
    return model


def load_model(
    cfg: CfgNode, label_names: Sequence[str], *, path: str = "", ema: bool = False
) -> nn.Module:
    """The model of a config with all its weights from a checkpoint, in evaluation mode.

    Args:
        cfg: of the model; MODEL.LABEL_HEAD.NUM_LABELS is the number of `label_names`.
        label_names: C names, in the order of the model's outputs: with TEST.LABELS, those of
            `scored_labels`, and else those of the checkpoint.
        path: of the checkpoint; "": MODEL.WEIGHTS.
        ema: load the EMA of the weights that the checkpoint contains.
    Raises:
        InputError: see `build_model` and `MultiLabelCheckpointer.load`, and with TEST.LABELS
            `give_label_embeddings`; or the checkpoint lacks a part of the model, or is far too
            small for it.
    """
    path = path or cfg.MODEL.WEIGHTS
    with Allowance(path):
        model = build_model(cfg)
    other_labels = bool(cfg.TEST.LABELS)
    if other_labels:
        give_label_embeddings(cfg, model, label_names)
    checkpointer = MultiLabelCheckpointer(
        model, label_names=label_names, load_ema=ema, other_labels=other_labels
    )
    if other_labels and model.label_prior is not None:
        raise InputError(f"TEST.LABELS: the label prior in {path} is of the labels of its training")
    checkpointer.load(path)
    checkpointer.check_complete()
    return model.eval()
