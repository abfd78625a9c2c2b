"""How tools/parity.py runs the code of a system's authors: a module for each format.

A module is called as its format in tools/convert_checkpoint.py --format, and has

    REPOSITORY  where the code is published
    REPLACED    what had to be replaced to run it with today's libraries, in a line; "" for nothing
    cases       a function: the folder of a clone to `Case`s, one after the other

`cases` imports the authors' modules, with `import_authors`, and builds their networks as their own
scripts do. Nothing of theirs is copied: what can't be imported is replaced while it runs. Weights
are random; `tools/parity.py` draws them anew with `randomize`, so that norms and biases are not
trivial. What is compared, how, and within which tolerance is in tools/parity.py.

For example, of a system whose clone has a file net.py with a class Net:

    REPOSITORY = "https://github.com/someone/net"
    REPLACED = ""

    def cases(folder):
        net = import_authors(folder, "net")
        yield Case(
            name="ResNet-101, 448",
            network=net.Net(num_classes=80),
            labels=sorted(COCO_LABELS),
            prepare=imagenet,
            checkpoint=lambda state: {"epoch": 7, "state_dict": state},
            arguments={"labels": "coco"},
        )
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Sequence

import torch
from torch import nn


class Case(NamedTuple):
    """A network of the authors', and how it goes with our converter."""

    name: str
    """What is compared, for the table."""
    network: nn.Module
    """Called as network(images), or network(images, label_states) if there are some; it returns
    logits (B, C), or {name: (B, C)} with `logits` and the names of our auxiliary logits. After
    `network.double()` it takes images in float64."""
    labels: List[str]
    """Names of the C outputs, in the network's order."""
    prepare: Callable[[torch.Tensor], torch.Tensor]
    """Images (B, 3, H, W), RGB from 0 to 255, float32 or float64, as the network is trained to see
    them, of the same dtype."""
    checkpoint: Callable[[Dict[str, torch.Tensor]], Dict[str, Any]] = lambda state: state
    """The network's state dict to the content of a file as the authors publish it."""
    arguments: Mapping[str, Any] = {}
    """Further ones of `ia_gcn.checkpoint.conversion.convert_checkpoint`: labels, opts, ..."""
    size: int = 448
    """Height and width of the images."""
    label_states: torch.Tensor | None = None
    """(B, C) in {1, 0, -1 = unknown}, in the network's order, B = 2: labels that are known."""


def import_authors(
    folder: Path, name: str, replaced: Mapping[str, ModuleType | None] | None = None
) -> ModuleType:
    """Import a module of a clone, and with it whatever it imports there.

    Args:
        folder: comes first in sys.path.
        name: of the module.
        replaced: modules to put in the place of others that can't be imported, by name.
    """
    sys.modules.update(replaced or {})
    sys.path.insert(0, str(folder))
    return importlib.import_module(name)


def make_buffer(module: nn.Module, name: str) -> None:
    """Make a buffer of a tensor that is a plain attribute, so that it gets the network's dtype."""
    tensor = getattr(module, name)
    delattr(module, name)
    module.register_buffer(name, tensor, persistent=False)


def imagenet(images: torch.Tensor) -> torch.Tensor:
    """ImageNet's mean and deviation, as torchvision's networks have them."""
    mean = images.new_tensor([0.485, 0.456, 0.406])[:, None, None]
    deviation = images.new_tensor([0.229, 0.224, 0.225])[:, None, None]
    return (images / 255 - mean) / deviation


def from_0_to_1(images: torch.Tensor) -> torch.Tensor:
    """Without mean and deviation."""
    return images / 255


@torch.no_grad()
def randomize(network: nn.Module, inputs: Sequence[torch.Tensor], seed: int = 0) -> None:
    """Draw norms, their statistics and biases at random, and put the network into evaluation.

    The statistics of a batch norm are those of the images, each disturbed, so that features neither
    grow nor vanish on their way through a deep network.

    Args:
        inputs: what the network is called with, images first.
    """
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        if parameter.ndim == 1 and parameter.is_floating_point():
            # A batch norm's weight may be negative, and then counts otherwise in InPlace-ABN.
            sign = torch.where(torch.rand(parameter.shape, generator=generator) < 0.2, -1, 1)
            size = torch.empty(parameter.shape).uniform_(0.1, 1.0, generator=generator)
            parameter.copy_(sign * size)

    def measure(norm, of_norm):
        (features,) = of_norm
        # Of images, of maps or of vectors.
        dims = [dim for dim in range(features.ndim) if dim != 1]
        spread = features.std(dim=dims)
        noise = torch.randn(2, len(spread), generator=generator)
        norm.running_mean.copy_(features.mean(dim=dims) + 0.1 * noise[0] * spread)
        norm.running_var.copy_(spread.square() * (0.2 * noise[1]).exp() + 1e-3)

    norms = [m for m in network.modules() if getattr(m, "running_mean", None) is not None]
    hooks = [norm.register_forward_pre_hook(measure) for norm in norms]
    network.eval()
    network(*inputs)
    for hook in hooks:
        hook.remove()
