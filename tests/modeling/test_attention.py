"""Layers of a Transformer against torch's own, and the encoding of places against its formula."""

import math

import pytest
import torch
from torch import nn

from ia_gcn.modeling.attention import (
    DecoderLayer,
    EncoderLayer,
    MultiheadAttention,
    map_tokens,
    sine_positions,
)
from ia_gcn.modeling.label_readout import LabelReadout

DIM, HEADS, FFN = 8, 2, 12


def randn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def of_torch(layer):
    """torch's layer without dropout, in float64, in training: its fast path of inference is off."""
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    return layer.double()


MASKS = [None, torch.tensor([[1, 1, 1, 1, 1], [1, 0, 1, 1, 0]]).bool()]


@pytest.mark.parametrize("mask", MASKS)
def test_attention_is_torchs(mask):
    theirs = of_torch(nn.MultiheadAttention(DIM, HEADS, batch_first=True))
    ours = MultiheadAttention(DIM, HEADS).double()
    ours.load_state_dict(theirs.state_dict())
    queries, keys, values = randn(2, 3, DIM), randn(2, 5, DIM, seed=1), randn(2, 5, DIM, seed=2)
    found, weights = ours(queries, keys, values, mask, need_weights=True)
    padding = None if mask is None else ~mask
    expected, expected_weights = theirs(queries, keys, values, key_padding_mask=padding)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(weights, expected_weights)
    assert not weights.requires_grad
    assert ours(queries, keys, values, mask)[1] is None


def test_queries_that_are_the_same_for_all_images():
    attention = MultiheadAttention(DIM, HEADS).double()
    queries, keys = randn(1, 3, DIM), randn(2, 5, DIM, seed=1)
    found = attention(queries, keys, keys, need_weights=True)
    expected = attention(queries.expand(2, -1, -1), keys, keys, need_weights=True)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("mask", MASKS)
def test_encoder_layer_is_torchs(mask):
    theirs = of_torch(nn.TransformerEncoderLayer(DIM, HEADS, FFN, 0.0, batch_first=True))
    ours = EncoderLayer(DIM, HEADS, FFN, 0.0).double()
    ours.load_state_dict(theirs.state_dict())
    tokens = randn(2, 5, DIM)
    expected = theirs(tokens, src_key_padding_mask=None if mask is None else ~mask)
    torch.testing.assert_close(ours(tokens, mask), expected)
    some, weights = ours.encode_some(tokens[:, 3:], tokens, mask)
    torch.testing.assert_close(some, expected[:, 3:])
    assert weights is None


@pytest.mark.parametrize("mask", MASKS)
def test_weights_of_some_keys_are_those_of_an_attention_to_them_alone(mask):
    attention = of_torch(MultiheadAttention(DIM, HEADS))
    queries, keys = randn(2, 3, DIM), randn(2, 5, DIM, seed=1)
    found, weights = attention(queries, keys, keys, mask, need_weights=True, num_weights=3)
    torch.testing.assert_close(found, attention(queries, keys, keys, mask)[0])
    few = mask if mask is None else mask[:, :3]
    _, expected = attention(queries, keys[:, :3], keys[:, :3], few, need_weights=True)
    torch.testing.assert_close(weights, expected)


@pytest.mark.parametrize("mask", MASKS)
def test_decoder_layer_with_self_attention_is_torchs(mask):
    theirs = of_torch(nn.TransformerDecoderLayer(DIM, HEADS, FFN, 0.0, batch_first=True))
    ours = DecoderLayer(DIM, HEADS, FFN, 0.0, self_attention=True).double()
    ours.load_state_dict(theirs.state_dict())
    queries, tokens = randn(2, 3, DIM), randn(2, 5, DIM, seed=1)
    expected = theirs(queries, tokens, memory_key_padding_mask=None if mask is None else ~mask)
    torch.testing.assert_close(ours(queries, tokens, mask)[0], expected)


