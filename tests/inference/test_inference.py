"""Batch norms folded into their convolutions, channels last, and bfloat16."""

import copy
from pathlib import Path

import pytest
import torch
from detectron2.layers import Conv2d
from detectron2.modeling import ResNet, build_model
from PIL import Image
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ia_gcn.checkpoint import MultiLabelCheckpointer
from ia_gcn.data.datasets.common import register_multilabel
from ia_gcn.engine import Trainer, setup_cfg
from ia_gcn.engine.evaluation import evaluate_checkpoint
from ia_gcn.inference import optimize_for_inference, precision, set_precision
from ia_gcn.inference.optimize import BATCH_NORMS, fold_following_norms
from ia_gcn.inference.precision import has_fast_bf16


@pytest.fixture
def build(monkeypatch, repository):
    """A function that builds a model whose batch norms and label graph say something."""
    monkeypatch.chdir(repository)

    def build_trained(name, *opts):
        torch.manual_seed(0)
        model = build_model(setup_cfg(f"configs/DigitScenes/{name}.yaml", opts)).eval()
        for module in model.modules():
            if hasattr(module, "running_var"):
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 2)
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.1)
        if model.label_graph is not None:
            graph = model.label_graph
            counts = torch.full((10, 10), 2).fill_diagonal_(4)
            graph.fill(counts.diagonal(), counts, torch.randn(10, 300))
        return model

    return build_trained


@pytest.mark.parametrize("name", ["ml_gcn", "ia_gcn"])
@pytest.mark.parametrize("norm", ["BN", "FrozenBN", "SyncBN"])
def test_logits_stay_the_same(build, name, norm):
    model = build(name, "MODEL.RESNETS.NORM", norm)
    optimized = optimize_for_inference(copy.deepcopy(model))
    images = [{"image": torch.randint(256, (3, 96, 96), dtype=torch.uint8)} for _ in range(3)]
    with torch.no_grad():
        for before, after in zip(model(images), optimized(images)):
            assert before["logits"].abs().max() < 100
            torch.testing.assert_close(after["logits"], before["logits"], rtol=1e-5, atol=1e-4)
    norms = [m.norm for m in optimized.backbone.modules() if isinstance(m, Conv2d)]
    assert norms
    assert all(norm is None for norm in norms)
    weight = optimized.backbone.res3[0].conv1.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not optimized.training
    assert not any(parameter.requires_grad for parameter in optimized.parameters())


def test_norms_that_depend_on_the_image_stay(build):
    model = build("ml_gcn", "MODEL.RESNETS.NORM", "GN")
    optimize_for_inference(model)
    assert any(isinstance(module, nn.GroupNorm) for module in model.modules())


def timm_model(name, *opts):
    """A recogniser on a timm network whose batch norms have the statistics of an image."""
    torch.manual_seed(0)
    options = {
        "MODEL.META_ARCHITECTURE": "MultiLabelRecognizer",
        "MODEL.BACKBONE.NAME": "build_timm_backbone",
        "MODEL.BACKBONE.FREEZE_AT": 0,
        "MODEL.TIMM.NAME": name,
        "MODEL.TIMM.PRETRAINED": False,
        "MODEL.LABEL_HEAD.NAME": "LinearHead",
        "MODEL.LABEL_HEAD.NUM_LABELS": 20,
        "MODEL.PIXEL_MEAN": [103.53, 116.28, 123.675],
        "MODEL.PIXEL_STD": [60.0, 60.0, 60.0],
        "MODEL.DEVICE": "cpu",
        "INPUT.IMAGE_SIZE": (224, 224),
    }
    flat = [item for pair in options.items() for item in pair]
    model = build_model(setup_cfg("", [*flat, *opts])).eval()
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.2, 0.8)
        nn.init.normal_(norm.bias, std=0.1)
        norm.train().momentum = 1.0
    with torch.no_grad():
        model(noise(1))
    for norm in norms:
        norm.eval()
    return model


def noise(number):
    return [{"image": torch.randint(256, (3, 224, 224), dtype=torch.uint8)} for _ in range(number)]


@torch.no_grad()
def logits(model, images):
    return torch.stack([output["logits"] for output in model(images)])


