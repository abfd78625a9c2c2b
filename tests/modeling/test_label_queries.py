"""Heads with label queries against loops of their equations, and against timm's ML-Decoder."""

import math

import numpy as np
import pytest
import torch
from detectron2.layers import ShapeSpec
from timm.layers.ml_decoder import MLDecoder
from torch import nn

from ia_gcn.errors import InputError
from ia_gcn.modeling import (
    LabelGraph,
    MLDecoderHead,
    MultiLabelRecognizer,
    Query2LabelHead,
    build_label_head,
)
from tests.helpers.heads import RecordSizes, make_cfg

NUM_LABELS, CHANNELS, DIM, HEADS, FFN = 5, 3, 8, 2, 6
SIZES = [(3, 4), (2, 1)]


def ml_decoder(num_groups=100, queries="random", readout="group", dropout=0.0, **options):
    torch.manual_seed(0)
    sizes = {"feature_dim": CHANNELS, "num_labels": NUM_LABELS, "dim": DIM, "num_heads": HEADS}
    head = MLDecoderHead(
        **{"in_feature": "map", **sizes, "ffn_dim": FFN, "embedding_dim": 7, **options},
        num_groups=num_groups,
        queries=queries,
        readout=readout,
        dropout=dropout,
    )
    return randomize(head)


def query2label(dim=DIM, encoder_layers=1, decoder_layers=2, self_attention=False, dropout=0.0):
    torch.manual_seed(0)
    head = Query2LabelHead(
        in_feature="map",
        feature_dim=CHANNELS if dim else DIM,
        num_labels=NUM_LABELS,
        dim=dim,
        num_heads=HEADS,
        ffn_dim=FFN,
        dropout=dropout,
        encoder_layers=encoder_layers,
        decoder_layers=decoder_layers,
        self_attention=self_attention,
    )
    return randomize(head)


@torch.no_grad()
def randomize(head):
    """Norms and biases that are not the defaults; in float64, evaluated."""
    for parameter in head.parameters():
        if parameter.ndim == 1:
            parameter.add_(torch.randn_like(parameter) / 2)
    return head.double().eval()


HEADS_OF_ALL_KINDS = {
    "ML-Decoder": (ml_decoder, {}),
    "ML-Decoder, groups": (ml_decoder, {"num_groups": 2}),
    "ML-Decoder, learned": (ml_decoder, {"num_groups": 3, "queries": "learned"}),
    "ML-Decoder, words": (ml_decoder, {"queries": "words"}),
    "ML-Decoder, shared": (ml_decoder, {"queries": "words", "readout": "shared"}),
    "Query2Label": (query2label, {}),
    "Query2Label, no encoder": (query2label, {"encoder_layers": 0, "decoder_layers": 1}),
    "Query2Label, self-attention": (query2label, {"self_attention": True}),
    "Query2Label, no projection": (query2label, {"dim": 0, "encoder_layers": 2}),
}
KINDS = pytest.mark.parametrize("kind", HEADS_OF_ALL_KINDS)


def make(kind, **options):
    function, own = HEADS_OF_ALL_KINDS[kind]
    return function(**own, **options)


def channels_of(kind):
    return DIM if "no projection" in kind else CHANNELS


def make_map(channels=CHANNELS, batch=2, height=3, width=4, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, channels, height, width, generator=generator, dtype=torch.float64)


def make_mask(height=3, width=4):
    mask = torch.zeros(len(SIZES), 1, height, width, dtype=torch.bool)
    for i, (h, w) in enumerate(SIZES):
        mask[i, :, :h, :w] = True
    return mask


def embeddings():
    return torch.randn(NUM_LABELS, 7, generator=torch.Generator().manual_seed(2)).double()


def run(head, features, mask=None):
    context = {"label_embeddings": embeddings()} if head.needs else {}
    return head({"map": features}, {"map": mask}, **context)


# The equations, one image, layer, head, query and cell after the other


def linear(x, layer):
    return x @ layer.weight.flatten(1).numpy(force=True).T + layer.bias.numpy(force=True)


def relu(x):
    return np.maximum(x, 0)


def layer_norm(x, norm):
    x = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5)
    return x * norm.weight.numpy(force=True) + norm.bias.numpy(force=True)