def test_positions_are_added_to_queries_and_keys_and_not_to_values():
    theirs = of_torch(nn.MultiheadAttention(DIM, HEADS, batch_first=True))
    tokens, positions = randn(2, 5, DIM), randn(1, 5, DIM, seed=1)
    queries, query_positions = randn(1, 3, DIM, seed=2), randn(1, 3, DIM, seed=3)
    encoder = EncoderLayer(DIM, HEADS, FFN, 0.0).double()
    encoder.self_attn.load_state_dict(theirs.state_dict())
    attended, _ = theirs(tokens + positions, tokens + positions, tokens)
    hidden = encoder.norm1(tokens + attended)
    expected = encoder.norm2(hidden + encoder.linear2(encoder.linear1(hidden).relu()))
    torch.testing.assert_close(encoder(tokens, positions=positions), expected)

    decoder = DecoderLayer(DIM, HEADS, FFN, 0.0).double()
    decoder.multihead_attn.load_state_dict(theirs.state_dict())
    placed = (queries + query_positions).expand(2, -1, -1)
    attended, weights = theirs(placed, tokens + positions, tokens)
    hidden = decoder.norm2(queries + attended)
    expected = decoder.norm3(hidden + decoder.linear2(decoder.linear1(hidden).relu()))
    found = decoder(queries, tokens, None, query_positions, positions, need_weights=True)
    torch.testing.assert_close(found, (expected, weights))


def test_dropout_is_that_of_training_alone():
    layer = EncoderLayer(DIM, HEADS, FFN, 0.5).double()
    tokens = randn(2, 5, DIM)
    assert not layer(tokens).equal(layer(tokens))
    layer.eval()
    assert layer(tokens).equal(layer(tokens))


def test_tokens_are_the_cells_row_by_row():
    features = torch.arange(2 * 3 * 2 * 2.0).view(2, 3, 2, 2)
    mask = torch.ones(2, 1, 2, 2, dtype=torch.bool)
    mask[1, 0, 1] = False
    tokens, key_mask = map_tokens(features, mask)
    assert tokens.shape == (2, 4, 3)
    assert tokens[1, 2].equal(features[1, :, 1, 0])
    assert key_mask.tolist() == [[True] * 4, [True, True, False, False]]
    assert map_tokens(features, None)[1] is None


def loop_positions(height, width, dim):
    """Of each cell, one channel after the other."""
    encoding = []
    for y in range(1, height + 1):
        for x in range(1, width + 1):
            cell = []
            for place in (y / (height + 1e-6), x / (width + 1e-6)):
                for channel in range(dim // 2):
                    rate = 10000 ** (2 * (channel // 2) / (dim // 2))
                    wave = math.cos if channel % 2 else math.sin
                    cell.append(wave(2 * math.pi * place / rate))
            encoding.append(cell)
    return torch.tensor([encoding], dtype=torch.float64)


def test_positions_of_the_formula():
    features = randn(2, 3, 4, 5)
    found = sine_positions(features, None, DIM)
    torch.testing.assert_close(found, loop_positions(4, 5, DIM))
    assert sine_positions(features.bfloat16(), None, DIM).dtype == torch.bfloat16


def test_a_padded_image_has_the_positions_of_the_image_alone():
    mask = torch.zeros(2, 1, 4, 5, dtype=torch.bool)
    mask[0] = True
    mask[1, :, :3, :2] = True
    found = sine_positions(randn(2, 3, 4, 5), mask, DIM)
    torch.testing.assert_close(found[:1], loop_positions(4, 5, DIM))
    alone = found[1].view(4, 5, DIM)[:3, :2].reshape(1, 6, DIM)
    torch.testing.assert_close(alone, loop_positions(3, 2, DIM))


@pytest.mark.parametrize(("num_labels", "num_queries"), [(5, None), (5, 5), (7, 3), (8, 2), (4, 3)])
def test_labels_are_read_from_the_query_of_their_group(num_labels, num_queries):
    readout = LabelReadout(num_labels, DIM, num_queries).double()
    features = randn(2, num_queries or num_labels, DIM)
    found = readout(features)
    assert found.shape == (2, num_labels)
    size = math.ceil(num_labels / (num_queries or num_labels))
    for label in range(num_labels):
        weight = readout.weight[label // size, :, label % size]
        expected = features[:, label // size] @ weight + readout.bias[label]
        torch.testing.assert_close(found[:, label], expected)
