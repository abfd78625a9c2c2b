"""Checkpoints of other projects' heads: networks of the published layouts, and the same logits."""

import copy

import numpy as np
import pytest
import torch
import torchvision
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from torch import nn
from torch.nn import functional as F

from ia_gcn.checkpoint import MultiLabelCheckpointer, read_checkpoint
from ia_gcn.checkpoint.conversion import convert_checkpoint
from ia_gcn.config import add_ia_gcn_config
from ia_gcn.data.datasets import COCO_LABELS, VOC_LABELS
from ia_gcn.errors import InputError

STAGES = ["conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4"]


@pytest.fixture(scope="module")
def resnet18():
    torch.manual_seed(0)
    return torchvision.models.resnet18()


@torch.no_grad()
def randomize(network, seed=0):
    """Norms, their statistics and biases that are not the defaults."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in network.state_dict().values():
        if tensor.is_floating_point() and tensor.ndim == 1:
            tensor.uniform_(0.5, 1.0, generator=generator)
    return network.eval()


def make_image(size=(64, 96)):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(256, (3, *size), dtype=torch.uint8, generator=generator)


def normalized(image):
    """As torchvision's ResNets take it."""
    statistics = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    return torchvision.transforms.Normalize(*statistics)(image / 255)[None]


def load(path):
    """The model of a checkpoint that has all of it, by the config in it."""
    content = read_checkpoint(str(path))
    cfg = get_cfg()
    add_ia_gcn_config(cfg)
    cfg.merge_from_other_cfg(CfgNode.load_cfg(content["config"]))
    cfg.MODEL.DEVICE = "cpu"
    model = build_model(cfg).eval()
    checkpointer = MultiLabelCheckpointer(model, label_names=content["label_names"])
    checkpointer.load(str(path))
    checkpointer.check_complete()
    return model, content["label_names"]


@torch.no_grad()
def assert_same_logits(path, network, labels, image, tolerance=1e-4):
    """A converted checkpoint's logits are the network's, whose labels are in another order."""
    model, label_names = load(path)
    (output,) = model([{"image": image}])
    by_name = dict(zip(labels, network(normalized(image))[0]))
    expected = torch.stack([by_name[name] for name in label_names])
    assert expected.std() > 0.01
    torch.testing.assert_close(output["logits"], expected, rtol=tolerance, atol=tolerance)
    return model


def numbered(channels_in, channels_out, bias=True):
    """A layer on vectors as the projects save it: a convolution that is the first in a row."""
    return nn.Sequential(nn.Conv1d(channels_in, channels_out, 1, bias=bias))


# -------------------------------------------------------------------------------------- ADD-GCN


class PublishedADDGCN(nn.Module):
    """The names of the published state dict, and the paper's equations on them."""

    def __init__(self, resnet, num_labels, dim=12):
        super().__init__()
        channels = resnet.fc.in_features
        self.features = nn.Sequential(*[getattr(resnet, stage) for stage in STAGES])
        self.fc = nn.Conv2d(channels, num_labels, 1, bias=False)
        self.conv_transform = nn.Conv2d(channels, dim, 1)
        self.gcn = gcn = nn.Module()
        gcn.static_adj = numbered(num_labels, num_labels, bias=False)
        gcn.static_weight = numbered(dim, dim)
        gcn.conv_global, gcn.bn_global = nn.Conv1d(dim, dim, 1), nn.BatchNorm1d(dim)
        gcn.conv_create_co_mat = nn.Conv1d(2 * dim, num_labels, 1)
        gcn.dynamic_weight = nn.Conv1d(dim, dim, 1)
        self.mask_mat = nn.Parameter(torch.eye(num_labels))
        self.last_linear = nn.Conv1d(dim, num_labels, 1)

    def forward(self, images):
        maps, gcn = self.features(images), self.gcn
        scores, values = self.fc(maps).flatten(2), self.conv_transform(maps).flatten(2)
        v = values @ scores.sigmoid().mT  # B×K×C
        h = v + F.leaky_relu(gcn.static_weight(F.leaky_relu(gcn.static_adj(v.mT), 0.2).mT), 0.2)
        g = F.leaky_relu(gcn.bn_global(gcn.conv_global(h.mean(2, keepdim=True))), 0.2)
        edges = gcn.conv_create_co_mat(torch.cat([g.expand_as(h), h], 1)).sigmoid()
        z = v + F.leaky_relu(gcn.dynamic_weight(F.leaky_relu(h @ edges, 0.2)), 0.2)
        own = self.last_linear(z).diagonal(dim1=1, dim2=2)
        return (scores.amax(2) + own) / 2


