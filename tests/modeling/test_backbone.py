"""timm networks as detectron2 backbones. No test needs a network connection."""

import io
import logging
import pickle

import pytest
import timm
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone, build_model
from safetensors.torch import save_file
from torch import nn

from ia_gcn.engine import build_optimizer
from ia_gcn.modeling import MultiLabelRecognizer, TimmBackbone
from ia_gcn.modeling.backbone import read_weights
from tests.helpers.recognizers import logits_of, make_inputs
from tests.helpers.recognizers import make_cfg as make_meta_arch_cfg


@pytest.fixture(autouse=True)
def downloads(monkeypatch):
    """The arguments of timm's attempts to download weights, all of which fail."""
    attempts = []

    def fail(*args, **kwargs):
        attempts.append(args)
        raise OSError("Network is unreachable\nTry again later")

    for name in ("state_dict_from_hf", "state_dict_from_url", "custom_from_hf"):
        monkeypatch.setattr(f"timm.models._builder.load_{name}", fail)
    return attempts


def make_cfg(name="test_resnet", freeze_at=0, weights="", **timm_keys):
    cfg = make_meta_arch_cfg("build_timm_backbone")
    cfg.MODEL.BACKBONE.FREEZE_AT = freeze_at
    cfg.MODEL.WEIGHTS = weights
    cfg.MODEL.TIMM.NAME = name
    cfg.MODEL.TIMM.PRETRAINED = False
    for key, value in timm_keys.items():
        setattr(cfg.MODEL.TIMM, key, value)
    return cfg


def make_model(seed=0, **keys):
    torch.manual_seed(seed)
    return build_model(make_cfg(**keys))


def make_images():
    """Of such a size that no feature map is as high as it has channels."""
    return torch.randn(2, 3, 96, 64, generator=torch.Generator().manual_seed(0))


def give_norms_a_past(net):
    """Statistics and weights that are not those of a new batch norm."""
    generator = torch.Generator().manual_seed(1)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.running_var, module.weight, module.bias):
                tensor.data.uniform_(0.5, 1.5, generator=generator)
    return net


def make_source(name, **options):
    """A network of timm as someone else has trained it."""
    torch.manual_seed(7)
    return give_norms_a_past(timm.create_model(name, **options)).eval()


# What it gives


