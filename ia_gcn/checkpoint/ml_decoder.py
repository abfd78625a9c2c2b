"""The published checkpoints of ML-Decoder on a TResNet under the names of our models."""

from __future__ import annotations

from typing import Any, Dict, Iterable, Sequence, Tuple

import torch

from ..errors import InputError
from .tresnet import convert_tresnet, tresnet_settings

HEAD = "head.decoder."

# Our names by theirs; of several that fit, the first.
PREFIXES = {
    f"{HEAD}embed_standart.": "label_head.embed.",
    f"{HEAD}query_embed.weight": "label_head.queries",
    f"{HEAD}layers.0.norm1.": "label_head.query_norm.",
    f"{HEAD}layers.0.": "label_head.decoder.",
    "head.wordvec_proj.": "label_head.embed_words.",
}
READOUT, READOUT_BIAS = f"{HEAD}duplicate_pooling", f"{HEAD}duplicate_pooling_bias"


def convert_ml_decoder(
    state_dict: Dict[str, torch.Tensor],
    model_names: Iterable[str],
    order: Sequence[int],
    embeddings: torch.Tensor | None = None,
) -> Dict[str, torch.Tensor]:
    """Rename the tensors, and put the labels into another order.

    Args:
        state_dict: body.conv1 and so on, as of `convert_tresnet`, and head.decoder.
        model_names: of the model's tensors.
        order: the places in the checkpoint of the labels of the model. If a query has several
            labels, they stay where they are.
        embeddings: (C, d), in the model's order, of a model with queries of words.
    """
    own = {**{name: tensor for name, tensor in state_dict.items() if name.startswith("head.")}}
    tensors = convert_tresnet(
        {name: tensor for name, tensor in state_dict.items() if name not in own}, model_names
    )
    weight, bias = own.pop(READOUT), own.pop(READOUT_BIAS)
    for name, tensor in own.items():
        prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), "")
        tensors[name.replace(prefix, PREFIXES.get(prefix, ""), 1)] = tensor
    if weight.ndim == 2:
        tensors["label_head.readout.0.weight"] = weight.T
        tensors["label_head.readout.0.bias"] = bias
        tensors["label_graph.embeddings"] = embeddings
        return tensors
    if weight.shape[2] == 1:
        tensors["label_head.queries"] = tensors["label_head.queries"][order]
        weight, bias = weight[order], bias[order]
    tensors["label_head.readout.weight"] = weight
    tensors["label_head.readout.bias"] = bias
    return tensors


def ml_decoder_sizes(state_dict: Dict[str, torch.Tensor]) -> Tuple[int | None, bool]:
    """C, or None where the readout is shared; and whether labels can be put into another order.

    Raises:
        InputError: the names or shapes are not those of ML-Decoder.
    """
    weight, bias = state_dict.get(READOUT), state_dict.get(READOUT_BIAS)
    if weight is None or bias is None or weight.ndim not in (2, 3) or bias.ndim != 1:
        raise InputError(
            f"it has no {READOUT} and {READOUT_BIAS}, which ML-Decoder's checkpoints have"
        )
    if weight.ndim == 2:
        if "head.wordvec_proj.weight" not in state_dict:
            raise InputError("its classifier is shared, but it has no head.wordvec_proj.weight")
        return None, True
    if f"{HEAD}query_embed.weight" not in state_dict:
        raise InputError(f"it has no {HEAD}query_embed.weight, its queries")
    return len(bias), weight.shape[2] == 1


def ml_decoder_settings(state_dict: Dict[str, torch.Tensor], num_labels: int) -> Dict[str, Any]:
    """The config keys that the checkpoint goes with.

    Raises:
        InputError: see `ml_decoder_sizes` and `tresnet_settings`.
    """
    ml_decoder_sizes(state_dict)
    settings = {
        **tresnet_settings(state_dict),
        "MODEL.LABEL_HEAD.NAME": "MLDecoderHead",
        "MODEL.LABEL_HEAD.NUM_LABELS": num_labels,
        "MODEL.ML_DECODER.DIM": size_of(state_dict, f"{HEAD}embed_standart.weight"),
        "MODEL.ML_DECODER.NUM_HEADS": 8,
        "MODEL.ML_DECODER.FFN_DIM": size_of(state_dict, f"{HEAD}layers.0.linear1.weight"),
    }
    if state_dict[READOUT].ndim == 2:
        words = state_dict["head.wordvec_proj.weight"]
        return {
            **settings,
            "MODEL.ML_DECODER.QUERIES": "words",
            "MODEL.ML_DECODER.READOUT": "shared",
            "MODEL.LABEL_EMBEDDINGS.DIM": words.shape[-1],
        }
    return {
        **settings,
        "MODEL.ML_DECODER.QUERIES": "random",
        "MODEL.ML_DECODER.READOUT": "group",
        "MODEL.ML_DECODER.NUM_GROUPS": len(state_dict[READOUT]),
    }


def size_of(state_dict: Dict[str, torch.Tensor], name: str) -> int:
    """The output channels of a linear layer's weight.

    Raises:
        InputError: it is not there, or no matrix.
    """
    weight = state_dict.get(name)
    if weight is None or weight.ndim != 2:
        raise InputError(f"it has no matrix {name}")
    return len(weight)
