import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from ia_gcn.errors import InputError
from ia_gcn.modeling import (
    LABEL_HEAD_REGISTRY,
    GCNHead,
    GraphConv,
    LabelGraph,
    LabelHead,
    LinearHead,
    RegionGCN,
    Regions,
    build_label_head,
    graph_scale,
)
from tests.helpers.heads import (
    EMBEDDING_DIM,
    FEATURE_DIM,
    NUM_LABELS,
    SHAPES,
    HeadOnVectors,
    RecordSizes,
    count_passes,
    dense_logits,
    fill,
    load,
    make_cfg,
    make_features,
    make_presence,
    matmul,
    on_vectors,
)
from tests.helpers.label_graphs import assert_close, dense_fused, dense_normalized


def make_head(hidden_dims=(8,), negative_slope=0.2, bias=False):
    torch.manual_seed(0)
    head = on_vectors(
        GCNHead,
        feature_dim=FEATURE_DIM,
        label_graph=LabelGraph(NUM_LABELS, EMBEDDING_DIM, threshold=0.4, reweight=0.25),
        hidden_dims=hidden_dims,
        negative_slope=negative_slope,
        bias=bias,
    )
    fill(head.label_graph)
    if bias:
        nn.init.normal_(head.head.bias)
    return head


def loop_logits(head, x, negative_slope):
    """ML-GCN in plain Python: H ← f(Â H W), ŷ = M x."""
    adjacency = dense_normalized(head.label_graph.lcm.numpy()).tolist()
    nodes = head.label_graph.embeddings.tolist()
    weights = [layer.weight.tolist() for layer in head.layers]
    for weight in weights[:-1]:
        nodes = matmul(matmul(adjacency, nodes), weight)
        nodes = [[v if v > 0 else negative_slope * v for v in row] for row in nodes]
    classifiers = matmul(matmul(adjacency, nodes), weights[-1])
    return [[sum(m * v for m, v in zip(row, image)) for row in classifiers] for image in x.tolist()]


# GraphConv


def test_graph_conv_is_the_product_of_its_three_matrices():
    conv = GraphConv(3, 2).double()
    nodes, lcm = torch.randn(4, 3).double(), torch.rand(4, 4).double()
    adjacency = dense_normalized(lcm.numpy()).tolist()
    expected = matmul(matmul(adjacency, nodes.tolist()), conv.weight.tolist())
    scale = graph_scale(lcm)
    found = scale[:, None] * conv(nodes, lcm, scale)
    np.testing.assert_allclose(found.tolist(), expected, rtol=1e-10)
    assert [name for name, _ in conv.named_parameters()] == ["weight"]


@pytest.mark.parametrize("out_dim", [2, 3, 7])
@pytest.mark.parametrize("graphs_of_images", [False, True])
@pytest.mark.parametrize("nodes_of_images", [False, True])
def test_graph_conv_on_graphs_of_images(nodes_of_images, graphs_of_images, out_dim):
    conv, presence = GraphConv(3, out_dim).double(), make_presence()
    nodes = torch.randn(3, NUM_LABELS, 3).double().requires_grad_()
    lcm = torch.rand(3, NUM_LABELS, NUM_LABELS).double() + torch.eye(NUM_LABELS)
    own_nodes = nodes if nodes_of_images else nodes[:1].expand_as(nodes)
    own_lcm = lcm if graphs_of_images else lcm[:1].expand_as(lcm)
    nodes = nodes if nodes_of_images else nodes[0]
    lcm = lcm if graphs_of_images else lcm[0]
    scale = graph_scale(lcm, presence)
    found = scale[..., None] * conv(nodes, lcm, scale)
    images = zip(own_nodes, own_lcm, presence)
    expected = torch.stack([dense_fused(a, p) @ h @ conv.weight for h, a, p in images])
    assert_close(found, expected)
    x = torch.randn(3, out_dim).double()
    scores = scale * conv.scores(nodes, x, lcm, scale)
    assert_close(scores, torch.einsum("bcd,bd->bc", expected, x))


