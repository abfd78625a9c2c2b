"""TDRG against its equations, one image after the other."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ia_gcn.errors import InputError
from ia_gcn.modeling import TDRGHead, build_label_head
from ia_gcn.modeling.cross_scale import cross_scale_attention, resize
from ia_gcn.modeling.pooling import masked_top_mean
from tests.helpers.heads import NUM_LABELS, SHAPES, make_cfg

FINE, COARSE, DIM, HEADS = 3, 4, 4, 2
# Rows and columns of the fine and the coarse map of three images.
SIZES = [((10, 12), (5, 6)), ((6, 8), (3, 4)), ((3, 12), (2, 6))]


def make_head(attends_to="image", num_layers=2, top_share=0.2):
    torch.manual_seed(0)
    head = TDRGHead(
        in_features=("fine", "coarse"),
        feature_dims=(FINE, COARSE),
        num_labels=NUM_LABELS,
        dim=DIM,
        num_layers=num_layers,
        num_heads=HEADS,
        ffn_dim=5,
        top_share=top_share,
        structure_weight=0.7,
        attends_to=attends_to,
    )
    for tensor in (*head.graph.norm.parameters(), *head.graph.norm.buffers()):
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.5, 1.5)
    return head.double().eval()


def make_maps(batch=3):
    generator = torch.Generator().manual_seed(1)
    shapes = {"fine": (batch, FINE, 10, 12), "coarse": (batch, COARSE, 5, 6)}
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in shapes.items()
    }


def make_masks():
    masks = {"fine": torch.zeros(3, 1, 10, 12), "coarse": torch.zeros(3, 1, 5, 6)}
    for i, (fine, coarse) in enumerate(SIZES):
        masks["fine"][i, :, : fine[0], : fine[1]] = 1
        masks["coarse"][i, :, : coarse[0], : coarse[1]] = 1
    return {name: mask.bool() for name, mask in masks.items()}


def cut_out(maps):
    """The maps of each image by itself, without padding."""
    names = ("fine", "coarse")
    return [
        {name: maps[name][i : i + 1, :, :h, :w] for name, (h, w) in zip(names, sizes)}
        for i, sizes in enumerate(SIZES)
    ]


def run(head, maps, masks=None):
    return head(maps, masks or dict.fromkeys(maps))


def layer(encoder, tokens):
    """A layer of the encoder on tokens (P, K)."""
    attention = encoder.self_attn
    weights, biases = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
    q, k, v = (tokens @ w.T + b for w, b in zip(weights, biases))
    size, heads = DIM // HEADS, []
    for first in range(0, DIM, size):
        own = slice(first, first + size)
        heads.append((q[:, own] @ k[:, own].T / math.sqrt(size)).softmax(1) @ v[:, own])
    tokens = encoder.norm1(tokens + attention.out_proj(torch.cat(heads, 1)))
    hidden = encoder.linear1(tokens)
    hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
    return encoder.norm2(tokens + encoder.linear2(hidden))


def corners(x, size):
    return F.interpolate(x, size, mode="bilinear", align_corners=True)


def literal_outputs(head, maps):
    """Of one image, without padding."""
    fine, coarse = maps["fine"], maps["coarse"]
    height, width = coarse.shape[2:]
    filled = F.pad(coarse, (0, max(0, 3 - width), 0, max(0, 3 - height)))
    three = [head.fine(fine), head.coarse(coarse), head.halved(filled)]
    sizes = [x.shape[2:] for x in three]
    large = [corners(x, sizes[0]) for x in three]
    product = large[0] * large[1] * large[2]
    three = [corners(x + product, size) for x, size in zip(large, sizes)]
    tokens = [x[0].flatten(1).T for x in three]
    for encoder in head.encoder:
        tokens = [layer(encoder, x) for x in tokens]
    structure = head.structure_classifier(torch.cat([x.amax(0) for x in tokens]))

    scores = head.activations(coarse)[0].flatten(1)
    cells = height * width
    top = scores.sort(dim=1, descending=True).values[:, : max(1, round(head.top_share * cells))]
    shares = scores.sigmoid()
    nodes = shares @ head.node_transform(coarse)[0].flatten(1).T
    nodes = torch.cat([nodes, head.guide_transform(shares @ tokens[1])], 1)
    graph, norm = head.graph, head.graph.norm
    x = graph.context(torch.cat([x.mean(0) for x in tokens]))
    x = (x - norm.running_mean) / (norm.running_var + 1e-5).sqrt() * norm.weight + norm.bias
    x = F.leaky_relu(x, 0.2)
    edges = torch.stack([graph.edges(torch.cat([x, node])).sigmoid() for node in nodes])
    mixed = F.leaky_relu(graph.transform(F.leaky_relu(edges @ nodes, 0.2)), 0.2)
    own = ((nodes + mixed) * head.readout.weight[:, :, 0]).sum(1) + head.readout.bias
    return {
        "logits": 0.7 * structure + 0.3 * own,
        "structure": structure,
        "graph": own,
        "activation": top.mean(1),
    }


def test_outputs_are_those_of_the_equations():
    head, maps = make_head(), make_maps()
    outputs = run(head, maps, make_masks())
    found = {"logits": outputs["logits"], **outputs["aux_logits"]}
    for i, own in enumerate(cut_out(maps)):
        for name, expected in literal_outputs(head, own).items():
            torch.testing.assert_close(found[name][i], expected)
        alone = run(head, own)
        torch.testing.assert_close(alone["logits"][0], outputs["logits"][i])
        torch.testing.assert_close(alone["aux_logits"]["graph"][0], found["graph"][i])
    assert outputs["attention"].shape == (3, NUM_LABELS, 5, 6)


def test_what_the_mask_leaves_out_has_no_effect_and_no_gradient():
    head, maps, masks = make_head(), make_maps(), make_masks()
    expected = run(head, maps, masks)
    other = {name: torch.where(masks[name], maps[name], 1e3).requires_grad_() for name in maps}
    outputs = run(head, other, masks)
    torch.testing.assert_close(outputs["logits"], expected["logits"])
    (outputs["logits"] + sum(outputs["aux_logits"].values())).sum().backward()
    for name, values in other.items():
        inside = masks[name].expand_as(values)
        assert not values.grad[~inside].any()
        assert values.grad[inside].all()


def test_gradients():
    head, maps = (
        make_head(num_layers=1),
        {name: x[:1, :, :5, :5] for name, x in make_maps().items()},
    )
    names, weights = zip(*head.named_parameters())

    def outputs(fine, coarse, *weights):
        maps = {"fine": fine, "coarse": coarse}
        arguments = maps, dict.fromkeys(maps)
        outputs = torch.func.functional_call(head, dict(zip(names, weights)), arguments)
        # Beside the graph's, whose guides have no gradient.
        return outputs["aux_logits"]["structure"], outputs["aux_logits"]["activation"]

    inputs = [x.clone().requires_grad_() for x in maps.values()] + list(weights)
    assert torch.autograd.gradcheck(outputs, inputs, fast_mode=True)


def test_the_graph_does_not_train_the_encoder():
    head, maps = make_head(), make_maps()
    run(head, maps)["aux_logits"]["graph"].sum().backward()
    trained = {name for name, parameter in head.named_parameters() if parameter.grad is not None}
    parts = ("activations", "node_transform", "guide_transform", "graph", "readout")
    assert {name.split(".")[0] for name in trained} == set(parts)


# ------------------------------------------------------------------------- attention to the batch


def test_as_published_a_cell_attends_to_the_same_cell_of_the_other_images():
    head, maps = make_head("batch", num_layers=1), make_maps()
    x = torch.randn(3, DIM, 2, 2, dtype=torch.float64)
    found = head.encode(x, None)
    for y in range(2):
        for column in range(2):
            expected = layer(head.encoder[0], x[:, :, y, column])
            torch.testing.assert_close(found[:, :, y, column], expected)
    alone = run(head, {name: values[:1] for name, values in maps.items()})["logits"]
    assert (run(head, maps)["logits"][:1] - alone).abs().max() > 1e-3


def test_attention_to_the_batch_is_for_evaluation_alone():
    head = make_head("batch")
    with pytest.raises(InputError, match=r"MODEL\.TDRG\.ATTENTION batch needs images of one size"):
        run(head, make_maps(), make_masks())
    with pytest.raises(InputError, match=r"MODEL\.TDRG\.ATTENTION batch is for the evaluation"):
        run(head.train(), make_maps())


# ------------------------------------------------------------------------------------- its parts


def test_resizing_with_masks_is_torchs_of_each_image():
    maps, masks = make_maps(), make_masks()
    found = resize(maps["coarse"], masks["coarse"], maps["fine"], masks["fine"])
    assert found.shape == (3, COARSE, 10, 12)
    for own, own_found, (size, _) in zip(cut_out(maps), found, SIZES):
        expected = corners(own["coarse"], size)[0]
        torch.testing.assert_close(own_found[:, : size[0], : size[1]], expected)
    assert not found[~masks["fine"].expand_as(found)].any()


def test_maps_strengthen_what_they_have_in_common():
    maps = [torch.full((1, 1, n, n), float(n)) for n in (3, 2, 1)]
    found = cross_scale_attention(maps, [None] * 3)
    assert [x.unique().tolist() for x in found] == [[9], [8], [7]]


def test_top_mean_is_of_a_share_of_the_valid_cells():
    scores = torch.arange(12.0).view(1, 1, 3, 4).repeat(2, 1, 1, 1)
    mask = torch.ones(2, 1, 3, 4, dtype=torch.bool)
    mask[1, :, :, 2:] = False
    assert masked_top_mean(scores, 0.25, None).tolist() == [[10], [10]]
    # Of 8, 4, 0 on the left and 9, 5, 1 beside them: the highest 0.25 · 6, rounded to 2.
    assert masked_top_mean(scores, 0.25, mask).tolist() == [[10], [8.5]]
    assert masked_top_mean(scores, 0.0, mask).tolist() == [[11], [9]]


# --------------------------------------------------------------------------------- from a config


def test_a_head_from_a_config_has_the_published_size():
    cfg = make_cfg("TDRGHead", num_labels=80)
    shapes = {
        name: shape._replace(channels=c) for (name, shape), c in zip(SHAPES.items(), (1024, 2048))
    }
    cfg.MODEL.LABEL_HEAD.IN_FEATURES = ["res5", "res4"]
    with torch.device("meta"):
        head = build_label_head(cfg, shapes)
    assert head.in_features == ("res4", "res5")
    size = sum(parameter.numel() for parameter in head.parameters())
    # Beside the 42.50 M of a ResNet-101 without its classifier.
    assert (size + 42.50e6) / 1e6 == pytest.approx(68, abs=1.5)


def test_channels_are_divided_among_the_heads():
    cfg = make_cfg("TDRGHead")
    cfg.MODEL.LABEL_HEAD.IN_FEATURES = ["res4", "res5"]
    cfg.MODEL.TDRG.NUM_HEADS = 3
    with pytest.raises(InputError, match=r"MODEL\.TDRG\.DIM 512"):
        build_label_head(cfg, SHAPES)


def test_it_reads_two_maps():
    with pytest.raises(
        InputError, match=r"IN_FEATURES: TDRGHead reads two feature maps.* not res5"
    ):
        build_label_head(make_cfg("TDRGHead"), SHAPES)
