"""ML-AGCN: its three graphs, the layer and the head, against loops written from Eq. 3-7."""

import copy
import io
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import nn

from ia_gcn.data.label_embeddings import normalize_embeddings
from ia_gcn.modeling import (
    AdaptiveGCNHead,
    AdaptiveGraphConv,
    GCNHead,
    LabelGraph,
    attention_graph,
    build_label_head,
    similarity_graph,
)
from tests.helpers.heads import (
    EMBEDDING_DIM,
    FEATURE_DIM,
    NUM_LABELS,
    SHAPES,
    HeadOnVectors,
    RecordSizes,
    count_passes,
    fill,
    make_cfg,
    make_features,
    make_presence,
    matmul,
    on_vectors,
)
from tests.helpers.label_graphs import assert_close, dense_normalized

quick = settings(max_examples=60)

GRAPHS = ["A", "B", "C", "AB", "AC", "BC", "ABC"]
WEIGHTS = ["per_graph", "shared"]
NORMS = ["row", "none"]
DEPTHS = [((), 0.2), ((8,), 0.2), ((8, 3), 0.0), ((3, 8), 0.1)]


def make_layer(in_dim=3, out_dim=2, seed=0, **options):
    torch.manual_seed(seed)
    return AdaptiveGraphConv(in_dim, out_dim, **options).double()


def make_graph(num_labels=NUM_LABELS, dim=EMBEDDING_DIM):
    graph = LabelGraph(num_labels, dim, threshold=0.0, reweight=0.25)
    fill(graph)
    return graph


def make_head(hidden_dims=(8,), negative_slope=0.2, graph=None, seed=0, **options):
    torch.manual_seed(seed)
    head = on_vectors(
        AdaptiveGCNHead,
        feature_dim=FEATURE_DIM,
        label_graph=graph or make_graph(),
        hidden_dims=hidden_dims,
        negative_slope=negative_slope,
        **options,
    )
    if head.bias is not None:
        nn.init.normal_(head.head.bias)
    return head


def make_nodes(num_labels=NUM_LABELS, dim=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_labels, dim, generator=generator, dtype=torch.float64)


# The equations in plain Python, on lists of rows.


def leaky_relu(value, slope):
    return value if value > 0 else slope * value


def loop_softmaxed_attention(nodes, weight, coefficients, slope):
    """α of Eq. 4-5: eᵢⱼ = LeakyReLU(aᵀ (W fᵢ ‖ W fⱼ)), softmax over all j."""
    transformed = matmul(nodes, weight)
    rows = []
    for i in range(len(nodes)):
        row = []
        for j in range(len(nodes)):
            concatenated = transformed[i] + transformed[j]
            assert len(concatenated) == len(coefficients)
            score = sum(a * value for a, value in zip(coefficients, concatenated))
            row.append(math.exp(leaky_relu(score, slope)))
        rows.append([value / sum(row) for value in row])
    return rows


def loop_attention(nodes, weight, coefficients, slope):
    """B of Eq. 6."""
    alpha = loop_softmaxed_attention(nodes, weight, coefficients, slope)
    return [
        [value + max(row) if i == j else value for j, value in enumerate(row)]
        for i, row in enumerate(alpha)
    ]


def loop_similarity(nodes, norm):
    """C of Eq. 7; with norm row, each divided by the sum of its row's absolute values."""
    rows = []
    for f in nodes:
        row = []
        for g in nodes:
            dot = sum(u * v for u, v in zip(f, g))
            lengths = math.sqrt(sum(u * u for u in f)) * math.sqrt(sum(v * v for v in g))
            row.append(dot / lengths if lengths else 0.0)
        total = sum(map(abs, row))
        rows.append([value / total for value in row] if norm == "row" and total else row)
    return rows


def loop_graphs(layer, nodes, statistical):
    graphs = {}
    for name in layer.graphs:
        if name == "A":
            graphs[name] = statistical
        elif name == "B":
            weight = layer.weights["shared" if "shared" in layer.weights else "B"].tolist()
            coefficients = layer.attention.flatten().tolist()
            graphs[name] = loop_attention(nodes, weight, coefficients, layer.attention_slope)
        else:
            graphs[name] = loop_similarity(nodes, layer.similarity_norm)
    return graphs


