"""Queries of the labels, which attend to the cells of the feature map.

B, C, D, K and d are the numbers of images, labels, channels, queries and embedding dimensions.
"""

from __future__ import annotations

from typing import Dict

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from torch import nn

from ...errors import InputError
from ..attention import DecoderLayer, EncoderLayer, map_tokens, sine_positions
from ..label_readout import LabelReadout
from .base import LABEL_HEAD_REGISTRY, LabelHead, one_in_feature


@LABEL_HEAD_REGISTRY.register()
class MLDecoderHead(LabelHead):
    """ML-Decoder (Ridnik et al., WACV 2023).

    The cells f of the map become tokens ReLU(W f + b), to which K queries attend in one decoder
    layer, without self-attention and without positions. Each query then has the classifiers of a
    group of labels (`LabelReadout`), so that thousands of labels cost little more than K.

    The queries are fixed random vectors, which the published head has; learned ones; or
    ReLU(V e + c) of each label's word vector e. With these, one classifier can be shared by all
    labels, and the head then scores any label that has a word vector (zero-shot).

    Attributes:
        queries: (K, D), a buffer if they are fixed, or a parameter; of words there is none.
        any_labels: whether it scores labels that it was not trained on.
    """

    @configurable
    def __init__(
        self,
        *,
        in_feature: str,
        feature_dim: int,
        num_labels: int,
        dim: int,
        num_heads: int,
        ffn_dim: int,
        dropout: float,
        num_groups: int,
        queries: str,
        readout: str,
        embedding_dim: int,
    ):
        """
        Args:
            in_feature: name of the feature map.
            feature_dim, num_labels: its channels, and C.
            dim: D.
            num_heads, ffn_dim, dropout: of `DecoderLayer`.
            num_groups: K, or C if that is less; of words it is always C.
            queries: random, learned or words.
            readout: group, or shared, which takes words.
            embedding_dim: d, of words.
        Raises:
            InputError: dim is no multiple of num_heads; or a shared readout without words.
        """
        super().__init__()
        check_width("MODEL.ML_DECODER", dim, num_heads)
        words, shared = queries == "words", readout == "shared"
        if shared and not words:
            raise InputError(
                "MODEL.ML_DECODER.READOUT shared needs MODEL.ML_DECODER.QUERIES words: labels "
                "would differ in nothing else"
            )
        self.in_features = (in_feature,)
        self.any_labels = shared
        num_queries = num_labels if words else min(num_groups, num_labels)
        self.embed = nn.Linear(feature_dim, dim)
        if words:
            self.needs = frozenset({"label_embeddings"})
            self.embed_words = nn.Linear(embedding_dim, dim)
        elif queries == "learned":
            self.queries = nn.Parameter(torch.randn(num_queries, dim))
        else:
            self.register_buffer("queries", torch.randn(num_queries, dim))
        self.query_norm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)
        self.decoder = DecoderLayer(dim, num_heads, ffn_dim, dropout)
        self.group_size = 1
        if shared:
            self.readout = nn.Sequential(nn.Linear(dim, 1), nn.Flatten())
        else:
            self.readout = LabelReadout(num_labels, dim, num_queries)
            self.group_size = self.readout.group_size
            # As published; LabelReadout's own is that of a linear layer.
            nn.init.xavier_normal_(self.readout.weight)
            nn.init.zeros_(self.readout.bias)

    @classmethod
    def from_config(cls, cfg, input_shape):
        in_feature = one_in_feature(cfg, input_shape)
        keys = cfg.MODEL.ML_DECODER
        return {
            "in_feature": in_feature,
            "feature_dim": input_shape[in_feature].channels,
            "num_labels": cfg.MODEL.LABEL_HEAD.NUM_LABELS,
            "dim": keys.DIM,
            "num_heads": keys.NUM_HEADS,
            "ffn_dim": keys.FFN_DIM,
            "dropout": keys.DROPOUT,
            "num_groups": keys.NUM_GROUPS,
            "queries": keys.QUERIES,
            "readout": keys.READOUT,
            "embedding_dim": cfg.MODEL.LABEL_EMBEDDINGS.DIM,
        }

    def forward(
        self,
        features: Dict[str, torch.Tensor],
        masks: Dict[str, torch.Tensor | None],
        *,
        label_embeddings: torch.Tensor | None = None,
    ) -> Dict[str, torch.Tensor]:
        """See `LabelHead`; attention is that of a label's query, in evaluation alone."""
        (name,) = self.in_features
        tokens, mask = map_tokens(features[name], masks[name])
        tokens = F.relu(self.embed(tokens))
        queries = self.label_queries(label_embeddings)[None]
        if self.training:
            # Each image has its own dropout.
            queries = queries.expand(tokens.shape[0], -1, -1)
        queries = self.query_norm(queries + self.dropout(queries))
        queries, weights = self.decoder(queries, tokens, mask, need_weights=not self.training)
        outputs = {"logits": self.readout(queries)}
        if weights is not None:
            num_labels = outputs["logits"].shape[1]
            maps = weights.repeat_interleave(self.group_size, dim=1)[:, :num_labels]
            outputs["attention"] = maps.unflatten(2, features[name].shape[2:])
        return outputs

    def label_queries(self, label_embeddings: torch.Tensor | None) -> torch.Tensor:
        """(K, D), of the label embeddings (C, d) if they are of words."""
        if label_embeddings is None:
            return self.queries
        return F.relu(self.embed_words(label_embeddings))