def save_add_gcn(resnet, num_labels, path, **changes):
    torch.manual_seed(1)
    network = randomize(PublishedADDGCN(resnet, num_labels))
    state = {**network.state_dict(), **changes}
    torch.save({"epoch": 50, "model_name": "ADD_GCN", "state_dict": state, "best_score": 0}, path)
    return network


@pytest.mark.slow
@pytest.mark.parametrize("labels", [sorted(COCO_LABELS), VOC_LABELS])
def test_add_gcn(tmp_path, resnet18, labels):
    source, output = tmp_path / "checkpoint_best.pth", tmp_path / "model.pth"
    network = save_add_gcn(resnet18, len(labels), source)
    convert_checkpoint(source, "add_gcn", output)
    model = assert_same_logits(output, network, labels, make_image())
    assert model.label_head.transform.weight.shape == (12, 512, 1, 1)
    names = read_checkpoint(str(output))["label_names"]
    assert names == (COCO_LABELS if len(labels) == 80 else VOC_LABELS)


def test_an_add_gcn_whose_classifiers_are_mixed_is_refused(tmp_path, resnet18):
    source = tmp_path / "checkpoint.pth"
    save_add_gcn(resnet18, 20, source, mask_mat=torch.ones(20, 20))
    with pytest.raises(InputError, match="mask_mat is not the identity"):
        convert_checkpoint(source, "add_gcn", tmp_path / "model.pth")


# ---------------------------------------------------------------------------------------- SSGRL


class PublishedSSGRL(nn.Module):
    """The names of the published state dict, and the paper's equations on them."""

    def __init__(self, resnet, num_labels, words, graph, hidden=6, out=7):
        super().__init__()
        dim = resnet.fc.in_features
        self.resnet_101 = copy.deepcopy(resnet)
        del self.resnet_101.fc
        self.word_semantic, self.graph_net = nn.Module(), nn.Module()
        layers = {
            "fc_1": nn.Linear(dim, hidden, bias=False),
            "fc_2": nn.Linear(words.shape[1], hidden, bias=False),
            "fc_3": nn.Linear(hidden, hidden),
            "fc_a": nn.Linear(hidden, 1),
        }
        for name, module in layers.items():
            self.word_semantic.add_module(name, module)
        for number in (3, 4, 5):
            self.graph_net.add_module(f"fc_eq{number}_w", nn.Linear(2 * dim, dim))
            self.graph_net.add_module(f"fc_eq{number}_u", nn.Linear(dim, dim))
        self.fc_output = nn.Linear(2 * dim, out)
        self.classifiers = nn.Module()
        self.classifiers.weight = nn.Parameter(torch.randn(num_labels, out))
        self.classifiers.bias = nn.Parameter(torch.randn(num_labels))
        # Of plain files, beside the checkpoint.
        self.words, self.graph = [torch.from_numpy(words).float(), torch.from_numpy(graph).float()]

    def forward(self, images):
        x = images
        for stage in STAGES:
            x = getattr(self.resnet_101, stage)(x)
        x = F.avg_pool2d(x, 2).flatten(2).mT
        s, g = self.word_semantic, self.graph_net
        t = (s.fc_1(x)[:, None] * s.fc_2(self.words)[:, None]).tanh()
        v = h = s.fc_a(s.fc_3(t))[..., 0].softmax(2) @ x
        for _ in range(3):
            m = torch.cat([self.graph @ h, self.graph.T @ h], 2)
            z = (g.fc_eq3_w(m) + g.fc_eq3_u(h)).sigmoid()
            r = (g.fc_eq4_w(m) + g.fc_eq3_u(h)).sigmoid()
            h = (1 - z) * h + z * (g.fc_eq5_w(m) + g.fc_eq5_u(r * h)).tanh()
        f = self.fc_output(torch.cat([h, v], 2)).tanh()
        return (f * self.classifiers.weight).sum(2) + self.classifiers.bias


