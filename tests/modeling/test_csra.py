"""Residual attention against loops written from its paper."""

import math

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from hypothesis import given, settings
from hypothesis import strategies as st

from ia_gcn import add_ia_gcn_config
from ia_gcn.errors import InputError
from ia_gcn.modeling import CSRAHead, build_label_head, masked_softmax

NUM_LABELS, DIM = 3, 4


def make_head(temperatures=(1.0,), attention_weight=0.3):
    torch.manual_seed(0)
    head = CSRAHead(
        in_feature="map",
        feature_dim=DIM,
        num_labels=NUM_LABELS,
        temperatures=temperatures,
        attention_weight=attention_weight,
    )
    return head.double()


def make_map(batch=2, height=3, width=4):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, DIM, height, width, generator=generator, dtype=torch.float64)


def loop_logits(head, features, valid):
    """One image, label, head and cell after the other. `valid` has a list of cells per image."""
    logits = []
    for image, cells in zip(features.tolist(), valid):
        columns = [[channel[y][x] for channel in image] for y, x in cells]
        row = []
        for label in range(NUM_LABELS):
            total = 0.0
            for classifier, temperature in zip(head.classifiers, head.temperatures):
                weight = classifier.weight[label, :, 0, 0].tolist()
                length = math.sqrt(sum(w * w for w in weight))
                scores = [sum(w * f for w, f in zip(weight, cell)) / length for cell in columns]
                if temperature >= 99:
                    attended = max(scores)
                else:
                    shares = [math.exp(temperature * s) for s in scores]
                    attended = sum(a * s for a, s in zip(shares, scores)) / sum(shares)
                total += sum(scores) / len(scores) + head.attention_weight * attended
            row.append(total)
        logits.append(row)
    return logits


@pytest.mark.parametrize("temperatures", [(1.0,), (99,), (0.5, 2.0), (1.0, 2.0, 99)])
@pytest.mark.parametrize("masked", [False, True])
def test_logits_are_those_of_the_loops(temperatures, masked):
    head, features = make_head(temperatures), make_map()
    sizes = [(3, 4), (2, 1)] if masked else [(3, 4), (3, 4)]
    valid = [[(y, x) for y in range(h) for x in range(w)] for h, w in sizes]
    mask = torch.zeros(2, 1, 3, 4, dtype=torch.bool)
    for i, cells in enumerate(valid):
        for y, x in cells:
            mask[i, 0, y, x] = True
    outputs = head({"map": features}, {"map": mask if masked else None})
    np.testing.assert_allclose(outputs["logits"].tolist(), loop_logits(head, features, valid))
    attention = outputs["attention"]
    assert attention.shape == (2, NUM_LABELS, 3, 4)
    torch.testing.assert_close(attention.sum(dim=(2, 3)), torch.ones(2, NUM_LABELS).double())
    assert not attention[~mask.expand_as(attention)].any() or not masked


@pytest.mark.parametrize("temperature", [1.0, 99])
def test_what_the_mask_leaves_out_has_no_effect_and_no_gradient(temperature):
    head, features = make_head((temperature,)), make_map()
    mask = torch.ones(2, 1, 3, 4, dtype=torch.bool)
    mask[1, :, 1:] = mask[1, :, :, 2:] = False
    expected = head({"map": features}, {"map": mask})["logits"]
    other = torch.where(mask, features, 1e3).requires_grad_()
    logits = head({"map": other}, {"map": mask})["logits"]
    torch.testing.assert_close(logits, expected)
    logits.sum().backward()
    assert not other.grad[~mask.expand_as(other)].any()
    assert other.grad[mask.expand_as(other)].all()
    cut = head({"map": features[1:, :, :1, :2]}, {"map": None})["logits"]
    torch.testing.assert_close(expected[1:], cut)


@settings(max_examples=25)
@given(st.floats(0.01, 50), st.integers(1, 4), st.integers(1, 4))
def test_attention_lies_between_mean_and_maximum(temperature, height, width):
    head, features = make_head((temperature,), attention_weight=1.0), make_map(1, height, width)
    scores = torch.nn.functional.conv2d(
        features, torch.nn.functional.normalize(head.classifiers[0].weight, dim=1)
    )
    mean, highest = scores.mean(dim=(2, 3)), scores.amax(dim=(2, 3))
    attended = head({"map": features}, {"map": None})["logits"] - mean
    assert (attended >= mean - 1e-9).all()
    assert (attended <= highest + 1e-9).all()


def test_gradients():
    head = make_head((1.0, 99))
    features = make_map(1, 2, 2).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda value: head({"map": value}, {"map": None})["logits"], features
    )


def test_masked_softmax_is_the_softmax_of_what_is_there():
    scores = torch.randn(2, 3, 2, 2).double()
    mask = torch.tensor([[[[1, 1], [1, 1]]], [[[1, 0], [1, 0]]]]).bool()
    found = masked_softmax(scores, mask)
    torch.testing.assert_close(found[0], scores[0].flatten(1).softmax(1).view(3, 2, 2))
    torch.testing.assert_close(found[1, :, :, 0], scores[1, :, :, 0].softmax(1))
    assert not found[1, :, :, 1].any()


def make_cfg(*opts):
    cfg = get_cfg()
    add_ia_gcn_config(cfg)
    options = ["MODEL.LABEL_HEAD.NAME", "CSRAHead", "MODEL.LABEL_HEAD.NUM_LABELS", NUM_LABELS]
    cfg.merge_from_list([*options, *opts])
    return cfg


def test_a_head_from_a_config():
    opts = ["MODEL.CSRA.TEMPERATURES", (1.0, 99), "MODEL.CSRA.ATTENTION_WEIGHT", 0.3]
    head = build_label_head(make_cfg(*opts), {"res5": ShapeSpec(channels=DIM, stride=32)}).double()
    head.load_state_dict(make_head((1.0, 99)).state_dict())
    features = make_map()
    expected = make_head((1.0, 99))({"map": features}, {"map": None})["logits"]
    assert head({"res5": features}, {"res5": None})["logits"].equal(expected)
    assert sum(parameter.numel() for parameter in head.parameters()) == 2 * NUM_LABELS * DIM


@pytest.mark.parametrize("temperatures", [(), (0.0,), (1.0, -1.0)])
def test_temperatures_are_above_0(temperatures):
    with pytest.raises(InputError, match=r"MODEL\.CSRA\.TEMPERATURES"):
        build_label_head(
            make_cfg("MODEL.CSRA.TEMPERATURES", temperatures),
            {"res5": ShapeSpec(channels=DIM, stride=32)},
        )