def test_graph_conv_starts_in_a_range_of_its_output_dimension():
    weight = GraphConv(10, 400).weight
    assert 0.04 < weight.max() <= 0.05
    assert -0.05 <= weight.min() < -0.04


# GCNHead


@pytest.mark.parametrize(
    ("hidden_dims", "negative_slope"), [((), 0.2), ((8,), 0.2), ((8, 7), 0.0), ((8, 7), 0.1)]
)
@pytest.mark.parametrize("training", [True, False])
def test_logits_are_those_of_ml_gcn(hidden_dims, negative_slope, training):
    head = make_head(hidden_dims, negative_slope).double().train(training)
    x = make_features(dtype=torch.float64)
    expected = loop_logits(head, x, negative_slope)
    np.testing.assert_allclose(head(x).tolist(), expected, rtol=1e-9)
    with torch.no_grad():
        np.testing.assert_allclose(head(x).tolist(), expected, rtol=1e-9)


@pytest.mark.parametrize("hidden_dims", [(), (8,), (8, 7)])
def test_there_is_no_activation_after_the_last_layer(hidden_dims):
    classifiers = make_head(hidden_dims, negative_slope=0.0).classifiers()
    assert (classifiers < 0).any()


@pytest.mark.parametrize("hidden_dims", [(), (8,), (3, 3)])
def test_gradients_wrt_weights_and_features(hidden_dims):
    head = make_head(hidden_dims).double()
    names, weights = zip(*head.named_parameters())
    x = make_features(dtype=torch.float64).requires_grad_()

    def logits(x, *weights):
        return torch.func.functional_call(head, dict(zip(names, weights)), x)

    assert torch.autograd.gradcheck(logits, (x, *weights))


# GCNHead on the graphs of images

DEPTHS = [((), 0.2), ((8,), 0.2), ((8, 3), 0.0), ((3, 8), 0.1)]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("hidden_dims", "negative_slope"), DEPTHS)
@pytest.mark.parametrize("training", [True, False])
def test_logits_are_those_of_the_dense_formula(hidden_dims, negative_slope, bias, training):
    head = make_head(hidden_dims, negative_slope, bias).double().train(training)
    x, presence = make_features(dtype=torch.float64), make_presence()
    for a in (presence, None):
        assert_close(head(x, a), dense_logits(head, x, a))
        with torch.no_grad():
            assert_close(head(x, a), dense_logits(head, x, a))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("hidden_dims", "negative_slope"), DEPTHS)
def test_gradients_are_those_of_the_dense_formula(hidden_dims, negative_slope, bias):
    head = make_head(hidden_dims, negative_slope, bias).double()
    x, presence = make_features(dtype=torch.float64).requires_grad_(), make_presence()
    inputs = (x, presence.requires_grad_(), *head.parameters())
    weights = torch.randn(3, NUM_LABELS, dtype=torch.float64)

    def gradients(logits):
        return torch.autograd.grad((weights * logits).sum(), inputs)

    found = gradients(head(x, presence))
    for gradient, expected in zip(found, gradients(dense_logits(head, x, presence))):
        assert expected.isfinite().all()
        assert expected.any()
        assert_close(gradient, expected)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("of_images", [False, True])
def test_logits_are_the_product_of_features_and_classifiers(of_images, bias):
    head, x = make_head((8, 7), bias=bias).double(), make_features(dtype=torch.float64)
    presence = make_presence() if of_images else None
    classifiers = head.classifiers(presence)
    assert classifiers.shape == (*([3] if of_images else []), NUM_LABELS, FEATURE_DIM)
    logits = torch.einsum("...cd,bd->bc" if not of_images else "bcd,bd->bc", classifiers, x)
    assert_close(head(x, presence), logits + head.bias if bias else logits)


