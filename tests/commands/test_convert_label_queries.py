"""Checkpoints of ML-Decoder, Query2Label and CSRA in their published layouts, and after conversion.

The networks that they are of are put together here, from timm's, torchvision's and torch's parts.
"""

import math

import numpy as np
import pytest
import timm
import torch
import torchvision
from timm.layers.ml_decoder import MLDecoder
from torch import nn
from torch.nn import functional as F

from ia_gcn import MultiLabelPredictor
from ia_gcn.checkpoint.conversion import convert_checkpoint
from ia_gcn.data.datasets import COCO_LABELS, VOC_LABELS
from ia_gcn.errors import InputError
from tests.helpers.checkpoints import original_layout, randomize

IMAGES = torch.randint(
    256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
)


@pytest.fixture
def convert(tmp_path, monkeypatch, repository):
    """A function that converts a file's content: (predictor of the result, what was reported)."""
    monkeypatch.chdir(repository)

    def run(content, format, **arguments):
        source, output, said = tmp_path / "source.pth", tmp_path / "model.pth", []
        torch.save(content, source)
        convert_checkpoint(source, format, output, report=said.append, **arguments)
        return MultiLabelPredictor(output, device="cpu", optimize=False), "\n".join(said)

    return run


def logits_of(predictor):
    with torch.no_grad():
        outputs = predictor.model([{"image": image} for image in IMAGES])
    return torch.stack([output["logits"] for output in outputs])


def imagenet(images):
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    return (images / 255 - mean) / std


def assert_same(found, expected):
    assert expected.std() > 0.05
    assert (expected[0] - expected[1]).abs().max() > 1e-4
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


# ----------------------------------------------------------------------------------- ML-Decoder


@pytest.fixture(scope="module")
def tresnet():
    """timm's TResNet-M, and its tensors as its authors' code has them."""
    torch.manual_seed(0)
    network = randomize(timm.create_model("tresnet_m", num_classes=0))
    return network, original_layout(network.state_dict())


def ml_decoder(num_labels, groups=100):
    """timm's head, and its tensors as the authors' code has them."""
    torch.manual_seed(1)
    head = randomize(MLDecoder(num_labels, groups, initial_num_features=2048))
    head.decoder.forward = head.decoder.layers[0].forward
    state = {}
    for name, tensor in head.state_dict().items():
        state[f"head.decoder.{name.removeprefix('decoder.')}"] = tensor
    return head, state


@torch.no_grad()
def expected_logits(tresnet, head):
    return head(tresnet.forward_features(IMAGES / 255))


@pytest.mark.slow
@pytest.mark.parametrize("prefix", ["", "module."])
def test_ml_decoder_gives_the_same_logits_by_label(convert, tresnet, prefix):
    network, body = tresnet
    head, own = ml_decoder(80)
    state = {f"{prefix}{name}": tensor for name, tensor in {**body, **own}.items()}
    names = sorted(COCO_LABELS)
    predictor, said = convert(
        {"model": state, "idx_to_class": dict(enumerate(names))}, "ml_decoder"
    )
    assert predictor.label_names == COCO_LABELS
    assert "labels: person, bicycle, car ...; reordered" in said
    assert "label_head.readout (2)" in said
    assert predictor.cfg.DATASETS.TEST == ("coco_2014_val_multilabel",)
    assert predictor.cfg.MODEL.ML_DECODER.NUM_GROUPS == 80
    expected = expected_logits(network, head)
    assert_same(logits_of(predictor), expected[:, [names.index(name) for name in COCO_LABELS]])


@pytest.mark.slow
def test_labels_of_a_group_stay_where_they_are(convert, tresnet):
    """Ten groups of COCO's labels, sorted: each query has eight labels, which can't be parted."""
    network, body = tresnet
    head, own = ml_decoder(80, groups=10)
    content = {"model": {**body, **own}, "idx_to_class": dict(enumerate(sorted(COCO_LABELS)))}
    predictor, _ = convert(content, "ml_decoder")
    assert predictor.label_names == sorted(COCO_LABELS)
    assert predictor.cfg.MODEL.ML_DECODER.NUM_GROUPS == 10
    assert_same(logits_of(predictor), expected_logits(network, head))


class Shared(nn.Module):
    """timm's head with queries of words and one classifier for all labels."""

    def __init__(self, words):
        super().__init__()
        torch.manual_seed(2)
        self.head = randomize(MLDecoder(len(words), initial_num_features=2048))
        self.words = words
        self.wordvec_proj = randomize(nn.Linear(300, 768))
        self.classifier = torch.randn(768, 1) / 30
        self.bias = torch.tensor([0.3])

    def forward(self, features):
        tokens = F.relu(self.head.embed_standart(features.flatten(2).mT))
        queries = F.relu(self.wordvec_proj(self.words))[:, None].expand(-1, len(tokens), -1)
        outputs = self.head.decoder.layers[0](queries, tokens.transpose(0, 1))
        return (outputs @ self.classifier)[..., 0].T + self.bias

    def published(self):
        layer = self.head.decoder.layers[0].state_dict()
        embed = self.head.embed_standart.state_dict()
        return {
            **{f"head.decoder.embed_standart.{name}": x for name, x in embed.items()},
            **{f"head.decoder.layers.0.{name}": x for name, x in layer.items()},
            **{f"head.wordvec_proj.{n}": x for n, x in self.wordvec_proj.state_dict().items()},
            "head.decoder.duplicate_pooling": self.classifier,
            "head.decoder.duplicate_pooling_bias": self.bias,
        }


