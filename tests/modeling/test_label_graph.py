import logging

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ia_gcn.modeling import LabelGraph, graph_scale, label_graph, propagate, statistical_lcm
from tests.helpers.label_graphs import assert_close, dense_fused, dense_normalized

quick = settings(max_examples=80)

# Fractions of small integers among them, so that P often meets the threshold exactly.
THRESHOLDS = st.sampled_from([0.0, 0.2, 1 / 3, 0.4, 0.5, 0.6, 2 / 3, 1.0]) | st.floats(0.01, 1)
REWEIGHTS = st.floats(0.01, 0.99)


@st.composite
def label_statistics(draw, max_images=8, max_labels=6):
    """Pair counts and label counts of images that draw their labels at random."""
    shape = draw(st.tuples(st.integers(0, max_images), st.integers(1, max_labels)))
    presence = draw(hnp.arrays(np.int64, shape, elements=st.integers(0, 1)))
    pair_counts = presence.T @ presence
    return pair_counts, np.diag(pair_counts).copy()


def loop_lcm(pair_counts, label_counts, threshold, reweight):
    """A_S, one loop per index."""
    labels = range(len(label_counts))
    edges = np.zeros((len(labels), len(labels)))
    for i in labels:
        for j in labels:
            if i != j and label_counts[i] > 0:
                conditional = pair_counts[i, j] / label_counts[i]
                edges[i, j] = float(conditional >= threshold) if threshold else conditional
    lcm = np.zeros_like(edges)
    for i in labels:
        for j in labels:
            incoming = sum(edges[k, j] for k in labels)
            lcm[i, j] = reweight * edges[i, j] / (incoming + 1e-6) + (i == j)
    return lcm


# statistical_lcm


@quick
@given(label_statistics(), THRESHOLDS, REWEIGHTS)
def test_lcm_is_the_double_loop(statistics, threshold, reweight):
    lcm = statistical_lcm(*statistics, threshold, reweight)
    expected = loop_lcm(*statistics, threshold, reweight)
    np.testing.assert_allclose(lcm, expected, rtol=1e-12)


def test_lcm_by_hand():
    # P(1|0) = 2/4, P(2|0) = 1/4, P(0|1) = 2/2, P(0|2) = 1/1; the last label never occurs.
    pair_counts = np.array([[4, 2, 1, 0], [2, 2, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]])
    lcm = statistical_lcm(pair_counts, np.array([4, 2, 1, 0]), threshold=0.4, reweight=0.25)
    expected = [[1, 0.25, 0, 0], [0.125, 1, 0, 0], [0.125, 0, 1, 0], [0, 0, 0, 1]]
    np.testing.assert_allclose(lcm, expected, atol=1e-6)


def test_lcm_defaults_are_the_published_ones():
    pair_counts, label_counts = np.array([[5, 2], [2, 6]]), np.array([5, 6])
    np.testing.assert_array_equal(
        statistical_lcm(pair_counts, label_counts),
        statistical_lcm(pair_counts, label_counts, threshold=0.4, reweight=0.25),
    )


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.float32, np.float64])
def test_lcm_has_an_edge_where_p_equals_the_threshold(dtype):
    pair_counts = np.array([[5, 2], [2, 6]], dtype=dtype)
    lcm = statistical_lcm(pair_counts, np.array([5, 6], dtype=dtype), 0.4, 0.25)
    assert lcm[0, 1] == pytest.approx(0.25, rel=1e-5)
    assert lcm[1, 0] == 0


@quick
@given(label_statistics(), THRESHOLDS, REWEIGHTS)
def test_lcm_of_tensors_is_that_of_arrays(statistics, threshold, reweight):
    array = statistical_lcm(*statistics, threshold, reweight)
    tensor = statistical_lcm(*map(torch.from_numpy, statistics), threshold, reweight)
    assert isinstance(array, np.ndarray)
    assert isinstance(tensor, torch.Tensor)
    np.testing.assert_array_equal(array, tensor.numpy())


