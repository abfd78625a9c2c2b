"""C-Tran's head against loops written from its paper, and what it is told about labels."""

import math

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from torch import nn

from ia_gcn import add_ia_gcn_config
from ia_gcn.errors import InputError
from ia_gcn.modeling import CTranHead, build_label_head
from ia_gcn.modeling.attention import sine_positions

NUM_LABELS, DIM, HEADS = 3, 4, 2


def make_head(positions=False):
    torch.manual_seed(0)
    head = CTranHead(
        in_feature="map",
        feature_dim=DIM,
        num_labels=NUM_LABELS,
        num_layers=2,
        num_heads=HEADS,
        positions=positions,
    )
    for parameter in head.parameters():
        nn.init.normal_(parameter, std=0.7)
    return head.double().eval()


def make_map(batch=2, height=2, width=3):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, DIM, height, width, generator=generator, dtype=torch.float64)


STATES = torch.tensor([[-1.0, -1, -1], [1, -1, 0]])


# One image, token and channel after the other.


def affine(weight, bias, x):
    return [sum(w * v for w, v in zip(row, x)) + b for row, b in zip(weight.tolist(), bias)]


def normalised(norm, x):
    mean = sum(x) / len(x)
    deviation = math.sqrt(sum((v - mean) ** 2 for v in x) / len(x) + 1e-5)
    weight, bias = norm.weight.tolist(), norm.bias.tolist()
    return [w * (v - mean) / deviation + b for v, w, b in zip(x, weight, bias)]


def projected(attention, tokens):
    """Queries, keys and values."""
    weights, biases = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
    return ([affine(w, b.tolist(), x) for x in tokens] for w, b in zip(weights, biases))


def shares(query, keys, head):
    """What a query gives to each key in a head, before all is divided by their sum."""
    size = DIM // HEADS
    part = slice(head * size, (head + 1) * size)
    scores = [sum(a * b for a, b in zip(query[part], key[part])) for key in keys]
    return [math.exp(score / math.sqrt(size)) for score in scores]


def attended(attention, tokens):
    q, k, v = projected(attention, tokens)
    size = DIM // HEADS
    results = []
    for query in q:
        joined = []
        for head in range(HEADS):
            given = shares(query, k, head)
            for channel in range(head * size, (head + 1) * size):
                total = sum(share * value[channel] for share, value in zip(given, v))
                joined.append(total / sum(given))
        results.append(affine(attention.out_proj.weight, attention.out_proj.bias.tolist(), joined))
    return results


def looked_at(attention, tokens, num_cells):
    """Of each label, the mean over the heads of its shares in the cells, 1 in sum."""
    q, k, _ = projected(attention, tokens)
    maps = []
    for query in q[num_cells:]:
        given = [shares(query, k[:num_cells], head) for head in range(HEADS)]
        maps.append([sum(s[i] / sum(s) for s in given) / HEADS for i in range(num_cells)])
    return maps


def encoded(layer, tokens):
    results = []
    for token, more in zip(tokens, attended(layer.self_attn, tokens)):
        token = normalised(layer.norm1, [a + b for a, b in zip(token, more)])
        hidden = affine(layer.linear1.weight, layer.linear1.bias.tolist(), token)
        hidden = [max(0.0, value) for value in hidden]
        more = affine(layer.linear2.weight, layer.linear2.bias.tolist(), hidden)
        results.append(normalised(layer.norm2, [a + b for a, b in zip(token, more)]))
    return results


def loop_outputs(head, cells, states):
    """Logits and attention of one image: its cells, a list of channels each, and its C states.

    The last layer computes all tokens, as the others do.
    """
    labels = head.label_embeddings.weight.tolist()
    told = head.state_embeddings.weight.tolist()
    unknown, absent, present = told
    of_state = {-1: unknown, 0: absent, 1: present}
    tokens = [
        *cells,
        *([a + b for a, b in zip(labels[c], of_state[int(states[c])])] for c in range(NUM_LABELS)),
    ]
    tokens = [normalised(head.norm, token) for token in tokens]
    for layer in head.layers:
        maps = looked_at(layer.self_attn, tokens, len(cells))
        tokens = encoded(layer, tokens)
    weight, bias = head.readout.weight[:, :, 0].tolist(), head.readout.bias.tolist()
    tokens = tokens[-NUM_LABELS:]
    logits = [sum(w * x for w, x in zip(weight[c], tokens[c])) + bias[c] for c in range(NUM_LABELS)]
    return logits, maps


