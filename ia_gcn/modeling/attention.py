"""Attention over the cells of feature maps: tokens, positions, and the layers of a Transformer.

The layers are those of "Attention is all you need" (Vaswani et al., NIPS 2017), each with its norm
after the sum ("post-norm"). Their tensors are named as those of torch's MultiheadAttention,
TransformerEncoderLayer and TransformerDecoderLayer.

B, Q, K and D are the numbers of images, queries, keys and channels. A mask (B, K) bool says which
keys may be attended to, at least one in each image; None: all of them.
"""

from __future__ import annotations

import math
from typing import Callable, Tuple

import torch
import torch.nn.functional as F
from torch import nn


def map_tokens(
    features: torch.Tensor, mask: torch.Tensor | None
) -> Tuple[torch.Tensor, torch.Tensor | None]:
    """The cells of a feature map as tokens, row by row.

    Args:
        features: (B, D, H, W).
        mask: (B, 1, H, W) bool, the cells that show the image; None where all do.
    Returns:
        (B, HW, D), and the mask (B, HW), or None.
    """
    return features.flatten(2).mT, None if mask is None else mask.flatten(1)


def sine_positions(
    features: torch.Tensor, mask: torch.Tensor | None, dim: int, temperature: float = 10000.0
) -> torch.Tensor:
    """Sine encoding of the places of a map's cells, normalised to the image (DETR, ECCV 2020).

    A cell in row y of Y, counted from 1, is at the angle 2π y/Y. Channels 2i and 2i + 1 of the
    first half are sine and cosine of angle · temperature^(-2i/(dim/2)); the second half is that of
    the columns. As y/Y is relative, a map of any size has the same range.

    Args:
        features: (B, D, H, W), of which size, device and dtype are used.
        mask: (B, 1, H, W) bool, a rectangle in each image, whose rows and columns are counted;
            None where every cell shows the image.
        dim: channels of the encoding, a multiple of 4.
    Returns:
        (B, HW, dim), or (1, HW, dim) without a mask.
    """
    height, width = features.shape[-2:]
    if mask is None:
        mask = features.new_ones((1, 1, height, width), dtype=torch.bool)
    mask = mask[:, 0]
    # In at least float32: 8 bits of a bfloat16 are too few for an angle.
    dtype = torch.promote_types(features.dtype, torch.float32)
    rows = _sines(mask.any(dim=2).to(dtype), dim // 2, temperature)
    columns = _sines(mask.any(dim=1).to(dtype), dim // 2, temperature)
    size = (mask.shape[0], height, width, dim // 2)
    both = [rows[:, :, None].expand(size), columns[:, None].expand(size)]
    return torch.cat(both, dim=3).flatten(1, 2).to(features.dtype)


def _sines(shown: torch.Tensor, dim: int, temperature: float) -> torch.Tensor:
    """(B, N), 1 for those of N rows that show the image and 0 for the others, to (B, N, dim)."""
    places = shown.cumsum(1)
    angles = 2 * math.pi * places / (places[:, -1:] + 1e-6)
    exponents = torch.arange(0, dim, 2, dtype=shown.dtype, device=shown.device) / dim
    angles = angles[..., None] / temperature**exponents
    return torch.stack([angles.sin(), angles.cos()], dim=3).flatten(2)


class MultiheadAttention(nn.Module):
    """softmax(q kᵀ / √d) v of each of several heads, joined by a linear layer.

    Its tensors are those of torch's nn.MultiheadAttention: in_proj_weight (3D, D), in_proj_bias
    (3D,), and out_proj.
    """

    def __init__(self, dim: int, num_heads: int, dropout: float = 0.0):
        """
        Args:
            dim: D, a multiple of num_heads.
            num_heads: each has d = D / num_heads channels.
            dropout: of the weights of the keys.
        """
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        mask: torch.Tensor | None = None,
        need_weights: bool = False,
        num_weights: int | None = None,
    ) -> Tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            queries: (B, Q, D), or (1, Q, D), the same for all images.
            keys, values: (B, K, D).
            mask: (B, K) bool, or None.
            need_weights: whether the weights are asked for.
            num_weights: of so many keys alone, the first ones, over which each head's softmax is
                then taken; None: of all.
        Returns:
            (B, Q, D); and the weights (B, Q, K), the mean over the heads, if they are asked for.
            These are without gradient and without dropout.
        """
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        q, k, v = map(F.linear, (queries, keys, values), weights, biases)
        q, k, v = (x.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for x in (q, k, v))
        q = q.expand(k.shape[0], -1, -1, -1)
        if mask is not None:
            mask = mask[:, None, None, :]
        dropout = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        attended = self.out_proj(attended.transpose(1, 2).flatten(2))
        if not need_weights:
            return attended, None
        if mask is not None:
            mask = mask[..., :num_weights]
        return attended, _mean_weights(q, k[:, :, :num_weights], mask)


@torch.no_grad()
def _mean_weights(q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """(B, heads, Q, d) and (B, heads, K, d) to the weights (B, Q, K), the mean over the heads."""
    mean = 0
    # One head after the other: all at once would be a tensor B × heads × Q × K.
    for head_q, head_k in zip(q.unbind(1), k.unbind(1)):
        scores = head_q @ head_k.mT / math.sqrt(q.shape[-1])
        if mask is not None:
            scores = scores.masked_fill(~mask[:, 0], -torch.inf)
        mean = mean + scores.softmax(dim=2) / q.shape[1]
    return mean


class EncoderLayer(nn.Module):
    """Self-attention of the tokens, then two linear layers on each of them."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        ffn_dim: int,
        dropout: float = 0.1,
        activation: Callable[[torch.Tensor], torch.Tensor] = F.relu,
    ):
        """
        Args:
            dim, num_heads: of `MultiheadAttention`.
            ffn_dim: channels between the two linear layers.
            dropout: of the weights of the keys, between the linear layers, and before each sum.
            activation: between the linear layers.
        """
        super().__init__()
        self.self_attn = MultiheadAttention(dim, num_heads, dropout)
        self.linear1 = nn.Linear(dim, ffn_dim)
        self.linear2 = nn.Linear(ffn_dim, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)
        self.activation = activation

    def forward(
        self,
        tokens: torch.Tensor,
        mask: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Args:
            tokens: (B, K, D).
            mask: (B, K) bool, or None. What it excludes is not attended to; its own output is
                computed, and to be left out by what follows.
            positions: (B, K, D), (1, K, D), or None: added to the queries and keys, not the values.
        Returns:
            (B, K, D).
        """
        placed = _add(tokens, positions)
        attended, _ = self.self_attn(placed, placed, tokens, mask)
        return self._after_attention(tokens, attended)

    def encode_some(
        self,
        some: torch.Tensor,
        tokens: torch.Tensor,
        mask: torch.Tensor | None = None,
        need_weights: bool = False,
        num_weights: int | None = None,
    ) -> Tuple[torch.Tensor, torch.Tensor | None]:
        """What `forward` makes of some of the tokens, without the cost of the others.

        Args:
            some: (B, Q, D), those of the tokens whose output is wanted.
            tokens, mask: of `forward`.
            need_weights, num_weights: of `MultiheadAttention`.
        Returns:
            (B, Q, D); and the weights (B, Q, K) of the tokens, if they are asked for.
        """
        attended, weights = self.self_attn(some, tokens, tokens, mask, need_weights, num_weights)
        return self._after_attention(some, attended), weights

    def _after_attention(self, tokens: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        tokens = self.norm1(tokens + self.dropout(attended))
        hidden = self.dropout(self.activation(self.linear1(tokens)))
        return self.norm2(tokens + self.dropout(self.linear2(hidden)))


class DecoderLayer(nn.Module):
    """Attention of queries to the tokens of an image, then two linear layers on each query.

    With self-attention, the queries attend to each other first.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        ffn_dim: int,
        dropout: float = 0.1,
        self_attention: bool = False,
    ):
        """
        Args:
            dim, num_heads: of `MultiheadAttention`.
            ffn_dim, dropout: of `EncoderLayer`.
            self_attention: whether the queries attend to each other.
        """
        super().__init__()
        if self_attention:
            self.self_attn = MultiheadAttention(dim, num_heads, dropout)
            self.norm1 = nn.LayerNorm(dim)
        self.self_attention = self_attention
        self.multihead_attn = MultiheadAttention(dim, num_heads, dropout)
        self.linear1 = nn.Linear(dim, ffn_dim)
        self.linear2 = nn.Linear(ffn_dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        queries: torch.Tensor,
        tokens: torch.Tensor,
        mask: torch.Tensor | None = None,
        query_positions: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        need_weights: bool = False,
    ) -> Tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            queries: (B, Q, D), or (1, Q, D), the same for all images.
            tokens: (B, K, D).
            mask: (B, K) bool, or None.
            query_positions: (1, Q, D), or None: added to the queries wherever they attend.
            positions: (B, K, D), (1, K, D), or None: added to the keys.
            need_weights: whether the weights are asked for.
        Returns:
            (B, Q, D); and the weights (B, Q, K) of the tokens, if they are asked for, see
            `MultiheadAttention`.
        """
        if self.self_attention:
            placed = _add(queries, query_positions)
            attended, _ = self.self_attn(placed, placed, queries)
            queries = self.norm1(queries + self.dropout(attended))
        attended, weights = self.multihead_attn(
            _add(queries, query_positions), _add(tokens, positions), tokens, mask, need_weights
        )
        queries = self.norm2(queries + self.dropout(attended))
        hidden = self.dropout(F.relu(self.linear1(queries)))
        return self.norm3(queries + self.dropout(self.linear2(hidden))), weights


def _add(tokens: torch.Tensor, positions: torch.Tensor | None) -> torch.Tensor:
    return tokens if positions is None else tokens + positions