@pytest.mark.parametrize(
    ("given_dtype", "dtype"),
    [
        (torch.int32, torch.float64),
        (torch.int64, torch.float64),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_lcm_dtype(given_dtype, dtype):
    pair_counts = torch.tensor([[3, 2], [2, 4]], dtype=given_dtype)
    label_counts = torch.tensor([3, 4], dtype=given_dtype)
    lcm = statistical_lcm(pair_counts, label_counts)
    assert lcm.dtype == dtype
    assert torch.from_numpy(statistical_lcm(pair_counts.numpy(), label_counts.numpy())).equal(lcm)


@pytest.mark.parametrize("threshold", [0.0, 0.4])
@pytest.mark.parametrize("step", [1, 2, 4])
def test_lcm_is_the_same_whatever_is_computed_at_once(monkeypatch, threshold, step):
    label_counts, pair_counts, _ = make_statistics()
    expected = loop_lcm(pair_counts, label_counts, threshold, 0.25)
    monkeypatch.setattr(label_graph, "PAIRS_AT_ONCE", step * len(label_counts))
    lcm = statistical_lcm(pair_counts, label_counts, threshold, 0.25)
    np.testing.assert_allclose(lcm, expected, rtol=1e-12)
    out = torch.empty(pair_counts.shape, dtype=torch.float32)
    counts = torch.from_numpy(pair_counts), torch.from_numpy(label_counts)
    assert statistical_lcm(*counts, threshold, 0.25, out=out) is out
    np.testing.assert_array_equal(out, lcm.astype(np.float32))


def test_a_graph_without_room_is_refused_before_it_is_made(monkeypatch, error_line):
    """Of 50,000 labels, it would take 30 GB."""
    monkeypatch.setattr("ia_gcn.memory.available_memory", lambda: 16 * 10**9)
    line = error_line(LabelGraph, 50_000, 4)
    assert "MODEL.LABEL_HEAD.NAME" in line
    assert "pairs of 50000 labels, needs 30 GB of memory, and 16 GB are available" in line
    assert LabelGraph(50_000, 4, statistics=False).embeddings.shape == (50_000, 4)
    monkeypatch.setattr("ia_gcn.memory.available_memory", lambda: None)
    assert LabelGraph(5, 4).lcm.shape == (5, 5)


@quick
@given(label_statistics(), REWEIGHTS)
def test_lcm_is_the_identity_where_the_threshold_removes_every_edge(statistics, reweight):
    pair_counts, label_counts = statistics
    # An image of its own for every label keeps each P below 1.
    lcm = statistical_lcm(pair_counts, label_counts + 1, 1.0, reweight)
    np.testing.assert_array_equal(lcm, np.eye(len(label_counts)))


@pytest.mark.parametrize("count", [0, 1, 7])
def test_lcm_of_one_label_is_one(count):
    assert statistical_lcm(np.array([[count]]), np.array([count])).tolist() == [[1]]


def test_lcm_of_labels_that_never_occur_is_the_identity():
    lcm = statistical_lcm(np.zeros((3, 3), np.int64), np.zeros(3, np.int64))
    np.testing.assert_array_equal(lcm, np.eye(3))


@quick
@given(label_statistics(), THRESHOLDS, REWEIGHTS)
def test_lcm_columns_off_the_diagonal_sum_to_p_or_nothing(statistics, threshold, reweight):
    lcm = statistical_lcm(*statistics, threshold, reweight)
    np.testing.assert_array_equal(np.diag(lcm), 1)
    for total in (lcm - np.eye(len(lcm))).sum(axis=0):
        assert total == 0 or total == pytest.approx(reweight, rel=2e-5)


@quick
@given(label_statistics(), THRESHOLDS, st.integers(0, 100))
def test_lcm_does_not_look_at_the_diagonal(statistics, threshold, diagonal):
    pair_counts, label_counts = statistics
    expected = statistical_lcm(pair_counts, label_counts, threshold)
    np.fill_diagonal(pair_counts, diagonal)
    np.testing.assert_array_equal(statistical_lcm(pair_counts, label_counts, threshold), expected)


@quick
@given(label_statistics(), THRESHOLDS, st.sampled_from([np.int64, np.float32, np.float64]))
def test_lcm_leaves_its_inputs_alone(statistics, threshold, dtype):
    given_counts = [counts.astype(dtype) for counts in statistics]
    statistical_lcm(*given_counts, threshold)
    for counts, before in zip(given_counts, statistics):
        np.testing.assert_array_equal(counts, before)


@quick
@given(st.data(), label_statistics(), THRESHOLDS)
def test_lcm_of_relabelled_counts_is_the_relabelled_lcm(data, statistics, threshold):
    pair_counts, label_counts = statistics
    order = data.draw(st.permutations(range(len(label_counts))))
    grid = np.ix_(order, order)
    np.testing.assert_allclose(
        statistical_lcm(pair_counts[grid], label_counts[order], threshold),
        statistical_lcm(pair_counts, label_counts, threshold)[grid],
        rtol=1e-12,
    )


@pytest.mark.parametrize("threshold", [-0.1, 1.1, float("nan")])
def test_lcm_refuses_a_threshold_outside_0_1(threshold):
    with pytest.raises(ValueError, match="threshold"):
        statistical_lcm(np.eye(2), np.ones(2), threshold)


@pytest.mark.parametrize(
    ("pairs", "labels"), [((2, 3), 2), ((3, 2), 2), ((2, 2), 3), ((2,), 2), ((2, 2), (2, 1))]
)
@pytest.mark.parametrize("ones", [np.ones, torch.ones])
def test_lcm_refuses_shapes_that_do_not_fit(ones, pairs, labels):
    with pytest.raises(ValueError, match="pair_counts"):
        statistical_lcm(ones(pairs), ones(labels))


# graph_scale and propagate


@st.composite
def adjacencies(draw, max_labels=6):
    """Non-negative and not symmetric; rows of zeros are frequent."""
    size = draw(st.integers(1, max_labels))
    weights = st.just(0.0) | st.floats(0.01, 10)
    adjacency = draw(hnp.arrays(np.float64, (size, size), elements=weights))
    adjacency[draw(hnp.arrays(bool, size))] = 0
    return adjacency


@st.composite
def image_graphs(draw, max_labels=8, max_images=3):
    """A graph (C, C) with a diagonal of ones, and presences (B, C), 0 and 1 among them."""
    shape = draw(st.tuples(st.integers(1, max_images), st.integers(1, max_labels)))
    weights = st.just(0.0) | st.floats(0.01, 10)
    lcm = draw(hnp.arrays(np.float64, (shape[1], shape[1]), elements=weights))
    np.fill_diagonal(lcm, 1)
    values = st.sampled_from([0.0, 1.0]) | st.floats(1e-6, 1)
    return torch.from_numpy(lcm), torch.from_numpy(draw(hnp.arrays(float, shape, elements=values)))


def normalized(lcm, presence=None):
    """Â, by what it does to the columns of I."""
    return propagate(torch.eye(lcm.shape[-1], dtype=lcm.dtype), lcm, graph_scale(lcm, presence))


@quick
@given(adjacencies())
def test_normalized_graph_is_the_product_of_matrices(adjacency):
    tensor = torch.from_numpy(adjacency.copy())
    np.testing.assert_allclose(normalized(tensor), dense_normalized(adjacency), rtol=1e-12)
    np.testing.assert_array_equal(tensor, adjacency)


@quick
@given(image_graphs())
def test_image_dependent_graph_is_the_product_of_matrices(graph):
    lcm, presence = graph
    before = presence.clone()
    expected = torch.stack([dense_fused(lcm, a) for a in presence])
    assert_close(normalized(lcm, presence), expected)
    np.testing.assert_allclose(
        expected, [dense_normalized((lcm * torch.outer(a, a)).numpy()) for a in presence]
    )
    assert presence.equal(before)


def test_normalized_graph_is_transposed():
    # Degrees 4 and 1.
    graph = normalized(torch.tensor([[1.0, 3.0], [0.0, 1.0]]))
    np.testing.assert_allclose(graph, [[0.25, 0], [1.5, 1]])


def test_image_dependent_graph_by_hand():
    # a = 1, ¼ and A_F = [[1, ¾], [0, 1/16]]: degrees 1¾ and 1/16.
    graph = normalized(torch.tensor([[1.0, 3.0], [0.0, 1.0]]), torch.tensor([1.0, 0.25]))
    np.testing.assert_allclose(graph, [[4 / 7, 0], [0.75 * (16 * 4 / 7) ** 0.5, 1]], rtol=1e-6)


def test_rows_of_zeros_stay_zero():
    assert normalized(torch.tensor([[0.0, 0.0], [2.0, 2.0]])).tolist() == [[0, 0], [0, 0.5]]


@pytest.mark.parametrize("presence", [None, [[0.3, 0.1, 1e-30]], [[1e-6, 1.0, 0.9]]])
def test_identity_stays_identity(presence):
    graph = normalized(torch.eye(3), None if presence is None else torch.tensor(presence))
    torch.testing.assert_close(graph.reshape(3, 3), torch.eye(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scale_has_the_graphs_dtype(dtype):
    lcm = torch.tensor([[1, 0.25], [0.125, 1]], dtype=dtype)
    for presence in (None, torch.rand(3, 2), torch.rand(3, 2, dtype=torch.float64)):
        scale = graph_scale(lcm, presence)
        assert scale.dtype == dtype
        assert scale.shape == (() if presence is None else (3,)) + (2,)


@quick
@given(image_graphs())
def test_presence_of_one_is_the_statistical_graph(graph):
    lcm, presence = graph
    expected = normalized(lcm).expand(len(presence), -1, -1)
    assert_close(normalized(lcm, torch.ones_like(presence)), expected)


@quick
@given(image_graphs(), st.floats(0.01, 100))
def test_only_ratios_of_presence_count(graph, factor):
    lcm, presence = graph
    assert_close(graph_scale(lcm, factor * presence), graph_scale(lcm, presence))


@quick
@given(image_graphs())
def test_root_of_the_degrees_is_an_eigenvector_of_one(graph):
    """As Âᵀ D^½ 1 = D^-½ A_F 1 = D^½ 1."""
    lcm, presence = graph
    degrees = presence * (presence @ lcm.T)
    vector = degrees.sqrt()[..., None]
    assert_close(propagate(vector, lcm.T, graph_scale(lcm, presence)), vector)


@quick
@given(image_graphs())
def test_images_do_not_mix(graph):
    lcm, presence = graph
    nodes = torch.from_numpy(np.random.default_rng(0).normal(size=(*presence.shape, 2)))
    scale = graph_scale(lcm, presence)
    alone = [propagate(h, lcm, graph_scale(lcm, a)) for h, a in zip(nodes, presence)]
    for graphs in (lcm, lcm.expand(len(presence), -1, -1)):
        assert_close(propagate(nodes, graphs, scale), torch.stack(alone))
        assert_close(graph_scale(graphs, presence), scale)


@quick
@given(st.data(), image_graphs())
def test_relabelled_graph(data, graph):
    lcm, presence = graph
    order = data.draw(st.permutations(range(len(lcm))))
    relabelled = normalized(lcm[order][:, order], presence[:, order])
    assert_close(relabelled, normalized(lcm, presence)[:, order][:, :, order])


@quick
@given(image_graphs())
def test_gradients_are_those_of_the_product_of_matrices(graph):
    """Also with respect to A, which the affinity of regions needs."""
    lcm, presence = (value.requires_grad_() for value in graph)
    weights = torch.from_numpy(np.random.default_rng(0).normal(size=(*presence.shape, len(lcm))))
    dense = torch.stack([dense_fused(lcm, a) for a in presence])
    expected = torch.autograd.grad((weights * dense).sum(), (lcm, presence))
    found = torch.autograd.grad((weights * normalized(lcm, presence)).sum(), (lcm, presence))
    for gradient, reference in zip(found, expected):
        assert reference.isfinite().all()
        # Of a near 0 it is as large as 1/√a.
        torch.testing.assert_close(gradient, reference, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_leaves_the_scale_alone(dtype):
    lcm, presence = torch.eye(40) + 0.1, torch.rand(3, 40)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scale = graph_scale(lcm, presence.to(dtype))
    assert scale.equal(graph_scale(lcm, presence.to(dtype).float()))


# LabelGraph


def make_statistics(num_labels=5, dim=4, seed=0):
    """Label counts, pair counts and embeddings."""
    rng = np.random.default_rng(seed)
    presence = (rng.random((40, num_labels)) < 0.4).astype(np.int64)
    pair_counts = presence.T @ presence
    return np.diag(pair_counts).copy(), pair_counts, rng.normal(size=(num_labels, dim))


def make_graph(num_labels=5, dim=4):
    return LabelGraph(num_labels, dim, threshold=0.4, reweight=0.25)


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
def test_fill_takes_statistics_and_embeddings(kind):
    label_counts, pair_counts, embeddings = make_statistics()
    graph = make_graph()
    graph.fill(kind(label_counts), kind(pair_counts), kind(embeddings))
    assert not graph.is_bare
    np.testing.assert_array_equal(graph.label_counts, label_counts)
    np.testing.assert_array_equal(graph.pair_counts, pair_counts)
    np.testing.assert_array_equal(graph.embeddings, embeddings.astype(np.float32))
    lcm = loop_lcm(pair_counts, label_counts, 0.4, 0.25)
    np.testing.assert_allclose(graph.lcm, lcm, rtol=1e-6)
    # Else the comparison would also hold for a graph without edges.
    assert (lcm != np.eye(len(lcm))).any()


@pytest.mark.parametrize(("threshold", "reweight"), [(0.2, 0.25), (0.4, 0.7)])
def test_the_graph_goes_by_its_threshold_and_reweight(threshold, reweight):
    label_counts, pair_counts, embeddings = make_statistics()
    graph = LabelGraph(5, 4, threshold, reweight)
    graph.fill(label_counts, pair_counts, embeddings)
    expected = loop_lcm(pair_counts, label_counts, threshold, reweight)
    np.testing.assert_allclose(graph.lcm, expected, rtol=1e-6)
    published = loop_lcm(pair_counts, label_counts, 0.4, 0.25)
    assert np.abs(expected - published).max() > 0.01


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("label_counts", [(4,), (5, 5), (5, 4)]),
        ("label_counts", [(1,), (5, 5), (5, 4)]),
        ("pair_counts", [(5,), (5, 4), (5, 4)]),
        ("embeddings", [(5,), (5, 5), (5, 3)]),
        ("embeddings", [(5,), (5, 5), (4,)]),
    ],
)
def test_fill_refuses_other_shapes_and_takes_nothing(name, shapes):
    graph = make_graph()
    before = {key: buffer.clone() for key, buffer in graph.named_buffers()}
    with pytest.raises(ValueError, match=name):
        graph.fill(*(torch.ones(shape) for shape in shapes))
    for key, buffer in graph.named_buffers():
        assert buffer.equal(before[key]), key


def test_state_dict_restores_everything():
    graph, restored = make_graph(), make_graph()
    graph.fill(*make_statistics())
    restored.load_state_dict(graph.state_dict())
    for name, buffer in graph.named_buffers():
        assert buffer.equal(restored.get_buffer(name)), name
    assert not restored.is_bare
    assert not restored.lcm.equal(torch.eye(5))


def test_a_checkpoint_replaces_what_was_filled_in():
    graph, restored = make_graph(), make_graph()
    graph.fill(*make_statistics(seed=0))
    restored.fill(*make_statistics(seed=1))
    assert not restored.lcm.equal(graph.lcm)
    restored.load_state_dict(graph.state_dict())
    assert restored.lcm.equal(graph.lcm)


def test_bare_graphs_are_alike_and_leave_the_global_generator_alone():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    graph = make_graph()
    assert torch.get_rng_state().equal(state)
    torch.manual_seed(2)
    assert make_graph().embeddings.equal(graph.embeddings)
    assert graph.lcm.equal(torch.eye(5))
    assert graph.is_bare


def test_the_graph_has_no_parameters():
    assert not list(make_graph().parameters())


def test_a_bare_graph_warns_once_in_evaluation(monkeypatch, caplog):
    # A tool's logging set-up cuts the package's logger off from caplog's handler.
    monkeypatch.setattr(logging.getLogger("ia_gcn"), "propagate", True)
    graph = make_graph().eval()
    graph.check_filled()
    graph.check_filled()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "bare" in caplog.text


def test_a_bare_graph_is_not_trained():
    with pytest.raises(RuntimeError, match="bare"):
        make_graph().train().check_filled()


@pytest.mark.parametrize("restore", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_a_filled_graph_is_silent(monkeypatch, caplog, training, restore):
    monkeypatch.setattr(logging.getLogger("ia_gcn"), "propagate", True)
    filled = make_graph()
    filled.fill(*make_statistics())
    graph = make_graph()
    graph.load_state_dict(filled.state_dict())
    graph = graph if restore else filled
    graph.train(training).check_filled()
    assert not caplog.records


def test_a_graph_that_becomes_bare_again_is_not_trained():
    graph = make_graph().train()
    graph.fill(*make_statistics())
    graph.check_filled()
    graph.load_state_dict(make_graph().state_dict())
    with pytest.raises(RuntimeError, match="bare"):
        graph.check_filled()