def add(a, b):
    return [[u + v for u, v in zip(p, q)] for p, q in zip(a, b)]


def loop_layer(layer, nodes, graphs):
    """Eq. 3: (A + B + C) F W, or A F W_A + B F W_B + C F W_C."""
    total, *others = graphs.values()
    if "shared" in layer.weights:
        for graph in others:
            total = add(total, graph)
        return matmul(matmul(total, nodes), layer.weights["shared"].tolist())
    products = [
        matmul(matmul(graph, nodes), layer.weights[name].tolist()) for name, graph in graphs.items()
    ]
    total, *others = products
    for product in others:
        total = add(total, product)
    return total


def loop_scale(lcm, presence):
    """s = √(a / (A a))."""
    degrees = [sum(weight * a for weight, a in zip(row, presence)) for row in lcm]
    return [math.sqrt(a / d) if a > 0 and d > 0 else 0.0 for a, d in zip(presence, degrees)]


def loop_classifiers(head, presence=None):
    """M (C, D) of one image; presence (C,) or None. Every G becomes diag(r) G diag(r)."""
    lcm = head.label_graph.lcm.tolist()
    statistical = dense_normalized(np.array(lcm)).tolist()
    r = [1.0] * len(lcm)
    if presence is not None:
        ones = loop_scale(lcm, r)
        r = [s / one for s, one in zip(loop_scale(lcm, presence.tolist()), ones)]
    features = nodes = head.label_graph.embeddings.tolist()
    for depth, layer in enumerate(head.layers):
        if depth:
            features, nodes = (
                [[leaky_relu(v, head.negative_slope) for v in row] for row in rows]
                for rows in (features, nodes)
            )
        graphs = loop_graphs(layer, features, statistical)
        scaled = {
            name: [[r[i] * v * r[j] for j, v in enumerate(row)] for i, row in enumerate(graph)]
            for name, graph in graphs.items()
        }
        features, nodes = loop_layer(layer, features, graphs), loop_layer(layer, nodes, scaled)
    return nodes


def loop_logits(head, x, presence=None):
    """ŷ = M x (+ b), one image after the other."""
    bias = [0.0] * NUM_LABELS if head.bias is None else head.bias.tolist()
    rows = []
    for i, image in enumerate(x.tolist()):
        classifiers = loop_classifiers(head, None if presence is None else presence[i])
        scores = (sum(m * v for m, v in zip(row, image)) for row in classifiers)
        rows.append([score + b for score, b in zip(scores, bias)])
    return torch.tensor(rows, dtype=x.dtype)


