"""tools/parity.py on a network that stands for the authors', defined here."""

import sys
from types import ModuleType

import parities
import parity
import pytest
import torch
import torchvision
from parities import Case, from_0_to_1, import_authors
from torch import nn

from ia_gcn.data.datasets import VOC_LABELS


class Network(nn.Module):
    """CSRA with one head at temperature 1 and λ = 0.1, in mmpretrain's layout."""

    def __init__(self):
        super().__init__()
        resnet = torchvision.models.resnet18()
        resnet.fc = resnet.avgpool = nn.Identity()
        self.backbone = resnet
        self.head = nn.ModuleDict({"csra_heads": nn.ModuleList([nn.Module()])})
        self.head["csra_heads"][0].head = nn.Conv2d(512, 20, 1, bias=False)

    def forward(self, images):
        features = self.backbone(images).unflatten(1, (512, -1))
        weight = self.head["csra_heads"][0].head.weight[:, :, 0, 0]
        scores = nn.functional.normalize(weight, dim=1) @ features
        return scores.mean(2) + 0.1 * (scores.softmax(2) * scores).sum(2)


class WithoutAttention(Network):
    """Another function of the same tensors."""

    def forward(self, images):
        features = self.backbone(images).unflatten(1, (512, -1))
        weight = self.head["csra_heads"][0].head.weight[:, :, 0, 0]
        return (nn.functional.normalize(weight, dim=1) @ features).mean(2) * 1.2


def case(network, labels=VOC_LABELS):
    torch.manual_seed(0)
    return Case("tiny", network(), list(labels), from_0_to_1, size=64)


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch, repository):
    monkeypatch.chdir(repository)


@pytest.mark.slow
def test_the_same_function_passes():
    found = parity.compare("csra", case(Network), rounds=1)
    assert found.passed
    assert found.logits < 1e-4
    assert found.gradients < 1e-3
    assert found.deviation > 0.01
    assert not found.reordered
    assert len(found.seconds) == 2


@pytest.mark.slow
def test_another_function_does_not():
    found = parity.compare("csra", case(WithoutAttention), rounds=1)
    assert not found.passed
    assert found.logits > 1e-3
    assert found.gradients > 1e-2


@pytest.mark.slow
def test_labels_are_compared_by_name(tmp_path):
    labels = VOC_LABELS[::-1]
    (tmp_path / "labels.txt").write_text("\n".join(labels))
    reversed_case = case(Network, labels)
    arguments = {"labels": str(tmp_path / "labels.txt")}
    found = parity.compare("csra", reversed_case._replace(arguments=arguments), rounds=1)
    assert found.passed
    assert found.reordered


@pytest.mark.slow
def test_a_row_for_each_network(monkeypatch, capsys, tmp_path):
    module = ModuleType("parities.csra")
    module.REPOSITORY, module.REPLACED = "https://github.com/someone/net", ""
    module.cases = lambda folder: iter([case(Network), case(WithoutAttention)])
    monkeypatch.setitem(sys.modules, "parities.csra", module)
    threads = str(torch.get_num_threads())
    command = ["parity.py", "csra", str(tmp_path), "--rounds", "1", "--threads", threads]
    monkeypatch.setattr(sys, "argv", command)
    assert parity.main() == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert lines[2].startswith("| csra, tiny | github.com/someone/net unknown | nothing | ")


def test_a_folder_that_is_not_there_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["parity.py", "csra", "no/such/folder"])
    assert parity.main() == 1
    assert capsys.readouterr().err == "parity: no/such/folder: no such folder\n"


def test_modules_of_a_clone_are_imported_with_others_in_place(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "their_net.py").write_text("from old_package import value\ndoubled = 2 * value\n")
    old = ModuleType("old_package")
    old.value = 21
    for name in ("their_net", "old_package"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert import_authors(tmp_path, "their_net", {"old_package": old}).doubled == 42


def test_random_norms_keep_features_in_range():
    network = case(Network).network
    images = torch.rand(2, 3, 64, 64)
    parities.randomize(network, [images])
    assert not network.training
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(norm.running_mean.abs().max() > 1e-4 for norm in norms)
    assert any((norm.weight < 0).any() for norm in norms)
    assert 0.01 < network(images).std() < 100
