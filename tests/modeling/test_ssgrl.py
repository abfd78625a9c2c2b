"""SSGRL and KGGR against loops written from their papers."""

import math

import numpy as np
import pytest
import torch

from ia_gcn.modeling import LabelGraph, SSGRLHead, build_label_head
from ia_gcn.modeling.label_nodes import LABELS_AT_ONCE, SemanticAttention
from tests.helpers.heads import EMBEDDING_DIM, NUM_LABELS, SHAPES, RecordSizes, fill, make_cfg

DIM, HIDDEN, OUT = 4, 3, 5


def make_graph():
    graph = LabelGraph(NUM_LABELS, EMBEDDING_DIM)
    fill(graph)
    return graph.double()


def make_head(steps=2, classifier_graph=False):
    torch.manual_seed(0)
    head = SSGRLHead(
        in_feature="map",
        feature_dim=DIM,
        num_labels=NUM_LABELS,
        embedding_dim=EMBEDDING_DIM,
        hidden_dim=HIDDEN,
        output_dim=OUT,
        steps=steps,
        classifier_graph=classifier_graph,
    )
    return head.double().eval()


def make_map(batch=2, height=4, width=5):
    generator = torch.Generator().manual_seed(1)
    return 3 * torch.randn(batch, DIM, height, width, generator=generator, dtype=torch.float64)


def run(head, features, mask=None, graph=None):
    return head({"map": features}, {"map": mask}, label_graph=graph or make_graph())


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def linear(layer, values):
    rows = layer.weight.tolist()
    biases = [0.0] * len(rows) if layer.bias is None else layer.bias.tolist()
    return [sum(w * v for w, v in zip(row, values)) + b for row, b in zip(rows, biases)]


def loop_graph(graph, nodes, edges):
    """The gated graph, one label after the other; edges[i][j] from i to j."""
    labels, dims = range(len(nodes)), range(len(nodes[0]))
    for _ in range(graph.steps):
        states = []
        for i in labels:
            out = [sum(edges[i][j] * nodes[j][k] for j in labels) for k in dims]
            back = [sum(edges[j][i] * nodes[j][k] for j in labels) for k in dims]
            m, h = [*out, *back], nodes[i]

            def gate(of_message, of_state, m=m, h=h):
                return [sigmoid(a + b) for a, b in zip(linear(of_message, m), linear(of_state, h))]

            z = gate(graph.update_message, graph.update_state)
            r = gate(graph.reset_message, graph.reset_state)
            kept = linear(graph.new_state, [a * b for a, b in zip(r, h)])
            new = [math.tanh(a + b) for a, b in zip(linear(graph.new_message, m), kept)]
            states.append([(1 - a) * b + a * c for a, b, c in zip(z, h, new)])
        nodes = states
    return nodes


def loop_logits(head, image, label_graph):
    """Of one image, (D, H, W), without padding."""
    _, height, width = image.shape
    windows = [
        image[:, y : y + 2, x : x + 2].flatten(1).mean(1).tolist()
        for y in range(0, height, 2)
        for x in range(0, width, 2)
    ]
    pairs, counts = label_graph.pair_counts.tolist(), label_graph.label_counts.tolist()
    labels = range(NUM_LABELS)
    edges = [[0 if i == j else pairs[i][j] / counts[i] for j in labels] for i in labels]
    nodes = []
    for embedding in label_graph.embeddings.tolist():
        e = linear(head.attention.of_labels, embedding)
        scores = []
        for cell in windows:
            x = linear(head.attention.of_cells, cell)
            hidden = linear(head.attention.hidden, [math.tanh(a * b) for a, b in zip(x, e)])
            # The layers' biases, which cancel.
            scores.append(linear(head.attention.score, [v + 0.3 for v in hidden])[0] + 0.7)
        shares = [math.exp(s) for s in scores]
        nodes.append([sum(a * v for a, v in zip(shares, c)) / sum(shares) for c in zip(*windows)])
    states = loop_graph(head.graph, nodes, edges)
    joined = [linear(head.output, [*h, *v]) for h, v in zip(states, nodes)]
    weights = head.readout.weight[:, :, 0].tolist()
    if head.classifier_graph is not None:
        states = loop_graph(head.classifier_graph, weights, edges)
        weights = [linear(head.classifier_output, [*h, *w]) for h, w in zip(states, weights)]
    return [
        sum(w * math.tanh(v) for w, v in zip(weight, row)) + bias
        for weight, row, bias in zip(weights, joined, head.readout.bias.tolist())
    ]