@LABEL_HEAD_REGISTRY.register()
class Query2LabelHead(LabelHead):
    """Query2Label (Liu et al., 2021): a Transformer with a learned query for each label.

    Encoder layers let the cells of the map attend to each other, with a sine encoding of their
    places. Decoder layers let the queries attend to them, from zeros, to which each label's
    embedding q is added wherever they attend; the published ones have no self-attention. Each
    label has a classifier of its own on its query's output.

    Attributes:
        queries: q, (C, D).
    """

    @configurable
    def __init__(
        self,
        *,
        in_feature: str,
        feature_dim: int,
        num_labels: int,
        dim: int,
        num_heads: int,
        ffn_dim: int,
        dropout: float,
        encoder_layers: int,
        decoder_layers: int,
        self_attention: bool,
    ):
        """
        Args:
            in_feature: name of the feature map.
            feature_dim, num_labels: its channels, and C.
            dim: D; 0: feature_dim, with no linear layer before the encoder.
            num_heads, ffn_dim, dropout: of `EncoderLayer` and `DecoderLayer`.
            encoder_layers, decoder_layers: how many; at least one of the latter.
            self_attention: whether the queries attend to each other.
        Raises:
            InputError: D is no multiple of 4 or of num_heads.
        """
        super().__init__()
        self.in_features = (in_feature,)
        self.project = nn.Conv2d(feature_dim, dim, 1) if dim else nn.Identity()
        self.dim = dim = dim or feature_dim
        check_width("MODEL.QUERY2LABEL", dim, num_heads)
        sizes = (dim, num_heads, ffn_dim, dropout)
        self.encoder = nn.ModuleList(EncoderLayer(*sizes) for _ in range(encoder_layers))
        self.decoder = nn.ModuleList(
            DecoderLayer(*sizes, self_attention=self_attention) for _ in range(decoder_layers)
        )
        for parameter in [*self.encoder.parameters(), *self.decoder.parameters()]:
            if parameter.ndim > 1:
                nn.init.xavier_uniform_(parameter)
        self.queries = nn.Parameter(torch.randn(num_labels, dim))
        self.norm = nn.LayerNorm(dim)
        self.readout = LabelReadout(num_labels, dim)

    @classmethod
    def from_config(cls, cfg, input_shape):
        in_feature = one_in_feature(cfg, input_shape)
        keys = cfg.MODEL.QUERY2LABEL
        return {
            "in_feature": in_feature,
            "feature_dim": input_shape[in_feature].channels,
            "num_labels": cfg.MODEL.LABEL_HEAD.NUM_LABELS,
            "dim": keys.DIM,
            "num_heads": keys.NUM_HEADS,
            "ffn_dim": keys.FFN_DIM,
            "dropout": keys.DROPOUT,
            "encoder_layers": keys.ENCODER_LAYERS,
            "decoder_layers": keys.DECODER_LAYERS,
            "self_attention": keys.SELF_ATTENTION,
        }

    def forward(
        self, features: Dict[str, torch.Tensor], masks: Dict[str, torch.Tensor | None]
    ) -> Dict[str, torch.Tensor]:
        """See `LabelHead`; attention is that of the last layer, in evaluation alone."""
        (name,) = self.in_features
        tokens, mask = map_tokens(self.project(features[name]), masks[name])
        positions = sine_positions(features[name], masks[name], self.dim)
        for layer in self.encoder:
            tokens = layer(tokens, mask, positions)
        queries = self.queries[None]
        states = torch.zeros_like(queries)
        for layer in self.decoder:
            asked = layer is self.decoder[-1] and not self.training
            states, weights = layer(states, tokens, mask, queries, positions, need_weights=asked)
        outputs = {"logits": self.readout(self.norm(states))}
        if weights is not None:
            outputs["attention"] = weights.unflatten(2, features[name].shape[2:])
        return outputs


def check_width(prefix: str, dim: int, num_heads: int) -> None:
    """Refuse a width that the heads, or sine and cosine of rows and columns, can't share."""
    for name, number in (("4", 4), (f"{prefix}.NUM_HEADS {num_heads}", num_heads)):
        if dim % number:
            raise InputError(f"{prefix}.DIM {dim} is no multiple of {name}")