@pytest.fixture
def ssgrl(resnet18, tmp_path):
    """A function that writes a checkpoint and its two files: (network, arguments)."""

    def write(num_labels, **changes):
        rng = np.random.default_rng(0)
        words, graph = rng.standard_normal((num_labels, 10)), rng.random((num_labels, num_labels))
        # Published graphs count pairs of objects: an element may be above 1.
        graph = np.where(np.eye(num_labels), 0, graph**4 * 1.5)
        torch.manual_seed(1)
        network = randomize(PublishedSSGRL(resnet18, num_labels, words, graph))
        state = {**network.state_dict(), **changes}
        torch.save({"epoch": 9, "state_dict": state, "best_mAP": 83.8}, tmp_path / "ssgrl.pth.tar")
        files = {"embeddings": tmp_path / "vectors.npy", "graph": tmp_path / "prob_train.npy"}
        np.save(files["embeddings"], words)
        np.save(files["graph"], graph)
        return network, files

    return write


@pytest.mark.slow
@pytest.mark.parametrize("labels", [COCO_LABELS, sorted(VOC_LABELS, reverse=True)])
def test_ssgrl(tmp_path, ssgrl, labels):
    network, files = ssgrl(len(labels))
    (tmp_path / "labels.txt").write_text("\n".join(labels))
    source, output = tmp_path / "ssgrl.pth.tar", tmp_path / "model.pth"
    convert_checkpoint(source, "ssgrl", output, labels=tmp_path / "labels.txt", **files)
    # An even number of cells; the published code drops the last of an odd one.
    model = assert_same_logits(output, network, labels, make_image((64, 128)))
    assert model.label_head.attention.hidden.weight.shape == (6, 6)


def test_an_ssgrl_without_its_graph_or_with_another_is_refused(tmp_path, ssgrl):
    _, files = ssgrl(20)
    source, output = tmp_path / "ssgrl.pth.tar", tmp_path / "model.pth"
    with pytest.raises(InputError, match=r"--graph: .* prob_train\.npy"):
        convert_checkpoint(source, "ssgrl", output, embeddings=files["embeddings"])
    for graph, message in [
        (np.eye(20), "zeros on its diagonal"),
        (np.full((20, 20), -0.1), "no negative element"),
        (np.zeros((20, 19)), "19 columns, not 20"),
    ]:
        np.save(files["graph"], graph)
        with pytest.raises(InputError, match=message):
            convert_checkpoint(source, "ssgrl", output, **files)
    with pytest.raises(InputError, match="--graph: --format add_gcn"):
        convert_checkpoint(source, "add_gcn", output, graph=files["graph"])


# ---------------------------------------------------------------------------------------- SALGL


class PublishedSALGL(nn.Module):
    """The names of the published state dict, and the paper's equations on them."""

    def __init__(self, resnet, num_labels, hidden=6, scenes=3, both_directions=False):
        super().__init__()
        dim = resnet.fc.in_features
        self.backbone = copy.deepcopy(resnet)
        del self.backbone.fc
        self.tb = nn.Module()
        # torch's own layer has the same names.
        layer = nn.TransformerEncoderLayer(dim, 8, 16, batch_first=True)
        self.tb.layers = nn.ModuleList([layer])
        self.register_buffer("embeddings", torch.randn(num_labels, 10))
        self.scene_linear = nn.Linear(dim, scenes, bias=False)
        self.ggnn = nn.Module()
        for number in (1, 2, 3):
            message_dim = 2 * dim if both_directions else dim
            self.ggnn.add_module(f"fc{number}_w", nn.Linear(message_dim, dim))
            self.ggnn.add_module(f"fc{number}_u", nn.Linear(dim, dim))
        self.register_buffer(
            "comatrix", torch.randint(0, 9, (scenes, num_labels, num_labels)) + 0.5
        )
        self.comatrix += self.comatrix.mT.clone()
        self.comatrix.diagonal(dim1=1, dim2=2).add_(20)
        self.attention = nn.Module()
        self.attention.linear1 = nn.Linear(dim, hidden, bias=False)
        self.attention.linear2 = nn.Linear(10, hidden, bias=False)
        self.attention.hidden_linear = nn.Linear(hidden, hidden)
        self.attention.target_linear = nn.Linear(hidden, 1)
        self.fc = nn.Sequential(nn.Linear(2 * dim, dim), nn.Tanh())
        self.classifier = nn.Module()
        self.classifier.weight = nn.Parameter(torch.randn(num_labels, dim))
        self.classifier.bias = nn.Parameter(torch.randn(num_labels))
        self.both_directions = both_directions

    def forward(self, images):
        x = images
        for stage in STAGES:
            x = getattr(self.backbone, stage)(x)
        x = self.tb.layers[0](x.flatten(2).mT)
        p = self.scene_linear(x.mean(1)).softmax(1)
        graphs = self.comatrix.mT / self.comatrix.diagonal(dim1=1, dim2=2)[..., None]
        graph, a, g = graphs[p.argmax(1)], self.attention, self.ggnn
        t = (a.linear1(x)[:, None] * a.linear2(self.embeddings)[:, None]).tanh()
        v = h = a.target_linear(a.hidden_linear(t))[..., 0].softmax(2) @ x
        for _ in range(3):
            m = graph @ h
            m = torch.cat([m, graph.mT @ h], 2) if self.both_directions else m
            z = (g.fc1_w(m) + g.fc1_u(h)).sigmoid()
            r = (g.fc2_w(m) + g.fc2_u(h)).sigmoid()
            h = (1 - z) * h + z * (g.fc3_w(m) + g.fc3_u(r * h)).tanh()
        f = self.fc(torch.cat([v, h], 2))
        return (f * self.classifier.weight).sum(2) + self.classifier.bias


