"""tools/convert_checkpoint.py: networks of the published layouts, and the same outputs after it."""

import json
import os
import pickle
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from detectron2 import model_zoo
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_backbone, build_model
from PIL import Image
from torch import nn

from ia_gcn.checkpoint import (
    MultiLabelCheckpointer,
    convert_torchvision_resnet,
    load_model,
    read_checkpoint,
)
from ia_gcn.checkpoint.conversion import CONVERTERS, convert_checkpoint
from ia_gcn.checkpoint.detectron2_zoo import convert_detectron2, detectron2_settings
from ia_gcn.checkpoint.ml_gcn import edge_counts
from ia_gcn.checkpoint.torchvision_resnet import torchvision_settings
from ia_gcn.checkpoint.tresnet import convert_tresnet, tresnet_settings
from ia_gcn.config import add_ia_gcn_config
from ia_gcn.data.datasets import COCO_LABELS, VOC_LABELS
from ia_gcn.engine import Trainer, setup_cfg
from ia_gcn.errors import InputError
from tests.helpers.checkpoints import original_layout, randomize
from tests.helpers.commands import run_script

COMMAND = "convert"
FORMATS = list(CONVERTERS)


@pytest.fixture
def convert_main(main, monkeypatch, repository):
    """`main` in the repository."""
    monkeypatch.chdir(repository)
    return main


@pytest.fixture
def convert(convert_main, tmp_path):
    """A function that converts with success: (the new checkpoint's path, stdout)."""

    def run(source, name, *arguments):
        output = tmp_path / "out" / "model.pth"
        status, out, err = convert_main(source, "--format", name, "--output", output, *arguments)
        assert status == 0, err
        return output, out

    return run


@pytest.fixture
def fails(convert_main, tmp_path):
    """A function that converts without success, and writes nothing: the one line on stderr."""

    def run(source, name, *arguments):
        output = tmp_path / "failed" / "model.pth"
        status, _, err = convert_main(source, "--format", name, "--output", output, *arguments)
        assert status == 1
        assert err.startswith("convert_checkpoint: ")
        assert err.count("\n") == 1
        assert not list(output.parent.glob("*"))
        return err

    return run


def printed_settings(out):
    """The config keys and values that the command says the weights go with."""
    lines = out.split("it goes with\n")[1].splitlines()
    return shlex.split(" ".join(line.rstrip("\\") for line in lines if line.startswith("  ")))


def groups_of(out, title):
    """What the command says under a title: number of tensors by group; None without it."""
    match = re.search(rf"^{title}: (\d+) tensors\n((?:  .*\n)*)", out, re.MULTILINE)
    if match is None:
        return None
    groups = {name: int(n) for name, n in re.findall(r"^  (\S+).* \((\d+)\)$", match[2], re.M)}
    assert sum(groups.values()) == int(match[1])
    return groups


def assert_same(actual, expected, tolerance):
    scale = float(expected.abs().max())
    assert scale > 0
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * max(scale, 1e-6))


def load(cfg, path, labels):
    """The config's model with a checkpoint that has all of it."""
    model = build_model(cfg).eval()
    checkpointer = MultiLabelCheckpointer(model, label_names=labels)
    checkpointer.load(str(path))
    checkpointer.check_complete()
    return model


def config_of(path):
    """The config that a checkpoint carries, for this machine."""
    cfg = get_cfg()
    add_ia_gcn_config(cfg)
    cfg.merge_from_other_cfg(CfgNode.load_cfg(read_checkpoint(str(path))["config"]))
    cfg.MODEL.DEVICE = "cpu"
    return cfg


# ---------------------------------------------------------------------------------- torchvision


