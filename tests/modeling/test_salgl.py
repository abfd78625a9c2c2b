"""SALGL against its equations, one image after the other."""

import math

import pytest
import torch
import torch.nn.functional as F

from ia_gcn.errors import InputError
from ia_gcn.modeling import MultiLabelCriterion, SALGLHead, build_label_head, multi_label_bce
from ia_gcn.modeling.label_heads.scene_graph import entropy, scene_losses
from tests.helpers.heads import EMBEDDING_DIM, NUM_LABELS, SHAPES, make_cfg

DIM, SCENES = 4, 3
OPTIONS = {
    "num_heads": 2,
    "ffn_dim": 5,
    "dropout": 0.0,
    "positions": False,
    "hidden_dim": 3,
    "num_scenes": SCENES,
    "soft_scenes": False,
    "self_edges": True,
    "normalize": False,
    "steps": 2,
    "both_directions": False,
}
CHOICES = [
    {},
    {"positions": True, "both_directions": True},
    {"soft_scenes": True, "normalize": True},
    {"self_edges": False, "normalize": True},
    {"steps": 0},
]
EMBEDDINGS = torch.randn(
    NUM_LABELS, EMBEDDING_DIM, generator=torch.Generator().manual_seed(3), dtype=torch.float64
)


def make_head(**options):
    torch.manual_seed(0)
    head = SALGLHead(
        in_feature="map",
        feature_dim=DIM,
        num_labels=NUM_LABELS,
        embedding_dim=EMBEDDING_DIM,
        **{**OPTIONS, **options},
    ).double()
    head.pair_counts.copy_(torch.randint(0, 9, head.pair_counts.shape))
    head.pair_counts += head.pair_counts.mT.clone()
    head.pair_counts.diagonal(dim1=1, dim2=2).add_(20)
    # Scenes that differ from image to image.
    head.scene_classifier.weight.data.copy_(3 * torch.eye(SCENES, DIM))
    return head.eval()


def make_map(batch=3, height=3, width=4):
    generator = torch.Generator().manual_seed(1)
    shape = batch, DIM, height, width
    features = 3 * torch.randn(shape, generator=generator, dtype=torch.float64)
    features[range(batch), range(batch)] += 6
    return features


def run(head, features, mask=None, targets=None):
    return head({"map": features}, {"map": mask}, label_embeddings=EMBEDDINGS, targets=targets)