@pytest.mark.parametrize("hidden_dims", [(), (8,), (8, 7)])
def test_on_presence_of_one_the_head_is_ml_gcn(hidden_dims):
    head, x = make_head(hidden_dims).double(), make_features(dtype=torch.float64)
    assert_close(head(x, torch.ones(3, NUM_LABELS)), head(x))


def test_a_label_that_is_absent_for_sure_scores_nothing():
    head, presence = make_head(), make_presence(torch.float32)
    logits = head(make_features(), presence)
    assert not logits[presence == 0].any()
    assert logits[presence > 0].all()


def test_the_bias_starts_at_zero_and_is_absent_by_default():
    graph = LabelGraph(NUM_LABELS, EMBEDDING_DIM, threshold=0.4, reweight=0.25)
    options = {"feature_dim": FEATURE_DIM, "hidden_dims": (), "negative_slope": 0.2}
    assert on_vectors(GCNHead, graph, **options).bias is None
    assert on_vectors(GCNHead, graph, bias=True, **options).bias.tolist() == [0] * NUM_LABELS


def test_presence_of_another_batch_is_not_kept():
    head, x, presence = make_head().eval(), make_features(), make_presence(torch.float32)
    with torch.no_grad():
        statistical = head(x)
        for a in (presence, presence.flip(0)):
            assert_close(head(x, a), dense_logits(head, x, a), 1e-5)
        assert head(x).equal(statistical)


BATCH, MANY_LABELS, REGIONS = 3, 50, 7


def take_gcn_head(presence, scores):
    graph = LabelGraph(MANY_LABELS, EMBEDDING_DIM, threshold=0.4, reweight=0.25)
    fill(graph)
    head = on_vectors(GCNHead, graph, feature_dim=FEATURE_DIM, hidden_dims=(8, 9), negative_slope=0)
    return head(make_features(BATCH), presence)


def take_region_gcn(presence, scores):
    gcn = RegionGCN(
        reading="labels", num_labels=MANY_LABELS, num_regions=REGIONS, hidden_dims=(5, 9)
    )
    valid = torch.ones(BATCH, REGIONS, dtype=torch.bool)
    lcm = torch.eye(MANY_LABELS) + 0.1
    return gcn(Regions(valid, valid.float(), scores, presence), lcm)


def take_dense_graph(presence, scores):
    return (presence[:, :, None] * presence[:, None]).sum(2)


@pytest.mark.parametrize("take", [take_gcn_head, take_region_gcn, take_dense_graph])
def test_no_graph_of_an_image_is_ever_written_out(take):
    presence = torch.rand(BATCH, MANY_LABELS).requires_grad_()
    scores = torch.rand(BATCH, REGIONS, MANY_LABELS).requires_grad_()
    with RecordSizes() as record:
        logits = take(presence, scores)
        forward = len(record.sizes)
        logits.sum().backward()
    assert presence.grad.any()
    assert 0 < forward < len(record.sizes)
    is_dense = max(record.sizes) >= BATCH * MANY_LABELS**2
    # Else the recorder sees nothing.
    assert is_dense == (take is take_dense_graph)


@pytest.mark.parametrize(
    ("hidden_dims", "expected"), [((1024,), 300 * 1024 + 1024 * 2048), ((), 300 * 2048)]
)
def test_parameter_count(hidden_dims, expected):
    graph = LabelGraph(80, 300, threshold=0.4, reweight=0.25)
    head = on_vectors(GCNHead, graph, feature_dim=2048, hidden_dims=hidden_dims, negative_slope=0.2)
    assert sum(parameter.numel() for parameter in head.parameters()) == expected


def test_a_bare_head_is_not_trained_and_can_be_evaluated():
    graph = LabelGraph(NUM_LABELS, EMBEDDING_DIM, threshold=0.4, reweight=0.25)
    head = on_vectors(GCNHead, graph, feature_dim=FEATURE_DIM, hidden_dims=(8,), negative_slope=0.2)
    with pytest.raises(RuntimeError, match="bare"):
        head(make_features())
    assert head.eval()(make_features()).shape == (3, NUM_LABELS)


