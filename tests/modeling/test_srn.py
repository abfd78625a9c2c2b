"""SRN's head against loops written from its paper; maps of any size on its grid."""

import math

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from torch import nn

from ia_gcn import add_ia_gcn_config
from ia_gcn.errors import InputError
from ia_gcn.modeling import SRNHead, build_label_head
from ia_gcn.modeling.label_heads.srn import to_grid

NUM_LABELS, HIDDEN = 3, 2


def make_head(grid_size=3):
    torch.manual_seed(0)
    head = SRNHead(
        attention_feature="fine",
        global_feature="deep",
        attention_dim=4,
        feature_dim=5,
        num_labels=NUM_LABELS,
        hidden_dim=HIDDEN,
        grid_size=grid_size,
    )
    for parameter in head.parameters():
        nn.init.normal_(parameter, std=0.7)
    return head.double()


def make_maps(batch=2, height=3, width=3):
    generator = torch.Generator().manual_seed(1)
    fine = torch.randn(batch, 4, height, width, generator=generator, dtype=torch.float64)
    deep = torch.randn(batch, 5, 2, 2, generator=generator, dtype=torch.float64)
    return {"fine": fine, "deep": deep}


NO_MASKS = {"fine": None, "deep": None}


def affine(layer, x):
    weight = layer.weight.flatten(1).tolist()
    bias = [0.0] * len(weight) if layer.bias is None else layer.bias.tolist()
    return [sum(w * v for w, v in zip(row, x)) + b for row, b in zip(weight, bias)]


def relu(x):
    return [max(0.0, v) for v in x]


def loop_logits(head, fine, deep):
    """ŷ, and the auxiliary logits, of one image whose finer map is as large as the grid."""
    cells = {(y, x): fine[:, y, x].tolist() for y in range(3) for x in range(3)}
    hidden = {place: relu(affine(head.reduction, cell)) for place, cell in cells.items()}
    context, _, score = head.attention
    scores = {}
    for y, x in cells:
        around = []
        for channel in range(HIDDEN):
            for dy in (-1, 0, 1):
                for dx in (-1, 0, 1):
                    around.append(hidden.get((y + dy, x + dx), [0.0] * HIDDEN)[channel])
        scores[y, x] = affine(score, relu(affine(context, around)))
    confidence = {place: affine(head.confidence, cell) for place, cell in cells.items()}
    u, attention = {place: [] for place in cells}, []
    for label in range(NUM_LABELS):
        total = sum(math.exp(s[label]) for s in scores.values())
        summed = 0.0
        for place in cells:
            share, s = math.exp(scores[place][label]) / total, confidence[place][label]
            summed += share * s
            u[place].append(share / (1 + math.exp(-s)))
        attention.append(summed)
    first, _, second, _, third, _, _, last = head.regularization
    hidden = {p: relu(affine(second, relu(affine(first, value)))) for p, value in u.items()}
    filtered = []
    for i, (kernel, bias) in enumerate(zip(third.weight.tolist(), third.bias.tolist())):
        # Four filters on each channel.
        total = sum(kernel[0][y][x] * hidden[y, x][i // 4] for y, x in cells)
        filtered.append(max(0.0, total + bias))
    regularized = affine(last, filtered)
    of_image = affine(head.classifier, deep.mean(dim=(1, 2)).tolist())
    fused = [0.5 * a + 0.5 * b for a, b in zip(of_image, regularized)]
    return fused, of_image, attention, regularized


@torch.no_grad()
def test_logits_are_those_of_the_loops():
    head, maps = make_head(), make_maps()
    outputs = head(maps, NO_MASKS)
    aux = outputs["aux_logits"]
    found = [outputs["logits"], aux["global"], aux["attention"], aux["regularization"]]
    for i in range(2):
        expected = loop_logits(head, maps["fine"][i], maps["deep"][i])
        np.testing.assert_allclose([values[i].tolist() for values in found], expected)
    torch.testing.assert_close(
        outputs["attention"].sum(dim=(2, 3)), torch.ones(2, NUM_LABELS).double()
    )


@pytest.mark.parametrize("size", [(3, 3), (5, 7), (2, 1)])
@torch.no_grad()
def test_padding_has_no_effect(size):
    head, maps = make_head(), make_maps(1, *size)
    expected = head(maps, NO_MASKS)
    padded = {name: nn.functional.pad(x, (0, 3, 0, 2), value=1e3) for name, x in maps.items()}
    masks = {}
    for name, x in maps.items():
        masks[name] = torch.zeros(1, 1, *padded[name].shape[2:], dtype=torch.bool)
        masks[name][..., : x.shape[2], : x.shape[3]] = True
    found = head(padded, masks)
    torch.testing.assert_close(found["logits"], expected["logits"])
    torch.testing.assert_close(found["aux_logits"], expected["aux_logits"])
    cut = found["attention"][..., : size[0], : size[1]]
    torch.testing.assert_close(cut, expected["attention"])
    assert found["attention"].sum() == pytest.approx(NUM_LABELS)


@pytest.mark.parametrize(("height", "width"), [(4, 4), (1, 1), (2, 9), (8, 12), (5, 3)])
def test_a_grid_gets_the_mass_that_lies_in_its_cells(height, width):
    mass = torch.rand(1, 1, height, width).double()
    found = to_grid(mass, None, 4)[0, 0]
    # Each cell as 4 × 4 points, so that the grid's borders are borders of points.
    points = mass.repeat_interleave(4, 2).repeat_interleave(4, 3) / 16
    expected = points.view(4, height, 4, width).sum(dim=(1, 3))
    torch.testing.assert_close(found, expected)
    if (height, width) == (4, 4):
        assert found.equal(mass[0, 0])


def test_gradients():
    head, maps = make_head(), make_maps(1, 2, 4)

    def logits(fine, deep):
        return head({"fine": fine, "deep": deep}, NO_MASKS)["logits"]

    assert torch.autograd.gradcheck(logits, [x.requires_grad_() for x in maps.values()])


def make_cfg(*opts):
    cfg = get_cfg()
    add_ia_gcn_config(cfg)
    options = ["MODEL.LABEL_HEAD.NAME", "SRNHead", "MODEL.LABEL_HEAD.NUM_LABELS", NUM_LABELS]
    cfg.merge_from_list([*options, *opts])
    return cfg


SHAPES = {"res4": ShapeSpec(channels=4, stride=16), "res5": ShapeSpec(channels=5, stride=32)}


@torch.no_grad()
def test_a_head_from_a_config():
    opts = ["MODEL.LABEL_HEAD.IN_FEATURES", ["res4", "res5"]]
    opts += ["MODEL.SRN.HIDDEN_DIM", HIDDEN, "MODEL.SRN.GRID_SIZE", 3]
    head = build_label_head(make_cfg(*opts), SHAPES).double()
    head.load_state_dict(make_head().state_dict())
    maps = make_maps()
    found = head(dict(zip(SHAPES, maps.values())), dict.fromkeys(SHAPES))
    assert found["logits"].equal(make_head()(maps, NO_MASKS)["logits"])


def test_two_maps_must_be_named():
    with pytest.raises(InputError, match=r"IN_FEATURES: SRNHead reads two .* not res5"):
        build_label_head(make_cfg(), SHAPES)