@pytest.mark.slow
@pytest.mark.parametrize("both_directions", [False, True])
def test_salgl(tmp_path, resnet18, both_directions):
    torch.manual_seed(1)
    network = randomize(PublishedSALGL(resnet18, 80, both_directions=both_directions))
    # As the EMA of the weights is saved.
    state = {f"module.{name}": tensor for name, tensor in network.state_dict().items()}
    torch.save(state, tmp_path / "ema_best_model.pth")
    said = []
    convert_checkpoint(
        tmp_path / "ema_best_model.pth", "salgl", tmp_path / "model.pth", report=said.append
    )
    assert "MODEL.SALGL.SOFT_SCENES False" in "\n".join(said)
    model = assert_same_logits(tmp_path / "model.pth", network, COCO_LABELS, make_image())
    assert not model.label_head.positions
    assert model.label_head.graph.both_directions == both_directions


# ----------------------------------------------------------------------------------------- TDRG


class PublishedTDRG(nn.Module):
    """The names of the published state dict, and the paper's equations on them."""

    def __init__(self, resnet, num_labels, dim=8):
        super().__init__()
        coarse, c = resnet.fc.in_features, num_labels
        self.layer1 = nn.Sequential(*[getattr(resnet, stage) for stage in STAGES[:5]])
        self.layer2, self.layer3, self.layer4 = resnet.layer2, resnet.layer3, resnet.layer4
        self.backbone = nn.ModuleList([self.layer1, self.layer2, self.layer3, self.layer4])
        self.transform_14 = nn.Conv2d(coarse, dim, 1)
        self.transform_28 = nn.Conv2d(coarse // 2, dim, 1)
        self.transform_7 = nn.Conv2d(coarse, dim, 3, stride=2)
        self.query_embed = nn.Embedding(1, dim)
        self.transformer = nn.Module()
        # torch's own layers have the same names.
        layers = [nn.TransformerEncoderLayer(dim, 4, 16, 0, "gelu", batch_first=True) for _ in "12"]
        self.transformer.encoder = nn.Module()
        self.transformer.encoder.layers = nn.ModuleList(layers)
        self.transformer.decoder = nn.Module()
        self.transformer.decoder.norm = nn.LayerNorm(dim)
        self.trans_classifier = nn.Linear(3 * dim, c)
        self.constraint_classifier = nn.Conv2d(coarse, c, 1, bias=False)
        self.guidance_transform = nn.Conv1d(dim, dim, 1)
        self.guidance_conv = nn.Conv1d(3 * dim, 3 * dim, 1)
        self.guidance_bn = nn.BatchNorm1d(3 * dim)
        self.gcn_dim_transform = nn.Conv2d(coarse, dim, 1)
        self.matrix_transform = nn.Conv1d(5 * dim, c, 1)
        self.forward_gcn = nn.Module()
        self.forward_gcn.weight = nn.Conv1d(2 * dim, 2 * dim, 1)
        self.mask_mat = nn.Parameter(torch.eye(c))
        self.gcn_classifier = nn.Conv1d(2 * dim, c, 1)

    def forward(self, images):
        x3 = self.layer3(self.layer2(self.layer1(images)))
        x4 = self.layer4(x3)
        maps = [self.transform_28(x3), self.transform_14(x4), self.transform_7(x4)]

        def to(x, like):
            return F.interpolate(x, like.shape[2:], mode="bilinear", align_corners=True)

        large = [to(x, maps[0]) for x in maps]
        maps = [to(x + large[0] * large[1] * large[2], own) for x, own in zip(large, maps)]
        # The cells take the place of the batch, and the batch that of the cells.
        maps = [x.flatten(2).permute(2, 0, 1) for x in maps]
        for layer in self.transformer.encoder.layers:
            maps = [layer(x) for x in maps]
        maps = [x.permute(1, 2, 0) for x in maps]
        trans = self.trans_classifier(torch.cat([x.amax(2) for x in maps], 1))
        shares = self.constraint_classifier(x4).flatten(2).sigmoid().mT
        v = self.gcn_dim_transform(x4).flatten(2) @ shares
        v = torch.cat([v, self.guidance_transform(maps[1] @ shares)], 1)
        g = self.guidance_conv(torch.cat([x.mean(2, keepdim=True) for x in maps], 1))
        g = F.leaky_relu(self.guidance_bn(g), 0.2).expand(-1, -1, v.shape[2])
        edges = self.matrix_transform(torch.cat([g, v], 1)).sigmoid()
        z = F.leaky_relu(self.forward_gcn.weight(F.leaky_relu(v @ edges, 0.2)), 0.2) + v
        own = self.gcn_classifier(z).diagonal(dim1=1, dim2=2)
        return 0.7 * trans + 0.3 * own


# The names of the weights that its authors released.
RELEASED = {
    "layer1.": "features.",
    "trans_classifier.": "classifier.",
    "guidance_transform.": "conv_position.",
    "constraint_classifier.": "fc.",
    "gcn_dim_transform.": "conv_transform.",
    "guidance_conv.": "gcn.conv_global.",
    "guidance_bn.": "gcn.bn_global.",
    "matrix_transform.": "gcn.conv_create_co_mat.",
    "forward_gcn.weight.": "gcn.dynamic_weight.",
    "gcn_classifier.": "last_linear.",
}


def released_name(name):
    for ours, theirs in RELEASED.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


@pytest.mark.slow
@pytest.mark.parametrize("released", [False, True])
def test_tdrg(tmp_path, resnet18, released):
    torch.manual_seed(1)
    labels = sorted(COCO_LABELS) if released else VOC_LABELS
    network = randomize(PublishedTDRG(resnet18, len(labels)))
    state = network.state_dict()
    if released:
        state = {released_name(n): t for n, t in state.items() if not n.startswith("backbone.")}
        state["gcn.static_adj.0.weight"] = state["bottleneck.0.weight"] = torch.zeros(3)
    content = {"epoch": 50, "model_name": "TDRG", "state_dict": state, "best_score": 84.6}
    torch.save(content, tmp_path / "tdrg.pth")
    convert_checkpoint(tmp_path / "tdrg.pth", "tdrg", tmp_path / "model.pth")
    model = assert_same_logits(tmp_path / "model.pth", network, labels, make_image((128, 128)))
    assert len(model.label_head.encoder) == 2
    # The images of a batch count, as published.
    images = torch.stack([make_image((128, 128)), make_image((128, 128)).flip(2)])
    with torch.no_grad():
        expected = network(torch.cat(list(map(normalized, images))))
        found = torch.stack([out["logits"] for out in model([{"image": x} for x in images])])
    order = [
        labels.index(name) for name in read_checkpoint(str(tmp_path / "model.pth"))["label_names"]
    ]
    torch.testing.assert_close(found, expected[:, order], rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("name", ["add_gcn", "salgl", "tdrg"])
@pytest.mark.parametrize("state", [{"weight": torch.zeros(3)}, {"fc.weight": torch.tensor(1.0)}])
def test_a_checkpoint_of_another_format_is_refused(tmp_path, name, state):
    source = tmp_path / "source.pth"
    torch.save(state, source)
    with pytest.raises(InputError, match=f"--format {name}: it has no"):
        convert_checkpoint(source, name, tmp_path / "model.pth")
