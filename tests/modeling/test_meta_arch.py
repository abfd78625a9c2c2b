from functools import cache

import pytest
import torch
import torch.nn.functional as F
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone, build_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ia_gcn.errors import InputError
from ia_gcn.modeling import (
    LABEL_HEAD_REGISTRY,
    NOT_COUNTED,
    AssumeNegativeLoss,
    LabelHead,
    MultiLabelRecognizer,
)
from tests.helpers.heads import fill
from tests.helpers.recognizers import NUM_LABELS, logits_of, make_cfg, make_inputs

POOLINGS = ["max", "mean", "gem"]
HEADS = [
    *("LinearHead", "GCNHead", "CSRAHead", "MLDecoderHead", "Query2LabelHead", "CTranHead"),
    *("ADDGCNHead", "RecurrentHead", "SSGRLHead", "KGGR", "SALGLHead", "TDRGHead", "SRNHead"),
]


class LocalBackbone(Backbone):
    """No cell sees a pixel of another; the features have both signs."""

    def __init__(self, cfg, input_shape):
        super().__init__()
        self.projection = nn.Conv2d(input_shape.channels, 8, 1)

    def output_shape(self):
        return {
            "res4": ShapeSpec(channels=8, stride=16),
            "res5": ShapeSpec(channels=8, stride=32),
        }


@BACKBONE_REGISTRY.register()
class CellBackbone(LocalBackbone):
    """Means over squares of pixels, of a batch that is padded to multiples of 32."""

    @property
    def size_divisibility(self):
        return 32

    def forward(self, x):
        x = self.projection(x)
        return {name: F.avg_pool2d(x, shape.stride) for name, shape in self.output_shape().items()}


@BACKBONE_REGISTRY.register()
class PointBackbone(LocalBackbone):
    """Every 16th and 32nd pixel, of any size, as a ResNet's cells lie."""

    def forward(self, x):
        x = self.projection(x)
        strides = {name: shape.stride for name, shape in self.output_shape().items()}
        return {name: x[:, :, ::stride, ::stride] for name, stride in strides.items()}


def make_slim_resnet_cfg(head="LinearHead"):
    cfg = make_cfg("build_resnet_backbone", head=head)
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.RESNETS.NORM = "BN"
    cfg.MODEL.RESNETS.OUT_FEATURES = list(cfg.MODEL.LABEL_HEAD.IN_FEATURES) or ["res5"]
    cfg.MODEL.RESNETS.STEM_OUT_CHANNELS = 8
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 16
    cfg.MODEL.RESNETS.WIDTH_PER_GROUP = 4
    return cfg


def make_model(cfg, seed=0):
    torch.manual_seed(seed)
    return build_model(cfg)


@cache
def make_filled_model(backbone, head, pooling="max"):
    """In evaluation and float64, with statistics of labels."""
    resnet = backbone == "build_resnet_backbone"
    model = make_model(make_slim_resnet_cfg(head) if resnet else make_cfg(backbone, pooling, head))
    if model.label_graph is not None:
        fill(model.label_graph)
    if head == "SALGLHead":
        model.label_head.pair_counts.random_(9)
    return model.double().eval()


# What comes out


@pytest.mark.parametrize("head", ["LinearHead", "GCNHead"])
def test_evaluation_returns_scores_and_logits_per_image(head):
    model = make_model(make_slim_resnet_cfg(head)).eval()
    assert isinstance(model, MultiLabelRecognizer)
    with torch.no_grad():
        outputs = model(make_inputs([(64, 64), (40, 70), (64, 33)]))
    assert len(outputs) == 3
    for output in outputs:
        assert output["scores"].shape == output["logits"].shape == (NUM_LABELS,)
        torch.testing.assert_close(output["scores"], 1 / (1 + (-output["logits"]).exp()))


def test_training_returns_the_loss():
    model = make_model(make_cfg("CellBackbone"))
    inputs = make_inputs([(64, 64), (32, 70), (50, 64)], labels=True)
    losses = model.train()(inputs)
    assert list(losses) == ["loss_multi_label"]
    # No part of this model behaves otherwise in training than in evaluation.
    scores = logits_of(model, inputs).double().sigmoid()
    targets = torch.stack([x["labels"] for x in inputs])
    likelihood = (targets == 1) * scores.log() + (targets == 0) * (1 - scores).log()
    assert (targets == -1).any()
    assert losses["loss_multi_label"].item() == pytest.approx(-likelihood.mean().item(), rel=1e-5)
    losses["loss_multi_label"].backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())


# No image changes another's result.


SIDES = st.integers(1, 100)


@st.composite
def batches(draw):
    """Sizes of images, and their indices in random order, in one or two batches."""
    sizes = draw(st.lists(st.tuples(SIDES, SIDES), min_size=2, max_size=4))
    order = draw(st.permutations(range(len(sizes))))
    split = draw(st.integers(1, len(sizes)))
    return sizes, [batch for batch in (order[:split], order[split:]) if batch]


