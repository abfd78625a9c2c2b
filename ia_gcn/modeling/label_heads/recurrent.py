"""An LSTM that attends to the feature map, step by step."""

from __future__ import annotations

import math
from typing import Dict, NamedTuple

import torch
from detectron2.config import configurable
from torch import nn

from ..attention import map_tokens
from .base import LABEL_HEAD_REGISTRY, LabelHead, one_in_feature


class Paths(NamedTuple):
    """P paths of each image through the steps: what the LSTM has seen and said on each of them."""

    hidden: torch.Tensor
    """(B, P, M): the LSTM's output."""
    cell: torch.Tensor
    """(B, P, M): its memory."""
    label: torch.Tensor
    """(B, P, E): embedding of the last label on the path."""
    log_likelihood: torch.Tensor
    """(B, P): of the path's labels."""
    said: torch.Tensor
    """(B, P, C) bool: the labels on the path."""
    scores: torch.Tensor
    """(B, P, T, C): of the steps so far."""
    attention: torch.Tensor
    """(B, P, T, HW): of the steps so far."""


@LABEL_HEAD_REGISTRY.register()
class RecurrentHead(LabelHead):
    """An attention LSTM: the logit of a label is its highest score in a number of steps.

    In step t, the LSTM attends to the cells f of the map by what it has seen so far, and scores the
    labels, whose embeddings E are their classifiers:

        a = softmax((W_q h)ᵀ W_k f / √M),  z = Σ a f,  h = LSTM(z),  s = E ReLU(W_h h + W_z z) + b

    That is the plan of RNN-Attention (Wang, Chen, Li, Xu and Lin, ICCV 2017), whose attention is a
    window that a spatial transformer places, and whose scores are pooled by their maximum as well.

    With label embeddings as in CNN-RNN (Wang et al., CVPR 2016), the LSTM is also told the label
    that it has said before: h = LSTM(z, e). A path has each label once. Beam search keeps the P
    paths of the highest likelihood, the product of softmax(s) of their labels, and the logits are
    those of the best one. Published, such an LSTM learns a sequence of the labels that are present;
    here the loss is that of the logits, as with any head.
    """

    has_attention = True

    @configurable
    def __init__(
        self,
        *,
        in_feature: str,
        feature_dim: int,
        num_labels: int,
        hidden_dim: int,
        embedding_dim: int,
        steps: int,
        label_feedback: bool,
        beam_size: int,
    ):
        """
        Args:
            in_feature: name of the feature map.
            feature_dim, num_labels: D and C.
            hidden_dim: M, of the LSTM and of the attention.
            embedding_dim: of the labels.
            steps: T.
            label_feedback: whether the LSTM is told its last label.
            beam_size: P, with label_feedback; at most C are kept.
        """
        super().__init__()
        self.in_features = (in_feature,)
        self.steps = steps
        self.label_feedback = label_feedback
        self.beam_size = min(beam_size, num_labels) if label_feedback else 1
        self.key = nn.Linear(feature_dim, hidden_dim, bias=False)
        self.query = nn.Linear(hidden_dim, hidden_dim)
        self.lstm = nn.LSTMCell(feature_dim + embedding_dim * label_feedback, hidden_dim)
        self.of_hidden = nn.Linear(hidden_dim, embedding_dim)
        self.of_seen = nn.Linear(feature_dim, embedding_dim, bias=False)
        self.labels = nn.Linear(embedding_dim, num_labels)

    @classmethod
    def from_config(cls, cfg, input_shape):
        in_feature = one_in_feature(cfg, input_shape)
        recurrent = cfg.MODEL.RECURRENT
        return {
            "in_feature": in_feature,
            "feature_dim": input_shape[in_feature].channels,
            "num_labels": cfg.MODEL.LABEL_HEAD.NUM_LABELS,
            "hidden_dim": recurrent.HIDDEN_DIM,
            "embedding_dim": recurrent.EMBEDDING_DIM,
            "steps": recurrent.STEPS,
            "label_feedback": recurrent.LABEL_FEEDBACK,
            "beam_size": recurrent.BEAM_SIZE,
        }

    def forward(self, features, masks) -> Dict[str, torch.Tensor]:
        (name,) = self.in_features
        cells, mask = map_tokens(features[name], masks[name])
        keys = self.key(cells)
        paths = self.start(cells)
        for step in range(self.steps):
            # When all labels are said, none is left.
            if self.label_feedback and 0 < step <= self.labels.out_features:
                paths = self.say(paths)
            paths = self.step(paths, cells, keys, mask)
        # The most likely path comes first.
        highest = paths.scores[:, 0].max(dim=1)
        chosen = highest.indices[..., None].expand(-1, -1, cells.shape[1])
        attention = paths.attention[:, 0].gather(1, chosen)
        return {
            "logits": highest.values,
            "attention": attention.unflatten(2, features[name].shape[2:]),
        }

    def start(self, cells: torch.Tensor) -> Paths:
        """One path for each image, on which nothing was seen or said."""
        batch, num_cells = cells.shape[0], cells.shape[1]
        num_labels, dim = self.labels.weight.shape
        nothing = cells.new_zeros((batch, 1, self.lstm.hidden_size))
        return Paths(
            nothing,
            nothing,
            cells.new_zeros((batch, 1, dim)),
            cells.new_zeros((batch, 1)),
            cells.new_zeros((batch, 1, num_labels), dtype=torch.bool),
            cells.new_zeros((batch, 1, 0, num_labels)),
            cells.new_zeros((batch, 1, 0, num_cells)),
        )

    def step(
        self, paths: Paths, cells: torch.Tensor, keys: torch.Tensor, mask: torch.Tensor | None
    ) -> Paths:
        """Attend to the cells (B, HW, D), with their keys (B, HW, M), and score the labels."""
        # Written out, as the weights are handed out, and there are few of them: P × HW an image.
        attention = self.query(paths.hidden) @ keys.mT / math.sqrt(keys.shape[2])
        if mask is not None:
            attention = attention.masked_fill(~mask[:, None], -torch.inf)
        attention = attention.softmax(dim=2)
        seen = attention @ cells
        inputs = torch.cat([seen, paths.label], dim=2) if self.label_feedback else seen
        memory = paths.hidden.flatten(0, 1), paths.cell.flatten(0, 1)
        hidden, cell = self.lstm(inputs.flatten(0, 1), memory)
        hidden = hidden.unflatten(0, seen.shape[:2])
        scores = self.labels((self.of_hidden(hidden) + self.of_seen(seen)).relu())
        return paths._replace(
            hidden=hidden,
            cell=cell.unflatten(0, seen.shape[:2]),
            scores=torch.cat([paths.scores, scores[:, :, None]], dim=2),
            attention=torch.cat([paths.attention, attention[:, :, None]], dim=2),
        )

    def say(self, paths: Paths) -> Paths:
        """Continue the paths by a label each: the P most likely ones, in that order."""
        num_labels = paths.said.shape[2]
        log_p = paths.scores[:, :, -1].log_softmax(dim=2).masked_fill(paths.said, -torch.inf)
        log_p = (paths.log_likelihood[:, :, None] + log_p).flatten(1)
        log_likelihood, best = log_p.topk(self.beam_size, dim=1)
        came_from, label = best // num_labels, best % num_labels
        paths = Paths(*(pick_paths(value, came_from) for value in paths))
        return paths._replace(
            label=self.labels.weight[label],
            log_likelihood=log_likelihood,
            said=paths.said.scatter(2, label[..., None], True),
        )


def pick_paths(values: torch.Tensor, paths: torch.Tensor) -> torch.Tensor:
    """Values (B, P, ...) of some of the paths, by their indices (B, Q): (B, Q, ...)."""
    places = paths.reshape(*paths.shape, *[1] * (values.ndim - 2))
    return values.gather(1, places.expand(-1, -1, *values.shape[2:]))
