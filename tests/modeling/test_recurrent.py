"""The attention LSTM against loops, and its beam search against all sequences of labels."""

import itertools
import math

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from torch import nn

from ia_gcn import add_ia_gcn_config
from ia_gcn.modeling import RecurrentHead, build_label_head

NUM_LABELS, DIM, HIDDEN, EMBEDDING = 4, 3, 5, 2


def make_head(steps=3, label_feedback=False, beam_size=1):
    torch.manual_seed(0)
    head = RecurrentHead(
        in_feature="map",
        feature_dim=DIM,
        num_labels=NUM_LABELS,
        hidden_dim=HIDDEN,
        embedding_dim=EMBEDDING,
        steps=steps,
        label_feedback=label_feedback,
        beam_size=beam_size,
    )
    for parameter in head.parameters():
        nn.init.normal_(parameter, std=0.8)
    return head.double()


def make_map(batch=2, height=2, width=3):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, DIM, height, width, generator=generator, dtype=torch.float64)


def affine(weight, bias, x):
    bias = [0.0] * len(weight) if bias is None else bias.tolist()
    return [sum(w * v for w, v in zip(row, x)) + b for row, b in zip(weight.tolist(), bias)]


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def loop_steps(head, cells, told):
    """Scores and attention of each step of one image, if the LSTM says the labels `told`."""
    hidden, memory = [0.0] * HIDDEN, [0.0] * HIDDEN
    keys = [affine(head.key.weight, None, cell) for cell in cells]
    all_scores, all_attention = [], []
    for step in range(head.steps):
        query = affine(head.query.weight, head.query.bias, hidden)
        shares = [math.exp(sum(a * b for a, b in zip(query, k)) / math.sqrt(HIDDEN)) for k in keys]
        attention = [share / sum(shares) for share in shares]
        seen = [sum(a * cell[d] for a, cell in zip(attention, cells)) for d in range(DIM)]
        inputs = list(seen)
        if head.label_feedback:
            inputs += head.labels.weight[told[step - 1]].tolist() if step else [0.0] * EMBEDDING
        lstm = head.lstm
        gates = [
            a + b
            for a, b in zip(
                affine(lstm.weight_ih, lstm.bias_ih, inputs),
                affine(lstm.weight_hh, lstm.bias_hh, hidden),
            )
        ]
        i, f, g, o = (gates[n * HIDDEN : (n + 1) * HIDDEN] for n in range(4))
        memory = [
            sigmoid(f[m]) * memory[m] + sigmoid(i[m]) * math.tanh(g[m]) for m in range(HIDDEN)
        ]
        hidden = [sigmoid(o[m]) * math.tanh(memory[m]) for m in range(HIDDEN)]
        both = zip(
            affine(head.of_hidden.weight, head.of_hidden.bias, hidden),
            affine(head.of_seen.weight, None, seen),
        )
        embedded = [max(0.0, a + b) for a, b in both]
        all_scores.append(affine(head.labels.weight, head.labels.bias, embedded))
        all_attention.append(attention)
    return all_scores, all_attention


def log_likelihood(scores, told):
    """Of the labels that are said, each after a step; but the last step's is not."""
    return sum(s[c] - math.log(sum(map(math.exp, s))) for s, c in zip(scores, told))


def best_path(head, cells):
    """The steps of the most likely sequence of different labels, of all there are."""
    paths = []
    for told in itertools.permutations(range(NUM_LABELS), head.steps - 1):
        steps = loop_steps(head, cells, told)
        paths.append((log_likelihood(steps[0], told), steps))
    return max(paths, key=lambda path: path[0])[1]


def greedy_path(head, cells):
    told = []
    while True:
        steps = loop_steps(head, cells, [*told, *[0] * head.steps])
        if len(told) == head.steps - 1:
            return steps
        scores = steps[0][len(told)]
        others = [c for c in range(NUM_LABELS) if c not in told]
        told.append(max(others, key=lambda c: scores[c]))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("options", "path"),
    [
        ({}, lambda head, cells: loop_steps(head, cells, None)),
        ({"label_feedback": True}, greedy_path),
        # Wide enough to keep all sequences of two labels.
        ({"label_feedback": True, "beam_size": 4}, best_path),
    ],
)
@torch.no_grad()
def test_logits_are_those_of_the_loops(options, path, masked):
    head, features = make_head(**options), make_map()
    mask = torch.ones(2, 1, 2, 3, dtype=torch.bool)
    if masked:
        mask[1, :, 1:] = mask[1, :, :, 2:] = False
    outputs = head({"map": features}, {"map": mask if masked else None})
    for i in range(2):
        shown = mask[i, 0]
        scores, attention = path(head, features[i][:, shown].T.tolist())
        best = np.argmax(scores, axis=0)
        np.testing.assert_allclose(outputs["logits"][i].tolist(), np.max(scores, axis=0))
        found = outputs["attention"][i][:, shown]
        np.testing.assert_allclose(found.tolist(), np.array(attention)[best])
        assert not outputs["attention"][i][:, ~shown].any()


def test_what_the_mask_leaves_out_has_no_effect_and_no_gradient():
    head, features = make_head(label_feedback=True, beam_size=2), make_map()
    mask = torch.ones(2, 1, 2, 3, dtype=torch.bool)
    mask[1, :, 1:] = mask[1, :, :, 2:] = False
    expected = head({"map": features}, {"map": mask})["logits"]
    other = torch.where(mask, features, 1e3).requires_grad_()
    logits = head({"map": other}, {"map": mask})["logits"]
    torch.testing.assert_close(logits, expected)
    logits.sum().backward()
    assert not other.grad[~mask.expand_as(other)].any()
    assert other.grad[mask.expand_as(other)].all()


@pytest.mark.parametrize("label_feedback", [False, True])
def test_gradients(label_feedback):
    head, features = make_head(2, label_feedback), make_map(1, 1, 2).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda value: head({"map": value}, {"map": None})["logits"], features
    )


@torch.no_grad()
def test_more_steps_than_labels():
    head = make_head(steps=NUM_LABELS + 3, label_feedback=True, beam_size=9)
    assert head.beam_size == NUM_LABELS
    assert head({"map": make_map()}, {"map": None})["logits"].isfinite().all()


@torch.no_grad()
def test_a_head_from_a_config():
    cfg = get_cfg()
    add_ia_gcn_config(cfg)
    options = ["MODEL.LABEL_HEAD.NAME", "RecurrentHead", "MODEL.LABEL_HEAD.NUM_LABELS", NUM_LABELS]
    options += ["MODEL.RECURRENT.STEPS", 2, "MODEL.RECURRENT.HIDDEN_DIM", HIDDEN]
    options += ["MODEL.RECURRENT.EMBEDDING_DIM", EMBEDDING]
    options += ["MODEL.RECURRENT.LABEL_FEEDBACK", True, "MODEL.RECURRENT.BEAM_SIZE", 3]
    cfg.merge_from_list(options)
    head = build_label_head(cfg, {"res5": ShapeSpec(channels=DIM, stride=32)}).double()
    twin = make_head(2, True, 3)
    head.load_state_dict(twin.state_dict())
    features = make_map()
    expected = twin({"map": features}, {"map": None})["logits"]
    assert head({"res5": features}, {"res5": None})["logits"].equal(expected)
