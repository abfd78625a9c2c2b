"""A gated graph over label nodes, on how often labels occur together in images of a scene."""

from __future__ import annotations

import math
from typing import Dict

import torch
import torch.distributed as dist
import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.utils import comm
from torch import nn

from ...errors import InputError
from ...memory import check_memory
from ..attention import EncoderLayer, map_tokens, sine_positions
from ..gated_graph import GatedGraph
from ..label_nodes import SemanticAttention
from ..label_readout import LabelReadout
from ..pooling import masked_mean
from .base import LABEL_HEAD_REGISTRY, LabelHead, one_in_feature

# What is divided by is no smaller. The published code adds it, a hundred millionth of a count.
EPSILON = 1e-8


@LABEL_HEAD_REGISTRY.register()
class SALGLHead(LabelHead):
    """SALGL: scene-aware label graph learning (Zhu et al., ICCV 2023).

    The cells of the feature map attend to each other, in a layer of a Transformer encoder. Their
    mean says which of S scenes the image shows, p = softmax(W_s mean). Nobody names the scenes:
    in training, two losses make p certain of each image, and the scenes equally frequent,

        scene_entropy = mean of H(p),    scene_balance = log S - H(mean of p).

    The labels of the training images are counted for each scene. Where scene s has N_ij images with
    labels i and j, its graph is P(j|i) = N_ij / N_ii, and a gated graph on that of the image's
    scene mixes the labels' nodes v, which their embeddings pick from the cells. With its states h
    and a classifier for each label,

        f = tanh(W (v ‖ h) + b),    ŷ_c = w_cᵀ f_c + b_c.

    A batch is counted after its logits were computed: in the published code its own labels are
    already in the graphs that its logits are computed on.

    Attributes:
        pair_counts: N, (S, C, C) float32.
    """

    needs = frozenset({"label_embeddings"})
    uses = frozenset({"targets"})

    has_attention = True

    @configurable
    def __init__(
        self,
        *,
        in_feature: str,
        feature_dim: int,
        num_labels: int,
        embedding_dim: int,
        num_heads: int,
        ffn_dim: int,
        dropout: float,
        positions: bool,
        hidden_dim: int,
        num_scenes: int,
        soft_scenes: bool,
        self_edges: bool,
        normalize: bool,
        steps: int,
        both_directions: bool,
    ):
        """
        Args:
            in_feature: name of the feature map.
            feature_dim, num_labels, embedding_dim: D, C and d.
            num_heads, ffn_dim, dropout: of the encoder layer.
            positions: whether the cells' places are added where they attend.
            hidden_dim: of `SemanticAttention`.
            num_scenes: S.
            soft_scenes: whether an image counts, and has a graph, of all scenes, weighted by p;
                else of the likeliest.
            self_edges: whether a graph has P(i|i) = 1; else 0.
            normalize: whether each row of a graph is divided by its sum.
            steps, both_directions: of `GatedGraph`.
        Raises:
            InputError: D is no multiple of the number of heads, or, with positions, of 4.
        """
        super().__init__()
        if feature_dim % num_heads:
            raise InputError(
                f"MODEL.SALGL.NUM_HEADS: {feature_dim} channels are no multiple of {num_heads}"
            )
        if positions and feature_dim % 4:
            raise InputError(f"MODEL.SALGL.POSITIONS: {feature_dim} channels are no multiple of 4")
        self.in_features = (in_feature,)
        self.positions = positions
        self.soft_scenes = soft_scenes
        self.self_edges = self_edges
        self.normalize = normalize
        self.encoder = EncoderLayer(feature_dim, num_heads, ffn_dim, dropout)
        self.scene_classifier = nn.Linear(feature_dim, num_scenes, bias=False)
        self.attention = SemanticAttention(feature_dim, embedding_dim, hidden_dim)
        self.graph = GatedGraph(feature_dim, steps, both_directions) if steps else None
        self.output = nn.Linear((2 if steps else 1) * feature_dim, feature_dim)
        self.readout = LabelReadout(num_labels, feature_dim)
        check_memory(
            4 * num_scenes * num_labels**2,
            f"MODEL.LABEL_HEAD.NAME {type(self).__name__}, with the pairs of {num_labels} labels "
            f"in {num_scenes} scenes,",
        )
        counts = torch.zeros(num_scenes, num_labels, num_labels)
        self.register_buffer("pair_counts", counts)

    @classmethod
    def from_config(cls, cfg, input_shape):
        in_feature = one_in_feature(cfg, input_shape)
        salgl = cfg.MODEL.SALGL
        return {
            "in_feature": in_feature,
            "feature_dim": input_shape[in_feature].channels,
            "num_labels": cfg.MODEL.LABEL_HEAD.NUM_LABELS,
            "embedding_dim": cfg.MODEL.LABEL_EMBEDDINGS.DIM,
            "num_heads": salgl.NUM_HEADS,
            "ffn_dim": salgl.FFN_DIM,
            "dropout": salgl.DROPOUT,
            "positions": salgl.POSITIONS,
            "hidden_dim": salgl.HIDDEN_DIM,
            "num_scenes": salgl.NUM_SCENES,
            "soft_scenes": salgl.SOFT_SCENES,
            "self_edges": salgl.SELF_EDGES,
            "normalize": salgl.NORMALIZE,
            "steps": salgl.STEPS,
            "both_directions": salgl.BOTH_DIRECTIONS,
        }

    def forward(
        self, features, masks, *, label_embeddings, targets=None
    ) -> Dict[str, torch.Tensor | Dict[str, torch.Tensor]]:
        (name,) = self.in_features
        mask = masks[name]
        cells = self.encode(features[name], mask)
        scenes = self.scene_classifier(masked_mean(cells, mask)).softmax(dim=1)
        nodes, attention = self.attention(cells, label_embeddings, mask)
        label_features = nodes
        if self.graph is not None:
            states = self.graph(nodes, self.graphs_of_images(scenes))
            label_features = torch.cat([nodes, states], dim=2)
        logits = self.readout(self.output(label_features).tanh())
        outputs = {"logits": logits, "attention": attention}
        if self.training and targets is not None:
            self.count(scenes, targets)
            outputs["aux_losses"] = scene_losses(scenes)
        return outputs

    def encode(self, features: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """The map after its cells have attended to each other, (B, D, H, W)."""
        tokens, shown = map_tokens(features, mask)
        places = sine_positions(features, mask, features.shape[1]) if self.positions else None
        return self.encoder(tokens, shown, places).mT.unflatten(2, features.shape[2:])

    def graphs_of_images(self, scenes: torch.Tensor) -> torch.Tensor:
        """(B, C, C), of each image's scene, or of all weighted by p; p is (B, S)."""
        counts = self.pair_counts.diagonal(dim1=1, dim2=2)[:, :, None]
        graphs = self.pair_counts / counts.clamp(min=EPSILON)
        if not self.self_edges:
            graphs = graphs * (1 - torch.eye(graphs.shape[1], device=graphs.device))
        if self.normalize:
            graphs = graphs / graphs.sum(dim=2, keepdim=True).clamp(min=EPSILON)
        if self.soft_scenes:
            return torch.einsum("bs,sij->bij", scenes, graphs)
        return graphs[scenes.argmax(dim=1)]

    @torch.no_grad()
    def count(self, scenes: torch.Tensor, targets: torch.Tensor) -> None:
        """Add a batch's labels, those of all processes, to the counts of its scenes.

        Args:
            scenes: p, (B, S).
            targets: (B, C) in {1, 0, -1}; an ignored label is not counted.
        """
        present = (targets == 1).to(self.pair_counts.dtype)
        shares = scenes.to(self.pair_counts.dtype)
        if not self.soft_scenes:
            shares = F.one_hot(scenes.argmax(dim=1), scenes.shape[1]).to(present)
        with torch.autocast(present.device.type, enabled=False):
            pairs = torch.stack([(share[:, None] * present).T @ present for share in shares.T])
        if comm.get_world_size() > 1:
            dist.all_reduce(pairs)
        self.pair_counts += pairs


def scene_losses(scenes: torch.Tensor) -> Dict[str, torch.Tensor]:
    """The losses of p (B, S), scene_entropy and scene_balance; each is between 0 and log S."""
    scenes = scenes.to(torch.promote_types(scenes.dtype, torch.float32))
    return {
        "scene_entropy": entropy(scenes).mean(),
        "scene_balance": math.log(scenes.shape[1]) - entropy(scenes.mean(dim=0)),
    }


def entropy(probabilities: torch.Tensor) -> torch.Tensor:
    """H over the last dimension."""
    return torch.special.entr(probabilities.clamp(min=1e-7)).sum(dim=-1)