@pytest.fixture(scope="module")
def resnet18():
    torch.manual_seed(0)
    return randomize(torchvision.models.resnet18())


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_torchvision_resnet_gives_the_same_features(convert, tmp_path, resnet18, wrapped):
    state = resnet18.state_dict()
    if wrapped:
        state = {"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}
    torch.save(state, tmp_path / "resnet.pth")
    path, out = convert(tmp_path / "resnet.pth", "torchvision")
    assert groups_of(out, "taken") == {
        **{"backbone.stem": 6, "backbone.res2": 24},
        **{f"backbone.res{stage}": 30 for stage in (3, 4, 5)},
    }
    assert groups_of(out, "left in the file") == {"fc.weight": 1, "fc.bias": 1}
    assert set(read_checkpoint(str(path))) == {"model"}

    # Of a config with everything else: only what is printed makes it fit.
    opts = ["MODEL.DEVICE", "cpu", *printed_settings(out)]
    model = build_model(setup_cfg("configs/VOC/resnet101.yaml", opts)).eval()
    MultiLabelCheckpointer(model, label_names=VOC_LABELS).load(str(path))
    image = torch.randint(256, (3, 64, 64), dtype=torch.uint8)
    normalize = torchvision.transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    with torch.no_grad():
        actual = model.backbone(model.preprocess_image([{"image": image}]).tensor)["res5"]
        expected = nn.Sequential(*list(resnet18.children())[:-2])(normalize(image / 255)[None])
    assert_same(actual, expected, 1e-5)


@pytest.mark.parametrize("depth", [18, 34, 50, 101, 152])
def test_the_depth_is_told(monkeypatch, repository, depth):
    monkeypatch.chdir(repository)
    with torch.device("meta"):
        state = getattr(torchvision.models, f"resnet{depth}")().state_dict()
    converted = convert_torchvision_resnet(state)
    settings = torchvision_settings(converted)
    assert settings["MODEL.RESNETS.DEPTH"] == depth
    assert settings["MODEL.RESNETS.RES2_OUT_CHANNELS"] == (64 if depth < 50 else 256)
    opts = [item for pair in settings.items() for item in pair]
    with torch.device("meta"):
        backbone = build_backbone(setup_cfg("configs/Base-MultiLabel.yaml", opts)).state_dict()
    shapes = {f"backbone.{name}": tensor.shape for name, tensor in backbone.items()}
    assert {name: tensor.shape for name, tensor in converted.items()} == shapes


def test_tensors_that_do_not_match(convert, fails, tmp_path, resnet18):
    source = tmp_path / "resnet.pth"
    state = resnet18.state_dict()
    state["layer1.0.conv9.weight"] = torch.zeros(3)
    state["layer4.1.bn2.bias"] = torch.zeros(7)
    del state["layer2.0.conv1.weight"]
    torch.save(state, source)
    error = fails(source, "torchvision")
    assert str(source) in error
    assert "1 without a place in the model (backbone.res2.0.conv9.weight)" in error
    assert "backbone.res5.1.conv2.norm.bias (7,) in the file, (512,) in the model" in error
    assert "1 of the model that it lacks (backbone.res3.0.conv1.weight)" in error
    assert "--allow-partial" in error

    path, out = convert(source, "torchvision", "--allow-partial")
    assert groups_of(out, "unmatched in the file") == {"backbone.res2": 1}
    assert groups_of(out, "misshaped") == {"backbone.res5": 1}
    assert groups_of(out, "missing") == {"backbone.res3": 1}
    taken = read_checkpoint(str(path))["model"]
    assert len(taken) == 118
    assert taken["backbone.stem.conv1.weight"].equal(state["conv1.weight"])


def test_a_config_that_the_source_does_not_fit_is_told_what_does(fails, tmp_path, resnet18):
    torch.save(resnet18.state_dict(), tmp_path / "resnet.pth")
    error = fails(tmp_path / "resnet.pth", "torchvision", "MODEL.RESNETS.DEPTH", 34)
    assert "it goes with MODEL.RESNETS.DEPTH 18;" in error
    opts = ["MODEL.RESNETS.RES2_OUT_CHANNELS", 256]
    assert "RES2_OUT_CHANNELS" in fails(tmp_path / "resnet.pth", "torchvision", *opts)


def test_regions_res5_starts_as_a_converted_backbones(monkeypatch, repository, tmp_path):
    monkeypatch.chdir(repository)
    regions = ("MODEL.REGION_BRANCH.RES5", True, "MODEL.ROI_HEADS.IN_FEATURES", ["res4"])
    narrow = ("MODEL.RESNETS.RES2_OUT_CHANNELS", 16, "MODEL.RESNETS.WIDTH_PER_GROUP", 4)
    opts = ["MODEL.DEVICE", "cpu", "MODEL.RESNETS.DEPTH", 50, *regions, *narrow]
    cfg = setup_cfg("configs/COCO/ia_gcn_R_101.yaml", opts)
    state = {f"backbone.{n}": t for n, t in build_backbone(cfg).state_dict().items()}
    torch.save({"model": state}, tmp_path / "backbone.pth")
    model = build_model(cfg)
    MultiLabelCheckpointer(model, label_names=COCO_LABELS).load(str(tmp_path / "backbone.pth"))
    for name, tensor in model.roi_heads.res5.state_dict().items():
        assert tensor.equal(state[f"backbone.res5.{name}"]), name


# --------------------------------------------------------------------------------------- ML-GCN


class PublishedMLGCN(nn.Module):
    """ML-GCN as it was published: H⁽⁰⁾ comes in with the images, A is a parameter."""

    def __init__(self, resnet, adjacency, embedding_dim=300, hidden_dim=64):
        super().__init__()
        parts = ["conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4"]
        self.features = nn.Sequential(*[getattr(resnet, part) for part in parts])
        self.gc1, self.gc2 = nn.Module(), nn.Module()
        out_dim = resnet.fc.in_features
        self.gc1.weight = nn.Parameter(torch.randn(embedding_dim, hidden_dim) / 30)
        self.gc2.weight = nn.Parameter(torch.randn(hidden_dim, out_dim) / 30)
        self.A = nn.Parameter(torch.from_numpy(adjacency).float())

    def forward(self, images, embeddings):
        x = nn.MaxPool2d(14, 14)(self.features(images)).flatten(1)
        scale = torch.diag(self.A.sum(1) ** -0.5)
        graph = (self.A @ scale).T @ scale
        hidden = nn.functional.leaky_relu(graph @ (embeddings @ self.gc1.weight), 0.2)
        return x @ (graph @ (hidden @ self.gc2.weight)).T


def published_adjacency(num_labels, seed=0):
    """A (C, C) of random counts, at τ = 0.4 and p = 0.25; float64, as the published code has it."""
    rng = np.random.default_rng(seed)
    shown = rng.random((200, num_labels)) < rng.uniform(0.1, 0.7, num_labels)
    together = shown.T.astype(float) @ shown
    np.fill_diagonal(together, 0)
    edges = (together / shown.sum(0)[:, None] >= 0.4).astype(float)
    assert 0 < edges.mean() < 1
    return edges * 0.25 / (edges.sum(0, keepdims=True) + 1e-6) + np.identity(num_labels)


@pytest.fixture
def ml_gcn(resnet18, tmp_path):
    """A function that writes a checkpoint and its label embeddings: (network, both, paths)."""

    def write(num_labels, prefix=""):
        torch.manual_seed(1)
        network = PublishedMLGCN(resnet18, published_adjacency(num_labels)).eval()
        state = {f"{prefix}{name}": tensor for name, tensor in network.state_dict().items()}
        content = {"epoch": 7, "arch": "gcn", "state_dict": state, "best_score": 83.0}
        torch.save(content, tmp_path / "checkpoint.pth.tar")
        embeddings = np.random.default_rng(2).standard_normal((num_labels, 300)).astype(np.float32)
        with open(tmp_path / "word2vec.pkl", "wb") as file:
            pickle.dump(embeddings, file, protocol=2)
        return network, embeddings

    return write


def normalized(pixels):
    """Images (B, 448, 448, 3) as ML-GCN normalises them."""
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])
    return ((torch.from_numpy(pixels) / 255 - mean) / std).permute(0, 3, 1, 2)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_ml_gcn_on_coco_gives_the_same_logits_by_label(convert, ml_gcn, tmp_path, prefix):
    network, embeddings = ml_gcn(80, prefix)
    given = ["--embeddings", tmp_path / "word2vec.pkl"]
    path, out = convert(tmp_path / "checkpoint.pth.tar", "ml_gcn", *given)
    taken = groups_of(out, "taken")
    names = ("embeddings", "label_counts", "pair_counts")
    assert {f"label_graph.{name}": 1 for name in names}.items() <= taken.items()
    assert groups_of(out, "left in the file") is None

    checkpoint = read_checkpoint(str(path))
    assert set(checkpoint) == {"model", "label_names", "config"}
    assert checkpoint["label_names"] == COCO_LABELS
    assert checkpoint["label_names"][0] == "person"
    cfg = config_of(path)
    assert cfg.DATASETS.TEST == ("coco_2014_val_multilabel",)
    model = load(cfg, path, COCO_LABELS)

    pixels = np.random.default_rng(3).integers(0, 256, (1, 448, 448, 3), dtype=np.uint8)
    with torch.no_grad():
        expected = network(normalized(pixels), torch.from_numpy(embeddings))[0]
        actual = model([{"image": torch.from_numpy(pixels[0]).permute(2, 0, 1)}])[0]["logits"]
    by_name = dict(zip(sorted(COCO_LABELS), expected))
    expected = torch.stack([by_name[name] for name in COCO_LABELS])
    assert expected.std() > 0.01
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_eval_only_of_a_converted_ml_gcn(ml_gcn, tmp_path, tiny_coco, repository, monkeypatch):
    """On labels that no data set has, in the source's order; converted from the command line."""
    data = tiny_coco(3)
    network, embeddings = ml_gcn(3)
    order = ["green", "blue", "red"]
    (tmp_path / "labels.txt").write_text("\n".join(order))
    np.save(tmp_path / "word2vec.npy", embeddings)
    weights = tmp_path / "model.pth"
    result = run_script(
        *("tools/convert_checkpoint.py", tmp_path / "checkpoint.pth.tar", "--format", "ml_gcn"),
        *("--labels", tmp_path / "labels.txt", "--embeddings", tmp_path / "word2vec.npy"),
        *("--output", weights),
    )
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    assert config_of(weights).DATASETS.TEST == ()

    monkeypatch.chdir(repository)
    opts = {
        "MODEL.DEVICE": "cpu",
        "MODEL.WEIGHTS": str(weights),
        "DATASETS.CUSTOM.TEST": data.json_file,
        "DATASETS.CUSTOM.IMAGE_ROOT": data.image_root,
        "DATASETS.CUSTOM.LABELS": order,
        "DATALOADER.NUM_WORKERS": 0,
        "OUTPUT_DIR": str(tmp_path),
    }
    opts = [*(item for pair in opts.items() for item in pair), *printed_settings(result.stdout)]
    cfg = setup_cfg("configs/COCO/ml_gcn_R_101.yaml", opts)
    Trainer.test(cfg, load_model(cfg, order))
    predictions = np.load(tmp_path / "inference/custom_test/predictions.npz")
    assert predictions["label_names"].tolist() == order

    files = [image["file_name"] for image in json.loads(Path(data.json_file).read_text())["images"]]
    images = [Image.open(Path(data.image_root) / file).convert("RGB") for file in files]
    pixels = [np.asarray(p.resize((448, 448), Image.BILINEAR)) for p in images]
    with torch.no_grad():
        logits = network(normalized(np.stack(pixels)), torch.from_numpy(embeddings))
    np.testing.assert_allclose(predictions["scores"], logits.sigmoid(), rtol=0, atol=1e-4)


