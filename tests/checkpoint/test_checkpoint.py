"""Checkpoints: safe, complete, and of the right labels."""

import pickle

import pytest
import torch
import torchvision
from detectron2.modeling import build_backbone, build_model

from ia_gcn.checkpoint import MultiLabelCheckpointer, convert_torchvision_resnet
from ia_gcn.engine import setup_cfg
from ia_gcn.errors import InputError

LABELS = ["cat", "dog", "sea"]
SLIM = ("MODEL.DEVICE", "cpu", "MODEL.LABEL_HEAD.NUM_LABELS", 3)
R18 = ("MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64)


@pytest.fixture
def build(monkeypatch, repository):
    """A function that builds the small ML-GCN of three labels, with a filled label graph."""
    monkeypatch.chdir(repository)

    def build_filled(*opts):
        model = build_model(setup_cfg("configs/DigitScenes/ml_gcn.yaml", [*SLIM, *opts]))
        if model.label_graph is not None:
            graph = model.label_graph
            counts = torch.tensor([[4, 2, 0], [2, 3, 1], [0, 1, 2]])
            graph.fill(counts.diagonal(), counts, torch.randn(3, 300))
        return model.eval()

    return build_filled


def test_a_checkpoint_restores_weights_and_label_graph(build, tmp_path):
    model, other = build(), build()
    MultiLabelCheckpointer(model, str(tmp_path), label_names=LABELS).save("model")
    checkpointer = MultiLabelCheckpointer(other, label_names=LABELS)
    checkpointer.load(str(tmp_path / "model.pth"))
    checkpointer.check_complete()
    images = [{"image": torch.randint(256, (3, 64, 64), dtype=torch.uint8)}]
    with torch.no_grad():
        assert torch.equal(model(images)[0]["logits"], other(images)[0]["logits"])
    assert torch.equal(model.label_graph.pair_counts, other.label_graph.pair_counts)


def old_names(state_dict):
    """A state dict as version 0.1 named it."""
    changes = {"label_graph.": "label_head.label_graph.", "label_head.pooling.": "pooling."}
    renamed = {}
    for name, value in state_dict.items():
        for new, old in changes.items():
            if name.startswith(new):
                name = name.replace(new, old, 1)
        renamed[name] = value
    return renamed


@pytest.mark.parametrize("load_ema", [False, True])
def test_a_checkpoint_of_version_0_1_gives_the_same_scores(build, tmp_path, load_ema):
    gem = ("MODEL.GLOBAL_POOLING.NAME", "gem")
    model, other = build(*gem), build(*gem)
    with torch.no_grad():
        model.label_head.pooling.power += 0.5
    old = old_names(model.state_dict())
    assert set(old) ^ set(model.state_dict()) == {
        *(
            f"label_{part}.{name}"
            for part in ("graph", "head.label_graph")
            for name in ("embeddings", "label_counts", "pair_counts")
        ),
        "pooling.power",
        "label_head.pooling.power",
    }
    content = {"model": old, "label_names": LABELS}
    if load_ema:
        content = {
            "model": old_names(other.state_dict()),
            "ema": {f"module.{name}": value for name, value in old.items()},
            "label_names": LABELS,
        }
    torch.save(content, tmp_path / "old.pth")
    checkpointer = MultiLabelCheckpointer(other, label_names=LABELS, load_ema=load_ema)
    checkpointer.load(str(tmp_path / "old.pth"))
    checkpointer.check_complete()
    images = [{"image": torch.randint(256, (3, 64, 64), dtype=torch.uint8)}]
    with torch.no_grad():
        assert torch.equal(model(images)[0]["scores"], other(images)[0]["scores"])


def test_a_file_that_would_run_code_is_refused(build, tmp_path):
    witness = tmp_path / "witness"

    class Malicious:
        def __reduce__(self):
            return (open, (str(witness), "w"))

    for name, save in [("a.pth", torch.save), ("a.pkl", _pickle), ("b.pth", _pickle)]:
        save({"model": {}, "x": Malicious()}, tmp_path / name)
        with pytest.raises(InputError, match=name):
            MultiLabelCheckpointer(build(), label_names=LABELS).load(str(tmp_path / name))
    assert not witness.exists()


def _pickle(content, path):
    path.write_bytes(pickle.dumps(content))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["dog", "cat", "sea"], "same labels in another order"),
        (["cat", "dog", "sky"], "has sky; lacks sea"),
    ],
)
def test_other_labels_are_refused(build, tmp_path, labels, message):
    MultiLabelCheckpointer(build(), str(tmp_path), label_names=LABELS).save("model")
    with pytest.raises(InputError, match=message):
        MultiLabelCheckpointer(build(), label_names=labels).load(str(tmp_path / "model.pth"))


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None])
def test_a_file_that_is_no_checkpoint_is_refused_in_one_line(build, tmp_path, content):
    path = tmp_path / "model.pth"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        MultiLabelCheckpointer(build(), label_names=LABELS).load(str(path))
    assert "model.pth" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("content", [5, [1, 2], {"model": 5}, {"model": {"weight": "text"}}])
