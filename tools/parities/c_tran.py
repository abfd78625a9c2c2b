"""C-Tran on ResNet-101, without and with labels that are known."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Iterator
from unittest import mock

import torch
import torchvision
from torch import nn

from ia_gcn.data.datasets import COCO_LABELS

from . import Case, imagenet, import_authors

REPOSITORY = "https://github.com/QData/C-Tran"
REPLACED = "`.cuda()`, by nothing; ImageNet's weights, by random ones"


def cases(folder: Path) -> Iterator[Case]:
    """On COCO's labels, with label-mask training's states.

    A quarter of the published 576×576 pixels will do: a cell does not know its place.
    """
    c_tran = import_authors(folder, "models.CTran")
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(0, 2, (2, len(COCO_LABELS)), generator=generator).float()
    known = torch.rand(labels.shape, generator=generator) < 0.5
    for name, states in [
        ("no label known", torch.full_like(labels, -1)),
        ("half of the labels known", torch.where(known, labels, -1)),
    ]:
        yield Case(
            name=f"ResNet-101, 288, {name}",
            network=LogitsAlone(build(c_tran)),
            labels=COCO_LABELS,
            prepare=imagenet,
            checkpoint=lambda state: {
                "epoch": 9,
                "state_dict": {name.removeprefix("network."): state[name] for name in state},
            },
            size=288,
            label_states=states,
        )


def build(c_tran: ModuleType) -> nn.Module:
    """The network of the published options, which stays on the CPU."""
    resnet101 = torchvision.models.resnet101()
    with mock.patch("torchvision.models.resnet101", return_value=resnet101):
        network = c_tran.CTranModel(len(COCO_LABELS), use_lmt=True)
    network.forward = without_cuda(network.forward)
    return network


class LogitsAlone(nn.Module):
    """The network without the attention that it returns as well."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, images, label_states):
        return self.network(images, label_states)[0]


def without_cuda(function):
    """A function in which tensors stay where they are."""

    def call(*args):
        with mock.patch.object(torch.Tensor, "cuda", lambda tensor: tensor):
            return function(*args)

    return call