# test_mambaout has its channels last, the three stages of test_vit one stride.
@pytest.mark.parametrize(
    "name", ["test_resnet", "mobilenetv3_small_050", "test_convnext", "test_mambaout", "test_vit"]
)
@torch.no_grad()
def test_features_are_those_of_the_network_by_their_stride(name):
    cfg = make_cfg(name)
    model = build_backbone(cfg).eval()
    assert isinstance(model, TimmBackbone)
    # test_vit has position embeddings for one size, which it makes do for others.
    size = {"img_size": tuple(cfg.INPUT.IMAGE_SIZE)} if name == "test_vit" else {}
    net = timm.create_model(name, features_only=True, **size).eval()
    net.load_state_dict(model.net.state_dict())
    images, expected, shapes = make_images(), {}, {}
    for features, channels in zip(net(images), net.feature_info.channels()):
        if features.shape[1] != channels:
            features = features.permute(0, 3, 1, 2)
        stride = 96 // features.shape[2]
        assert features.shape == (2, channels, 96 // stride, 64 // stride)
        place = {2: "res1", 4: "res2", 8: "res3", 16: "res4", 32: "res5"}[stride]
        expected[place], shapes[place] = features, ShapeSpec(channels=channels, stride=stride)
    found = model(images)
    assert found.keys() == expected.keys()
    for place, features in found.items():
        assert features.equal(expected[place]), place
    assert model.output_shape() == shapes
    assert model.size_divisibility == max(shape.stride for shape in shapes.values())


def test_of_stages_with_one_stride_the_last_counts():
    model = build_backbone(make_cfg("test_vit"))
    assert model.net.feature_info.reduction() == [16, 16, 16]
    assert model.output_shape() == {"res4": ShapeSpec(channels=64, stride=16)}
    with torch.no_grad():
        *_, last = model.eval().net(make_images())
        assert model(make_images())["res4"].equal(last)


@torch.no_grad()
def test_tresnet_m():
    model = build_backbone(make_cfg("tresnet_m")).eval()
    # The paper's 29.5 million include a classifier of 80 labels.
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == 29.34
    features = model(torch.zeros(1, 3, 64, 96))
    assert {name: tuple(value.shape[1:]) for name, value in features.items()} == {
        "res2": (64, 16, 24),
        "res3": (128, 8, 12),
        "res4": (1024, 4, 6),
        "res5": (2048, 2, 3),
    }
    assert all(model.output_shape()[name].channels == f.shape[1] for name, f in features.items())
    assert model.size_divisibility == 32


def test_the_number_of_channels_is_the_images():
    model = build_backbone(make_cfg(), ShapeSpec(channels=1))
    assert model(torch.zeros(1, 1, 64, 64))["res5"].shape == (1, 96, 2, 2)


# In a model


@pytest.mark.parametrize("name", ["test_resnet", "test_mambaout"])
def test_a_recognizer_sees_the_image_and_not_its_padding(name):
    """Against the network run by hand, on images that fill 2×2 and 1×3 cells of 2×3."""
    model = make_model(name=name)
    assert isinstance(model, MultiLabelRecognizer)
    give_norms_a_past(model.backbone)
    inputs = make_inputs([(64, 50), (20, 96)])
    net, classifier = model.backbone.net, model.label_head.classifier
    expected = []
    with torch.no_grad():
        for x, (height, width) in zip(inputs, [(2, 2), (1, 3)]):
            pixels = (x["image"] - model.pixel_mean) / model.pixel_std
            padded = torch.zeros(1, 3, 64, 96)
            padded[0, :, : pixels.shape[1], : pixels.shape[2]] = pixels
            features = net.eval()(padded)[-1][0]
            if name == "test_mambaout":
                features = features.permute(2, 0, 1)
            peaks = features[:, :height, :width].amax(dim=(1, 2))
            expected.append(classifier(peaks))
    found = logits_of(model, inputs)
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["test_resnet", "mobilenetv3_small_050", "test_mambaout"])
def test_images_of_one_size_keep_to_themselves(name):
    model = make_model(name=name)
    give_norms_a_past(model.backbone)
    inputs = make_inputs([(64, 96)] * 3)
    logits = logits_of(model, inputs)
    assert not torch.allclose(logits[0], logits[1], atol=1e-3)
    for i, x in enumerate(inputs):
        torch.testing.assert_close(logits_of(model, [x])[0], logits[i], rtol=1e-4, atol=1e-4)
    backwards = logits_of(model, inputs[::-1]).flip(0)
    torch.testing.assert_close(backwards, logits, rtol=1e-4, atol=1e-4)


def test_it_trains_by_config_keys_alone():
    cfg = make_cfg("mobilenetv3_small_050")
    cfg.SOLVER.OPTIMIZER = "AdamW"
    cfg.SOLVER.BASE_LR = 0.01
    torch.manual_seed(0)
    model = build_model(cfg).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = build_optimizer(cfg, model)
    inputs = make_inputs([(64, 64)] * 4, labels=True)
    losses = []
    for _ in range(5):
        loss = model(inputs)["loss_multi_label"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    # DistributedDataParallel waits for the gradient of every parameter.
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert all(not value.equal(before[name]) for name, value in model.state_dict().items())


def test_a_feature_map_that_the_network_lacks_is_refused_in_one_line(error_line):
    cfg = make_cfg("test_vit")
    assert build_model(cfg).in_features == ("res4",)
    cfg.MODEL.LABEL_HEAD.IN_FEATURES = ["res5"]
    message = error_line(build_model, cfg)
    assert message == "MODEL.LABEL_HEAD.IN_FEATURES: res5; the backbone has res4"


def test_a_network_of_one_image_size_is_made_for_that_of_the_config():
    cfg = make_cfg("test_vit_relpos")
    cfg.INPUT.IMAGE_SIZE = (128, 96)
    assert logits_of(build_model(cfg), make_inputs([(128, 96)])).isfinite().all()


def test_a_network_that_can_not_be_of_the_config_s_image_size_is_refused(error_line):
    cfg = make_cfg("test_vit_relpos")
    cfg.INPUT.IMAGE_SIZE = (8, 8)
    assert "MODEL.TIMM.NAME test_vit_relpos" in error_line(build_backbone, cfg)


# Weights of a file


def write(content, path):
    if path.suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in content.items()}, path)
    else:
        torch.save(content, path)
    return str(path)


