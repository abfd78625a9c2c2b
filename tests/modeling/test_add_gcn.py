"""ADD-GCN against loops written from its paper."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from ia_gcn.errors import InputError
from ia_gcn.modeling import ADDGCNHead, build_label_head
from tests.helpers.heads import NUM_LABELS, SHAPES, make_cfg

DIM, NODE_DIM = 4, 3
GRAPHS = [(True, True), (True, False), (False, True), (False, False)]


def make_head(static=True, dynamic=True):
    torch.manual_seed(0)
    head = ADDGCNHead(
        in_feature="map",
        feature_dim=DIM,
        num_labels=NUM_LABELS,
        node_dim=NODE_DIM,
        static_graph=static,
        dynamic_graph=dynamic,
    )
    if dynamic:
        for tensor in (*head.dynamic_graph.norm.parameters(), *head.dynamic_graph.norm.buffers()):
            if tensor.is_floating_point():
                nn.init.uniform_(tensor, 0.5, 1.5)
    return head.double().eval()


def make_map(batch=2, height=3, width=4):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, DIM, height, width, generator=generator, dtype=torch.float64)


def run(head, features, mask=None):
    return head({"map": features}, {"map": mask})


def leaky(values):
    return [v if v > 0 else 0.2 * v for v in values]


def linear(layer, values):
    rows, biases = layer.weight.flatten(1).tolist(), layer.bias.tolist()
    return [sum(w * v for w, v in zip(row, values)) + b for row, b in zip(rows, biases)]


def add(a, b):
    return [[u + v for u, v in zip(*rows)] for rows in zip(a, b)]


def loop_logits(head, cells):
    """Of one image, whose cells are lists of D numbers."""
    rows = head.classifiers.weight.flatten(1).tolist()
    scores = [[sum(w * f for w, f in zip(row, cell)) for cell in cells] for row in rows]
    values = [linear(head.transform, cell) for cell in cells]
    nodes = [
        [sum(v[k] / (1 + math.exp(-s)) for s, v in zip(row, values)) for k in range(NODE_DIM)]
        for row in scores
    ]
    labels, mixed = range(NUM_LABELS), nodes
    if head.static_graph is not None:
        graph = head.static_graph.adjacency.weight.tolist()
        summed = [
            leaky([sum(graph[i][j] * nodes[j][k] for j in labels) for k in range(NODE_DIM)])
            for i in labels
        ]
        mixed = add(nodes, [leaky(linear(head.static_graph.transform, row)) for row in summed])
    if head.dynamic_graph is not None:
        graph, norm = head.dynamic_graph, head.dynamic_graph.norm
        mean = [sum(column) / NUM_LABELS for column in zip(*mixed)]
        context = linear(graph.context, mean)
        statistics = zip(
            *(context, norm.running_mean.tolist(), norm.running_var.tolist()),
            *(norm.weight.tolist(), norm.bias.tolist()),
        )
        context = leaky([(x - m) / math.sqrt(v + 1e-5) * w + b for x, m, v, w, b in statistics])
        # edges[j][i], from i to j
        edges = [
            [1 / (1 + math.exp(-s)) for s in linear(graph.edges, [*context, *node])]
            for node in mixed
        ]
        summed = [
            leaky([sum(edges[j][i] * mixed[i][k] for i in labels) for k in range(NODE_DIM)])
            for j in labels
        ]
        mixed = add(nodes, [leaky(linear(graph.transform, row)) for row in summed])
    weights, biases = head.readout.weight[:, :, 0].tolist(), head.readout.bias.tolist()
    graph_logits = [
        sum(w * v for w, v in zip(weight, node)) + bias
        for weight, node, bias in zip(weights, mixed, biases)
    ]
    return [(max(row) + logit) / 2 for row, logit in zip(scores, graph_logits)]


@pytest.mark.parametrize(("static", "dynamic"), GRAPHS)
def test_logits_are_those_of_the_loops(static, dynamic):
    head, features = make_head(static, dynamic), make_map()
    mask = torch.zeros(2, 1, 3, 4, dtype=torch.bool)
    mask[0] = mask[1, :, :2, :1] = True
    outputs = run(head, features, mask)
    expected = [
        loop_logits(head, image[:, shown[0]].T.tolist()) for image, shown in zip(features, mask)
    ]
    np.testing.assert_allclose(outputs["logits"].tolist(), expected)
    scores = nn.functional.conv2d(features, head.classifiers.weight)
    torch.testing.assert_close(outputs["attention"], scores.sigmoid() * mask)


def test_what_the_mask_leaves_out_has_no_effect_and_no_gradient():
    head, features = make_head(), make_map()
    mask = torch.ones(2, 1, 3, 4, dtype=torch.bool)
    mask[1, :, 1:] = mask[1, :, :, 2:] = False
    expected = run(head, features, mask)["logits"]
    other = torch.where(mask, features, 1e3).requires_grad_()
    logits = run(head, other, mask)["logits"]
    torch.testing.assert_close(logits, expected)
    logits.sum().backward()
    assert not other.grad[~mask.expand_as(other)].any()
    assert other.grad[mask.expand_as(other)].all()
    torch.testing.assert_close(run(head, features[1:, :, :1, :2])["logits"], expected[1:])


@pytest.mark.parametrize(("static", "dynamic"), GRAPHS)
def test_gradients(static, dynamic):
    head, features = make_head(static, dynamic), make_map(1, 2, 2)
    names, weights = zip(*head.named_parameters())

    def logits(features, *weights):
        context = {"map": features}, {"map": None}
        return torch.func.functional_call(head, dict(zip(names, weights)), context)["logits"]

    inputs = (features.requires_grad_(), *weights)
    assert torch.autograd.gradcheck(logits, inputs, fast_mode=True)


def test_the_dynamic_graph_is_trained_on_two_images_or_more():
    head = make_head().train()
    with pytest.raises(InputError, match=r"SOLVER\.IMS_PER_BATCH"):
        run(head, make_map(1))
    run(head, make_map(2))["logits"].sum().backward()
    assert all(parameter.grad.any() for parameter in head.parameters() if parameter.ndim > 1)
    run(make_head(dynamic=False).train(), make_map(1))


def test_a_head_from_a_config_has_the_published_size():
    cfg = make_cfg("ADDGCNHead", num_labels=80)
    shapes = {"res5": SHAPES["res5"]._replace(channels=2048)}
    head = build_label_head(cfg, shapes)
    # C D + (D + 1) K; C² + (K + 1) K; (K + 1) K + 2K + (2K + 1) C + (K + 1) K; (K + 1) C
    d, c, k = 2048, 80, 1024
    expected = c * d + (d + 1) * k + c**2 + 3 * (k + 1) * k + 2 * k + (2 * k + 1) * c + (k + 1) * c
    assert sum(parameter.numel() for parameter in head.parameters()) == expected
    cfg.MODEL.ADD_GCN.STATIC_GRAPH = cfg.MODEL.ADD_GCN.DYNAMIC_GRAPH = False
    cfg.MODEL.ADD_GCN.NODE_DIM = 7
    names = dict(build_label_head(cfg, shapes).named_parameters())
    assert set(names) == {"classifiers.weight", "transform.weight", "transform.bias"} | {
        "readout.weight",
        "readout.bias",
    }
    assert names["readout.weight"].shape == (80, 7, 1)