def test_ml_gcn_on_voc_and_embeddings_by_name(convert, fails, ml_gcn, tmp_path):
    ml_gcn(20)
    source = tmp_path / "checkpoint.pth.tar"
    assert "--embeddings" in fails(source, "ml_gcn", "MODEL.LABEL_EMBEDDINGS.SOURCE", "names")
    vectors = np.random.default_rng(0).standard_normal((20, 300)).round(3)
    glove = tmp_path / "glove.txt"
    lines = [f"{name} {' '.join(map(str, row))}\n" for name, row in zip(VOC_LABELS, vectors)]
    glove.write_text("".join(reversed(lines)))
    opts = ["MODEL.LABEL_EMBEDDINGS.SOURCE", glove, "MODEL.LABEL_EMBEDDINGS.ALIASES", "[]"]
    path, out = convert(source, "ml_gcn", *opts)
    assert str(glove) in out
    checkpoint = read_checkpoint(str(path))
    assert checkpoint["label_names"] == VOC_LABELS
    assert config_of(path).DATASETS.TEST == ("voc_2007_test_multilabel",)
    embeddings = checkpoint["model"]["label_graph.embeddings"]
    np.testing.assert_allclose(embeddings, vectors, rtol=1e-6)
    opts[1] = tmp_path / "none.txt"
    error = fails(source, "ml_gcn", *opts)
    assert "none.txt" in error
    assert "--embeddings" in error