@pytest.mark.parametrize(
    ("head", "pooling"),
    [
        *(("LinearHead", pooling) for pooling in POOLINGS),
        *((head, "max") for head in HEADS[1:]),
    ],
)
@pytest.mark.parametrize("backbone", ["CellBackbone", "PointBackbone"])
@settings(max_examples=10)
@given(batches())
@torch.no_grad()
def test_images_of_different_sizes_keep_to_themselves(backbone, head, pooling, sizes_and_batches):
    model = make_filled_model(backbone, head, pooling)
    sizes, batches = sizes_and_batches
    inputs = make_inputs(sizes)
    for batch in batches:
        for i, output in zip(batch, model([inputs[i] for i in batch])):
            (alone,) = model([inputs[i]])
            torch.testing.assert_close(output["logits"], alone["logits"])
            if model.has_attention:
                attention = torch.zeros_like(output["attention"])
                _, height, width = alone["attention"].shape
                attention[:, :height, :width] = alone["attention"]
                torch.testing.assert_close(output["attention"], attention)


@pytest.mark.parametrize("head", HEADS)
def test_images_of_one_size_keep_to_themselves_in_a_resnet(head):
    model = make_filled_model("build_resnet_backbone", head)
    inputs = make_inputs([(64, 96)] * 4)
    logits = logits_of(model, inputs)
    assert (logits[0] - logits[1]).abs().max() > 0.01
    for i, x in enumerate(inputs):
        torch.testing.assert_close(logits_of(model, [x])[0], logits[i])
    backwards = logits_of(model, inputs[::-1]).flip(0)
    torch.testing.assert_close(backwards, logits)


# What goes in


def test_bytes_and_floats_give_the_same():
    model = make_model(make_cfg("CellBackbone"))
    inputs = make_inputs([(64, 64), (40, 50)])
    as_floats = [{"image": x["image"].float()} for x in inputs]
    assert logits_of(model, as_floats).equal(logits_of(model, inputs))


def test_pixels_are_normalised_channel_by_channel():
    cfg = make_cfg("CellBackbone", "mean")
    cfg.MODEL.PIXEL_MEAN = [10.0, 100.0, 200.0]
    cfg.MODEL.PIXEL_STD = [5.0, 50.0, 100.0]
    model = make_model(cfg)
    (x,) = make_inputs([(64, 32)])
    channels = [
        (channel.double() - mean) / std
        for channel, mean, std in zip(x["image"], [10, 100, 200], [5, 50, 100])
    ]
    mean_pixel = torch.stack(channels).mean(dim=(1, 2)).float()
    # All that follows is linear.
    weight, bias = model.backbone.projection.weight[:, :, 0, 0], model.backbone.projection.bias
    expected = model.label_head.classifier(weight @ mean_pixel + bias)
    torch.testing.assert_close(logits_of(model, [x])[0], expected, rtol=1e-4, atol=1e-5)


def test_padding_has_the_colour_of_the_mean():
    model = make_model(make_cfg("CellBackbone"))
    inputs = make_inputs([(64, 64), (20, 40)])
    images = model.preprocess_image(inputs)
    assert images.tensor.shape == (2, 3, 64, 64)
    assert not images.tensor[1, :, 20:].any()
    assert not images.tensor[1, :, :, 40:].any()
    assert [tuple(size) for size in images.image_sizes] == [(64, 64), (20, 40)]


def test_inputs_are_left_alone():
    (x,) = make_inputs([(64, 64)], labels=True)
    x["image"] = x["image"].float()
    before = {key: value.clone() for key, value in x.items()}
    model = make_model(make_cfg("CellBackbone"))
    model.train()([x])
    logits_of(model, [x])
    assert x.keys() == before.keys()
    assert all(x[key].equal(value) for key, value in before.items())


def test_another_feature_map_can_be_read():
    cfg = make_slim_resnet_cfg()
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res3", "res5"]
    cfg.MODEL.LABEL_HEAD.IN_FEATURES = ["res3"]
    model = make_model(cfg)
    assert model.label_head.classifier.in_features == 32
    assert logits_of(model, make_inputs([(64, 64)])).shape == (1, NUM_LABELS)


# How it is built


@pytest.mark.parametrize("head", ["LinearHead", "GCNHead"])
def test_a_model_without_labels_is_refused(head):
    cfg = make_cfg("CellBackbone", head=head)
    cfg.MODEL.LABEL_HEAD.NUM_LABELS = 0
    with pytest.raises(InputError, match=r"MODEL\.LABEL_HEAD\.NUM_LABELS"):
        build_model(cfg)


def test_building_reads_no_data():
    cfg = make_cfg("CellBackbone", head="GCNHead")
    cfg.DATASETS.TRAIN = ("no_such_data_set",)
    cfg.DATASETS.TEST = ("no_such_data_set",)
    cfg.MODEL.LABEL_EMBEDDINGS.SOURCE = "no/such/file.txt"
    cfg.MODEL.WEIGHTS = "no/such/weights.pth"
    assert make_model(cfg).label_graph.is_bare