@pytest.mark.slow
def test_a_shared_classifier_goes_with_given_labels_and_words(convert, tresnet, tmp_path):
    network, body = tresnet
    head = Shared(torch.randn(4, 300))
    content = {"model": {**body, **head.published()}}
    (tmp_path / "labels.txt").write_text("zebra\nlake\nroad\nsky\n")
    np.save(tmp_path / "words.npy", head.words.numpy())
    given = {"labels": tmp_path / "labels.txt", "embeddings": tmp_path / "words.npy"}
    predictor, _ = convert(content, "ml_decoder", **given)
    assert predictor.label_names == ["zebra", "lake", "road", "sky"]
    assert predictor.cfg.MODEL.ML_DECODER.READOUT == "shared"
    assert_same(logits_of(predictor), expected_logits(network, head))
    with pytest.raises(InputError, match="share a classifier: --labels must name"):
        convert(content, "ml_decoder")


# ---------------------------------------------------------------------------------- Query2Label


class PublishedQuery2Label(nn.Module):
    """The published layout, without self-attention of the queries, on a torchvision ResNet-18."""

    def __init__(self, num_labels, dim=512, project=False):
        super().__init__()
        resnet = randomize(torchvision.models.resnet18())
        stages = [(n, m) for n, m in resnet.named_children() if n not in ("avgpool", "fc")]
        self.backbone = nn.ModuleList([nn.Module(), nn.Module()])
        self.backbone[0].body = nn.Sequential()
        for name, stage in stages:
            self.backbone[0].body.add_module(name, stage)
        self.backbone[1].register_buffer("pe", positions(2, 2, dim))
        self.transformer = nn.ModuleDict({"encoder": nn.Module(), "decoder": nn.Module()})
        encoder, decoder = self.transformer["encoder"], self.transformer["decoder"]
        encoder.layers = nn.ModuleList([nn.TransformerEncoderLayer(dim, 4, 24, 0.0)])
        decoder.layers = nn.ModuleList(decoder_layer(dim) for _ in range(2))
        decoder.norm = nn.LayerNorm(dim)
        self.query_embed = nn.Embedding(num_labels, dim)
        self.input_proj = nn.Conv2d(512, dim, 1) if project else nn.Identity()
        self.fc = nn.Module()
        self.fc.W = nn.Parameter(torch.randn(1, num_labels, dim) / math.sqrt(dim))
        self.fc.b = nn.Parameter(torch.randn(1, num_labels))

    def forward(self, images):
        features = self.input_proj(self.backbone[0].body(images))
        tokens = features.flatten(2).permute(2, 0, 1)
        places = self.backbone[1].pe.flatten(2).permute(2, 0, 1)
        for layer in self.transformer["encoder"].layers:
            placed = tokens + places
            tokens = layer.norm1(tokens + layer.self_attn(placed, placed, tokens)[0])
            tokens = layer.norm2(tokens + layer.linear2(F.relu(layer.linear1(tokens))))
        queries = self.query_embed.weight[:, None].expand(-1, len(images), -1)
        states = torch.zeros_like(queries)
        for layer in self.transformer["decoder"].layers:
            attended, _ = layer.multihead_attn(states + queries, tokens + places, tokens)
            states = layer.norm2(states + attended)
            states = layer.norm3(states + layer.linear2(F.relu(layer.linear1(states))))
        states = self.transformer["decoder"].norm(states).transpose(0, 1)
        return (self.fc.W * states).sum(2) + self.fc.b


def decoder_layer(dim):
    """torch's, less its self-attention."""
    layer = nn.TransformerDecoderLayer(dim, 4, 24, 0.0)
    del layer.self_attn, layer.norm1
    return layer