def test_counts_that_make_a_graph():
    lcm = torch.from_numpy(published_adjacency(12)).float()
    label_counts, pair_counts = edge_counts(lcm, 0.4, 0.25)
    assert label_counts.tolist() == [1] * 12
    assert set(pair_counts.unique().tolist()) == {0, 1}
    assert pair_counts.bool().equal(lcm != 0)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda a: a.index_put_((torch.tensor(0), torch.tensor(0)), torch.tensor(0.75)),
        lambda a: a.mul_(torch.rand(3, 3)),
        lambda a: a.fill_(torch.nan),
        lambda a: a.sub_(1),
    ],
)
def test_a_graph_that_no_counts_make_is_refused(fails, ml_gcn, tmp_path, spoil):
    ml_gcn(3)
    source = tmp_path / "checkpoint.pth.tar"
    content = torch.load(source, weights_only=True)
    content["state_dict"]["A"] = spoil(content["state_dict"]["A"].detach().clone())
    torch.save(content, source)
    (tmp_path / "labels.txt").write_text("a\nb\nc\n")
    given = ["--labels", tmp_path / "labels.txt", "--embeddings", tmp_path / "word2vec.pkl"]
    error = fails(source, "ml_gcn", *given)
    assert "A is not" in error
    assert "MODEL.LABEL_GRAPH.REWEIGHT 0.25" in error


def test_another_p_is_refused_and_the_right_one_taken(convert, fails, ml_gcn, tmp_path):
    ml_gcn(20)
    given = ["--embeddings", tmp_path / "word2vec.pkl"]
    source = tmp_path / "checkpoint.pth.tar"
    assert "REWEIGHT 0.2 " in fails(source, "ml_gcn", *given, "MODEL.LABEL_GRAPH.REWEIGHT", 0.2)
    convert(source, "ml_gcn", *given, "MODEL.LABEL_GRAPH.REWEIGHT", 0.25)


def test_labels_that_can_not_be_told_or_do_not_fit(fails, ml_gcn, tmp_path):
    ml_gcn(3)
    source = tmp_path / "checkpoint.pth.tar"
    given = ["--embeddings", tmp_path / "word2vec.pkl"]
    assert "3 labels: --labels must name them" in fails(source, "ml_gcn", *given)
    error = fails(source, "ml_gcn", *given, "--labels", "coco")
    assert "--labels coco names 80 labels, and the source has 3" in error
    none = tmp_path / "none.txt"
    assert str(none) in fails(source, "ml_gcn", *given, "--labels", none)
    none.write_text("a\nb\na\n")
    assert "twice" in fails(source, "ml_gcn", *given, "--labels", none)


@pytest.mark.slow
def test_embeddings_that_do_not_fit(fails, ml_gcn, tmp_path):
    ml_gcn(20)
    source = tmp_path / "checkpoint.pth.tar"

    def given(name, save, content):
        with open(tmp_path / name, "wb") as file:
            save(file, content)
        return fails(source, "ml_gcn", "--embeddings", tmp_path / name)

    def dump(file, content):
        pickle.dump(content, file)

    assert "of 19 labels" in given("a.npy", np.save, np.zeros((19, 300)))
    assert "(20, 5) in the file" in given("b.npy", np.save, np.zeros((20, 5)))
    assert "no matrix" in given("c.npy", np.save, np.zeros(20))
    assert "no matrix" in given("d.pkl", dump, {"a": 1})
    assert "no matrix" in given("e.npy", np.save, np.full((20, 300), "text"))
    assert "not finite" in given("f.npy", np.save, np.full((20, 300), np.inf))
    objects = np.full((20, 300), None)
    assert "damaged" in given("g.npy", np.save, objects)
    assert "an array of O8" in given("h.pkl", dump, objects)
    assert "damaged" in given("i.npz", lambda file, _: file.write(b"PK\x03\x04"), None)
    two = {"embeddings": np.zeros((20, 300)), "label_names": np.array(VOC_LABELS)}
    error = given("j.npz", lambda file, arrays: np.savez(file, **arrays), two)
    assert "MODEL.LABEL_EMBEDDINGS.SOURCE" in error
    assert "none.npy" in fails(source, "ml_gcn", "--embeddings", tmp_path / "none.npy")


def test_an_npz_of_one_array_is_taken(convert, ml_gcn, tmp_path):
    _, embeddings = ml_gcn(20)
    np.savez(tmp_path / "one.npz", embeddings)
    given = ["--embeddings", tmp_path / "one.npz"]
    path, _ = convert(tmp_path / "checkpoint.pth.tar", "ml_gcn", *given)
    kept = read_checkpoint(str(path))["model"]["label_graph.embeddings"]
    np.testing.assert_array_equal(kept, embeddings)


# -------------------------------------------------------------------------------- TResNet, ASL


@pytest.fixture(scope="module")
def asl(tmp_path_factory):
    """A TResNet-M of timm's for COCO; and the file of an ASL checkpoint with its weights."""
    torch.manual_seed(0)
    network = randomize(timm.create_model("tresnet_m", num_classes=80))
    path = tmp_path_factory.mktemp("asl") / "asl.pth"
    # In another order than COCO's.
    names = dict(enumerate(reversed(COCO_LABELS)))
    state = original_layout(network.state_dict())
    torch.save({"model": state, "num_classes": 80, "idx_to_class": names}, path)
    return network, path