WRAPPERS = {
    "bare.safetensors": lambda state: state,
    "bare.pth": lambda state: state,
    "state_dict.pth": lambda state: {"epoch": 3, "state_dict": state, "arch": "resnet"},
    "model.pth": lambda state: {"model": state, "optimizer": {"lr": 0.1}},
    "both.pth": lambda state: {"state_dict": {"model": state}},
}


@pytest.mark.parametrize("file", WRAPPERS)
@pytest.mark.parametrize("name", ["test_resnet", "mobilenetv3_small_050"])
@torch.no_grad()
def test_weights_of_a_file_give_the_features_of_the_network(tmp_path, downloads, name, file):
    source = make_source(name)
    path = write(WRAPPERS[file](source.state_dict()), tmp_path / file)
    found = build_backbone(make_cfg(name, WEIGHTS_FILE=path)).eval()(make_images())
    expected = source.forward_intermediates(make_images(), intermediates_only=True)
    for i, features in enumerate(expected, start=1):
        assert found[f"res{i}"].equal(features), i
    assert not downloads


@pytest.mark.parametrize("name", ["test_resnet", "mobilenetv3_small_050", "test_convnext"])
@torch.no_grad()
def test_a_file_needs_no_classifier(tmp_path, name):
    source = make_source(name, num_classes=0)
    path = write(source.state_dict(), tmp_path / "headless.safetensors")
    found = build_backbone(make_cfg(name, WEIGHTS_FILE=path)).eval()(make_images())
    expected = source.forward_intermediates(make_images(), intermediates_only=True)
    assert found["res5"].equal(expected[-1])


def test_a_file_goes_before_timms_own_weights(tmp_path, downloads):
    source = make_source("test_resnet")
    path = write(source.state_dict(), tmp_path / "source.pth")
    model = build_backbone(make_cfg(WEIGHTS_FILE=path, PRETRAINED=True))
    assert model.net.conv1[0].weight.equal(source.conv1[0].weight)
    assert not downloads


def test_what_was_read_is_not_kept_beside_the_network(tmp_path):
    path = write(make_source("test_resnet").state_dict(), tmp_path / "source.pth")
    sizes = []
    for keys in ({}, {"WEIGHTS_FILE": path}):
        content = io.BytesIO()
        torch.save(build_backbone(make_cfg(**keys)), content)
        sizes.append(content.tell())
    assert sizes[1] < 1.1 * sizes[0]


def of_another_width(state):
    return {**state, "bn1.bias": torch.zeros(1)}


def without_last_stage(state):
    return {name: value for name, value in state.items() if not name.startswith("layer4.")}


def without_statistics(state):
    return {name: value for name, value in state.items() if "running" not in name}


def with_a_prefix(state):
    return {f"backbone.{name}": value for name, value in state.items()}


def with_numbers_for_names(state):
    return dict(enumerate(state.values()))


def of_nothing(state):
    return {}


def of_mobilenet(state):
    return timm.create_model("mobilenetv3_small_050").state_dict()


def of_mambaout(state):
    return timm.create_model("test_mambaout").state_dict()


# Nothing of the network may stay random unsaid.
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("test_resnet", of_another_width),
        ("test_resnet", without_last_stage),
        ("test_resnet", without_statistics),
        ("test_resnet", with_a_prefix),
        ("test_resnet", with_numbers_for_names),
        ("test_resnet", of_nothing),
        ("test_resnet", of_mobilenet),
        ("test_resnet", of_mambaout),
        ("test_mambaout", of_mobilenet),
        ("mobilenetv3_small_050", of_mambaout),
    ],
)
def test_a_file_that_does_not_fit_is_refused_in_one_line(
    tmp_path, error_line, downloads, name, change
):
    path = write(change(make_source("test_resnet").state_dict()), tmp_path / "other.pth")
    message = error_line(build_backbone, make_cfg(name, WEIGHTS_FILE=path))
    assert "MODEL.TIMM.WEIGHTS_FILE" in message
    assert path in message
    assert not downloads


class Malicious:
    def __init__(self, witness):
        self.witness = witness

    def __reduce__(self):
        return open, (str(self.witness), "w")