def test_a_checkpoint_is_complete_in_itself():
    cfg = make_cfg("CellBackbone", "gem", head="GCNHead")
    model, restored = make_model(cfg, seed=0), make_model(cfg, seed=1)
    pair_counts = torch.tensor([[9, 8, 1], [8, 9, 0], [1, 0, 9]]).repeat(2, 2)[:5, :5]
    model.label_graph.fill(pair_counts.diag(), pair_counts, torch.randn(5, 300))
    inputs = make_inputs([(64, 64), (32, 64)])
    expected = logits_of(model, inputs)
    assert not torch.allclose(logits_of(restored, inputs), expected)
    restored.load_state_dict(model.state_dict())
    assert logits_of(restored, inputs).equal(expected)


# What a head gets beside the feature maps


class ContextHead(LabelHead):
    """Keeps what it was given."""

    in_features = ("res5",)

    def __init__(self, cfg, input_shape):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(NUM_LABELS))

    def forward(self, features, masks, **context):
        self.context = context
        return {"logits": features["res5"].mean() + self.bias.expand(len(features["res5"]), -1)}


def context_model(monkeypatch, uses=(), needs=(), **changes):
    kind = type("Kind", (ContextHead,), {"uses": frozenset(uses), "needs": frozenset(needs)})
    monkeypatch.setitem(LABEL_HEAD_REGISTRY._obj_map, "Kind", kind)
    cfg = make_cfg("CellBackbone", head="Kind")
    for key, value in changes.items():
        setattr(cfg.MODEL, key, value)
    return make_model(cfg)


def test_a_head_that_asks_for_nothing_gets_nothing(monkeypatch):
    model = context_model(monkeypatch)
    logits_of(model, make_inputs([(64, 64)]))
    assert model.label_head.context == {}
    assert model.label_graph is None


def test_label_embeddings_come_without_counts(monkeypatch):
    model = context_model(monkeypatch, needs={"label_embeddings"})
    assert list(model.label_graph.state_dict()) == ["embeddings"]
    assert model.label_graph.is_bare
    embeddings = torch.randn(NUM_LABELS, 300)
    model.label_graph.fill(None, None, embeddings)
    assert not model.label_graph.is_bare
    logits_of(model, make_inputs([(64, 64)]))
    assert model.label_head.context["label_embeddings"].equal(embeddings)
    restored = context_model(monkeypatch, needs={"label_embeddings"})
    restored.load_state_dict(model.state_dict())
    assert not restored.label_graph.is_bare


def test_label_states_are_those_of_the_inputs_and_else_unknown(monkeypatch):
    model = context_model(monkeypatch, uses={"label_states"})
    inputs = make_inputs([(64, 64), (64, 64)])
    logits_of(model, inputs)
    assert model.label_head.context["label_states"].tolist() == [[-1] * NUM_LABELS] * 2
    inputs[1]["label_states"] = [1, 0, -1, -1, 0]
    logits_of(model, inputs)
    expected = [[-1] * NUM_LABELS, [1, 0, -1, -1, 0]]
    assert model.label_head.context["label_states"].tolist() == expected


def test_what_a_head_is_told_does_not_count_in_the_loss(monkeypatch):
    model = context_model(monkeypatch, uses={"label_states"}).train()
    inputs = make_inputs([(64, 64), (64, 64)], labels=True)
    ignored = [{**x, "labels": x["labels"].clone()} for x in inputs]
    inputs[0]["label_states"] = [1, 0, -1, -1, 0]
    ignored[0]["labels"][[0, 1, 4]] = -1
    assert model(inputs)["loss_multi_label"] == model(ignored)["loss_multi_label"]
    # Nor as a label that is unknown, which some losses take as absent.
    model.criterion.loss = AssumeNegativeLoss()
    told = model(inputs)["loss_multi_label"]
    ignored[0]["labels"][[0, 1, 4]] = NOT_COUNTED
    assert told == model(ignored)["loss_multi_label"]
    # A head that knows nothing of it learns from all labels.
    model = context_model(monkeypatch).train()
    assert model(inputs)["loss_multi_label"] != model(ignored)["loss_multi_label"]


def test_label_mask_training_of_a_head_that_makes_no_use_of_it_is_refused():
    cfg = make_cfg("CellBackbone")
    cfg.INPUT.KNOWN_LABELS = 0.5
    with pytest.raises(InputError, match=r"INPUT\.KNOWN_LABELS is 0\.5.*NAME LinearHead makes no"):
        make_model(cfg)
    cfg.MODEL.LABEL_HEAD.NAME = "CTranHead"
    make_model(cfg)


def test_a_head_whose_needs_cannot_be_met_is_refused_with_both_keys(monkeypatch):
    with pytest.raises(InputError) as caught:
        context_model(monkeypatch, needs={"presence"})
    message = str(caught.value)
    assert "MODEL.LABEL_HEAD.NAME: Kind needs presence" in message
    assert "MODEL.META_ARCHITECTURE MultiLabelRecognizer does not have" in message


def test_a_head_that_could_use_presence_does_without(monkeypatch):
    model = context_model(monkeypatch, uses={"presence"})
    logits_of(model, make_inputs([(64, 64)]))
    assert model.label_head.context == {}
