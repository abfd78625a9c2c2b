"""A Transformer encoder over the cells of a feature map and the labels."""

from __future__ import annotations

import math
from typing import Dict

import torch
from detectron2.config import configurable
from torch import nn

from ...errors import InputError
from ..attention import EncoderLayer, map_tokens, sine_positions
from ..label_readout import LabelReadout
from .base import LABEL_HEAD_REGISTRY, LabelHead, one_in_feature


@LABEL_HEAD_REGISTRY.register()
class CTranHead(LabelHead):
    """C-Tran (Lanchantin, Wang, Ordonez and Qi, CVPR 2021).

    Each label is a token: its embedding plus the embedding of its state, which is 0 for a label
    that is unknown, and else says that it is absent or present. The label tokens and the cells of
    the map attend to all of each other, so that a label that is known tells of those that are not.
    From the last layer's token of each label comes the label's logit, by a classifier of its own.

    In training, some labels are known at random (INPUT.KNOWN_LABELS), and the loss is that of the
    others.
    """

    needs = frozenset({"label_states"})
    has_attention = True

    @configurable
    def __init__(
        self,
        *,
        in_feature: str,
        feature_dim: int,
        num_labels: int,
        num_layers: int = 3,
        num_heads: int = 4,
        positions: bool = False,
        dropout: float = 0.1,
    ):
        """
        Args:
            in_feature: name of the feature map.
            feature_dim, num_labels: D, the dimension of all tokens, and C.
            num_layers, num_heads: of the encoder; its layers have D channels inside as well.
            positions: whether cells get an encoding of their place; the paper's have none.
            dropout: of the encoder.
        Raises:
            InputError: D is no multiple of num_heads; or, with positions, of 4.
        """
        super().__init__()
        if feature_dim % num_heads:
            raise InputError(
                f"MODEL.C_TRAN.NUM_HEADS: the {feature_dim} channels of {in_feature} can't be "
                f"divided among {num_heads}"
            )
        if positions and feature_dim % 4:
            raise InputError(
                f"MODEL.C_TRAN.POSITIONS: the {feature_dim} channels of {in_feature} are no "
                "multiple of 4"
            )
        self.in_features = (in_feature,)
        self.positions = positions
        self.label_embeddings = nn.Embedding(num_labels, feature_dim)
        # Of a label that is unknown, which stays as it is, absent and present.
        self.state_embeddings = nn.Embedding(3, feature_dim, padding_idx=0)
        self.norm = nn.LayerNorm(feature_dim)
        self.layers = nn.ModuleList(
            EncoderLayer(feature_dim, num_heads, feature_dim, dropout) for _ in range(num_layers)
        )
        self.readout = LabelReadout(num_labels, feature_dim)
        bound = 1 / math.sqrt(feature_dim)
        nn.init.uniform_(self.label_embeddings.weight, -bound, bound)
        nn.init.uniform_(self.state_embeddings.weight[1:].detach(), -bound, bound)

    @classmethod
    def from_config(cls, cfg, input_shape):
        in_feature = one_in_feature(cfg, input_shape)
        return {
            "in_feature": in_feature,
            "feature_dim": input_shape[in_feature].channels,
            "num_labels": cfg.MODEL.LABEL_HEAD.NUM_LABELS,
            "num_layers": cfg.MODEL.C_TRAN.NUM_LAYERS,
            "num_heads": cfg.MODEL.C_TRAN.NUM_HEADS,
            "positions": cfg.MODEL.C_TRAN.POSITIONS,
        }

    def forward(self, features, masks, *, label_states: torch.Tensor) -> Dict[str, torch.Tensor]:
        """See `LabelHead`; attention is that of the last layer, in evaluation alone.

        It is how each label's token divides among the cells what it gives to them, which is 1 in
        sum; how much it gives to the labels is left out.
        """
        (name,) = self.in_features
        cells, mask = map_tokens(features[name], masks[name])
        if self.positions:
            cells = cells + sine_positions(features[name], masks[name], cells.shape[2])
        labels = self.label_embeddings.weight + self.state_embeddings(label_states.long() + 1)
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(label_states.shape)], dim=1)
        num_cells = cells.shape[1]
        tokens = self.norm(torch.cat([cells, labels], dim=1))
        *layers, last = self.layers
        for layer in layers:
            tokens = layer(tokens, mask)
        # Nothing reads the cells behind the last layer.
        labels, weights = last.encode_some(
            tokens[:, num_cells:], tokens, mask, not self.training, num_cells
        )
        outputs = {"logits": self.readout(labels)}
        if weights is not None:
            outputs["attention"] = weights.unflatten(2, features[name].shape[2:])
        return outputs
