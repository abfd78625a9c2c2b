"""A graph over the labels, guided by what an encoder finds in maps of three sizes."""

from __future__ import annotations

from typing import Dict, Tuple

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from torch import nn

from ...errors import InputError
from ..attention import EncoderLayer, map_tokens
from ..cross_scale import cross_scale_attention
from ..dynamic_graph import DynamicGraph
from ..label_nodes import activation_nodes, class_activation
from ..label_readout import LabelReadout
from ..pooling import masked_max, masked_mean, masked_top_mean
from .base import LABEL_HEAD_REGISTRY, LabelHead, head_in_features


@LABEL_HEAD_REGISTRY.register()
class TDRGHead(LabelHead):
    """TDRG: Transformer-based dual relation graph (Zhao et al., ICCV 2021).

    *Structure.* Of a fine and a coarse feature map, three maps of K channels are made: the fine
    one, the coarse one, and the coarse one halved by a convolution. They strengthen what they have
    in common, and in each the cells attend to each other. The maxima of the three are scored.

    *Semantics.* As in ADD-GCN, the coarse map's cells become a node for each label, weighted by the
    label's activation; beside it stands the same of the encoder's middle map. A graph whose edges
    follow from the nodes and from the means of the encoder's three maps mixes them, and a
    classifier for each label scores its node.

    The logits are 0.7 of the structure's and 0.3 of the graph's. Each of the two is also trained by
    itself, and so is the mean of a label's highest scores in the coarse map. Of the encoder's maps
    the semantic part has a copy without a gradient.

    With attention to the batch, which is what the published code computes, a cell attends to the
    same cell of the other images: no image has scores of its own.
    """

    has_attention = True

    @configurable
    def __init__(
        self,
        *,
        in_features: Tuple[str, str],
        feature_dims: Tuple[int, int],
        num_labels: int,
        dim: int,
        num_layers: int,
        num_heads: int,
        ffn_dim: int,
        top_share: float,
        structure_weight: float,
        attends_to: str = "image",
    ):
        """
        Args:
            in_features: names of the fine and the coarse feature map.
            feature_dims: their channels.
            num_labels, dim: C and K.
            num_layers, num_heads, ffn_dim: of the encoder.
            top_share: of an image's cells, of which the mean activation is taken.
            structure_weight: of the structure's logits; the graph's have the rest.
            attends_to: image or batch.
        Raises:
            InputError: dim is no multiple of num_heads.
        """
        super().__init__()
        if dim % num_heads:
            raise InputError(f"MODEL.TDRG.DIM {dim} is no multiple of MODEL.TDRG.NUM_HEADS")
        self.in_features = tuple(in_features)
        self.top_share = top_share
        self.structure_weight = structure_weight
        self.attends_to = attends_to
        fine_dim, coarse_dim = feature_dims
        self.fine = nn.Conv2d(fine_dim, dim, 1)
        self.coarse = nn.Conv2d(coarse_dim, dim, 1)
        self.halved = nn.Conv2d(coarse_dim, dim, 3, stride=2)
        self.encoder = nn.ModuleList(
            EncoderLayer(dim, num_heads, ffn_dim, dropout=0.0, activation=F.gelu)
            for _ in range(num_layers)
        )
        self.structure_classifier = nn.Linear(3 * dim, num_labels)
        self.activations = nn.Conv2d(coarse_dim, num_labels, 1, bias=False)
        self.node_transform = nn.Conv2d(coarse_dim, dim, 1)
        self.guide_transform = nn.Linear(dim, dim)
        self.graph = DynamicGraph(num_labels, node_dim=2 * dim, context_dim=3 * dim)
        self.readout = LabelReadout(num_labels, 2 * dim)

    @classmethod
    def from_config(cls, cfg, input_shape):
        names = head_in_features(cfg, input_shape)
        if len(names) != 2:
            raise InputError(
                "MODEL.LABEL_HEAD.IN_FEATURES: TDRGHead reads two feature maps, such as res4 and "
                f"res5, not {', '.join(names)}"
            )
        names = tuple(sorted(names, key=lambda name: input_shape[name].stride))
        tdrg = cfg.MODEL.TDRG
        return {
            "in_features": names,
            "feature_dims": tuple(input_shape[name].channels for name in names),
            "num_labels": cfg.MODEL.LABEL_HEAD.NUM_LABELS,
            "dim": tdrg.DIM,
            "num_layers": tdrg.LAYERS,
            "num_heads": tdrg.NUM_HEADS,
            "ffn_dim": tdrg.FFN_DIM,
            "top_share": tdrg.TOP_SHARE,
            "structure_weight": tdrg.STRUCTURE_WEIGHT,
            "attends_to": tdrg.ATTENTION,
        }

    def forward(self, features, masks) -> Dict[str, torch.Tensor | Dict[str, torch.Tensor]]:
        fine, coarse = (features[name] for name in self.in_features)
        halved, halved_mask = self.halve(coarse, masks[self.in_features[1]])
        masks = [*(masks[name] for name in self.in_features), halved_mask]
        maps = [self.fine(fine), self.coarse(coarse), halved]
        maps = [self.encode(*pair) for pair in zip(cross_scale_attention(maps, masks), masks)]
        pooled = torch.cat([masked_max(*pair) for pair in zip(maps, masks)], dim=1)
        structure = self.structure_classifier(pooled)

        scores = self.activations(coarse)
        activation = class_activation(scores, masks[1])
        # The graph is guided by the encoder, and does not train it.
        guides = [x.detach() for x in maps]
        context = torch.cat([masked_mean(*pair) for pair in zip(guides, masks)], dim=1)
        guide = self.guide_transform(activation_nodes(activation.detach(), guides[1]))
        nodes = activation_nodes(activation, self.node_transform(coarse))
        nodes = torch.cat([nodes, guide], dim=2)
        graph = self.readout(nodes + self.graph(nodes, context))

        weight = self.structure_weight
        return {
            "logits": weight * structure + (1 - weight) * graph,
            "aux_logits": {
                "structure": structure,
                "graph": graph,
                "activation": masked_top_mean(scores, self.top_share, masks[1]),
            },
            "attention": activation,
        }

    def halve(
        self, coarse: torch.Tensor, mask: torch.Tensor | None
    ) -> Tuple[torch.Tensor, torch.Tensor | None]:
        """The third map, and its mask: the windows of 3×3 cells that lie in the image.

        Of an image with fewer than three rows or columns, there is one window, filled up with 0.
        """
        if mask is not None:
            coarse = coarse.masked_fill(~mask, 0)
        height, width = coarse.shape[2:]
        halved = self.halved(F.pad(coarse, (0, max(0, 3 - width), 0, max(0, 3 - height))))
        if mask is None:
            return halved, None
        rows = _windows_inside(mask.any(dim=3), halved.shape[2])
        columns = _windows_inside(mask.any(dim=2), halved.shape[3])
        return halved, rows[:, :, :, None] & columns[:, :, None, :]

    def encode(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """(B, K, H, W) to the same.

        Raises:
            InputError: attention to the batch, in training or of images of different sizes.
        """
        tokens, shown = map_tokens(x, mask)
        if self.attends_to == "batch":
            if self.training:
                raise InputError(
                    "MODEL.TDRG.ATTENTION batch is for the evaluation of the published weights "
                    "alone; train with image"
                )
            if shown is not None:
                raise InputError("MODEL.TDRG.ATTENTION batch needs images of one size")
            tokens = tokens.transpose(0, 1)
        for layer in self.encoder:
            tokens = layer(tokens, shown)
        if self.attends_to == "batch":
            tokens = tokens.transpose(0, 1)
        return tokens.mT.unflatten(2, x.shape[2:])


def _windows_inside(shown: torch.Tensor, number: int) -> torch.Tensor:
    """Which windows of three rows, from every second row on, lie in the image; the first counts as
    one.

    Args:
        shown: which rows show the image, (B, 1, H).
        number: of windows.
    Returns:
        (B, 1, number) bool.
    """
    first = torch.ones_like(shown[:, :, :1])
    return torch.cat([first, shown[:, :, 4::2]], dim=2)[:, :, :number]
