"""The published checkpoints of TResNet, and of ASL on it, under the names of our models."""

from __future__ import annotations

import re
from typing import Any, Dict, Iterable, Sequence

import torch
from timm.models.tresnet import checkpoint_filter_fn

from ..errors import InputError

# timm's name by the blocks of the four stages.
NAMES = {
    (3, 4, 11, 3): "tresnet_m",
    (4, 5, 18, 3): "tresnet_l",
    (4, 5, 24, 3): "tresnet_xl",
    # What ML-Decoder, and Query2Label with weights of ImageNet-21k, call TResNet-L.
    (3, 4, 23, 3): "tresnet_v2_l",
}

# The fixed filter of a layer that blurs before subsampling; timm has its own.
BLUR = ".filt"

CLASSIFIER = "head.fc."


def convert_tresnet(
    state_dict: Dict[str, torch.Tensor], model_names: Iterable[str]
) -> Dict[str, torch.Tensor]:
    """Rename a TResNet's tensors to those of the backbone of a model.

    They may have timm's names, or the original ones, in which a convolution and its norm are the
    first and second of a sequence. The original norms are inplace-ABN's: their scale is |w| + 1e-5,
    which becomes the weight of a batch norm.

    Args:
        state_dict: body.conv1, body.layer1 and so on. The classifier `head.fc` is left out.
        model_names: of the model's tensors, whose backbone is a `TimmBackbone`.
    """
    # In float16, |w| and |w| + 1e-5 would be equal.
    state_dict = {
        name: tensor.to(torch.promote_types(tensor.dtype, torch.float32))
        if tensor.is_floating_point()
        else tensor
        for name, tensor in state_dict.items()
        if not name.endswith(BLUR) and not name.startswith(CLASSIFIER)
    }
    # With features_only, timm flattens names: body.layer1.0 becomes body_layer1.0.
    places = {name.replace(".", "_"): name for name in model_names}
    return {
        places.get(f"backbone.net.{name}".replace(".", "_"), name): tensor
        for name, tensor in checkpoint_filter_fn(state_dict, None).items()
    }


def convert_classifier(
    state_dict: Dict[str, torch.Tensor], order: Sequence[int]
) -> Dict[str, torch.Tensor]:
    """The classifier of a TResNet as a LinearHead.

    Args:
        state_dict: with head.fc.weight (C, D) and head.fc.bias (C,), and more.
        order: the places in the checkpoint of the labels of the model.
    """
    return {
        name.replace(CLASSIFIER, "label_head.classifier."): tensor[order]
        for name, tensor in state_dict.items()
        if name.startswith(CLASSIFIER)
    }


def num_labels(state_dict: Dict[str, torch.Tensor]) -> int:
    """C of a classifier `head.fc`.

    Raises:
        InputError: there is none, or it has more than a weight and a bias, as ASL's has for
            OpenImages.
    """
    tensors = [state_dict.get(f"{CLASSIFIER}{name}") for name in ("weight", "bias")]
    if any(tensor is None or not tensor.ndim for tensor in tensors):
        raise InputError("it has no head.fc.weight and head.fc.bias, which ASL's checkpoints have")
    if len(tensors[0]) != len(tensors[1]):
        raise InputError(f"head.fc has {len(tensors[0])} weights and {len(tensors[1])} biases")
    return len(tensors[0])


def tresnet_settings(state_dict: Dict[str, torch.Tensor]) -> Dict[str, Any]:
    """The config keys that a TResNet goes with.

    Raises:
        InputError: it is no TResNet-M, -L or -XL.
    """
    pattern = re.compile(r"body\.layer(\d)\.(\d+)\.")
    found = {match.groups() for match in map(pattern.match, state_dict) if match}
    blocks = tuple(sum(stage == number for stage, _ in found) for number in "1234")
    if blocks not in NAMES:
        raise InputError(
            f"no TResNet-M, -L or -XL: its stages have {', '.join(map(str, blocks))} blocks"
        )
    return {
        "MODEL.BACKBONE.NAME": "build_timm_backbone",
        "MODEL.TIMM.NAME": NAMES[blocks],
        "MODEL.PIXEL_MEAN": [0.0, 0.0, 0.0],
        "MODEL.PIXEL_STD": [255.0, 255.0, 255.0],
        "INPUT.FORMAT": "RGB",
    }


def asl_settings(state_dict: Dict[str, torch.Tensor]) -> Dict[str, Any]:
    """The config keys that ASL's checkpoints go with; raises as the two it calls."""
    return {
        **tresnet_settings(state_dict),
        "MODEL.GLOBAL_POOLING.NAME": "mean",
        "MODEL.LABEL_HEAD.NAME": "LinearHead",
        "MODEL.LABEL_HEAD.NUM_LABELS": num_labels(state_dict),
    }