def test_a_file_of_something_else_is_refused(build, tmp_path, content):
    torch.save(content, tmp_path / "model.pth")
    with pytest.raises(InputError, match=r"model\.pth"):
        MultiLabelCheckpointer(build(), label_names=LABELS).load(str(tmp_path / "model.pth"))


def test_a_model_that_is_not_wholly_loaded_is_not_complete(build, tmp_path):
    checkpointer = MultiLabelCheckpointer(build(), label_names=LABELS)
    with pytest.raises(InputError, match=r"MODEL\.WEIGHTS is empty"):
        checkpointer.check_complete()
    linear = build("MODEL.LABEL_HEAD.NAME", "LinearHead")
    MultiLabelCheckpointer(linear, str(tmp_path), label_names=LABELS).save("linear")
    checkpointer.load(str(tmp_path / "linear.pth"))
    with pytest.raises(InputError, match="of the model's tensors"):
        checkpointer.check_complete()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["label_head.layers.0.weight", "label_graph.embeddings"])
def test_a_tensor_that_is_not_finite_is_named(build, tmp_path, name, value):
    model = build()
    model.state_dict()[name].view(-1)[-1] = value
    MultiLabelCheckpointer(model, str(tmp_path), label_names=LABELS).save("model")
    checkpointer = MultiLabelCheckpointer(build(), label_names=LABELS)
    checkpointer.load(str(tmp_path / "model.pth"))
    with pytest.raises(InputError, match=rf"model\.pth: {name} has values that are not finite"):
        checkpointer.check_complete()


def test_a_bare_label_graph_is_not_complete(monkeypatch, repository, tmp_path):
    monkeypatch.chdir(repository)
    bare = build_model(setup_cfg("configs/DigitScenes/ml_gcn.yaml", SLIM))
    MultiLabelCheckpointer(bare, str(tmp_path), label_names=LABELS).save("bare")
    checkpointer = MultiLabelCheckpointer(bare, label_names=LABELS)
    checkpointer.load(str(tmp_path / "bare.pth"))
    with pytest.raises(InputError, match="is bare"):
        checkpointer.check_complete()


@pytest.mark.parametrize(("name", "opts"), [("resnet18", R18), ("resnet50", ())])
def test_torchvision_weights_give_torchvision_features(
    monkeypatch, repository, tmp_path, name, opts
):
    monkeypatch.chdir(repository)
    reference = getattr(torchvision.models, name)().eval()
    for tensor in reference.state_dict().values():
        if tensor.dtype == torch.float32 and tensor.ndim == 1:
            tensor.uniform_(0.5, 1.5)  # running statistics and norms that are not the defaults
    path = tmp_path / "resnet.pth"
    torch.save(reference.state_dict(), path)

    depth = ("MODEL.RESNETS.DEPTH", 50, *opts)
    cfg = setup_cfg("configs/COCO/resnet101.yaml", ["MODEL.DEVICE", "cpu", *depth])
    model = build_model(cfg).eval()
    MultiLabelCheckpointer(model, label_names=LABELS).load(str(path))
    image = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        features = model.backbone(image)["res5"]
        layers = torch.nn.Sequential(*list(reference.children())[:-2])
        expected = layers(image)
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5 * float(expected.max()))


def test_every_tensor_of_a_torchvision_resnet_is_used(monkeypatch, repository):
    monkeypatch.chdir(repository)
    converted = convert_torchvision_resnet(torchvision.models.resnet101().state_dict())
    cfg = setup_cfg("configs/COCO/resnet101.yaml", ["MODEL.DEVICE", "cpu"])
    backbone = build_backbone(cfg)
    assert set(converted) == {f"backbone.{name}" for name in backbone.state_dict()}


def test_a_res5_stage_of_the_regions_starts_as_the_backbones(monkeypatch, repository, tmp_path):
    monkeypatch.chdir(repository)
    torch.save(torchvision.models.resnet50().state_dict(), tmp_path / "resnet.pth")
    regions = ("MODEL.REGION_BRANCH.RES5", True, "MODEL.ROI_HEADS.IN_FEATURES", ["res4"])
    opts = ["MODEL.DEVICE", "cpu", "MODEL.RESNETS.DEPTH", 50, *regions]
    model = build_model(setup_cfg("configs/COCO/ia_gcn_R_101.yaml", opts))
    MultiLabelCheckpointer(model, label_names=LABELS).load(str(tmp_path / "resnet.pth"))
    expected = model.backbone.res5.state_dict()
    for name, tensor in model.roi_heads.res5.state_dict().items():
        assert tensor.equal(expected[name]), name