def loop_attention(queries, keys, values, attention):
    """(Q, D), (K, D), (K, D) to (Q, D), and the mean of the heads' weights (Q, K)."""
    weights = attention.in_proj_weight.numpy(force=True).reshape(3, DIM, DIM)
    biases = attention.in_proj_bias.numpy(force=True).reshape(3, DIM)
    q, k, v = (x @ w.T + b for x, w, b in zip((queries, keys, values), weights, biases))
    out, mean, size = np.zeros_like(q), np.zeros((len(q), len(k))), DIM // HEADS
    for head in range(HEADS):
        part = slice(head * size, (head + 1) * size)
        for i in range(len(q)):
            scores = [q[i, part] @ key[part] / math.sqrt(size) for key in k]
            shares = np.exp(scores) / np.exp(scores).sum()
            mean[i] += shares / HEADS
            out[i, part] = sum(share * value[part] for share, value in zip(shares, v))
    return linear(out, attention.out_proj), mean


def loop_ffn(x, layer, norm):
    return layer_norm(x + linear(relu(linear(x, layer.linear1)), layer.linear2), norm)


def loop_ml_decoder(head, cells):
    """Cells (K, D) of an image to logits (C,), and a list of C times what was looked at."""
    tokens = relu(linear(cells, head.embed))
    if head.needs:
        queries = relu(linear(embeddings().numpy(), head.embed_words))
    else:
        queries = head.queries.numpy(force=True)
    queries = layer_norm(queries + queries, head.query_norm)
    attended, weights = loop_attention(queries, tokens, tokens, head.decoder.multihead_attn)
    queries = layer_norm(queries + attended, head.decoder.norm2)
    queries = loop_ffn(queries, head.decoder, head.decoder.norm3)
    if head.any_labels:
        return linear(queries, head.readout[0])[:, 0], weights
    logits, size = [], math.ceil(NUM_LABELS / len(queries))
    for label in range(NUM_LABELS):
        weight = head.readout.weight[label // size, :, label % size].numpy(force=True)
        logits.append(queries[label // size] @ weight + head.readout.bias[label].item())
    return logits, [weights[label // size] for label in range(NUM_LABELS)]


def loop_query2label(head, cells, height, width):
    tokens = cells if isinstance(head.project, nn.Identity) else linear(cells, head.project)
    positions = np.zeros((height, width, DIM))
    for y in range(height):
        for x in range(width):
            for half, place in enumerate([(y + 1) / (height + 1e-6), (x + 1) / (width + 1e-6)]):
                for i in range(DIM // 2):
                    angle = 2 * math.pi * place / 10000 ** (i // 2 * 2 / (DIM // 2))
                    wave = math.cos(angle) if i % 2 else math.sin(angle)
                    positions[y, x, half * DIM // 2 + i] = wave
    positions = positions.reshape(-1, DIM)
    for layer in head.encoder:
        placed = tokens + positions
        attended, _ = loop_attention(placed, placed, tokens, layer.self_attn)
        tokens = loop_ffn(layer_norm(tokens + attended, layer.norm1), layer, layer.norm2)
    queries = head.queries.numpy(force=True)
    states = np.zeros_like(queries)
    for layer in head.decoder:
        if layer.self_attention:
            placed = states + queries
            attended, _ = loop_attention(placed, placed, states, layer.self_attn)
            states = layer_norm(states + attended, layer.norm1)
        attention = layer.multihead_attn
        attended, weights = loop_attention(states + queries, tokens + positions, tokens, attention)
        states = loop_ffn(layer_norm(states + attended, layer.norm2), layer, layer.norm3)
    states = layer_norm(states, head.norm)
    classifiers = head.readout.weight[:, :, 0].numpy(force=True)
    return (states * classifiers).sum(1) + head.readout.bias.numpy(force=True), weights


def loop(head, cells, height, width):
    if "embed.weight" in head.state_dict():
        return loop_ml_decoder(head, cells)
    return loop_query2label(head, cells, height, width)


@KINDS
@pytest.mark.parametrize("masked", [False, True])
def test_logits_and_attention_are_those_of_the_loops(kind, masked):
    head, features = make(kind), make_map(channels_of(kind))
    outputs = run(head, features, make_mask() if masked else None)
    assert outputs["logits"].shape == (2, NUM_LABELS)
    assert outputs["attention"].shape == (2, NUM_LABELS, 3, 4)
    for i, (height, width) in enumerate(SIZES if masked else [(3, 4)] * 2):
        cells = features[i, :, :height, :width].flatten(1).T.numpy()
        logits, weights = loop(head, cells, height, width)
        np.testing.assert_allclose(outputs["logits"][i].detach().numpy(), logits, rtol=1e-9)
        attention = outputs["attention"][i]
        np.testing.assert_allclose(attention[:, :height, :width].flatten(1), weights, rtol=1e-9)
        torch.testing.assert_close(attention.sum(dim=(1, 2)), torch.ones(NUM_LABELS).double())


@KINDS
def test_what_the_mask_leaves_out_has_no_effect_and_no_gradient(kind):
    head, features, mask = make(kind), make_map(channels_of(kind)), make_mask()
    expected = run(head, features, mask)["logits"]
    other = torch.where(mask, features, 1e3).requires_grad_()
    logits = run(head, other, mask)["logits"]
    torch.testing.assert_close(logits, expected)
    logits.square().sum().backward()
    assert not other.grad[~mask.expand_as(other)].any()
    assert other.grad.abs().sum(1, keepdim=True)[mask].all()
    alone = run(head, features[1:, :, :2, :1])["logits"]
    torch.testing.assert_close(expected[1:], alone)


@KINDS
def test_images_do_not_depend_on_each_other(kind):
    head, features = make(kind), make_map(channels_of(kind), batch=3)
    logits = run(head, features)["logits"]
    assert (logits[0] - logits[1]).abs().max() > 1e-3
    torch.testing.assert_close(run(head, features[[2, 0, 1]])["logits"], logits[[2, 0, 1]])
    for i in range(3):
        torch.testing.assert_close(run(head, features[i : i + 1])["logits"], logits[i : i + 1])


@KINDS
def test_gradients(kind):
    head, features = make(kind), make_map(channels_of(kind), 1, 2, 2).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda value: run(head, value)["logits"], features, fast_mode=True
    )


@KINDS
def test_all_is_trained_but_fixed_queries(kind):
    head = make(kind, dropout=0.1).train()
    outputs = run(head, make_map(channels_of(kind)))
    assert "attention" not in outputs
    outputs["logits"].square().sum().backward()
    for name, parameter in head.named_parameters():
        assert parameter.grad.any(), name
    fixed = kind in ("ML-Decoder", "ML-Decoder, groups")
    assert ("queries" in dict(head.named_buffers())) == fixed
    assert "queries" in head.state_dict() or head.needs


def test_dropout_of_fixed_queries_is_each_images_own():
    head = ml_decoder(dropout=0.5).train()
    head.decoder.eval()
    features = make_map(batch=1).expand(2, -1, -1, -1)
    logits = run(head, features)["logits"]
    assert (logits[0] - logits[1]).abs().max() > 1e-3


# ML-Decoder beside timm's


@pytest.mark.parametrize("num_labels", [3, 10, 25])
def test_ml_decoder_is_timms(num_labels):
    torch.manual_seed(0)
    theirs = MLDecoder(num_labels, num_of_groups=10, decoder_embedding=16, initial_num_features=12)
    # torch's TransformerDecoder asks layers for a self-attention, which this one does not have.
    theirs.decoder.forward = theirs.decoder.layers[0].forward
    for parameter in theirs.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, std=0.5)
    ours = MLDecoderHead(
        in_feature="map",
        feature_dim=12,
        num_labels=num_labels,
        dim=16,
        num_heads=8,
        ffn_dim=2048,
        dropout=0.1,
        num_groups=10,
        queries="random",
        readout="group",
        embedding_dim=1,
    )
    names = {
        "embed_standart.": "embed.",
        "query_embed.weight": "queries",
        "decoder.layers.0.norm1.": "query_norm.",
        "decoder.layers.0.": "decoder.",
        "duplicate_pooling_bias": "readout.bias",
        "duplicate_pooling": "readout.weight",
    }
    state = {}
    for name, tensor in theirs.state_dict().items():
        start = next(start for start in names if name.startswith(start))
        state[name.replace(start, names[start], 1)] = tensor
    ours.load_state_dict(state)
    features = torch.randn(2, 12, 3, 4)
    expected = theirs.eval()(features)
    assert expected.std() > 0.1
    found = ours.eval()({"map": features}, {"map": None})["logits"]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


# Labels that were not trained on


def test_a_shared_readout_scores_any_label():
    head = ml_decoder(queries="words", readout="shared")
    assert head.any_labels
    assert not ml_decoder(queries="words").any_labels
    assert all(NUM_LABELS not in tensor.shape for tensor in head.state_dict().values())
    features, known = make_map(), embeddings()
    unseen = torch.cat([torch.randn(2, 7).double(), known[[3]]])
    logits = run(head, features)["logits"]
    found = head({"map": features}, {"map": None}, label_embeddings=unseen)["logits"]
    assert found.shape == (2, 3)
    torch.testing.assert_close(found[:, 2], logits[:, 3])


# From a config


def cfg_of(name, **keys):
    cfg = make_cfg(name, NUM_LABELS)
    opts = {"ML_DECODER": {"DIM": 8}, "QUERY2LABEL": {"FFN_DIM": 16}}
    section = "ML_DECODER" if name == "MLDecoderHead" else "QUERY2LABEL"
    for key, value in {**opts[section], **keys}.items():
        cfg.MODEL[section][key] = value
    return cfg


SHAPE = {"res5": ShapeSpec(channels=12, stride=32)}


def test_heads_from_a_config():
    head = build_label_head(cfg_of("MLDecoderHead", NUM_GROUPS=2), SHAPE)
    assert head.queries.shape == (2, 8)
    assert head.readout.weight.shape == (2, 8, 3)
    assert head.decoder.linear1.weight.shape == (2048, 8)
    head = build_label_head(cfg_of("Query2LabelHead", ENCODER_LAYERS=3), SHAPE)
    assert isinstance(head.project, nn.Identity)
    assert head.queries.shape == (NUM_LABELS, 12)
    assert (len(head.encoder), len(head.decoder)) == (3, 2)
    head = build_label_head(cfg_of("Query2LabelHead", DIM=8), SHAPE)
    assert head.project.weight.shape == (8, 12, 1, 1)


@pytest.mark.parametrize(
    ("name", "keys", "message"),
    [
        ("MLDecoderHead", {"READOUT": "shared"}, r"ML_DECODER\.READOUT shared needs .* words"),
        ("MLDecoderHead", {"DIM": 12}, r"MODEL\.ML_DECODER\.DIM 12 .*NUM_HEADS 8"),
        ("Query2LabelHead", {"DIM": 10}, r"MODEL\.QUERY2LABEL\.DIM 10 is no multiple of 4"),
        ("Query2LabelHead", {"NUM_HEADS": 5}, r"MODEL\.QUERY2LABEL\.DIM 12 .*NUM_HEADS 5"),
    ],
)
def test_what_does_not_go_together_is_named(name, keys, message):
    with pytest.raises(InputError, match=message):
        build_label_head(cfg_of(name, **keys), SHAPE)


def test_words_come_from_the_recognisers_label_embeddings():
    cfg = cfg_of("MLDecoderHead", QUERIES="words", READOUT="shared")
    cfg.MODEL.BACKBONE.NAME = "build_resnet10_backbone"
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res5"]
    cfg.MODEL.RESNETS.STEM_OUT_CHANNELS = cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 8
    cfg.MODEL.LABEL_EMBEDDINGS.DIM = 7
    cfg.MODEL.DEVICE = "cpu"
    model = MultiLabelRecognizer(cfg).eval()
    assert isinstance(model.label_graph, LabelGraph)
    image = {"image": torch.randint(256, (3, 64, 64), dtype=torch.uint8)}
    before = model([image])[0]["logits"]
    model.label_graph.fill(None, None, torch.randn(NUM_LABELS, 7))
    assert not model([image])[0]["logits"].allclose(before)


def test_thousands_of_labels_cost_no_tensor_of_each_cell_and_channel():
    """In a training step of 8 images at 448, attention weights are the largest tensor."""
    num_labels, num_groups, batch, cells = 9605, 100, 8, 14 * 14
    head = MLDecoderHead(
        in_feature="map",
        feature_dim=64,
        num_labels=num_labels,
        dim=64,
        num_heads=8,
        ffn_dim=64,
        dropout=0.1,
        num_groups=num_groups,
        queries="random",
        readout="group",
        embedding_dim=1,
    )
    features = torch.randn(batch, 64, 14, 14)
    with RecordSizes() as record:
        logits = head({"map": features}, {"map": None})["logits"]
        logits.square().mean().backward()
    assert logits.shape == (batch, num_labels)
    assert max(record.sizes) <= batch * head.decoder.multihead_attn.num_heads * num_groups * cells
