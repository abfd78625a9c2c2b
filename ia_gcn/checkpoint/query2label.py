"""The published checkpoints of Query2Label, on a ResNet or TResNet, under our models' names."""

from __future__ import annotations

import re
from typing import Any, Dict, Iterable, List, Sequence

import torch

from ..errors import InputError
from ..modeling.attention import sine_positions
from .ml_decoder import size_of
from .torchvision_resnet import (
    convert_torchvision_resnet,
    is_torchvision_resnet,
    torchvision_settings,
)
from .tresnet import convert_tresnet, tresnet_settings

BACKBONE, POSITIONS = "backbone.0.body.", "backbone.1.pe"

# Our names by theirs.
PREFIXES = {
    "transformer.encoder.layers.": "label_head.encoder.",
    "transformer.decoder.layers.": "label_head.decoder.",
    "transformer.decoder.norm.": "label_head.norm.",
    "input_proj.": "label_head.project.",
}
QUERIES, READOUT, READOUT_BIAS = "query_embed.weight", "fc.W", "fc.b"

# Pixels of a cell of the map.
STRIDE = 32

# Their positions are computed in float32.
TOLERANCE = 1e-4


def convert_query2label(
    state_dict: Dict[str, torch.Tensor], model_names: Iterable[str], order: Sequence[int]
) -> Dict[str, torch.Tensor]:
    """Rename the tensors, and put the labels into another order.

    The positions, which are computed here, are left out: `check_positions` compares them.

    Args:
        state_dict: backbone.0.body, transformer, query_embed, fc, and input_proj if there is one.
        model_names: of the model's tensors.
        order: the places in the checkpoint of the labels of the model.
    """
    tensors = {}
    for name, tensor in state_dict.items():
        if name.startswith(BACKBONE) or name in (POSITIONS, QUERIES, READOUT, READOUT_BIAS):
            continue
        prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), "")
        tensors[name.replace(prefix, PREFIXES.get(prefix, ""), 1)] = tensor
    backbone = backbone_of(state_dict)
    if is_torchvision_resnet(backbone):
        tensors.update(convert_torchvision_resnet(backbone))
    else:
        tensors.update(convert_tresnet(backbone, model_names))
    return {
        **tensors,
        "label_head.queries": state_dict[QUERIES][order],
        "label_head.readout.weight": state_dict[READOUT][0][order][..., None],
        "label_head.readout.bias": state_dict[READOUT_BIAS][0][order],
    }


def backbone_of(state_dict: Dict[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
    """The backbone's tensors, under the names of torchvision's ResNet or of TResNet."""
    return {
        name.removeprefix(BACKBONE): tensor
        for name, tensor in state_dict.items()
        if name.startswith(BACKBONE)
    }


def query2label_settings(state_dict: Dict[str, torch.Tensor]) -> Dict[str, Any]:
    """The config keys that the checkpoint goes with.

    Raises:
        InputError: the names or shapes are not those of Query2Label, or see `resnet_settings`,
            `tresnet_settings` and `check_positions`.
    """
    queries, readout, bias = (state_dict.get(n) for n in (QUERIES, READOUT, READOUT_BIAS))
    if any(x is None for x in (queries, readout, bias)) or queries.ndim != 2:
        raise InputError(
            f"it has no {QUERIES}, {READOUT} and {READOUT_BIAS}, which Query2Label's checkpoints "
            "have"
        )
    if readout.shape != (1, *queries.shape) or bias.shape != (1, len(queries)):
        raise InputError(f"{READOUT} and {READOUT_BIAS} do not fit {QUERIES} {queries.shape}")
    backbone = backbone_of(state_dict)
    if is_torchvision_resnet(backbone):
        settings = torchvision_settings(convert_torchvision_resnet(backbone))
        # Its batch norms are fixed.
        settings["MODEL.RESNETS.NORM"] = "FrozenBN"
    else:
        settings = tresnet_settings(backbone)
    height, width = check_positions(state_dict)
    decoder = "transformer.decoder.layers.0.linear1.weight"
    return {
        **settings,
        "INPUT.IMAGE_SIZE": [STRIDE * height, STRIDE * width],
        "MODEL.LABEL_HEAD.NAME": "Query2LabelHead",
        "MODEL.LABEL_HEAD.NUM_LABELS": len(queries),
        "MODEL.QUERY2LABEL.ENCODER_LAYERS": len(layers_with(state_dict, "encoder", "norm1")),
        "MODEL.QUERY2LABEL.DECODER_LAYERS": len(layers_with(state_dict, "decoder", "norm3")),
        "MODEL.QUERY2LABEL.SELF_ATTENTION": has_self_attention(state_dict),
        "MODEL.QUERY2LABEL.DIM": queries.shape[1] if "input_proj.weight" in state_dict else 0,
        "MODEL.QUERY2LABEL.NUM_HEADS": 4,
        "MODEL.QUERY2LABEL.FFN_DIM": size_of(state_dict, decoder),
    }


def layers_with(state_dict: Dict[str, torch.Tensor], part: str, module: str) -> List[str]:
    """The numbers of the encoder's or decoder's layers that have a module."""
    pattern = re.compile(rf"transformer\.{part}\.layers\.(\d+)\.{module}\.")
    return sorted({match[1] for match in map(pattern.match, state_dict) if match})


def has_self_attention(state_dict: Dict[str, torch.Tensor]) -> bool:
    """Whether the decoder's layers have self-attention.

    Raises:
        InputError: some have, and others not.
    """
    found = layers_with(state_dict, "decoder", "self_attn")
    if found and found != layers_with(state_dict, "decoder", "norm3"):
        raise InputError(f"of its decoder, only layers {', '.join(found)} have self-attention")
    return bool(found)


def check_positions(state_dict: Dict[str, torch.Tensor]) -> List[int]:
    """Compare the checkpoint's positions with those that the model computes.

    Returns:
        height and width of the map that they are of.
    Raises:
        InputError: there are none, or others.
    """
    theirs = state_dict.get(POSITIONS)
    if theirs is None or theirs.ndim != 4 or theirs.shape[:2] != (1, state_dict[QUERIES].shape[1]):
        raise InputError(f"it has no {POSITIONS} (1, D, H, W), its encoding of places")
    ours = sine_positions(theirs, None, theirs.shape[1])
    if not torch.allclose(theirs.flatten(2).mT, ours, rtol=0, atol=TOLERANCE):
        raise InputError(f"{POSITIONS} is not the sine encoding that Query2Label computes")
    return list(theirs.shape[2:])