# What is computed once for a model that is only evaluated.


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_fixed_classifiers_are_computed_once(mode, fixed):
    head = make_head().eval()
    with mode():
        expected = head(make_features())
        passes = count_passes(head)
        if fixed:
            head.fix_classifiers()
        for _ in range(3):
            assert head(make_features()).equal(expected)
    assert len(passes) == (1 if fixed else 3)


def train_and_evaluate(head):
    head.train().eval()


@pytest.mark.parametrize("release", [load, train_and_evaluate])
def test_fixed_classifiers_are_given_up_when_weights_may_change(release):
    head, x = make_head().eval(), make_features()
    head.fix_classifiers()
    release(head)
    with torch.no_grad():
        before = head(x)
        head.layers[0].weight.data *= 2
        after = head(x)
    assert not torch.allclose(after, before)
    assert after.equal(x @ head.classifiers().T)


def test_fixed_classifiers_are_no_part_of_a_checkpoint_and_follow_a_move():
    head = make_head().eval()
    names = list(head.state_dict())
    head.fix_classifiers()
    assert list(head.state_dict()) == names
    x = make_features(dtype=torch.float64)
    expected = loop_logits(head.double(), x, 0.2)
    np.testing.assert_allclose(head(x).tolist(), expected, rtol=1e-6)


def test_fixed_classifiers_are_in_full_precision():
    head, x = make_head().eval(), make_features()
    with torch.no_grad():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            head.fix_classifiers()
            assert head(x).dtype == torch.bfloat16
        assert head(x).equal(x @ head.classifiers().T)


def test_presence_goes_round_fixed_classifiers():
    head, x, presence = make_head().eval(), make_features(), make_presence(torch.float32)
    expected = head(x, presence)
    head.fix_classifiers()
    assert head(x, presence).equal(expected)


def test_a_copy_of_a_fixed_head_is_independent():
    head, x = make_head().eval(), make_features()
    head.fix_classifiers()
    with torch.no_grad():
        expected = head(x)
        twin = copy.deepcopy(head).train().eval()
        for parameter in twin.parameters():
            parameter.mul_(2)
        assert not torch.allclose(twin(x), expected)
        assert head(x).equal(expected)


# LinearHead


def test_linear_head_is_a_product_and_a_bias():
    head = on_vectors(LinearHead, feature_dim=FEATURE_DIM, num_labels=NUM_LABELS).double()
    x = make_features(dtype=torch.float64)
    weight, bias = head.classifier.weight.tolist(), head.classifier.bias.tolist()
    expected = [
        [sum(w * v for w, v in zip(row, image)) + b for row, b in zip(weight, bias)]
        for image in x.tolist()
    ]
    np.testing.assert_allclose(head(x).tolist(), expected, rtol=1e-10)


def test_cosines_of_a_linear_head():
    options = {"feature_dim": FEATURE_DIM, "num_labels": NUM_LABELS, "cosine_scale": 7.0}
    head = on_vectors(LinearHead, **options).double()
    assert head.classifier.bias is None
    x = make_features(dtype=torch.float64)
    expected = [
        [
            7 * sum(w * v for w, v in zip(row, image)) / math.hypot(*row) / math.hypot(*image)
            for row in head.classifier.weight.tolist()
        ]
        for image in x.tolist()
    ]
    np.testing.assert_allclose(head(x).tolist(), expected, rtol=1e-10)


# From a config


def make_maps(batch=2):
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(batch, shape.channels, 64 // shape.stride, 3, generator=generator)
        for name, shape in SHAPES.items()
    }


def test_linear_head_from_a_config():
    head = build_label_head(make_cfg("LinearHead"), SHAPES)
    assert head.classifier.weight.shape == (NUM_LABELS, 4)
    maps = make_maps()
    outputs = head(maps, dict.fromkeys(maps))
    assert_close(outputs["logits"], head.classifier(maps["res5"].amax(dim=(2, 3))), 1e-6)