def positions(height, width):
    """Sines of the rows for the first half of the channels, and of the columns for the second."""
    places = torch.zeros(height, width, DIM, dtype=torch.float64)
    for y in range(height):
        for x in range(width):
            for first, place in ((0, (y + 1) / height), (DIM // 2, (x + 1) / width)):
                angle = 2 * math.pi * place
                places[y, x, first : first + 2] = torch.tensor([math.sin(angle), math.cos(angle)])
    return places.flatten(0, 1)


def encode(head, tokens, places):
    """A layer of a Transformer encoder on the tokens of one image, (P, D)."""
    layer, size = head.encoder, DIM // 2
    weights, biases = layer.self_attn.in_proj_weight.chunk(3), layer.self_attn.in_proj_bias.chunk(3)
    inputs = (tokens + places, tokens + places, tokens)
    q, k, v = (x @ w.T + b for x, w, b in zip(inputs, weights, biases))
    attended = []
    for first in range(0, DIM, size):
        own = slice(first, first + size)
        scores = q[:, own] @ k[:, own].T / math.sqrt(size)
        attended.append(scores.softmax(dim=1) @ v[:, own])
    out = layer.self_attn.out_proj
    tokens = F.layer_norm(
        tokens + torch.cat(attended, 1) @ out.weight.T + out.bias,
        (DIM,),
        layer.norm1.weight,
        layer.norm1.bias,
    )
    return layer.norm2(tokens + layer.linear2(layer.linear1(tokens).clamp(min=0)))


def literal_logits(head, image):
    """Of one image, (D, H, W); and its scenes."""
    tokens = image.flatten(1).T
    tokens = encode(head, tokens, positions(*image.shape[1:]) if head.positions else 0)
    scenes = head.scene_classifier(tokens.mean(0)).softmax(0)
    graphs = []
    for counts in head.pair_counts:
        graph = torch.stack([row / max(row[i], 1e-8) for i, row in enumerate(counts)])
        if not head.self_edges:
            graph = graph - graph.diag().diag()
        if head.normalize:
            graph = torch.stack([row / max(row.sum(), 1e-8) for row in graph])
        graphs.append(graph)
    graph = graphs[scenes.argmax()]
    if head.soft_scenes:
        graph = sum(p * each for p, each in zip(scenes, graphs))
    nodes = []
    for embedding in EMBEDDINGS:
        products = head.attention.of_cells(tokens) * head.attention.of_labels(embedding)
        scores = head.attention.score(head.attention.hidden(products.tanh()))[:, 0]
        nodes.append(scores.softmax(0) @ tokens)
    nodes = states = torch.stack(nodes)
    if head.graph is not None:
        for _ in range(head.graph.steps):
            m = graph @ states
            if head.graph.both_directions:
                m = torch.cat([m, graph.T @ states], 1)
            g = head.graph
            z = (g.update_message(m) + g.update_state(states)).sigmoid()
            r = (g.reset_message(m) + g.reset_state(states)).sigmoid()
            states = (1 - z) * states + z * (g.new_message(m) + g.new_state(r * states)).tanh()
        nodes = torch.cat([nodes, states], 1)
    features = head.output(nodes).tanh()
    logits = (features * head.readout.weight[:, :, 0]).sum(1) + head.readout.bias
    return logits, scenes


@pytest.mark.parametrize("options", CHOICES)
def test_logits_are_those_of_the_equations(options):
    head, features = make_head(**options), make_map()
    mask = torch.zeros(3, 1, 3, 4, dtype=torch.bool)
    mask[0] = mask[1, :, :2, :1] = mask[2, :, :, :3] = True
    images = [features[0], features[1, :, :2, :1], features[2, :, :, :3]]
    expected, scenes = zip(*(literal_logits(head, image) for image in images))
    assert len({int(p.argmax()) for p in scenes}) > 1
    outputs = run(head, features, mask)
    # Sines are float32, and their places 1e-6 off.
    tolerance = 1e-5 if head.positions else 1e-9
    torch.testing.assert_close(
        outputs["logits"], torch.stack(expected), rtol=tolerance, atol=tolerance
    )
    assert set(outputs) == {"logits", "attention"}
    attention = outputs["attention"]
    torch.testing.assert_close(attention.sum(dim=(2, 3)), torch.ones(3, NUM_LABELS).double())
    assert not attention[~mask.expand_as(attention)].any()


def test_what_the_mask_leaves_out_has_no_effect_and_no_gradient():
    head, features = make_head(positions=True, soft_scenes=True), make_map()
    mask = torch.ones(3, 1, 3, 4, dtype=torch.bool)
    mask[1, :, 1:] = mask[1, :, :, 2:] = False
    expected = run(head, features, mask)["logits"]
    other = torch.where(mask, features, 1e3).requires_grad_()
    logits = run(head, other, mask)["logits"]
    torch.testing.assert_close(logits, expected)
    logits.sum().backward()
    assert not other.grad[~mask.expand_as(other)].any()
    assert other.grad[mask.expand_as(other)].all()


@pytest.mark.parametrize("options", [{}, {"soft_scenes": True}])
def test_gradients(options):
    head, features = make_head(**options), make_map(1, 2, 2)
    names, weights = zip(*head.named_parameters())

    def logits(features, *weights):
        context = {"map": features}, {"map": None}
        values = dict(zip(names, weights))
        kwargs = {"label_embeddings": EMBEDDINGS}
        return torch.func.functional_call(head, values, context, kwargs)["logits"]

    inputs = (features.requires_grad_(), *weights)
    assert torch.autograd.gradcheck(logits, inputs, fast_mode=True)


TARGETS = torch.tensor([[1.0, 1, 0, -1, 0], [0, 1, 1, 0, 1], [1, 0, 0, 0, 0]])


@pytest.mark.parametrize("soft", [False, True])
def test_labels_are_counted_for_the_scenes_of_their_images(soft):
    head, features = make_head(soft_scenes=soft), make_map()
    before = head.pair_counts.clone()
    scenes = torch.stack([literal_logits(head, image)[1] for image in features])
    expected = before.clone()
    for p, labels in zip(scenes, TARGETS.clamp(min=0).double()):
        shares = p if soft else F.one_hot(p.argmax(), SCENES)
        for scene, share in enumerate(shares):
            expected[scene] += share * torch.outer(labels, labels)
    logits = run(head.train(), features, targets=TARGETS)["logits"]
    torch.testing.assert_close(head.pair_counts, expected)
    # The logits are those of the counts before.
    head.eval().pair_counts.copy_(before)
    torch.testing.assert_close(run(head, features, targets=TARGETS)["logits"], logits)
    assert head.pair_counts.equal(before)


def test_losses_of_scenes():
    certain = torch.eye(4).double()
    undecided = torch.full((4, 4), 0.25).double()
    one_for_all = torch.eye(4).double()[[0, 0, 0, 0]]
    for scenes, found in [(certain, (0, 0)), (undecided, (1, 0)), (one_for_all, (0, 1))]:
        losses = scene_losses(scenes)
        values = [float(losses[name]) for name in ("scene_entropy", "scene_balance")]
        assert values == pytest.approx([x * math.log(4) for x in found], abs=1e-5)
    p = torch.tensor([0.2, 0.5, 0.3]).double()
    assert float(entropy(p)) == pytest.approx(-sum(x * math.log(x) for x in p.tolist()))


def test_losses_of_a_head_are_weighted_by_name():
    head, features = make_head().train(), make_map()
    outputs = run(head, features, targets=TARGETS)
    weights = {"scene_balance": 8.0}
    losses = MultiLabelCriterion(loss=multi_label_bce, aux_weights=weights)(outputs, TARGETS)
    own = outputs["aux_losses"]
    assert set(losses) == {"loss_multi_label", "loss_scene_entropy", "loss_scene_balance"}
    assert losses["loss_scene_balance"] == 8 * own["scene_balance"]
    assert losses["loss_scene_entropy"] == own["scene_entropy"]
    sum(losses.values()).backward()
    assert head.scene_classifier.weight.grad.any()


@pytest.mark.parametrize(("key", "value"), [("NUM_HEADS", 3), ("POSITIONS", True)])
def test_channels_that_can_not_be_divided_are_refused(key, value):
    cfg = make_cfg("SALGLHead")
    cfg.MODEL.SALGL.NUM_HEADS = 2
    cfg.merge_from_list([f"MODEL.SALGL.{key}", value])
    with pytest.raises(InputError, match=rf"MODEL\.SALGL\.{key}: 10 channels"):
        build_label_head(cfg, {"res5": SHAPES["res5"]._replace(channels=10)})


def test_a_head_from_a_config():
    cfg = make_cfg("SALGLHead", num_labels=80)
    with torch.device("meta"):
        head = build_label_head(cfg, {"res5": SHAPES["res5"]._replace(channels=2048)})
    assert head.pair_counts.shape == (4, 80, 80)
    assert head.needs == {"label_embeddings"}
    d, k = 2048, 1024
    encoder = 3 * d * (d + 1) + d * (d + 1) + 2 * d * (d + 1) + 4 * d
    attention = d * k + 300 * k + k * k + k
    expected = encoder + 4 * d + attention + 6 * d * (d + 1) + (2 * d + 1) * d + 80 * (d + 1)
    assert sum(parameter.numel() for parameter in head.parameters()) == expected