def test_a_file_that_would_run_code_is_refused(tmp_path, error_line):
    witness = tmp_path / "witness"
    for name, save in [("a.pth", torch.save), ("b.pth", pickle_to), ("c.safetensors", pickle_to)]:
        path = tmp_path / name
        save({"conv1.weight": torch.ones(1), "x": Malicious(witness)}, path)
        message = error_line(build_backbone, make_cfg(WEIGHTS_FILE=str(path)))
        assert f"MODEL.TIMM.WEIGHTS_FILE: {path}: " in message
    assert not witness.exists()
    # Which does run where it is unpickled.
    pickle.loads((tmp_path / "b.pth").read_bytes())["x"].close()
    assert witness.exists()


def pickle_to(content, path):
    path.write_bytes(pickle.dumps(content, protocol=2))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    "content",
    [
        None,
        b"",
        b"not weights",
        b"PK\x03\x04 zip",
        # Pickles: cut short, of nothing, of what was never put into the memo.
        b"\x80\x02K\x01",
        b"\x80\x02.",
        b"\x80\x02h\x05.",
    ],
)
def test_a_file_without_weights_is_refused_in_one_line(tmp_path, error_line, suffix, content):
    path = tmp_path / f"weights{suffix}"
    if content is not None:
        path.write_bytes(content)
    assert f"MODEL.TIMM.WEIGHTS_FILE: {path}: " in error_line(read_weights, str(path))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_file_that_was_cut_short_or_is_a_folder_is_refused(tmp_path, error_line, suffix):
    path = tmp_path / f"weights{suffix}"
    write({"weight": torch.ones(100)}, path)
    whole = path.read_bytes()
    for length in (4, 9, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert f"MODEL.TIMM.WEIGHTS_FILE: {path}: " in error_line(read_weights, str(path))
    folder = tmp_path / f"folder{suffix}"
    folder.mkdir()
    assert f"MODEL.TIMM.WEIGHTS_FILE: {folder}: " in error_line(read_weights, str(folder))


@pytest.mark.parametrize(
    "content",
    [
        5,
        [torch.ones(1)],
        torch.ones(1),
        {"epoch": 3},
        {"weight": torch.ones(1), "name": "text"},
        {"state_dict": {"layers": {"weight": torch.ones(1)}}},
        {"model": torch.ones(1), "optimizer": {}},
    ],
)
def test_a_pth_of_something_else_is_refused_in_one_line(tmp_path, error_line, content):
    path = write(content, tmp_path / "something.pth")
    assert f"MODEL.TIMM.WEIGHTS_FILE: {path}: " in error_line(read_weights, path)


# timm's own weights


@pytest.mark.parametrize("name", ["test_resnet", "tresnet_m"])
def test_without_a_network_pretrained_says_what_to_do(error_line, downloads, name):
    message = error_line(build_backbone, make_cfg(name, PRETRAINED=True))
    assert len(downloads) == 1
    assert f"MODEL.TIMM.NAME {name}: timm's weights can't be downloaded" in message
    assert "Network is unreachable Try again later" in message
    assert "set MODEL.TIMM.PRETRAINED to False" in message
    assert "MODEL.TIMM.WEIGHTS_FILE" in message


def test_weights_are_random_unless_asked_for(downloads):
    states = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        states.append(build_backbone(make_cfg()).net.conv1[0].weight)
    assert states[0].equal(states[1])
    assert not states[0].equal(states[2])
    assert not downloads


@pytest.mark.parametrize("keys", [{"PRETRAINED": True}, {"WEIGHTS_FILE": "no/such/file.pth"}])
def test_with_a_checkpoint_no_other_weights_are_looked_at(downloads, error_line, keys):
    model = build_backbone(make_cfg(weights="output/model_final.pth", **keys))
    assert isinstance(model, TimmBackbone)
    assert not downloads
    # Without one they are.
    error_line(build_backbone, make_cfg(**keys))


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, "random weights"),
        ({"weights": "output/model_final.pth", "PRETRAINED": True}, "output/model_final.pth"),
    ],
)
def test_the_log_says_where_the_weights_are_from(caplog, keys, expected):
    with caplog.at_level(logging.DEBUG, logger="ia_gcn"):
        build_backbone(make_cfg(**keys))
    assert f"test_resnet: {expected}" in caplog.messages


# What can't be