def test_gcn_head_from_a_config():
    cfg = make_cfg("GCNHead")
    cfg.MODEL.LABEL_GCN.HIDDEN_DIMS = (8, 7)
    cfg.MODEL.LABEL_GCN.NEGATIVE_SLOPE = 0.3
    cfg.MODEL.LABEL_EMBEDDINGS.DIM = EMBEDDING_DIM
    head = build_label_head(cfg, SHAPES)
    assert head.bias is None
    assert head.needs == {"label_graph"}
    assert head.uses == {"presence"}
    cfg.MODEL.LABEL_GCN.BIAS = True
    assert build_label_head(cfg, SHAPES).bias.shape == (NUM_LABELS,)
    assert [layer.weight.shape for layer in head.layers] == [(6, 8), (8, 7), (7, 4)]
    graph = LabelGraph(NUM_LABELS, EMBEDDING_DIM)
    fill(graph)
    maps = make_maps()
    logits = head(maps, dict.fromkeys(maps), label_graph=graph)["logits"]
    expected = loop_logits(HeadOnVectors(head, graph), maps["res5"].amax(dim=(2, 3)), 0.3)
    np.testing.assert_allclose(logits.tolist(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["LinearHead", "GCNHead"])
def test_the_number_of_labels_has_to_be_set(name):
    with pytest.raises(InputError, match=r"MODEL\.LABEL_HEAD\.NUM_LABELS"):
        build_label_head(make_cfg(name, num_labels=0), SHAPES)


# The contract


def test_a_head_reads_the_deepest_map_or_the_one_that_is_asked_for():
    cfg = make_cfg("LinearHead")
    assert build_label_head(cfg, SHAPES).in_features == ("res5",)
    # What it was called in version 0.1.
    cfg.MODEL.GLOBAL_POOLING.IN_FEATURE = "res4"
    assert build_label_head(cfg, SHAPES).in_features == ("res4",)
    cfg.MODEL.LABEL_HEAD.IN_FEATURES = ["res5"]
    assert build_label_head(cfg, SHAPES).in_features == ("res5",)


@pytest.mark.parametrize("name", ["LinearHead", "CSRAHead", "ADDGCNHead", "SSGRLHead", "SALGLHead"])
def test_a_map_that_is_not_there_and_one_too_many_are_refused(name):
    cfg = make_cfg(name)
    cfg.MODEL.LABEL_HEAD.IN_FEATURES = ["res3"]
    with pytest.raises(InputError, match=r"IN_FEATURES: res3; the backbone has res4, res5"):
        build_label_head(cfg, SHAPES)
    cfg.MODEL.LABEL_HEAD.IN_FEATURES = ["res4", "res5"]
    with pytest.raises(InputError, match=f"{name} reads one feature map"):
        build_label_head(cfg, SHAPES)


class OldHead(nn.Linear):
    """As heads were in version 0.1: x (B, D) to logits (B, C)."""

    def __init__(self, cfg, feature_dim):
        super().__init__(feature_dim, NUM_LABELS)


class NosyHead(LabelHead):
    needs = frozenset({"weather"})


class ReadsTooMuch(LabelHead):
    def __init__(self, cfg, input_shape):
        super().__init__()
        self.in_features = ("res4", "p7")


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (OldHead, "OldHead has no uses, needs, fix_classifiers; a label head derives from"),
        (NosyHead, "NosyHead asks for weather; there is label_embeddings, label_graph,"),
        (ReadsTooMuch, "ReadsTooMuch reads p7; the backbone has res4, res5"),
    ],
)
def test_heads_of_another_contract_are_refused_with_the_reason(monkeypatch, head, message):
    monkeypatch.setitem(LABEL_HEAD_REGISTRY._obj_map, head.__name__, head)
    with pytest.raises(InputError, match=message):
        build_label_head(make_cfg(head.__name__), SHAPES)