def counterless(network):
    """The names of a network's tensors, without how many batches its norms saw."""
    return [name for name in network.state_dict() if not name.endswith("num_batches_tracked")]


@pytest.mark.slow
def test_asl_gives_the_same_logits_by_label(convert, asl):
    network, source = asl
    path, out = convert(source, "asl")
    assert "labels: person, bicycle, car ...; reordered" in out
    taken = groups_of(out, "taken")
    assert taken == {"backbone.net": len(counterless(network)) - 2, "label_head.classifier": 2}
    assert groups_of(out, "left in the file") == {"body.layer2": 1}
    assert read_checkpoint(str(path))["label_names"] == COCO_LABELS
    cfg = config_of(path)
    assert cfg.MODEL.TIMM.NAME == "tresnet_m"
    assert cfg.MODEL.LOSS.NAME == "AsymmetricLoss"
    cfg.MODEL.WEIGHTS = str(path)
    model = load(cfg, path, COCO_LABELS)
    image = torch.randint(256, (3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        actual = model([{"image": image}])[0]["logits"]
        expected = network(image[None] / 255)[0].flip(0)
    assert_same(actual, expected, 1e-4)


@pytest.mark.slow
def test_tresnet_gives_the_same_features(convert, asl):
    network, source = asl
    path, out = convert(source, "tresnet")
    assert groups_of(out, "left in the file") == {
        **{"body.layer2": 1, "head.fc": 2},
    }
    assert set(read_checkpoint(str(path))) == {"model"}
    # A checkpoint is there: nothing is downloaded.
    opts = ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", str(path), *printed_settings(out)]
    model = build_model(setup_cfg("configs/COCO/ml_agcn_2l.yaml", opts)).eval()
    MultiLabelCheckpointer(model, label_names=COCO_LABELS).load(str(path))
    image = torch.randint(256, (3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        actual = model.backbone(model.preprocess_image([{"image": image}]).tensor)["res5"]
        expected = network.forward_features(image[None] / 255)
    assert_same(actual, expected, 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tresnet_m", "tresnet_l", "tresnet_xl", "tresnet_v2_l"])
@pytest.mark.parametrize("layout", [original_layout, dict])
def test_each_tresnet_is_told_and_all_of_it_used(name, layout):
    with torch.device("meta"):
        network, features = (timm.create_model(name, features_only=f) for f in (False, True))
    state = {n: torch.empty(t.shape, dtype=t.dtype) for n, t in network.state_dict().items()}
    state = layout(state)
    assert tresnet_settings(state)["MODEL.TIMM.NAME"] == name
    expected = {f"backbone.net.{n}": t.shape for n, t in features.state_dict().items()}
    converted = convert_tresnet(state, expected)
    if layout is original_layout:
        expected = {n: s for n, s in expected.items() if not n.endswith("num_batches_tracked")}
    assert {n: t.shape for n, t in converted.items()} == expected


def test_the_scale_of_inplace_abn_and_of_batch_norm():
    """|w| + 1e-5 of the one, in half precision too; the other's as it is."""
    names = ["backbone.net.body_conv1.bn.weight", "backbone.net.body_conv1.conv.weight"]
    weights = torch.tensor([-0.5, 0.25, 0.0])
    kernel = torch.zeros(3, 48, 3, 3)
    for dtype in (torch.float32, torch.float16):
        state = {"body.conv1.0.weight": kernel, "body.conv1.1.weight": weights.to(dtype)}
        scale = convert_tresnet(state, names)[names[0]]
        torch.testing.assert_close(scale, torch.tensor([0.50001, 0.25001, 0.00001]))
    state = {"body.conv1.conv.weight": kernel, "body.conv1.bn.weight": weights}
    assert convert_tresnet(state, names)[names[0]].equal(weights)


def small_asl(**changes):
    """Tensors that have the names of TResNet-M's blocks and ASL's classifier, and no weights."""
    blocks = {1: 3, 2: 4, 3: 11, 4: 3}
    state = {
        f"body.layer{stage}.{block}.conv1.0.weight": torch.zeros(1)
        for stage, number in blocks.items()
        for block in range(number)
    }
    head = {"head.fc.weight": torch.zeros(80, 2048), "head.fc.bias": torch.zeros(80)}
    state.update(head, **{name.replace("__", "."): value for name, value in changes.items()})
    return {name: tensor for name, tensor in state.items() if tensor is not None}


def test_what_is_no_asl_checkpoint_is_refused(fails, tmp_path):
    source = tmp_path / "asl.pth"

    def error(state, name="asl", *arguments):
        torch.save(state, source)
        return fails(source, name, *arguments)

    assert "no head.fc.weight" in error(small_asl(head__fc__weight=None))
    assert "80 weights and 79 biases" in error(small_asl(head__fc__bias=torch.zeros(79)))
    assert "3, 4, 11, 4 blocks" in error(small_asl(body__layer4__3__x=torch.zeros(1)))
    names = {"model": small_asl(), "idx_to_class": {0: "cat"}}
    assert "idx_to_class names 1 labels, and the source has 80" in error(names)
    assert "22 of another shape" in error(small_asl(**{"body__conv1__0__weight": torch.zeros(1)}))


def test_asls_labels_are_in_the_order_of_cocos_categories(convert_main, tmp_path):
    """Unless the file says another, or --labels; the classifier goes with them."""
    order = []
    for arguments in ([], ["--labels", "coco"]):
        weight = torch.arange(80.0)[:, None].expand(80, 2048)
        content = {"model": small_asl(head__fc__weight=weight)}
        if arguments:
            content["idx_to_class"] = dict(enumerate(sorted(COCO_LABELS)))
        torch.save(content, tmp_path / "asl.pth")
        output = ["--output", tmp_path / "model.pth", "--allow-partial", *arguments]
        status, _, err = convert_main(tmp_path / "asl.pth", "--format", "asl", *output)
        assert status == 0, err
        checkpoint = read_checkpoint(str(tmp_path / "model.pth"))
        assert checkpoint["label_names"] == COCO_LABELS
        order.append(checkpoint["model"]["label_head.classifier.weight"][:, 0].tolist())
    assert order == 2 * [list(range(80))]


# ----------------------------------------------------------------------------------- detectron2

NARROW = {
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 8,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 32,
    "MODEL.RESNETS.WIDTH_PER_GROUP": 8,
    "MODEL.FPN.OUT_CHANNELS": 16,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 16,
}


def zoo_config(name):
    return model_zoo.get_config(f"COCO-Detection/faster_rcnn_{name}.yaml")


@pytest.fixture
def zoo(tmp_path):
    """A function that writes a narrow Faster R-CNN as the zoo has them: (network, path)."""

    def write(name, **extra):
        cfg = zoo_config(name)
        cfg.merge_from_list([item for pair in NARROW.items() for item in pair])
        cfg.MODEL.DEVICE = "cpu"
        torch.manual_seed(0)
        network = randomize(build_model(cfg))
        arrays = {name: tensor.numpy() for name, tensor in network.state_dict().items()}
        content = {"model": {**arrays, **extra}, "__author__": "Detectron2 Model Zoo"}
        path = tmp_path / "model_final.pkl"
        path.write_bytes(pickle.dumps(content))
        return network, path

    return write


def region_model(path, settings, *opts):
    """IA-GCN with a converted backbone and RPN, and the tensors that were not in the file."""
    opts = ["MODEL.DEVICE", "cpu", *settings, *opts]
    model = build_model(setup_cfg("configs/COCO/ia_gcn_R_101.yaml", opts)).eval()
    checkpointer = MultiLabelCheckpointer(model, label_names=COCO_LABELS)
    checkpointer.load(str(path))
    return model, checkpointer.missing


def both_images(model, network):
    """An image as each network gets it, which must be the same."""
    image = torch.randint(256, (3, 64, 96), dtype=torch.uint8)
    ours = model.preprocess_image([{"image": image}]).tensor
    theirs = network.preprocess_image([{"image": image}]).tensor
    torch.testing.assert_close(ours, theirs)
    return ours


def test_a_c4_model_gives_the_same_features_and_regions(convert, fails, zoo):
    network, source = zoo("R_50_C4_1x")
    # By the error alone, the model is made to fit.
    error = fails(source, "detectron2")
    assert "MODEL.RESNETS.DEPTH 50" in error
    assert "MODEL.RPN.CONV_DIMS [-1]" in error
    wrong = error.split("it goes with ")[1].split(";")[0]
    opts = re.findall(r"([A-Z0-9_.]+) (\[.*?\]|[^,]+)", wrong)
    path, out = convert(source, "detectron2", *[item for pair in opts for item in pair])

    taken = groups_of(out, "taken")
    assert set(taken) == {
        *("backbone.stem", "backbone.res2", "backbone.res3", "backbone.res4", "backbone.res5"),
        "proposal_generator.rpn_head",
    }
    assert taken["proposal_generator.rpn_head"] == 6
    assert groups_of(out, "left in the file") == {"roi_heads.box_predictor": 4}
    assert groups_of(out, "fresh in the model")["label_head.layers"] == 3
    assert "anchors: the file has none" in out

    model, missing = region_model(path, printed_settings(out))
    assert missing
    assert not [name for name in missing if name.startswith(("backbone.", "proposal_generator."))]
    with torch.no_grad():
        images = both_images(model, network)
        theirs, ours = network.backbone(images)["res4"], model.backbone(images)
        assert_same(ours["res4"], theirs, 1e-5)
        assert_same(ours["res5"], network.roi_heads.res5(theirs), 1e-5)
        regions = zip(*(n.proposal_generator.rpn_head([theirs]) for n in (model, network)))
        for actual, expected in regions:
            assert_same(actual[0], expected[0], 1e-5)


def test_regions_get_a_c4_models_res5(convert, zoo):
    network, source = zoo("R_50_C4_1x")
    regions = ["MODEL.REGION_BRANCH.RES5", "True", "MODEL.ROI_HEADS.IN_FEATURES", "['res4']"]
    opts = [item for pair in NARROW.items() for item in pair]
    opts += ["MODEL.RESNETS.DEPTH", "50", "MODEL.RPN.CONV_DIMS", "[-1]", *regions]
    path, out = convert(source, "detectron2", *opts)
    expected = network.roi_heads.res5.state_dict()
    assert groups_of(out, "taken")["roi_heads.res5"] == len(expected)
    assert "missing" not in out
    state = read_checkpoint(str(path))["model"]
    for name, tensor in expected.items():
        assert state[f"roi_heads.res5.{name}"].equal(tensor), name
        assert state[f"backbone.res5.{name}"].equal(tensor), name


def test_an_fpn_model_gives_its_resnet(convert, fails, zoo):
    network, source = zoo("R_50_FPN_1x")
    opts = [item for pair in NARROW.items() for item in pair] + ["MODEL.RESNETS.DEPTH", 50]
    error = fails(source, "detectron2", *opts)
    assert "proposal_generator.rpn_head.conv.weight (16, 16, 3, 3) in the file" in error
    path, out = convert(source, "detectron2", *opts, "--allow-partial")
    assert "build_resnet_fpn_backbone" in out
    assert groups_of(out, "misshaped") == {"proposal_generator.rpn_head": 6}
    left = groups_of(out, "left in the file")
    assert left["backbone.fpn_lateral2"] == 2
    assert left["roi_heads.box_head"] == 4
    model, missing = region_model(path, printed_settings(out))
    assert not [name for name in missing if name.startswith("backbone.")]
    with torch.no_grad():
        images = both_images(model, network)
        theirs = network.backbone.bottom_up(images)
        for name, features in model.backbone(images).items():
            assert_same(features, theirs[name], 1e-5)


def test_an_fpn_model_in_a_model_with_an_fpn(convert, zoo):
    network, source = zoo("R_50_FPN_1x")
    fpn = {
        **NARROW,
        "MODEL.RESNETS.DEPTH": 50,
        "MODEL.BACKBONE.NAME": "build_resnet_fpn_backbone",
        "MODEL.RESNETS.OUT_FEATURES": ["res2", "res3", "res4", "res5"],
        "MODEL.FPN.IN_FEATURES": ["res2", "res3", "res4", "res5"],
        "MODEL.RPN.IN_FEATURES": ["p2", "p3", "p4", "p5", "p6"],
        "MODEL.RPN.CONV_DIMS": [-1],
        "MODEL.ANCHOR_GENERATOR.SIZES": [[32], [64], [128], [256], [512]],
        "MODEL.ROI_HEADS.IN_FEATURES": ["p5"],
        "MODEL.LABEL_HEAD.IN_FEATURES": ["p5"],
    }
    opts = [item for pair in fpn.items() for item in pair]
    path, out = convert(source, "detectron2", *opts)
    assert groups_of(out, "left in the file") == {
        **{"roi_heads.box_head": 4, "roi_heads.box_predictor": 4},
    }
    model, _ = region_model(path, printed_settings(out), *opts)
    with torch.no_grad():
        images = both_images(model, network)
        theirs, ours = network.backbone(images), model.backbone(images)
        for name in ("p2", "p5", "p6"):
            assert_same(ours[name], theirs[name], 1e-5)
        features = [theirs[name] for name in network.proposal_generator.in_features]
        regions = zip(*(n.proposal_generator.rpn_head(features) for n in (model, network)))
        for actual, expected in regions:
            assert_same(actual[-1], expected[-1], 1e-5)


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_anchors_of_older_files_are_compared(convert, zoo, scale):
    cfg = setup_cfg("configs/COCO/ia_gcn_R_101.yaml", ["MODEL.DEVICE", "cpu"])
    generator = build_model(cfg).proposal_generator.anchor_generator
    anchors = scale * generator.cell_anchors._buffers["0"].numpy()
    name = "proposal_generator.anchor_generator.cell_anchors.0"
    _, source = zoo("R_50_C4_1x", **{name: anchors})
    opts = [item for pair in NARROW.items() for item in pair]
    opts += ["MODEL.RESNETS.DEPTH", 50, "MODEL.RPN.CONV_DIMS", "[-1]"]
    _, out = convert(source, "detectron2", *opts)
    assert ("anchors: the same" in out) == (scale == 1)
    assert ("anchors: not the source's" in out) == (scale == 2)


@pytest.mark.parametrize(
    "name", ["R_50_C4_1x", "R_101_C4_3x", "R_50_FPN_1x", "R_101_FPN_3x", "X_101_32x8d_FPN_3x"]
)
def test_the_zoos_own_configs_have_the_settings(name):
    cfg = zoo_config(name)
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        state = build_model(cfg).state_dict()
    settings = detectron2_settings(state, state)
    assert {"MODEL.RPN.CONV_DIMS", "MODEL.RESNETS.DEPTH", "INPUT.FORMAT"} < set(settings)
    values = {key: eval(f"cfg.{key}", {"cfg": cfg}) for key in settings}
    assert values == settings
    converted = convert_detectron2(state, ["backbone.stem.conv1.weight"])
    assert {".".join(name.split(".")[:2]) for name in converted} == {
        *("backbone.stem", "backbone.res2", "backbone.res3", "backbone.res4", "backbone.res5"),
        "proposal_generator.rpn_head",
    }


def test_a_model_without_an_rpn(fails, convert, zoo):
    _, source = zoo("R_50_C4_1x")
    opts = [item for pair in NARROW.items() for item in pair] + ["MODEL.RESNETS.DEPTH", 50]
    opts += ["--config-file", "configs/COCO/resnet101.yaml"]
    error = fails(source, "detectron2", *opts)
    assert "6 without a place in the model (proposal_generator.rpn_head.conv.weight" in error
    _, out = convert(source, "detectron2", *opts, "--allow-partial")
    assert groups_of(out, "taken")["backbone.res5"] > 0


# ------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("save", ["torch", "pickle"])
@pytest.mark.parametrize("suffix", [".pth", ".pkl", ".pth.tar"])
def test_a_file_that_would_run_code_is_refused(fails, tmp_path, name, save, suffix):
    witness = tmp_path / "witness"

    class Malicious:
        def __reduce__(self):
            return (open, (str(witness), "w"))

    source = tmp_path / f"evil{suffix}"
    content = {"model": {"conv1.weight": Malicious()}}
    if save == "torch":
        torch.save(content, source)
    else:
        source.write_bytes(pickle.dumps(content))
    error = fails(source, name)
    assert str(source) in error
    if save == "pickle" and suffix == ".pkl":
        assert "io.open" in error
    assert not witness.exists()


def test_embeddings_that_would_run_code_are_refused(fails, ml_gcn, tmp_path):
    ml_gcn(20)
    witness = tmp_path / "witness"

    class Malicious:
        def __reduce__(self):
            return (os.mkdir, (str(witness),))

    evil = tmp_path / "evil.pkl"
    evil.write_bytes(pickle.dumps(Malicious()))
    error = fails(tmp_path / "checkpoint.pth.tar", "ml_gcn", "--embeddings", evil)
    assert str(evil) in error
    assert "posix.mkdir" in error
    assert not witness.exists()


@pytest.mark.parametrize(
    "content", [5, [1], {}, {"model": {}}, {1: torch.zeros(1)}, {"model": {"x": 5}}]
)
@pytest.mark.parametrize("suffix", [".pth", ".pkl"])
def test_a_file_of_something_else_is_refused(fails, tmp_path, content, suffix):
    source = tmp_path / f"source{suffix}"
    if suffix == ".pth":
        torch.save(content, source)
    elif content == {1: torch.zeros(1)}:
        source.write_bytes(pickle.dumps({1: np.zeros(1)}))
    else:
        source.write_bytes(pickle.dumps(content))
    assert str(source) in fails(source, "torchvision")


def test_arrays_that_are_no_numbers_are_refused(fails, tmp_path):
    source = tmp_path / "source.pkl"
    for array in (np.array(["text"]), np.array([None]), np.zeros(2, ">f4")[::-1]):
        source.write_bytes(pickle.dumps({"model": {"backbone.stem.conv1.weight": array}}))
        assert "source.pkl" in fails(source, "detectron2")


@pytest.mark.parametrize("name", FORMATS)
def test_a_checkpoint_of_another_format_is_refused(fails, tmp_path, name):
    source = tmp_path / "source.pth"
    torch.save({"weight": torch.zeros(3)}, source)
    error = fails(source, name)
    assert str(source) in error


def test_matrices_of_another_form_are_refused(fails, tmp_path):
    source = tmp_path / "source.pth"
    state = {name: torch.zeros(3, 3) for name in ("A", "gc1.weight", "gc2.weight")}
    for name, tensor in [("A", torch.zeros(3, 4)), ("gc1.weight", torch.zeros(3))]:
        torch.save({**state, name: tensor}, source)
        error = fails(source, "ml_gcn")
        assert f"{name} is" in error
        assert str(source) in error


def test_damaged_and_missing_files_are_one_line(fails, tmp_path, resnet18):
    assert "none.pth" in fails(tmp_path / "none.pth", "torchvision")
    assert "none.pkl" in fails(tmp_path / "none.pkl", "detectron2")
    source = tmp_path / "cut.pth"
    torch.save(resnet18.state_dict(), source)
    source.write_bytes(source.read_bytes()[:100000])
    assert "cut.pth" in fails(source, "torchvision")


def test_arguments_that_can_not_be(convert_main, fails, tmp_path, resnet18):
    source = tmp_path / "resnet.pth"
    torch.save(resnet18.state_dict(), source)
    before = source.read_bytes()

    def error(output, *arguments):
        arguments = ["--format", "torchvision", "--output", output, *arguments]
        status, _, err = convert_main(source, *arguments)
        assert status == 1
        assert err.count("\n") == 1
        return err

    assert "must end in .pth" in error(tmp_path / "model.pkl")
    (tmp_path / "folder.pth").mkdir()
    assert "is a folder" in error(tmp_path / "folder.pth")
    assert "is SOURCE" in error(source)
    assert source.read_bytes() == before
    assert str(tmp_path) in error(source / "model.pth")
    assert "--labels" in fails(source, "torchvision", "--labels", "coco")
    assert "--embeddings" in fails(source, "torchvision", "--embeddings", "a.npy")
    assert "none.yaml" in fails(source, "torchvision", "--config-file", tmp_path / "none.yaml")
    assert "NO.SUCH.KEY" in fails(source, "torchvision", "NO.SUCH.KEY", 1)


def test_from_python(tmp_path, resnet18):
    """What the command says is reported, and a refusal is an InputError."""
    source, output = tmp_path / "resnet.pth", tmp_path / "model.pth"
    torch.save(resnet18.state_dict(), source)
    said = []
    convert_checkpoint(source, "torchvision", output, report=said.append)
    assert groups_of("\n".join(said), "taken")["backbone.stem"] == 6
    taken = read_checkpoint(str(output))["model"]
    assert taken["backbone.stem.conv1.weight"].equal(resnet18.conv1.weight)
    output.unlink()
    with pytest.raises(InputError, match="--format caffe: there is torchvision, ml_gcn"):
        convert_checkpoint(source, "caffe", output)
    opts = ["MODEL.RESNETS.DEPTH", 34]
    with pytest.raises(InputError, match=r"it goes with MODEL\.RESNETS\.DEPTH 18;"):
        convert_checkpoint(source, "torchvision", output, opts=opts)
    assert not output.exists()


def test_help_names_formats_and_options(convert_main, capsys):
    with pytest.raises(SystemExit, match="0"):
        convert_main("--help")
    out = capsys.readouterr().out
    for part in (*FORMATS, "--allow-partial"):
        assert part in out
    for part in ("--embeddings", "--labels", "--config-file"):
        assert part in out
