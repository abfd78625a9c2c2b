"""Batch norms folded into their convolutions, and channels last."""

import copy

import pytest
import torch
from detectron2.layers import Conv2d
from detectron2.modeling import build_model
from torch import nn

from ia_gcn.checkpoint import MultiLabelCheckpointer
from ia_gcn.engine import Trainer, setup_cfg
from ia_gcn.inference import optimize_for_inference
from tests.helpers.commands import load_command


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


@pytest.mark.parametrize("optimize", [True, False])
def test_eval_only_does_as_the_config_says(build, repository, monkeypatch, tmp_path, optimize):
    train_net = load_command("train_net")
    names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    MultiLabelCheckpointer(build("ml_gcn"), str(tmp_path), label_names=names).save("model")
    opts = ["MODEL.WEIGHTS", str(tmp_path / "model.pth"), "TEST.OPTIMIZE_MODEL", optimize]
    tested = []
    monkeypatch.setattr(Trainer, "test", lambda cfg, model: tested.append(model))
    train_net.evaluate(setup_cfg("configs/DigitScenes/ml_gcn.yaml", opts), resume=False)
    norm = tested[0].backbone.stem.conv1.norm
    assert (norm is None) == optimize