@pytest.mark.parametrize("positions", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_logits_and_attention_are_those_of_the_loops(positions, masked):
    head, features = make_head(positions), make_map()
    mask = None
    if masked:
        mask = torch.ones(2, 1, 2, 3, dtype=torch.bool)
        mask[1, :, 1:] = mask[1, :, :, 2:] = False
    placed = features
    if positions:
        encoding = sine_positions(features, mask, DIM)
        placed = features + encoding.mT.unflatten(2, (2, 3))
    with torch.no_grad():
        outputs = head({"map": features}, {"map": mask}, label_states=STATES)
    for i, states in enumerate(STATES.tolist()):
        shown = torch.ones(2, 3).bool() if mask is None else mask[i, 0]
        logits, maps = loop_outputs(head, placed[i][:, shown].T.tolist(), states)
        np.testing.assert_allclose(outputs["logits"][i], logits)
        np.testing.assert_allclose(outputs["attention"][i][:, shown], maps)
        assert not outputs["attention"][i][:, ~shown].any()


def test_attention_is_not_computed_in_training():
    outputs = make_head().train()({"map": make_map()}, {"map": None}, label_states=STATES)
    assert list(outputs) == ["logits"]


def test_what_the_mask_leaves_out_has_no_effect_and_no_gradient():
    head, features = make_head(), make_map()
    mask = torch.ones(2, 1, 2, 3, dtype=torch.bool)
    mask[1, :, 1:] = mask[1, :, :, 2:] = False
    expected = head({"map": features}, {"map": mask}, label_states=STATES)["logits"]
    other = torch.where(mask, features, 1e3).requires_grad_()
    logits = head({"map": other}, {"map": mask}, label_states=STATES)["logits"]
    torch.testing.assert_close(logits, expected)
    logits.sum().backward()
    assert not other.grad[~mask.expand_as(other)].any()
    assert other.grad[mask.expand_as(other)].all()
    cut = head({"map": features[1:, :, :1, :2]}, {"map": None}, label_states=STATES[1:])["logits"]
    torch.testing.assert_close(expected[1:], cut)


@torch.no_grad()
def test_what_is_known_of_a_label_tells_of_the_others():
    head, features = make_head(), make_map(batch=1).expand(3, -1, -1, -1)
    states = torch.tensor([[-1.0, -1, -1], [1, -1, -1], [0, -1, -1]])
    logits = head({"map": features}, {"map": None}, label_states=states)["logits"]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert (logits[a] - logits[b]).abs().min() > 1e-6


def test_gradients():
    head, features = make_head(), make_map(1, 1, 2).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda value: head({"map": value}, {"map": None}, label_states=STATES[1:])["logits"],
        features,
    )
    head({"map": features}, {"map": None}, label_states=STATES[1:])["logits"].sum().backward()
    # The state of a label of which nothing is known stays as it is: at first 0.
    assert head.state_embeddings.weight.grad.any(dim=1).tolist() == [False, True, True]
    fresh = CTranHead(in_feature="map", feature_dim=DIM, num_labels=NUM_LABELS)
    assert fresh.state_embeddings.weight.any(dim=1).tolist() == [False, True, True]


def make_cfg(*opts):
    cfg = get_cfg()
    add_ia_gcn_config(cfg)
    options = ["MODEL.LABEL_HEAD.NAME", "CTranHead", "MODEL.LABEL_HEAD.NUM_LABELS", NUM_LABELS]
    cfg.merge_from_list([*options, *opts])
    return cfg


def test_a_head_from_a_config():
    opts = ["MODEL.C_TRAN.NUM_LAYERS", 2, "MODEL.C_TRAN.NUM_HEADS", HEADS]
    opts += ["MODEL.C_TRAN.POSITIONS", True]
    head = build_label_head(make_cfg(*opts), {"res5": ShapeSpec(channels=DIM, stride=32)})
    head.double().eval().load_state_dict(make_head().state_dict())
    features = make_map()
    expected = make_head(positions=True)({"map": features}, {"map": None}, label_states=STATES)
    found = head({"res5": features}, {"res5": None}, label_states=STATES)
    assert found["logits"].equal(expected["logits"])


def test_it_has_the_published_size():
    shapes = {"res5": ShapeSpec(channels=2048, stride=32)}
    with torch.device("meta"):
        head = build_label_head(make_cfg("MODEL.LABEL_HEAD.NUM_LABELS", 80), shapes)
    # Of ResNet-101 the published 120.4 million count ImageNet's classifier as well.
    millions = sum(p.numel() for p in head.parameters()) / 1e6
    assert millions + 44.55 == pytest.approx(120.4, abs=0.1)


@pytest.mark.parametrize(
    ("channels", "opts", "key"),
    [(6, [], "NUM_HEADS"), (6, ["MODEL.C_TRAN.NUM_HEADS", 2], "POSITIONS")],
)
def test_channels_that_cannot_be_divided_are_refused(channels, opts, key):
    with pytest.raises(InputError, match=rf"MODEL\.C_TRAN\.{key}.*{channels} channels of res5"):
        build_label_head(
            make_cfg("MODEL.C_TRAN.POSITIONS", True, *opts),
            {"res5": ShapeSpec(channels=channels, stride=32)},
        )