@pytest.mark.parametrize("classifier_graph", [False, True])
@pytest.mark.parametrize("steps", [0, 3])
def test_logits_are_those_of_the_loops(steps, classifier_graph):
    head, features, graph = make_head(steps, classifier_graph), make_map(), make_graph()
    mask = torch.zeros(2, 1, 4, 5, dtype=torch.bool)
    mask[0] = mask[1, :, :3, :4] = True
    outputs = run(head, features, mask, graph)
    expected = [
        loop_logits(head, features[0], graph),
        loop_logits(head, features[1, :, :3, :4], graph),
    ]
    np.testing.assert_allclose(outputs["logits"].tolist(), expected)
    attention = outputs["attention"]
    assert attention.shape == (2, NUM_LABELS, 4, 5)
    torch.testing.assert_close(attention.sum(dim=(2, 3)), torch.ones(2, NUM_LABELS).double())
    assert not attention[~mask.expand_as(attention)].any()


def test_what_the_mask_leaves_out_has_no_effect_and_no_gradient():
    head, features = make_head(), make_map()
    mask = torch.ones(2, 1, 4, 5, dtype=torch.bool)
    mask[1, :, 1:] = mask[1, :, :, 3:] = False
    expected = run(head, features, mask)["logits"]
    other = torch.where(mask, features, torch.inf).requires_grad_()
    logits = run(head, other, mask)["logits"]
    torch.testing.assert_close(logits, expected)
    logits.sum().backward()
    assert not other.grad[~mask.expand_as(other)].any()
    assert other.grad[mask.expand_as(other)].all()
    torch.testing.assert_close(run(head, features[1:, :, :1, :3])["logits"], expected[1:])


@pytest.mark.parametrize("training", [False, True])
def test_gradients(training):
    head, features, graph = make_head(1, True).train(training), make_map(1, 2, 3), make_graph()
    names, weights = zip(*head.named_parameters())

    def logits(features, *weights):
        context = {"map": features}, {"map": None}
        values = dict(zip(names, weights))
        return torch.func.functional_call(head, values, context, {"label_graph": graph})["logits"]

    inputs = (features.requires_grad_(), *weights)
    assert torch.autograd.gradcheck(logits, inputs, fast_mode=True)


def test_a_training_step_keeps_the_products_of_some_labels_alone():
    labels, cells, hidden = 3 * LABELS_AT_ONCE + 1, 12, 7
    attention = SemanticAttention(DIM, EMBEDDING_DIM, hidden)
    features, embeddings = torch.randn(2, DIM, 3, 4), torch.randn(labels, EMBEDDING_DIM)
    with RecordSizes() as record:
        nodes, _ = attention(features, embeddings, None)
        nodes.sum().backward()
    assert max(record.sizes) == 2 * LABELS_AT_ONCE * cells * hidden
    kept = attention(features, embeddings, None)[0]
    torch.testing.assert_close(attention.eval()(features, embeddings, None)[0], kept)


def test_conditional_probabilities():
    graph = LabelGraph(2, 3)
    graph.fill(torch.tensor([4, 0]), torch.tensor([[4, 1], [1, 0]]), torch.zeros(2, 3))
    assert graph.conditional_probabilities().tolist() == [[0, 0.25], [1, 0]]


def test_a_head_from_a_config_has_the_published_size():
    cfg = make_cfg("SSGRLHead", num_labels=80)
    shapes = {"res5": SHAPES["res5"]._replace(channels=2048)}
    with torch.device("meta"):
        head = build_label_head(cfg, shapes)
        cfg.MODEL.SSGRL.CLASSIFIER_GRAPH = True
        kggr = build_label_head(cfg, shapes)
    # fc_1, fc_2, fc_3 and fc_a without biases; 3 (4096 + 1 + 2048 + 1) 2048; fc_output; classifiers
    attention = 2048 * 1024 + 300 * 1024 + 1024 * 1024 + 1024
    graph, output = 3 * (4096 + 1 + 2048 + 1) * 2048, (4096 + 1) * 2048
    size = sum(parameter.numel() for parameter in head.parameters())
    assert size == attention + graph + output + 80 * 2049
    assert sum(parameter.numel() for parameter in kggr.parameters()) == size + graph + output
    # Beside the 42.50 M of a ResNet-101 without its classifier.
    assert (size + 42.50e6) / 1e6 == pytest.approx(92.2, abs=0.3)
    assert head.needs == {"label_graph"}