def positions(height, width, dim):
    """(1, D, H, W): sines and cosines of rows, then of columns."""
    encoding = torch.zeros(1, dim, height, width)
    for i in range(dim // 2):
        wave = torch.cos if i % 2 else torch.sin
        rate = 10000 ** (2 * (i // 2) / (dim // 2))
        for y in range(height):
            angle = torch.tensor(2 * math.pi * (y + 1) / (height + 1e-6) / rate)
            encoding[0, i, y] = wave(angle)
        for x in range(width):
            angle = torch.tensor(2 * math.pi * (x + 1) / (width + 1e-6) / rate)
            encoding[0, dim // 2 + i, :, x] = wave(angle)
    return encoding


def query2label(num_labels=80, **options):
    torch.manual_seed(3)
    network = randomize(PublishedQuery2Label(num_labels, **options))
    state = {
        f"module.{name}": tensor
        for name, tensor in network.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    return network, {"epoch": 7, "arch": "Q2L", "state_dict": state, "best_mAP": 84.9}


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"dim": 64, "project": True}])
def test_query2label_gives_the_same_logits(convert, options):
    network, content = query2label(**options)
    predictor, said = convert(content, "query2label")
    assert predictor.label_names == COCO_LABELS
    assert "left in the file: 1 tensors\n  backbone.1 (1)" in said
    cfg = predictor.cfg
    assert cfg.INPUT.IMAGE_SIZE == (64, 64)
    keys = cfg.MODEL.QUERY2LABEL
    assert (keys.ENCODER_LAYERS, keys.DECODER_LAYERS, keys.SELF_ATTENTION) == (1, 2, False)
    assert (options.get("dim", 0), 24) == (keys.DIM, keys.FFN_DIM)
    with torch.no_grad():
        assert_same(logits_of(predictor), network(imagenet(IMAGES)))


def test_query2label_with_labels_in_another_order(convert, tmp_path):
    network, content = query2label(20, dim=64, project=True)
    (tmp_path / "labels.txt").write_text("\n".join(VOC_LABELS[::-1]))
    predictor, _ = convert(content, "query2label", labels=tmp_path / "labels.txt")
    assert predictor.label_names == VOC_LABELS
    assert predictor.cfg.DATASETS.TEST == ("voc_2007_test_multilabel",)
    with torch.no_grad():
        assert_same(logits_of(predictor), network(imagenet(IMAGES)).flip(1))


def test_what_is_no_query2label_checkpoint_is_refused(convert):
    _, content = query2label(dim=64, project=True)
    state = content["state_dict"]

    def error(**changes):
        changed = {f"module.{name.replace('__', '.')}": x for name, x in changes.items()}
        with pytest.raises(InputError, match=r"source\.pth: --format query2label: ") as caught:
            convert({"state_dict": {**state, **changed}}, "query2label")
        return str(caught.value)

    other = state["module.backbone.1.pe"] + 0.01
    assert "backbone.1.pe is not the sine encoding" in error(backbone__1__pe=other)
    assert "no backbone.1.pe" in error(backbone__1__pe=torch.zeros(1, 32, 2, 2))
    assert "fc.W and fc.b do not fit" in error(fc__W=torch.zeros(1, 80, 32))
    attention = {"transformer__decoder__layers__1__self_attn__in_proj_bias": torch.zeros(192)}
    assert "only layers 1 have self-attention" in error(**attention)


# ----------------------------------------------------------------------------------------- CSRA


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["mmpretrain", "authors"])
@pytest.mark.parametrize("temperatures", [[1.0], [1.0, 99.0]])
def test_csra_gives_the_same_logits(convert, layout, temperatures):
    torch.manual_seed(4)
    resnet = randomize(torchvision.models.resnet18())
    backbone, head = ("backbone.", "head.csra_heads") if layout == "mmpretrain" else ("", "")
    head = head or "classifier.multi_head"
    weights = [torch.randn(20, 512, 1, 1) for _ in temperatures]
    state = {
        **{f"{backbone}{n}": x for n, x in resnet.state_dict().items() if n[:3] != "fc."},
        **{f"{head}.{i}.head.weight": weight for i, weight in enumerate(weights)},
    }
    content = {"meta": {}, "state_dict": state} if layout == "mmpretrain" else state
    predictor, said = convert(content, "csra", opts=["MODEL.CSRA.ATTENTION_WEIGHT", 0.4])
    assert predictor.label_names == VOC_LABELS
    assert "MODEL.CSRA.ATTENTION_WEIGHT 0.4" in said
    assert list(predictor.cfg.MODEL.CSRA.TEMPERATURES) == temperatures
    with torch.no_grad():
        features = nn.Sequential(*list(resnet.children())[:-2])(IMAGES / 255).flatten(2)
        expected = 0
        for weight, temperature in zip(weights, temperatures):
            scores = F.normalize(weight[:, :, 0, 0], dim=1) @ features
            attended = scores.amax(2)
            if temperature < 99:
                attended = ((temperature * scores).softmax(2) * scores).sum(2)
            expected = expected + scores.mean(2) + 0.4 * attended
    assert_same(logits_of(predictor), expected)


def test_csra_with_a_number_of_heads_that_the_paper_does_not_have(convert):
    state = {f"classifier.multi_head.{i}.head.weight": torch.zeros(20, 8, 1, 1) for i in range(3)}
    with pytest.raises(InputError, match=r"it has 3 classifiers .* and not 1, 2, 4, 6, 8"):
        convert(state, "csra")