def count_batch_norms(model):
    return sum(isinstance(module, BATCH_NORMS) for module in model.modules())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "opts", "norms", "left"),
    [
        # Its norms have activations of their own.
        ("tf_efficientnet_lite0", (), 48, 0),
        ("resnet18", (), 20, 0),
        ("resnet18", ("MODEL.BACKBONE.FREEZE_AT", 5), 20, 0),
        ("test_resnet", (), 15, 0),
        pytest.param("tresnet_m", (), 60, 0, marks=pytest.mark.slow),
        pytest.param("mobilenetv3_small_100", (), 34, 0, marks=pytest.mark.slow),
        # A concatenation stands before half of its norms.
        pytest.param("densenet121", (), 121, 62, marks=pytest.mark.slow),
        # The first convolution's output is a feature map, too.
        pytest.param("ghostnetv2_100", (), 93, 1, marks=pytest.mark.slow),
        # There is nothing to fold, and it takes one size of image alone.
        ("test_vit", (), 0, 0),
    ],
)
def test_timm_networks_stay_the_same(name, opts, norms, left):
    model = timm_model(name, *opts)
    assert count_batch_norms(model) == norms
    images = noise(2)
    expected = logits(model.double(), images)
    exact = optimize_for_inference(copy.deepcopy(model), (224, 224))
    assert count_batch_norms(exact) == left
    torch.testing.assert_close(logits(exact, images), expected, rtol=0, atol=1e-9)
    # In float32, TResNet's logits have rounding errors of that size with or without its norms.
    optimized = optimize_for_inference(model.float(), (224, 224))
    assert expected.abs().max() > 0.1
    atol = 3e-4 if name == "tresnet_m" else 1e-4
    torch.testing.assert_close(logits(optimized, images).double(), expected, rtol=0, atol=atol)


class Branches(nn.Module):
    """Its convolution's output goes somewhere else, too."""

    size_divisibility = 0

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.norm.running_mean.normal_()

    def forward(self, images):
        features = self.conv(images)
        return {"res5": self.norm(features) + features.relu()}


class AsksItsNorm(Branches):
    def forward(self, images):
        return {"res5": self.norm(self.conv(images)) * self.norm.weight.mean()}


class OneConvolutionTwice(Branches):
    def forward(self, images):
        return {"res5": self.norm(self.conv(images)), "res4": self.conv(images)}


class StatisticsOfTheBatch(Branches):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(8, track_running_stats=False)

    def forward(self, images):
        return {"res5": self.norm(self.conv(images))}


@pytest.mark.parametrize("kind", [Branches, AsksItsNorm, OneConvolutionTwice, StatisticsOfTheBatch])
def test_what_cannot_be_folded_stays(kind):
    network = kind().eval()
    state = copy.deepcopy(network.state_dict())
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = network(images)
        fold_following_norms(network, images[:1])
        assert network(images)["res5"].equal(expected["res5"])
    assert network.state_dict().keys() == state.keys()
    assert all(value.equal(state[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize("name", ["bf16", "fp32", "auto"])
@pytest.mark.parametrize("flags", [{"avx512_bf16"}, {"avx512f"}])
def test_precision(monkeypatch, name, flags):
    monkeypatch.setattr(precision, "cpu_flags", lambda: flags)
    low = name == "bf16" or (name == "auto" and "avx512_bf16" in flags)
    model, images = timm_model("test_resnet"), noise(2)
    expected = logits(model, images)
    dtypes = []
    model.backbone.net.register_forward_hook(
        lambda module, args, maps: dtypes.append(maps[-1].dtype)
    )
    model.label_head.register_forward_hook(
        lambda module, args, outputs: dtypes.append(outputs["logits"].dtype)
    )
    found = logits(set_precision(model, name), images)
    assert dtypes == [torch.bfloat16 if low else torch.float32, torch.float32]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=0.1 if low else 0)
    assert found.equal(expected) != low


def test_another_precision_is_refused(error_line):
    line = error_line(set_precision, nn.Identity(), "fp16")
    assert line == "TEST.PRECISION must be fp32, bf16 or auto, not 'fp16'"


def test_flags_of_this_processor():
    expected = {"avx512_bf16", "amx_bf16"} & set(Path("/proc/cpuinfo").read_text().split())
    assert has_fast_bf16(torch.device("cpu")) == bool(expected)


class Reached(Exception):
    """Carries the model that would be evaluated."""


@pytest.mark.parametrize(
    ("optimize", "name", "kind"), [(True, "bf16", precision.Bf16Backbone), (False, "fp32", ResNet)]
)
def test_eval_only_does_as_the_config_says(build, monkeypatch, tmp_path, optimize, name, kind):
    def test(cfg, model, evaluators):
        raise Reached(model)

    names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    MultiLabelCheckpointer(build("ml_gcn"), str(tmp_path), label_names=names).save("model")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    record = {"file_name": str(tmp_path / "a.png"), "image_id": 1, "labels": [0]}
    register_multilabel("ten_digits", lambda: [record], names)
    opts = ["MODEL.WEIGHTS", str(tmp_path / "model.pth"), "DATASETS.TEST", ["ten_digits"]]
    opts += ["TEST.OPTIMIZE_MODEL", optimize, "TEST.PRECISION", name]
    monkeypatch.setattr(Trainer, "test", test)
    with pytest.raises(Reached) as found:
        evaluate_checkpoint(setup_cfg("configs/DigitScenes/ml_gcn.yaml", opts, eval_only=True))
    (model,) = found.value.args
    assert type(model.backbone) is kind
    (stem,) = [m for name, m in model.named_modules() if name.endswith("stem.conv1")]
    assert (stem.norm is None) == optimize
