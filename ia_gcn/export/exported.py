"""Metadata of an exported file, and running it."""

from __future__ import annotations

import os
from typing import Any, Callable, Dict, NamedTuple, Sequence

import numpy as np
import torch
from detectron2.config import CfgNode

from .. import __version__
from ..data.augmentation import centre, resized_size
from ..errors import InputError
from ..inference.onnx_predictor import ImageView


class ExportedModel(NamedTuple):
    """An exported model that was read from its file."""

    view: ImageView
    """From an image to the model's input, as the file's own preprocessing says."""
    run: Callable[[np.ndarray, np.ndarray], np.ndarray]
    """From images (B, 3, H, W) uint8 and label_states (B, C) int8 to logits (B, C). The states have
    no effect on a model that does not take known labels."""


def describe(
    cfg: CfgNode, label_names: Sequence[str], takes_known_labels: bool = False
) -> Dict[str, Any]:
    """The metadata of an exported file, for JSON.

    Args:
        cfg: of the model, with MODEL.WEIGHTS.
        label_names: C names.
        takes_known_labels: whether the model has the input label_states.
    Returns:
        label_names; preprocessing: from an image to the model's input; made_by; and, of a model
        that has this input, what label_states are.
    Raises:
        InputError: INPUT.FORMAT is neither RGB nor BGR, the formats with integer pixels.
    """
    if cfg.INPUT.FORMAT not in ("RGB", "BGR"):
        raise InputError(f"INPUT.FORMAT must be RGB or BGR to be exported, not {cfg.INPUT.FORMAT}")
    states = "int8 (B, C): 1 for a label that is known to be there, 0 not to be there, -1 unknown"
    size, share = cfg.INPUT.IMAGE_SIZE, cfg.INPUT.CENTER_CROP
    return {
        "label_names": list(label_names),
        **({"label_states": states} if takes_known_labels else {}),
        "preprocessing": {
            # The image is resized to one height and width, and the size is cut out at one row and
            # column.
            "resize": list(resized_size(size, share)),
            "crop": list(centre(size, share)),
            "size": list(size),
            "format": cfg.INPUT.FORMAT,
            # Pillow's, which takes the mean over what becomes a pixel.
            "interpolation": cfg.INPUT.INTERPOLATION,
            "input": "uint8 (B, 3, height, width); the model itself takes off mean and deviation",
            "mean": list(cfg.MODEL.PIXEL_MEAN),
            "deviation": list(cfg.MODEL.PIXEL_STD),
        },
        "made_by": {
            "ia_gcn": __version__,
            "torch": str(torch.__version__),
            "weights": os.path.basename(cfg.MODEL.WEIGHTS),
            "meta_architecture": cfg.MODEL.META_ARCHITECTURE,
            "label_head": cfg.MODEL.LABEL_HEAD.NAME,
        },
    }