@pytest.mark.parametrize("keys", [{}, {"PRETRAINED": True}, {"WEIGHTS_FILE": "weights.pth"}])
def test_an_unknown_name_is_refused_in_one_line(tmp_path, monkeypatch, error_line, downloads, keys):
    monkeypatch.chdir(tmp_path)
    write(make_source("test_resnet").state_dict(), tmp_path / "weights.pth")
    message = error_line(build_backbone, make_cfg("no_such_net", **keys))
    assert "MODEL.TIMM.NAME: timm has no network 'no_such_net'" in message
    assert not downloads


def test_strides_that_are_no_powers_of_2_are_refused_in_one_line(error_line):
    message = error_line(build_backbone, make_cfg("vit_small_patch14_dinov2"))
    assert "MODEL.TIMM.NAME vit_small_patch14_dinov2" in message
    assert "14" in message


# FREEZE_AT and the optimizer


def step(model, cfg):
    """One step of training; returns the names of what it changed."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = build_optimizer(cfg, model)
    model.train()(make_inputs([(64, 64)] * 4, labels=True))["loss_multi_label"].backward()
    optimizer.step()
    return {name for name, value in model.state_dict().items() if not value.equal(before[name])}


@pytest.mark.parametrize("name", ["test_resnet", "mobilenetv3_small_050", "test_mambaout"])
@pytest.mark.parametrize("freeze_at", [0, 5])
def test_a_step_leaves_a_frozen_backbone_as_it_was(name, freeze_at):
    cfg = make_cfg(name, freeze_at)
    cfg.SOLVER.BASE_LR = 0.1
    model = build_model(cfg)
    give_norms_a_past(model.backbone)
    state = model.state_dict()
    head = {"label_head.classifier.weight", "label_head.classifier.bias"}
    changed = step(model, cfg)
    if freeze_at:
        assert changed == head
        assert not any(parameter.requires_grad for parameter in model.backbone.parameters())
    else:
        statistics = {key for key in state if "running" in key}
        convolutions = {key for key, value in state.items() if value.ndim == 4}
        assert convolutions
        assert changed >= head | statistics | convolutions


@torch.no_grad()
def test_a_frozen_backbone_has_the_weights_of_the_file(tmp_path):
    source = make_source("test_resnet")
    path = write(source.state_dict(), tmp_path / "source.pth")
    model = build_backbone(make_cfg(freeze_at=5, WEIGHTS_FILE=path)).train()
    expected = source.forward_intermediates(make_images(), intermediates_only=True)
    torch.testing.assert_close(model(make_images())["res5"], expected[-1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("freeze_at", [-1, 1, 3, 4, 6])
def test_a_part_of_it_can_not_be_frozen(error_line, freeze_at):
    message = error_line(build_backbone, make_cfg(freeze_at=freeze_at))
    assert f"MODEL.BACKBONE.FREEZE_AT {freeze_at}: " in message


@pytest.mark.parametrize(
    "name",
    ["tresnet_m", "test_resnet", "mobilenetv3_small_050", "test_convnext", "test_efficientnet_gn"],
)
def test_norms_and_biases_have_their_own_weight_decay(name):
    cfg = make_cfg(name)
    cfg.SOLVER.OPTIMIZER = "AdamW"
    cfg.SOLVER.BACKBONE_MULTIPLIER = 0.1
    cfg.SOLVER.WEIGHT_DECAY = 0.5
    cfg.SOLVER.WEIGHT_DECAY_NORM = 0.25
    cfg.SOLVER.WEIGHT_DECAY_BIAS = 0.125
    model = build_model(cfg)
    decay, rate = {}, {}
    for group in build_optimizer(cfg, model).param_groups:
        for parameter in group["params"]:
            decay[parameter], rate[parameter] = group["weight_decay"], group["lr"]
    seen = set()
    for key, parameter in model.backbone.named_parameters():
        if key.endswith(".bias"):
            kind, expected = "bias", 0.125
        # Layer scales are vectors, too, and called gamma.
        elif parameter.ndim == 1 and key.endswith(".weight"):
            kind, expected = "norm", 0.25
        else:
            kind, expected = "weight", 0.5
        seen.add(kind)
        assert decay[parameter] == expected, key
        assert rate[parameter] == pytest.approx(0.1 * cfg.SOLVER.BASE_LR), key
    assert seen == {"bias", "norm", "weight"}