# B: attention


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("slope", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("num_labels", [1, 2, NUM_LABELS])
def test_attention_is_that_of_equations_4_to_6(num_labels, slope, weights):
    layer = make_layer(graphs="B", weights=weights, attention_slope=slope)
    nodes = make_nodes(num_labels)
    (weight,) = layer.weights.values()
    coefficients = layer.attention.flatten().tolist()
    expected = loop_attention(nodes.tolist(), weight.tolist(), coefficients, slope)
    found = layer.topology(nodes, torch.eye(num_labels).double())
    assert list(found) == ["B"]
    np.testing.assert_allclose(found["B"].tolist(), expected, rtol=1e-10)


def test_attention_by_hand():
    # eᵢⱼ = uᵢ + vⱼ: 0 and log 3, then log 2 and log 6; α is ¼ and ¾ in both rows.
    attention = attention_graph(torch.tensor([1, 2]).log(), torch.tensor([1, 3]).log(), 0.2)
    np.testing.assert_allclose(attention, [[1, 0.75], [0.25, 1.5]], rtol=1e-6)
    # Below 0, half as much: 0 and -log 2.
    attention = attention_graph(torch.zeros(2), torch.tensor([1, 1 / 4]).log(), 0.5)
    np.testing.assert_allclose(attention, [[4 / 3, 1 / 3], [2 / 3, 1]], rtol=1e-6)


finite = st.floats(-50, 50)


@quick
@given(st.integers(1, 6).flatmap(lambda n: hnp.arrays(float, (2, n), elements=finite)))
def test_rows_of_attention_sum_to_1_and_each_label_gets_the_largest_of_its_row_on_top(scores):
    looking, looked_at = torch.from_numpy(scores)
    graph = attention_graph(looking, looked_at, 0.2)
    importance = graph.sum(dim=1) - 1
    alpha = graph - importance.diag()
    assert (alpha >= -1e-12).all()
    assert_close(alpha.sum(dim=1), torch.ones_like(looking))
    assert_close(alpha.amax(dim=1), importance)


def test_attention_goes_to_all_labels_with_an_edge_or_not():
    layer, nodes = make_layer(), make_nodes()
    found = [
        layer.topology(nodes, statistical)["B"]
        for statistical in (torch.eye(NUM_LABELS), torch.zeros(NUM_LABELS, NUM_LABELS))
    ]
    assert found[0].equal(found[1])
    assert (found[0] > 0).all()


def test_attention_of_huge_scores_is_finite():
    looking = torch.tensor([1e4, -1e4, 0]).requires_grad_()
    looked_at = torch.tensor([-1e4, 1e4, 3e4]).requires_grad_()
    graph = attention_graph(looking, looked_at, 0.2)
    assert_close(graph, torch.tensor([[0.0, 0, 1], [0, 0, 1], [0, 0, 1]]) + torch.eye(3))
    graph.sum().backward()
    assert looking.grad.isfinite().all()
    assert looked_at.grad.isfinite().all()


# C: similarity


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("num_labels", [1, 2, NUM_LABELS])
def test_similarity_is_that_of_equation_7(num_labels, norm):
    nodes = make_nodes(num_labels)
    expected = loop_similarity(nodes.tolist(), norm)
    np.testing.assert_allclose(similarity_graph(nodes, norm).tolist(), expected, rtol=1e-10)


def test_similarity_by_hand():
    nodes = torch.tensor([[3.0, 4.0], [40.0, 30.0], [-3.0, -4.0]])
    cosines = [[1, 0.96, -1], [0.96, 1, -0.96], [-1, -0.96, 1]]
    np.testing.assert_allclose(similarity_graph(nodes, "none"), cosines, rtol=1e-6)
    totals = [[2.96], [2.92], [2.96]]
    np.testing.assert_allclose(similarity_graph(nodes, "row"), np.divide(cosines, totals), 1e-6)


@quick
@given(
    hnp.arrays(
        float,
        hnp.array_shapes(min_dims=2, max_dims=2, max_side=5),
        # What is shorter than 1e-12 counts as 0.
        elements=st.just(0.0) | st.floats(0.01, 10) | st.floats(-10, -0.01),
    )
)
def test_similarities_of_a_row_sum_to_1_or_are_0(features):
    nodes = torch.from_numpy(features)
    cosines, normalized = similarity_graph(nodes, "none"), similarity_graph(nodes, "row")
    assert_close(cosines, cosines.T)
    assert (cosines.abs() <= 1 + 1e-12).all()
    there = nodes.any(dim=1).double()
    assert_close(cosines.diag(), there)
    assert_close(normalized.abs().sum(dim=1), there)
    assert_close(normalized * cosines.abs().sum(dim=1, keepdim=True), cosines)


@pytest.mark.parametrize("norm", NORMS)
def test_a_vector_of_zeros_is_like_nothing_and_has_no_gradient(norm):
    weights = torch.randn(4, 4, generator=torch.Generator().manual_seed(2)).double()
    nodes = make_nodes(4)
    nodes[1] = 0
    others = nodes[[0, 2, 3]].requires_grad_()
    similarity = similarity_graph(nodes.requires_grad_(), norm)
    assert not similarity[1].any()
    assert not similarity[:, 1].any()
    (weights * similarity).sum().backward()
    (weights[[0, 2, 3]][:, [0, 2, 3]] * similarity_graph(others, norm)).sum().backward()
    assert_close(nodes.grad[[0, 2, 3]], others.grad)
    assert nodes.grad[1].tolist() == [0, 0, 0]


# The layer


@pytest.mark.parametrize("graphs", GRAPHS)
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("norm", NORMS)
def test_layer_is_equation_3(graphs, weights, norm):
    layer = make_layer(graphs=graphs, weights=weights, similarity_norm=norm)
    nodes = make_nodes()
    statistical = torch.rand(NUM_LABELS, NUM_LABELS, dtype=torch.float64)
    expected = loop_graphs(layer, nodes.tolist(), statistical.tolist())
    topology = layer.topology(nodes, statistical)
    assert list(topology) == list(graphs)
    for name, graph in expected.items():
        np.testing.assert_allclose(topology[name].tolist(), graph, rtol=1e-10)
    found = layer(nodes, topology)
    np.testing.assert_allclose(found.tolist(), loop_layer(layer, nodes.tolist(), expected), 1e-9)


@pytest.mark.parametrize("graphs", GRAPHS)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_layer_has_a_matrix_per_graph_or_one_and_coefficients_for_attention(graphs, weights):
    layer = make_layer(graphs=graphs, weights=weights)
    names = graphs if weights == "per_graph" else ["shared"]
    expected = {f"weights.{name}": (3, 2) for name in names}
    if "B" in graphs:
        expected["attention"] = (2, 2)
    assert {name: tuple(value.shape) for name, value in layer.named_parameters()} == expected


@pytest.mark.parametrize("of_images", [False, True])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_layer_on_graphs_of_images(weights, of_images):
    layer, scale = make_layer(weights=weights), make_presence()
    topology = layer.topology(make_nodes(), torch.eye(NUM_LABELS).double())
    nodes = torch.randn(3, NUM_LABELS, 3, dtype=torch.float64)
    nodes = nodes if of_images else nodes[0]
    expected = torch.stack(
        [
            layer(f, {name: torch.outer(r, r) * graph for name, graph in topology.items()})
            for f, r in zip(nodes if of_images else [nodes] * 3, scale)
        ]
    )
    assert_close(layer(nodes, topology, scale), expected)
    x = torch.randn(3, 2, dtype=torch.float64)
    scores = layer.scores(nodes, x, topology, scale)
    assert_close(scores, torch.einsum("bcd,bd->bc", expected, x))


# AdaptiveGCNHead


@pytest.mark.parametrize("graphs", GRAPHS)
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("hidden_dims", [(), (8,)])
def test_logits_are_those_of_the_loops(hidden_dims, weights, graphs):
    head = make_head(hidden_dims, graphs=graphs, weights=weights).double()
    x, presence = make_features(dtype=torch.float64), make_presence()
    for a in (None, presence):
        assert_close(head(x, a), loop_logits(head, x, a))


@pytest.mark.parametrize(("hidden_dims", "negative_slope"), DEPTHS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("norm", NORMS)
def test_logits_are_those_of_the_loops_at_any_depth(hidden_dims, negative_slope, bias, norm):
    options = {"bias": bias, "similarity_norm": norm, "attention_slope": 0.4}
    head = make_head(hidden_dims, negative_slope, **options).double()
    x, presence = make_features(dtype=torch.float64), make_presence()
    for a in (None, presence):
        assert_close(head(x, a), loop_logits(head, x, a))


@pytest.mark.parametrize("of_images", [False, True])
def test_logits_in_evaluation_are_those_of_training(of_images):
    head, x = make_head((8, 7), bias=True).double(), make_features(dtype=torch.float64)
    presence = make_presence() if of_images else None
    expected = head(x, presence)
    with torch.no_grad():
        assert_close(head.eval()(x, presence), expected)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("hidden_dims", [(), (8, 7)])
@pytest.mark.parametrize("of_images", [False, True])
def test_logits_are_the_product_of_features_and_classifiers(of_images, hidden_dims, weights):
    head = make_head(hidden_dims, weights=weights).double()
    x, presence = make_features(dtype=torch.float64), make_presence() if of_images else None
    classifiers = head.classifiers(presence)
    assert classifiers.shape == (*([3] if of_images else []), NUM_LABELS, FEATURE_DIM)
    own = classifiers if of_images else classifiers.expand(3, -1, -1)
    assert_close(head(x, presence), torch.einsum("bcd,bd->bc", own, x))


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("hidden_dims", [(), (8,)])
@pytest.mark.parametrize("of_images", [False, True])
def test_gradients_wrt_weights_attention_and_features(of_images, hidden_dims, weights):
    head = make_head(hidden_dims, weights=weights).double()
    names, parameters = zip(*head.named_parameters())
    assert sum(name.endswith("attention") for name in names) == len(head.layers)
    x = make_features(dtype=torch.float64).requires_grad_()
    presence = [make_presence().clamp(0.1, 0.9).requires_grad_()] if of_images else []

    def logits(*inputs):
        values, images = inputs[: len(names)], inputs[len(names) :]
        return torch.func.functional_call(head, dict(zip(names, values)), images)

    assert torch.autograd.gradcheck(logits, (*parameters, x, *presence))


@pytest.mark.parametrize("hidden_dims", [(), (8,), (8, 7)])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_on_presence_of_one_the_graph_is_that_of_all_images(hidden_dims, weights):
    head = make_head(hidden_dims, weights=weights).double()
    x = make_features(dtype=torch.float64)
    assert_close(head(x, torch.ones(3, NUM_LABELS)), head(x))


def test_images_keep_to_themselves():
    head = make_head((8, 7)).double()
    x, presence = make_features(dtype=torch.float64), make_presence().clamp(0.1, 0.9)
    logits = head(x.requires_grad_(), presence.requires_grad_())
    for i in range(3):
        assert_close(head(x[i : i + 1], presence[i : i + 1])[0], logits[i])
        for gradient in torch.autograd.grad(logits[i].sum(), (x, presence), retain_graph=True):
            assert gradient[i].any()
            gradient[i] = 0
            assert not gradient.any()


@pytest.mark.parametrize("hidden_dims", [(), (8, 7)])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_label_that_is_absent_for_sure_scores_nothing(hidden_dims, weights):
    head = make_head(hidden_dims, weights=weights)
    x, presence = make_features().requires_grad_(), make_presence(torch.float32).requires_grad_()
    assert not presence[1].any()
    logits = head(x, presence)
    assert not logits[presence == 0].any()
    assert logits[presence > 0].all()
    logits.sum().backward()
    for tensor in (x, presence, *head.parameters()):
        assert tensor.grad.isfinite().all()
        assert tensor.grad.any()


@pytest.mark.parametrize("graphs", GRAPHS)
@pytest.mark.parametrize("num_hidden", [0, 1, 2])
def test_a_label_without_embedding_and_company_leaves_all_gradients_finite(num_hidden, graphs):
    """Its features are zeros in every layer, unless attention brings it those of others."""
    graph = LabelGraph(NUM_LABELS, EMBEDDING_DIM, threshold=0.0, reweight=0.25)
    counts = torch.full((NUM_LABELS, NUM_LABELS), 2).fill_diagonal_(5)
    counts[-1, :-1] = counts[:-1, -1] = 0
    embeddings = make_nodes(NUM_LABELS, EMBEDDING_DIM)
    embeddings[-1] = 0
    graph.fill(counts.diagonal(), counts, embeddings)
    head = make_head((8,) * num_hidden, graph=graph, graphs=graphs)
    logits = head(make_features())
    assert logits.isfinite().all()
    logits.sum().backward()
    for name, parameter in head.named_parameters():
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("hidden_dims", [(), (8,), (8, 7)])
@pytest.mark.parametrize("of_images", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_with_statistics_alone_it_is_a_gcn_head(bias, of_images, hidden_dims):
    head = make_head(hidden_dims, graphs="A", bias=bias).double()
    gcn = on_vectors(
        GCNHead,
        feature_dim=FEATURE_DIM,
        label_graph=copy.deepcopy(head.label_graph),
        hidden_dims=hidden_dims,
        negative_slope=0.2,
        bias=bias,
    )
    gcn.double().head.bias = head.bias
    for mine, theirs in zip(gcn.layers, head.layers):
        mine.weight = theirs.weights["A"]
    x, presence = make_features(dtype=torch.float64), make_presence() if of_images else None
    assert_close(head(x, presence), gcn(x, presence))
    assert_close(head.classifiers(presence), gcn.classifiers(presence))


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("hidden_dims", [(), (8, 9)])
def test_no_graph_of_an_image_is_ever_written_out(hidden_dims, weights):
    batch, num_labels = 3, 50
    head = make_head(hidden_dims, graph=make_graph(num_labels), weights=weights)
    presence = torch.rand(batch, num_labels).requires_grad_()
    with RecordSizes() as record:
        logits = head(make_features(batch), presence)
        forward = len(record.sizes)
        logits.sum().backward()
    assert presence.grad.any()
    assert 0 < forward < len(record.sizes)
    # Nodes of an image have less; the graphs of all images, as much.
    assert num_labels**2 <= max(record.sizes) < batch * num_labels**2


def test_a_bare_head_is_not_trained_and_can_be_evaluated():
    head = make_head(graph=LabelGraph(NUM_LABELS, EMBEDDING_DIM, threshold=0.0, reweight=0.25))
    for presence in (None, make_presence(torch.float32)):
        with pytest.raises(RuntimeError, match="bare"):
            head.train()(make_features(), presence)
        logits = head.eval()(make_features(), presence)
        assert logits.shape == (3, NUM_LABELS)
        assert logits.isfinite().all()


# Million parameters of the whole network, as published; without classifier, TResNet-M has 29.34.
@pytest.mark.parametrize(
    ("num_labels", "hidden_dims", "published"),
    [(80, (), 29.9), (80, (1024,), 35.9), (500, (), 32.7), (500, (1024,), 37.4)],
)
def test_parameter_count_is_the_published_one(num_labels, hidden_dims, published):
    head = on_vectors(
        AdaptiveGCNHead,
        feature_dim=2048,
        label_graph=LabelGraph(num_labels, num_labels, threshold=0.0, reweight=0.25),
        hidden_dims=hidden_dims,
        negative_slope=0.2,
    )
    # The published A is one of the parameters.
    count = head.label_graph.lcm.numel() + sum(p.numel() for p in head.parameters())
    assert 29.34 + count / 1e6 == pytest.approx(published, abs=0.07)


def test_fixed_classifiers_give_the_same_scores_in_one_pass():
    head = make_head().eval()
    with torch.no_grad():
        expected = head(make_features())
        passes = count_passes(head)
        head.fix_classifiers()
        for _ in range(3):
            assert head(make_features()).equal(expected)
    assert len(passes) == 1


def test_presence_of_another_batch_is_not_kept():
    head, x, presence = make_head().eval(), make_features(), make_presence(torch.float32)
    with torch.no_grad():
        statistical = head(x)
        for a in (presence, presence.flip(0)):
            expected = loop_logits(head, x, a)
            assert_close(head(x, a), expected, 1e-5)
        assert head(x).equal(statistical)


# Precision and state


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("of_images", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_autocast_gives_nearly_the_same_logits(dtype, of_images, training):
    head, x = make_head((8, 7)).train(training), make_features()
    presence = make_presence(torch.float32) if of_images else None
    with torch.set_grad_enabled(training):
        expected = head(x, presence)
        with torch.autocast("cpu", dtype=dtype):
            found = head(x, presence)
    tolerance = 30 * torch.finfo(dtype).eps * expected.abs().max().item()
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=tolerance)
    assert not found.float().equal(expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("norm", NORMS)
def test_autocast_of_a_label_without_embedding_is_finite(dtype, norm):
    head = make_head(similarity_norm=norm)
    head.label_graph.embeddings[2] = 0
    with torch.autocast("cpu", dtype=dtype):
        logits = head(make_features())
    assert logits.isfinite().all()
    logits.float().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in head.parameters())


@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_state_dict_restores_the_head(weights):
    head = make_head(weights=weights, bias=True)
    bare = LabelGraph(NUM_LABELS, EMBEDDING_DIM, threshold=0.0, reweight=0.25)
    other = make_head(graph=bare, weights=weights, bias=True, seed=1)
    file, x, presence = io.BytesIO(), make_features(), make_presence(torch.float32)
    torch.save(head.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    for a in (None, presence):
        assert head(x, a).equal(other(x, a))


# From a config


def make_adaptive_cfg(**keys):
    cfg = make_cfg("AdaptiveGCNHead")
    cfg.MODEL.LABEL_EMBEDDINGS.DIM = EMBEDDING_DIM
    for key, value in keys.items():
        setattr(cfg.MODEL.ADAPTIVE_GCN, key, value)
    return cfg


def test_adaptive_head_from_a_config():
    keys = {"GRAPHS": "BC", "WEIGHTS": "shared", "ATTENTION_SLOPE": 0.5, "SIMILARITY_NORM": "none"}
    cfg = make_adaptive_cfg(**keys)
    cfg.MODEL.LABEL_GCN.HIDDEN_DIMS = (8, 7)
    cfg.MODEL.LABEL_GCN.NEGATIVE_SLOPE = 0.3
    cfg.MODEL.LABEL_GCN.BIAS = True
    head = HeadOnVectors(build_label_head(cfg, SHAPES), make_graph())
    for layer, shape in zip(head.layers, [(6, 8), (8, 7), (7, 4)]):
        assert (layer.graphs, layer.attention_slope, layer.similarity_norm) == ("BC", 0.5, "none")
        assert {name: w.shape for name, w in layer.weights.items()} == {"shared": shape}
    assert (head.negative_slope, head.bias.tolist()) == (0.3, [0] * NUM_LABELS)
    x = make_features(dtype=torch.float64)
    assert_close(head.double()(x), loop_logits(head, x))


def test_the_configs_defaults_are_those_of_the_class():
    cfg = make_adaptive_cfg()
    cfg.MODEL.LABEL_GCN.HIDDEN_DIMS = (8,)
    head, expected = HeadOnVectors(build_label_head(cfg, SHAPES), make_graph()), make_head()
    head.load_state_dict(expected.state_dict())
    assert head(make_features()).equal(expected(make_features()))
    assert expected.layers[0].graphs == "ABC"
    assert set(expected.layers[0].weights) == set("ABC")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("GRAPHS", value) for value in ("", "BA", "AA", "abc", "ABCD", "A+B")),
        ("WEIGHTS", "per_layer"),
        ("SIMILARITY_NORM", "softmax"),
    ],
)
def test_a_wrong_value_is_refused_in_one_line_with_its_key(error_line, key, value):
    message = error_line(build_label_head, make_adaptive_cfg(**{key: value}), SHAPES)
    assert f"MODEL.ADAPTIVE_GCN.{key}" in message
    assert repr(value) in message


# Scale of the logits that a training starts with.


def class_means(num_labels):
    """Mean scores of a trained linear head over the images with each label, (C, C).

    The rows are alike, base rates; a label's own score is higher.
    """
    rng = np.random.default_rng(0)
    base_rates = rng.uniform(0.02, 0.3, num_labels)
    means = base_rates * rng.uniform(0.5, 1.5, (num_labels, num_labels))
    np.fill_diagonal(means, rng.uniform(0.4, 0.9, num_labels))
    return means.astype(np.float32)


@torch.no_grad()
def deviation_of_first_logits(num_labels, hidden_dims, embedding_norm, **options):
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    presence = rng.random((1000, num_labels)) < rng.uniform(0.02, 0.2, num_labels)
    pair_counts = torch.from_numpy(presence).float()
    pair_counts = pair_counts.T @ pair_counts
    graph = LabelGraph(num_labels, num_labels, threshold=0.0, reweight=0.25)
    embeddings = normalize_embeddings(class_means(num_labels), embedding_norm)
    graph.fill(pair_counts.diagonal(), pair_counts, embeddings)
    head = on_vectors(
        AdaptiveGCNHead,
        feature_dim=2048,
        label_graph=graph,
        hidden_dims=hidden_dims,
        negative_slope=0.2,
        **options,
    )
    return head(torch.randn(64, 2048).relu()).std().item()


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("hidden_dims", [(), (1024,)])
@pytest.mark.parametrize("num_labels", [20, 80, 500])
def test_first_logits_have_a_deviation_near_1(num_labels, hidden_dims, weights):
    deviation = deviation_of_first_logits(num_labels, hidden_dims, "standardize", weights=weights)
    assert 0.25 < deviation < 4


@pytest.mark.parametrize("hidden_dims", [(), (1024,)])
def test_equation_7_as_printed_on_class_means_starts_in_the_hundreds(hidden_dims):
    options = {"similarity_norm": "none"}
    assert deviation_of_first_logits(500, hidden_dims, "none", **options) > 200
